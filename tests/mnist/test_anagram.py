"""Digit anagrams: the formula with classes for prompts, what counts as a success, and the command."""

from dataclasses import asdict

import pytest
import torch

from minidiff import views
from minidiff.mnist import anagram, judge, models
from minidiff.mnist.unet import UNet, UNetConfig
from tests.mnist.real import fails
from tests.mnist.test_models import LABELS, X, net

TURN = [views.named("identity"), views.named("rotate_180")]


def test_it_is_the_mean_of_both_classes_seen_through_their_views():
    """By hand: eps of a 6 as it is, and of a 9 in the turned image, turned back, each with guidance 5."""
    unet, t = net(), torch.full((3,), 0.4)
    found, _ = anagram.answer(unet, [6, 9], TURN, 5.0)(X, t)
    six, _ = models.guided_unet(unet, torch.full_like(LABELS, 6), 5.0)(X, t)
    nine, _ = models.guided_unet(unet, torch.full_like(LABELS, 9), 5.0)(X.rot90(2, (-2, -1)), t)
    torch.testing.assert_close(found, (six + nine.rot90(2, (-2, -1))) / 2, rtol=0, atol=1e-5)


def test_a_success_is_right_in_every_view(monkeypatch):
    """The judge here reads the digit off the upper left pixel; turned, it sees the lower right one."""
    monkeypatch.setattr(judge, "look", lambda _, x: (None, x[:, 0, 0, 0].long()))
    x = torch.zeros(3, 1, 28, 28)
    x[:, 0, 0, 0], x[:, 0, -1, -1] = torch.tensor([6.0, 6, 9]), torch.tensor([9.0, 6, 9])
    assert anagram.aligned(None, x, [6, 9], TURN).tolist() == [True, False, False]


def test_the_command_draws_and_counts(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    unet, judge_of = UNet(UNetConfig(4, time=True, num_classes=10)), judge.Judge()
    models.write(tmp_path / "ddpm", unet, {"kind": "ddpm", "dataset": "mnist", "unet": asdict(unet.config)})
    zeros = {"feature_mean": torch.zeros(64), "feature_covariance": torch.eye(64)}
    models.write(
        tmp_path / "judge", judge_of, {"kind": "judge", "dataset": "mnist", "accuracy": 0.5, "floors": {}}, zeros
    )
    flags = ["--model", str(tmp_path / "ddpm"), "--judge", str(tmp_path / "judge"), "--out", str(tmp_path / "a.png")]
    anagram.main(["6", "9", *flags, "--quick"])
    printed = capsys.readouterr().out
    assert "of 5 are 6 and 9 through identity, rotate_180; of plain samples of 6:" in printed
    assert (tmp_path / "a.png").is_file()

    # What is counted: the anagrams first (here all are right), then plain samples of the first digit (none is).
    with monkeypatch.context() as patch:
        patch.setattr(models, "guided_unet", lambda unet, labels, scale: ("plain", labels.tolist(), scale))
        patch.setattr(anagram, "answer", lambda unet, digits, turned, scale: ("both", digits, scale))
        walks = []
        patch.setattr(models, "walk", lambda *args: walks.append(args[0]) or iter([torch.zeros(5, 1, 28, 28)] * 2))
        patch.setattr(anagram, "aligned", lambda *_: torch.full((5,), len(walks) == 2 and not walks.append(0)))
        anagram.main(["6", "9", *flags, "--quick", "--guidance-scale", "3"])
    assert walks[:2] == [("both", [6, 9], 3.0), ("plain", [6], 3.0)]
    assert "5 of 5 are 6 and 9 through identity, rotate_180; of plain samples of 6: 0;" in capsys.readouterr().out
    for wrong in (["6", "9", "8"], ["6", "9", "--view", "identity", "negate"]):
        message = fails(capsys, anagram.main, *wrong, *flags)
        assert "need one digit for each view, and views that leave values in 0 to 1, got [6, 9" in message
    assert "invalid choice: 10" in fails(capsys, anagram.main, "6", "10", *flags)
    for net_of, dataset in ((UNet(UNetConfig(4, time=True)), "mnist"), (unet, "fashion")):
        config = {"kind": "ddpm", "dataset": dataset, "unet": asdict(net_of.config)}
        models.write(tmp_path / "wrong", net_of, config)
        message = fails(capsys, anagram.main, "6", "9", *flags, "--model", tmp_path / "wrong")
        assert "wrong must take a digit (`train_diffusion --preset class`) and draw what " in message


def test_many_are_drawn_in_parts_each_from_its_own_seed(tmp_path, monkeypatch):
    unet = net()
    models.write(tmp_path / "ddpm", unet, {"kind": "ddpm", "dataset": "mnist", "unet": asdict(unet.config)})
    flags = ["6", "9", "--model", str(tmp_path / "ddpm"), "--out", str(tmp_path / "a.png"), "--quick", "--seed", "3"]
    found = []
    monkeypatch.setattr(anagram, "aligned", lambda _, x, *rest: found.append(x) or torch.ones(len(x), dtype=torch.bool))
    anagram.main(flags)
    monkeypatch.setattr(models, "at_once", lambda device: 2)
    anagram.main(flags)
    for whole, parts in zip(found[:2], found[2:]):
        assert len(whole) == 5
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ddpm", "judge"])
def test_missing_models_say_how_to_train_them(tmp_path, capsys, kind):
    flags = ["--model", tmp_path / "ddpm", "--judge", tmp_path / "judge", "--out", tmp_path / "a.png"]
    if kind == "judge":
        unet = UNet(UNetConfig(4, time=True, num_classes=10))
        models.write(tmp_path / "ddpm", unet, {"kind": "ddpm", "dataset": "mnist", "unet": asdict(unet.config)})
    message = fails(capsys, anagram.main, "6", "9", *flags)
    maker = {"ddpm": "train_diffusion", "judge": "judge train"}[kind]
    assert f"no trained {kind} in" in message and f"python -m minidiff.mnist.{maker}" in message
