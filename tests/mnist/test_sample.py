"""Samples of trained networks: what the flags ask for reaches the network, and the embedded networks draw well."""

import shutil
from argparse import Namespace
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
from tests.mnist.test_models import last
from tests.mnist.test_trainers import edit_config

CPU = torch.device("cpu")


def alone(unet, labels, seeds, steps, sampler, scale=5.0):
    return last(models.walk(models.guided_unet(unet, labels, scale), seeded(seeds), CPU, steps, sampler))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "course"], "argument --steps: takes whole numbers, such as 10 20, got 'course'; names are for"),
        (["--digits", "7-3"], "argument --digits: digits must be like 0-9, 3,7 or 0-2,9, got '7-3'"),
        (["--digits", "8-10"], "digits must be like 0-9, 3,7 or 0-2,9, got '8-10'"),
        (
            ["--model", "nowhere"],
            "no trained ddpm or flow in nowhere; train one with `python -m minidiff.mnist.train_d",
        ),
        (["--out", "digits.xyz"], "must end in one of"),
        (["--sampler", "heun"], "sampler heun is for another kind of network; of ddpm: ddpm-twice, ddpm-lower"),
        (["--kind", "flow", "--model", "OUT"], "--kind names an embedded network, --model another; leave out one"),
        (["--kind", "flow", "--sampler", "ddim"], "sampler ddim is for another kind of network; of flow: euler, mid"),
        (["--seed", "-1"], "a seed must lie in 0..2^32 - 1, got -1"),
        (["--num-images", "0"], "--num-images must be a whole number of 1 or more, got"),
        (["--num-images", "0", "--out", "OUT/s.gif"], "--num-images must be a whole number of 1 or more, got"),
        (["--tensors", "OUT/s.png"], "s.png must end in one of .safetensors"),
        (["--tensors", "OUT"], "is a folder; pass a file name"),
        (["--tensors", "OUT/t.safetensors", "--out", "OUT/s.gif"], "a GIF shows a walk and writes no samples; pass"),
        (["--guidance-scale", "1e38", "--quick"], "the digits hold NaN or infinity"),
        (["--steps", "0"], "--steps must be a whole number from 1 to 300, got 0"),
        (["--judge", "nowhere", "--quick"], "no trained judge in nowhere"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        sample.main(["--out", str(tmp_path / "s.png"), *(flag.replace("OUT", str(tmp_path)) for flag in flags)])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_samples_do_not_replace_a_network_or_good_samples(own, tmp_path, capsys):
    files = ["--quick", "--model", own, "--out", tmp_path / "s.png", "--tensors"]
    message = fails(capsys, sample.main, *files, own / "model.fp16.safetensors")
    assert f"{own} holds a network; pass --tensors in another folder" in message
    (tmp_path / "t.safetensors").write_text("good")
    message = fails(capsys, sample.main, *files, tmp_path / "t.safetensors", "--guidance-scale", "1e38")
    assert "the digits hold NaN or infinity" in message and (tmp_path / "t.safetensors").read_text() == "good"


def test_a_network_without_classes_gets_no_digit(tmp_path, capsys):
    unet = UNet(UNetConfig(4, time=True))
    config = {"kind": "flow", "dataset": "mnist", "trained": "1 of 9 epochs", "unet": asdict(unet.config)}
    models.write(tmp_path / "f", unet, config)
    flags = ["--model", str(tmp_path / "f"), "--quick", "--out", str(tmp_path / "s.png")]
    sample.main([*flags, "--tensors", str(tmp_path / "s.safetensors"), "--guidance-scale", "1", "5"])
    assert "labels" not in load_file(tmp_path / "s.safetensors")
    shown = capsys.readouterr().out
    assert "agreement" not in shown and shown.count("f, no class, by euler, 4 steps, trained 1 of 9 epochs:") == 1
    # Images of another kind are not judged, here or later.
    edit_config(tmp_path / "f", dataset="fashion")
    sample.main([*flags, "--tensors", str(tmp_path / "s.safetensors")])
    assert "the judge knows mnist, these are of fashion" in capsys.readouterr().out
    judge.main(["score", str(tmp_path / "s.safetensors")])
    assert "the judge knows mnist, these are of fashion" in capsys.readouterr().out


def test_networks_in_folders_of_one_name_have_two_names(tmp_path, capsys, monkeypatch):
    embedded, own = WEIGHTS / "mnist" / "flow", tmp_path / "flow"
    shutil.copytree(embedded, own)
    starts, walk = [], flow.walk  # both begin with the same noise
    monkeypatch.setattr(flow, "walk", lambda v, x_0, *rest: starts.append(x_0) or walk(v, x_0, *rest))
    sample.main(["--model", str(embedded), str(own), "--digits", "3", "--quick", "--out", str(tmp_path / "s.png")])
    assert len(starts) == 2 and torch.equal(*starts)
    shown = capsys.readouterr().out
    assert f"{embedded}, scale 5, by euler, 4 steps" in shown and f"{own}, scale 5, by euler, 4 steps" in shown


def test_every_row_is_planned_before_one_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "draw", lambda *args: pytest.fail("drawn"))
    embedded = WEIGHTS / "mnist" / "flow"
    message = fails(capsys, sample.main, "--out", tmp_path / "s.png", "--model", embedded, "nowhere")
    assert "no trained ddpm or flow in nowhere" in message


def test_a_ddpm_and_a_flow_stand_side_by_side_each_with_its_own_sampler_and_steps(tmp_path, monkeypatch, capsys):
    walks = []
    monkeypatch.setattr(
        models, "draw", lambda answer_of, seeds, device, *how: walks.append(how) or torch.zeros(1, 1, 28, 28)
    )
    folders = [str(WEIGHTS / "mnist" / kind) for kind in ("ddpm", "flow")]
    sample.main(["--model", *folders, "--digits", "3", "--out", str(tmp_path / "s.png")])
    assert walks == [(300, "ddpm-twice"), (50, "euler")]


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
    rows = [line.rstrip(":").split(", trained")[0] for line in shown]
    assert rows == [f"flow, scale {scale}, {how}" for scale in (0, 5)
                    for how in ("by heun, 2 steps", "by heun, 3 steps", "by dormand-prince")]  # fmt: skip


def test_the_figure_names_every_row_below_its_last_line(tmp_path, monkeypatch):
    """Twelve digits of a row are ten and two; what both rows share is the title's."""
    strips, strip, values = [], models.strip, iter([0.0, 1.0])
    monkeypatch.setattr(models, "draw", lambda *args: torch.full((12, 1, 28, 28), next(values)))
    monkeypatch.setattr(models, "strip", lambda *args: strips.append(args) or strip(*args))
    sample.main(["--digits", "3", "--num-images", "12", "--guidance-scale", "0", "1", "--out", str(tmp_path / "s.png")])
    rows, texts, title = strips[0]
    assert texts == ["", "scale 0", "", "scale 1"] and title == "ddpm, by ddpm-twice, 300 steps, seeds 0 to 11"
    assert [(len(x), x.mean().item()) for x in rows] == [(10, 0), (2, 0), (10, 1), (2, 1)]


def test_what_the_flags_ask_for_reaches_the_network(tmp_path):
    """Digits 3 and 7 twice, from seed 5 on, with guidance 2."""
    files = ["--out", str(tmp_path / "s.png"), "--tensors", str(tmp_path / "s.safetensors")]
    sample.main(["--kind", "flow", "--digits", "3,7", "--num-images", "2", "--seed", "5", "--guidance-scale", "2",
                 "--steps", "2", *files])  # fmt: skip
    found, unet = load_file(tmp_path / "s.safetensors"), models.load(WEIGHTS / "mnist" / "flow", CPU, "flow")[0]
    assert found["labels"].tolist() == [3, 7, 3, 7] and found["seed"].item() == 5
    expected = alone(unet, found["labels"], range(5, 9), 2, "euler", 2.0)
    assert expected.min() < -0.02 and expected.max() > 1.02  # what is written is clamped, as the image is
    torch.testing.assert_close(found["images"], expected.clamp(0, 1))
    judge.main(["score", str(tmp_path / "s.safetensors")])


@pytest.fixture
def own(tmp_path):
    """An untrained flow network with classes, in a folder."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True, num_classes=10))
    config = {"kind": "flow", "dataset": "mnist", "trained": "1 of 9 epochs", "unet": asdict(unet.config)}
    models.write(tmp_path / "f", unet, config)
    return tmp_path / "f"


def test_a_solver_of_several_evaluations_has_their_number_below_its_row(own, tmp_path, monkeypatch):
    """Also where three digits are drawn two at a time. Dormand-Prince has six for each step and one to begin with."""
    strips, strip = [], models.strip
    monkeypatch.setattr(models, "at_once", lambda device: 2)
    monkeypatch.setattr(models, "strip", lambda *args: strips.append(args) or strip(*args))
    solvers = ["euler", "midpoint", "rk4", "dormand-prince"]
    sample.main(["--model", str(own), "--digits", "0-2", "--steps", "3", "--solver", *solvers, "--out",
                 str(tmp_path / "s.png")])  # fmt: skip
    *few, last = strips[0][1]
    assert few == ["by euler, 3 steps", "by midpoint, 3 steps, 6 evaluations", "by rk4, 3 steps, 12 evaluations"]
    _, words, number, name = last.split()
    assert (words, name) == ("dormand-prince,", "evaluations") and int(number) >= 13


def test_a_gif_is_the_walk_of_the_first_row(own, tmp_path, monkeypatch):
    walks = []
    monkeypatch.setattr(models, "save_animation", lambda states, path: walks.append((list(states), path)))
    sample.main(["--model", str(own), "--digits", "3,7", "--steps", "2", "4", "--seed", "5", "--out",
                 str(tmp_path / "s.gif")])  # fmt: skip
    (states, path), unet = walks[0], models.load(own, CPU, "flow")[0]
    assert len(walks) == 1 and path == tmp_path / "s.gif" and len(states) == 3
    torch.testing.assert_close(states[-1], alone(unet, torch.tensor([3, 7]), range(5, 7), 2, "euler"))


def test_a_trainer_draws_from_its_folder_with_its_seed(own, tmp_path, capsys, monkeypatch):
    """Two files of one training: they hold what the command would draw."""
    args = Namespace(figures=None, out=own, seed=7, device="cpu", quick=True)
    strips, strip = [], models.strip
    monkeypatch.setattr(models, "strip", lambda *args: strips.append(args) or strip(*args))
    sample.of_epoch(args, 3)
    sample.main(["--model", str(own), "--seed", "7", "--quick", "--num-images", "4", "--out",
                 str(tmp_path / "s.png")])  # fmt: skip
    assert all(map(torch.equal, strips[0][0], strips[1][0])) and (own / "samples" / "epoch-03.png").is_file()
    assert strips[0][2] == strips[1][2] == "f, scale 5, by euler, 4 steps, seeds 7 to 46"
    args.figures, args.out = own, tmp_path / "other"
    sample.of_trainer(args, "x.png", "--num-images 4 --guidance-scale 0")
    assert (tmp_path / "other" / "x.png").is_file() and not torch.equal(strips[2][0][0], strips[0][0][0])
    assert capsys.readouterr().out.count("trained 1 of 9 epochs") == 1  # figures of a trainer print no report


def test_digits_are_parsed():
    assert sample.parse_digits("0-2,9,4") == [0, 1, 2, 9, 4]


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_the_embedded_networks_draw_the_digits_they_are_asked_for(kind):
    """Right at guidance 5, by chance at 0, where the digits are as mixed as without a class."""
    judging = judge.load(judge.EMBEDDED)[0]
    unet, _ = models.load(WEIGHTS / "mnist" / kind, CPU, kind)
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
    unet, _ = models.load(WEIGHTS / "mnist" / "denoiser", CPU, "denoiser")
    assert 0.0001 < train_denoiser.Denoising(0.5)(unet, digits[:200], generator("cpu", 0)) < 0.0084


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("ddpm", 0.0036, 0.030), ("flow", 0.031, 0.088)])
@torch.no_grad()
def test_the_embedded_networks_have_the_courses_loss(kind, lowest, highest, digits):
    """150 digits at times that are spread evenly: no more than the course's staff report, and more than the known
    training set would give (README)."""
    unet, _ = models.load(WEIGHTS / "mnist" / kind, CPU, kind)
    x, c = digits.images[:150], one_hot(digits.labels[:150])
    noise, t = torch.randn(x.shape, generator=generator("cpu", 0)), 2 * torch.arange(150) + 1
    if kind == "ddpm":
        x_t = ddpm.add_noise(x, noise, models.course_schedule().alpha_bar(t))
        error = unet(x_t, (t + 1) / 300, c) - noise
    else:
        error = unet(flow.path(noise, x, t / 300), t / 300, c) - (x - noise)
    assert lowest < error.square().mean() < highest
