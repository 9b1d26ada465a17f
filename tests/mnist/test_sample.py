"""Samples of trained networks: what the flags ask for reaches the network, and the embedded networks draw well."""

import shutil
import signal
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from minidiff import ddpm, flow
from minidiff.mnist import judge, models, sample, train_denoiser
from minidiff.mnist.data import generator, one_hot
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import seeded
from minidiff.weights import WEIGHTS
from tests.mnist.real import fails
from tests.mnist.test_models import net
from tests.mnist.test_trainers import edit_config

CPU = torch.device("cpu")


def alone(unet, labels, seeds, steps, sampler, scale=5.0):
    return models.last(models.walk(models.guided_unet(unet, labels, scale), seeded(seeds), CPU, steps, sampler))


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
def test_each_digit_of_a_row_is_what_its_label_seed_and_scale_draw_alone(sampler, monkeypatch):
    """Six of them, four at a time, from seed 3 on, with guidance 5."""
    monkeypatch.setattr(models, "at_once", lambda device: 4)
    unet, labels = net(), torch.tensor([3, 1, 4, 1, 5, 9])
    found = sample.Row(unet, {}, "n", 5.0, sampler, 3).draw(labels, range(3, 9), lambda: False)
    for i in range(6):
        expected = alone(unet, labels[i : i + 1], [3 + i], 3, sampler)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--digits", "7-3"], "--digits must be like 0-9, 3,7 or 0-2,9, got '7-3'"),
        (["--digits", "ten"], "got 'ten'"),
        (["--num-images", "0"], "--num-images must be at least 1, and 1 with"),
        (
            ["--model", "nowhere"],
            "no trained ddpm in nowhere; train one with `python -m minidiff.mnist.train_d",
        ),
        (["--out", "digits.xyz"], "must end in one of"),
        (["--sampler", "heun"], "--sampler heun is for another kind of network; of ddpm: ddpm, ddim, dpm++"),
        (["--kind", "flow", "--sampler", "ddim"], "--sampler ddim is for another kind of network; of flow: euler, mid"),
        (["--seed", "1", "2", "--num-images", "2"], "--num-images must be at least 1, and 1 with several seeds, got 2"),
        (["--seed", "-1"], "a seed must lie in 0..2^32 - 1, got -1"),
        (["--kind", "flow", "--solver", "dormand-prince", "--steps", "9"], "chooses its own steps; leave out --steps"),
        (["--steps", "0"], "cannot take 0 steps out of 300; choose 1 to 300"),
        (["--judge", "nowhere", "--quick"], "no trained judge in nowhere"),
        (["--tensors", "digits.pt"], "must end in one of .safetensors"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        sample.main(["--out", str(tmp_path / "s.png"), *flags])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_a_network_without_classes_gets_no_digit(tmp_path, capsys):
    unet = UNet(UNetConfig(4, time=True))
    models.write(tmp_path / "f", unet, {"kind": "flow", "unet": asdict(unet.config)})
    flags = ["--kind", "flow", "--model", str(tmp_path / "f"), "--quick", "--out", str(tmp_path / "s.png")]
    sample.main([*flags, "--tensors", str(tmp_path / "s.safetensors"), "--digits", "3"])
    assert "labels" not in load_file(tmp_path / "s.safetensors")
    shown = capsys.readouterr()
    assert "agreement" not in shown.out and "f, no class, euler, 4 steps:" in shown.out
    assert "takes no digit: --digits only says how many" in shown.err
    assert "nothing to guide; leave out --guidance-scale" in fails(capsys, sample.main, *flags, "--guidance-scale", 5)
    # Images of another kind are not judged, here or later.
    edit_config(tmp_path / "f", dataset="fashion", trained="1 of 9 epochs")
    sample.main([*flags, "--tensors", str(tmp_path / "s.safetensors")])
    shown = capsys.readouterr().out
    assert "4 steps, trained 1 of 9 epochs:" in shown and "the judge knows mnist, these are of fashion" in shown
    assert "holds samples of fashion" in fails(capsys, judge.main, "score", tmp_path / "s.safetensors")


def test_networks_in_folders_of_one_name_have_two_names(tmp_path, capsys, monkeypatch):
    embedded, own = WEIGHTS / "mnist" / "flow", tmp_path / "flow"
    shutil.copytree(embedded, own)
    starts, walk = [], flow.walk  # both begin with the same noise
    monkeypatch.setattr(flow, "walk", lambda v, x_0, *rest: starts.append(x_0) or walk(v, x_0, *rest))
    sample.main(["--model", str(embedded), str(own), "--digits", "3", "--quick", "--out", str(tmp_path / "s.png")])
    assert len(starts) == 2 and torch.equal(*starts)
    shown = capsys.readouterr().out
    assert f"{embedded}, scale 5, euler, 4 steps" in shown and f"{own}, scale 5, euler, 4 steps" in shown


def test_every_row_is_planned_before_one_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.Row, "draw", lambda *args: pytest.fail("drawn"))
    embedded = str(WEIGHTS / "mnist" / "flow")
    flags = ["--kind", "flow", "--out", str(tmp_path / "s.png")]
    assert "no trained flow in nowhere" in fails(capsys, sample.main, *flags, "--model", embedded, "nowhere")
    assert "no trained ddpm in" in fails(capsys, sample.main, "--out", tmp_path / "s.png", "--model", __file__)


def test_ctrl_c_in_a_long_row_keeps_what_is_drawn(tmp_path, capsys, monkeypatch):
    """Three parts of four; it comes during the second. The second row is not begun."""
    monkeypatch.setattr(models, "at_once", lambda device: 4)
    parts, original = [], models.walk

    def walk(*args):
        parts.append(args)
        if len(parts) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(models, "walk", walk)
    files = ["--out", str(tmp_path / "s.png"), "--tensors", str(tmp_path / "s.safetensors")]
    sample.main(["--kind", "flow", "--quick", *files, "--guidance-scale", "1", "5"])
    shown, kept = capsys.readouterr().out, load_file(tmp_path / "s.safetensors")
    assert len(parts) == 2 and len(kept["images"]) == 8 and kept["labels"].tolist() == list(range(8))
    assert "N = 8, seed 0" in shown and "stopped after 8 of 10 of this row" in shown and (tmp_path / "s.png").is_file()


def test_a_row_for_each_scale_solver_and_number_of_steps(tmp_path, capsys, monkeypatch):
    walks, original = [], models.walk

    def note(answer, seeds, device, steps, sampler):
        walks.append((sampler, steps))
        return original(answer, seeds, device, 1, "euler")

    monkeypatch.setattr(models, "walk", note)
    sample.main(["--kind", "flow", "--digits", "3", "--guidance-scale", "0", "5", "--solver", "heun", "dormand-prince",
                 "--steps", "2", "3", "--out", str(tmp_path / "s.png")])  # fmt: skip
    assert walks == [("heun", 2), ("heun", 3), ("dormand-prince", 2)] * 2
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flow, ")]
    said = [line.rstrip(":").split(", trained")[0] for line in shown]
    assert said == [f"flow, scale {scale}, {how}" for scale in (0, 5)
                    for how in ("heun, 2 steps", "heun, 3 steps", "dormand-prince")]  # fmt: skip


def test_a_solver_that_is_stuck_costs_its_own_row_alone(tmp_path, capsys, monkeypatch):
    def stuck(*args):
        raise ValueError("the solver is stuck at time 0.1")

    monkeypatch.setattr(flow, "dormand_prince", stuck)
    flags, tensors = (
        ["--kind", "flow", "--quick", "--out", tmp_path / "s.png"],
        ["--tensors", tmp_path / "s.safetensors"],
    )
    sample.main([*map(str, flags), "--solver", "dormand-prince", "euler"])
    said = capsys.readouterr()
    assert "flow, scale 5, euler, 4 steps" in said.out and (tmp_path / "s.png").is_file()
    assert "warning: no row for flow, scale 5, dormand-prince: the solver is stuck at time 0.1" in said.err
    for wrong in (["dormand-prince"], ["dormand-prince", "euler", *tensors]):
        assert "error: the solver is stuck at time 0.1" in fails(capsys, sample.main, *flags, "--solver", *wrong)


def test_the_figure_names_every_row_below_its_last_line(tmp_path, monkeypatch):
    """Twelve digits of a row are ten and two; what both rows share is the title's."""
    drawn = []
    monkeypatch.setattr(sample.Row, "draw", lambda row, labels, *rest: torch.full((len(labels), 1, 28, 28), row.scale))
    monkeypatch.setattr(models, "save_strip", lambda *args: drawn.append(args))
    sample.main(["--digits", "3", "--num-images", "12", "--guidance-scale", "0", "1", "--out", str(tmp_path / "s.png")])
    pictures, texts, title, *_ = drawn[0]
    assert texts == ["", "scale 0", "", "scale 1"] and title == "ddpm, 300 steps, seeds 0 to 11"
    assert [(len(x), x.mean().item()) for x in pictures] == [(10, 0), (2, 0), (10, 1), (2, 1)]


def test_several_seeds_are_drawn_for_every_digit_each(tmp_path, monkeypatch):
    """A row for each seed: all digits of it from the same noise."""
    rows = []
    monkeypatch.setattr(sample.Row, "draw", lambda row, *args: rows.append(args[:2]) or torch.zeros(6, 1, 28, 28))
    files = ["--out", str(tmp_path / "s.png"), "--tensors", str(tmp_path / "s.safetensors")]
    sample.main(["--digits", "3,7", "--seed", "5", "0", "9", *files])
    assert rows[0][0].tolist() == [3, 7, 3, 7, 3, 7] and rows[0][1] == [5, 5, 0, 0, 9, 9]
    assert load_file(tmp_path / "s.safetensors")["seed"].tolist() == [5, 0, 9]
    judge.main(["score", str(tmp_path / "s.safetensors")])


def test_digits_are_parsed():
    assert sample.parse_digits("0-2,9,4") == [0, 1, 2, 9, 4]


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_the_embedded_networks_draw_the_digits_they_are_asked_for(kind):
    """Right at guidance 5, by chance at 0, where the digits are as mixed as without a class."""
    judging = judge.load(judge.EMBEDDED)[0]
    unet, _ = models.load(WEIGHTS / "mnist" / kind, kind, CPU)
    assert not unet.training

    def verdicts(labels, scale):
        steps, sampler = (30, "ddpm") if kind == "ddpm" else (10, "euler")
        return judge.look(judging, alone(unet, labels, range(len(labels)), steps, sampler, scale))[1]

    labels = torch.arange(10)
    assert judge.agreement(verdicts(labels, 5.0), labels) == 1
    labels = torch.arange(10).repeat(2)
    ignored = verdicts(labels, 0.0)
    assert judge.agreement(ignored, labels) < 0.4 and judge.entropy(ignored) > 1.8  # 2.1 is to be expected of 20


@torch.no_grad()
def test_the_embedded_denoiser_errs_less_than_the_courses(digits):
    unet, _ = models.load(WEIGHTS / "mnist" / "denoiser", "denoiser", CPU)
    assert 0.0001 < train_denoiser.Denoising(0.5)(unet, digits[:200], generator("cpu", 0)) < 0.0084


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("ddpm", 0.0036, 0.030), ("flow", 0.031, 0.088)])
@torch.no_grad()
def test_the_embedded_networks_have_the_courses_loss(kind, lowest, highest, digits):
    """150 digits at times that are spread evenly: no more than the course's staff report, and more than the known
    training set would give (README)."""
    unet, _ = models.load(WEIGHTS / "mnist" / kind, kind, CPU)
    x, c = digits.images[:150], one_hot(digits.labels[:150])
    noise, t = torch.randn(x.shape, generator=generator("cpu", 0)), 2 * torch.arange(150) + 1
    if kind == "ddpm":
        x_t = ddpm.add_noise(x, noise, models.course_schedule().alpha_bar(t))
        error = unet(x_t, (t + 1) / 300, c) - noise
    else:
        error = unet(flow.path(noise, x, t / 300), t / 300, c) - (x - noise)
    assert lowest < error.square().mean() < highest
