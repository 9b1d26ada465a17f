"""The three trainers and the sampler: what their losses ask for, and that every command makes its pictures."""

import functools
import itertools
import json
import re
import shutil
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from minidiff import flow, images, training
from minidiff.mnist import levels, models, sample, train_denoiser, train_diffusion, train_flow, trainer
from minidiff.mnist.data import Digits, generator
from minidiff.mnist.trainer import Plan, Preset
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
from tests.mnist.real import fails


class Recorder:
    """Stands for a network: keeps its inputs, and answers by a function of them."""

    def __init__(self, answer, classes=0):
        self.answer, self.config, self.inputs = answer, UNetConfig(4, time=True, num_classes=classes), []

    def __call__(self, x, time=None, c=None):
        self.inputs.append((x, time, c))
        return self.answer(x, time)


def test_the_denoisers_loss_is_the_error_against_the_clean_digit(digits):
    net = Recorder(lambda z, time: z)
    found = train_denoiser.Denoising(0.5)(net, digits, generator("cpu", 0))
    noise = (net.inputs[0][0] - digits.images) / 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.std() - 1) < 5 / (2 * n) ** 0.5
    assert found.item() == pytest.approx(0.25 * noise.square().mean().item(), rel=1e-5)
    net = Recorder(lambda z, time: torch.zeros_like(z))
    found = train_denoiser.Denoising(None)(net, digits, generator("cpu", 0))
    assert found.item() == pytest.approx(digits.images.square().mean().item(), rel=1e-6)
    assert abs((net.inputs[0][0] * digits.images).mean()) < 5 * (digits.images.square().mean() / n) ** 0.5  # only noise


def test_noise_alone_is_best_answered_by_the_mean(digits):
    """At the answer "mean" neither a shift nor a share of z lowers the loss."""
    mean, share = digits.images.mean(0), torch.zeros((), requires_grad=True)
    shift = torch.zeros(1, 28, 28, requires_grad=True)
    loss = train_denoiser.Denoising(None)(lambda z: mean + shift + share * z, digits, generator("cpu", 0))
    loss.backward()
    assert loss.item() == pytest.approx(levels.mean_image_mse(digits.images), rel=1e-5)
    # dL / dshare = 2 mean((mean - x) z), of standard error 2 sqrt(L / n).
    assert shift.grad.abs().max() < 1e-7 and abs(share.grad) < 10 * (loss.item() / digits.images.numel()) ** 0.5


@pytest.mark.parametrize(
    "loss",
    [train_denoiser.Denoising(0.5), train_denoiser.Denoising(None),
     train_diffusion.Diffusion(models.course_schedule()), train_flow.matching],
)  # fmt: skip
def test_all_chance_in_a_loss_comes_from_its_generator(loss, digits):
    """So a resumed run asks what the uninterrupted one would have asked, and every step something new."""
    net = Recorder(lambda x, time: x, classes=10)
    for step, of_torch in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_torch)
        loss(net, digits[:50], generator("cpu", step))
    first, again, other = ([value for value in asked if value is not None] for asked in net.inputs)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_a_perfect_noise_predictor_has_loss_0_and_others_what_they_miss(digits):
    schedule = models.course_schedule()
    some = digits[:50]

    def perfect(x_t, time):
        alpha_bar = schedule.alpha_bar((time * 300).round().long() - 1).float()
        return (x_t - alpha_bar.sqrt() * some.images) / (1 - alpha_bar).sqrt()

    loss = train_diffusion.Diffusion(schedule)
    assert loss(Recorder(perfect), some, generator("cpu", 0)) < 1e-5
    net = Recorder(lambda x, time: torch.zeros_like(x))
    assert loss(net, some, generator("cpu", 0)).item() == pytest.approx(1, abs=5 * (2 / some.images.numel()) ** 0.5)
    times = torch.cat([loss(net, digits, generator("cpu", i)) * 0 + net.inputs[-1][1] for i in range(10)]) * 300
    assert times.min().round() == 1 and times.max().round() == 300 and abs(times.mean() - 150.5) < 5 * 86.6 / 5000**0.5


def test_the_flows_target_is_the_line_from_noise_to_digit(digits):
    some = digits[:50]
    kept = {}

    def perfect(x_t, time):
        kept["x_0"] = (x_t - time.view(-1, 1, 1, 1) * some.images) / (1 - time.view(-1, 1, 1, 1))
        return some.images - kept["x_0"]

    assert train_flow.matching(Recorder(perfect), some, generator("cpu", 0)) < 1e-4
    n = kept["x_0"].numel()
    assert abs(kept["x_0"].std() - 1) < 5 / (2 * n) ** 0.5 + 1e-3
    net = Recorder(lambda x, time: x)
    for i in range(10):
        train_flow.matching(net, digits, generator("cpu", i))
    times = torch.cat([time for _, time, _ in net.inputs])  # 5,000, each digit's its own, over all of [0, 1]
    assert 0 <= times.min() < 0.005 and 0.995 < times.max() <= 1 and abs(times.mean() - 0.5) < 5 / (12 * 5000) ** 0.5


def test_reflow_learns_the_lines_it_is_given(digits):
    x_0 = torch.randn(50, 1, 28, 28)
    pairs = Digits(torch.cat([digits.images[:50], x_0], dim=1), digits.labels[:50])
    line = digits.images[:50] - x_0
    net = Recorder(lambda x, time: line)
    assert train_flow.matching(net, pairs, generator("cpu", 0)) == 0
    x, time, _ = net.inputs[0]
    torch.testing.assert_close(x, flow.path(x_0, digits.images[:50], time))


def test_the_best_student_of_reflow_walks_straight_and_arrives_in_one_step():
    """Data 1 or -1, so that E[x_1 | x_t] = tanh(t x_t / (1 - t)^2). Paths in one dimension never cross, so neither do
    the lines between their ends; the student that interpolates these has no loss, and its one step is the teacher's 50.
    """

    def teacher(x, time):
        t = time.view(-1, 1, 1, 1)
        return ((t * x / (1 - t) ** 2).tanh() - x) / (1 - t)

    x_0 = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=generator("cpu", 0))
    pairs = train_flow.make_pairs(Recorder(teacher), torch.zeros(2, dtype=torch.int64), x_0, 50)
    order = x_0.flatten().argsort()
    start, end = x_0.flatten()[order].numpy(), pairs.images[:, 0].flatten()[order].numpy()
    assert (np.diff(end) >= 0).all()

    def student(x, time):
        rows = [np.interp(r.numpy().ravel(), start + t * (end - start), end - start) for r, t in zip(x, time.tolist())]
        return torch.from_numpy(np.stack(rows)).view_as(x)

    assert train_flow.matching(Recorder(student), pairs, generator("cpu", 0)) < 1e-9
    assert flow.straightness(student, x_0).max() < 1e-6 and flow.straightness(teacher, x_0).min() > 1e-2
    at_once, (x_1, _) = flow.grid(1), pairs.images.split(1, dim=1)
    torch.testing.assert_close(flow.solve(student, x_0, at_once), x_1, rtol=0, atol=1e-9)
    assert (flow.solve(teacher, x_0, at_once) - x_1).abs().mean() > 0.5


def test_pairs_join_each_noise_to_where_the_teacher_leads_it_for_its_class(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = UNet(UNetConfig(4, time=True, num_classes=10)).eval()
    monkeypatch.setattr(train_flow, "IN_FILE", 5)
    monkeypatch.setattr(train_flow, "at_once", lambda device: 2)
    pairs = train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)
    x_1, x_0 = pairs.images.split(1, dim=1)
    assert pairs.labels.tolist() == [*range(10), 0, 1, 2] and abs(x_0.std() - 1) < 5 / (2 * x_0.numel()) ** 0.5
    v = models.velocity(models.guided_unet(teacher, pairs.labels))
    torch.testing.assert_close(flow.solve(v, x_0, flow.grid(3)), x_1)
    # Killed after the second of three files: the third is made, the others are not, and all is as if in one go.
    (tmp_path / "pairs-000010.safetensors").unlink()
    made, make = [], train_flow.make_pairs
    monkeypatch.setattr(train_flow, "make_pairs", lambda *args: made.append(args) or make(*args))
    again = train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)
    assert len(made) == 1 and torch.equal(again.images, pairs.images) and torch.equal(again.labels, pairs.labels)
    (tmp_path / "pairs-000005.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="pairs-000005.safetensors is damaged .*; delete it"):
        train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)


@pytest.mark.parametrize("loss", [train_diffusion.Diffusion(models.course_schedule()), train_flow.matching])
def test_classes_are_inputs_and_a_tenth_of_them_dropped(digits, loss):
    net = Recorder(lambda x, time: x, classes=10)
    loss(net, digits, generator("cpu", 0))
    c = net.inputs[0][2]
    kept = c.sum(1) == 1
    assert torch.equal(c.argmax(1)[kept], digits.labels[kept]) and 20 <= (~kept).sum() <= 84  # 50 +- 5 sigma of 500


def test_what_is_always_dropped_is_never_learned(digits, monkeypatch):
    """Dropped with probability 1, classes are zeros: nothing that reads them has a gradient, all else has."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(4, time=True, num_classes=10))
    drop = train_flow.dropped
    for probability, learns in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(train_flow, "dropped", functools.partial(drop, probability=probability))
        net.zero_grad()
        train_flow.matching(net, digits[:50], generator("cpu", 0)).backward()
        for name, p in net.named_parameters():
            assert bool(p.grad.any()) is (learns or name not in ("fc1_c.0.weight", "fc2_c.0.weight")), name


def test_the_out_of_distribution_figure_uses_one_digit_and_one_noise_along_a_row(digits):
    rows, labels = train_denoiser.noising_figure(digits[:2])
    for i, row in enumerate(rows):
        assert torch.equal(row[0], digits.images[i])
        for x, sigma in zip(row[1:], train_denoiser.SIGMAS[1:]):
            torch.testing.assert_close((x - row[0]) / sigma, (row[-1] - row[0]) / 1.0, rtol=0, atol=1e-5)
    assert labels[0] == [f"sigma {s}" for s in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)]
    assert not torch.equal(rows[0][-1] - rows[0][0], rows[1][-1] - rows[1][0])
    seen = []
    train_denoiser.errors_by_sigma(lambda z: seen.append(z) or z, digits[:20], torch.ones(3))
    for z, sigma in zip(seen[1:], train_denoiser.SIGMAS[1:], strict=True):
        torch.testing.assert_close((z - seen[0]) / sigma, seen[-1] - seen[0], rtol=0, atol=1e-5)
    thrice = Digits(digits.images.repeat(3, 1, 1, 1), digits.labels.repeat(3))
    table = train_denoiser.errors_by_sigma(lambda z: z, thrice, torch.ones(3))
    # Doing nothing leaves sigma^2; of variance 1 the best is sigma^2 / (1 + sigma^2).
    for sigma, error, linear in table:
        assert error == pytest.approx(sigma**2, rel=0.02) and linear == pytest.approx(sigma**2 / (1 + sigma**2))


def test_figures_of_the_denoiser_name_their_rows(digits):
    """A network that turns black to white: noisy comes from the digit, denoised from noisy."""
    rows, names = train_denoiser.sample_figure(lambda z: -z, digits[:20], 0.5)
    assert names == ["clean", "noisy", "denoised"] * 2 and torch.equal(torch.cat(rows[::3]), digits.images[:20])
    for clean, noisy, denoised in zip(rows[::3], rows[1::3], rows[2::3]):
        assert torch.equal(denoised, -noisy) and 0.4 < (noisy - clean).std() < 0.6
    table = [(sigma, 0.1 * sigma, 0.2) for sigma in train_denoiser.SIGMAS]
    rows, names = train_denoiser.out_of_distribution(lambda z: -z, digits[:2], table)
    assert torch.equal(rows[0], train_denoiser.noising_figure(digits[:2])[0][0]) and torch.equal(rows[1], -rows[0])
    assert names[2] == [f"sigma {s}" for s in train_denoiser.SIGMAS] and names[3][3] == "error 0.0500, linear 0.2000"


def test_figures_of_the_flow_name_their_rows():
    def v(x, time):
        return time.view(-1, 1, 1, 1) - x

    def torn(x, time):
        return torch.full_like(x, float("nan"))

    x_0 = draw_noise((2, 1, 28, 28), seeded([0, 1]))
    with pytest.warns(UserWarning, match="no row for Dormand-Prince: the solver is stuck at time 0"):
        assert len(train_flow.by_solver(torn, x_0, 10)[0]) == 4
    rows, names = train_flow.by_solver(v, x_0, 10)
    assert names[:4] == ["Euler, 2", "Euler, 10", "midpoint, 4", "Heun, 4"]
    methods = (("euler", 2), ("euler", 10), ("midpoint", 2), ("heun", 2))
    assert all(torch.equal(row, flow.solve(v, x_0, flow.grid(n), m)) for row, (m, n) in zip(rows, methods))
    found, evaluations = flow.dormand_prince(v, x_0)
    assert torch.equal(rows[4], found) and names[4] == f"Dormand-Prince, {evaluations}"
    rows, names = train_flow.few_steps({"a": v, "b": lambda x, time: -v(x, time)}, x_0, 7)
    assert names == [f"{name}, {n}" for name in "ab" for n in (1, 2, 4, 7)]
    for row, (sign, n) in zip(rows, [(sign, n) for sign in (1, -1) for n in (1, 2, 4, 7)]):
        assert torch.equal(row, flow.solve(lambda x, t, sign=sign: sign * v(x, t), x_0, flow.grid(n)))


def test_the_mean_image_is_recognised_as_such(digits):
    mean = digits.images.mean(0, keepdim=True)
    *_, distance, spread = train_denoiser.pure_noise_figure(lambda z: (mean + 0.1).expand_as(z), digits)
    assert distance == pytest.approx(0.1, rel=1e-5) and spread == pytest.approx(0, abs=1e-6)
    *_, distance, spread = train_denoiser.pure_noise_figure(lambda z: mean + 0.2 * z, digits)  # each by itself
    assert distance == pytest.approx(0.2, rel=0.02) and spread == pytest.approx(0.2, rel=0.02)


def test_cleaning_starts_at_its_time_and_ends_at_the_digit(digits):
    """With the exact eps of one digit, every noised copy is led back to it."""
    schedule, one = models.course_schedule(), digits[:1]

    def predict_for(labels):
        def predict(x_t, t):
            alpha_bar = schedule.alpha_bar(t).float()
            return (x_t - alpha_bar.sqrt() * one.images) / (1 - alpha_bar).sqrt(), None

        return predict

    rows, names = train_diffusion.cleaned(predict_for, one, (5, 200))
    assert names == ["test digit", "noised to t = 5", "cleaned", "noised to t = 200", "cleaned"]
    for noisy, clean, t in ((rows[1], rows[2], 5), (rows[3], rows[4], 200)):
        alpha_bar = schedule.alphas_cumprod[t]
        spread = (noisy - alpha_bar.sqrt().float() * one.images).std()
        assert abs(spread - (1 - alpha_bar).sqrt()) < 5 * (1 - alpha_bar).sqrt() / (2 * 784) ** 0.5
        torch.testing.assert_close(clean, one.images, rtol=0, atol=1e-4)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(module, out, folder, *flags):
    module.main(["--quick", "--data", str(folder), "--out", str(out), *flags])
    return sorted(str(p.relative_to(out)) for p in out.rglob("*.*") if p.suffix in (".png", ".gif"))


def figures(module, trained, out, folder, *flags):
    """What --figures makes of a trained network: figures alone, and nothing in the network's folder."""
    before = {p: p.read_bytes() for p in trained.rglob("*.*")}
    made = run(module, out, folder, "--figures", str(trained), *flags)
    assert {p: p.read_bytes() for p in trained.rglob("*.*")} == before
    assert sorted(p.name for p in out.rglob("*.*")) == sorted(made)
    return made


@pytest.fixture
def titles(monkeypatch):
    """Of all strips that the denoiser's trainer saves, by name."""
    found, save = {}, train_denoiser.save_strip
    monkeypatch.setattr(
        train_denoiser, "save_strip", lambda *args: found.update({args[3].name: args[2]}) or save(*args)
    )
    return found


def test_train_denoiser_makes_its_figures(folder, tmp_path, capsys, titles):
    made = run(train_denoiser, tmp_path / "d", folder, "--four")
    assert titles["out-of-distribution.png"] == "Trained at sigma 0.5, tried at others (errors on 100 test digits)"
    assert titles["epoch-01.png"] == "epoch 1, sigma 0.5"
    assert made == ["noising.png", "out-of-distribution.png", "samples/epoch-01.png", "training/loss.png"]
    first = capsys.readouterr().out
    assert "loss on 100 test digits: 0." in first and "sigma 0.8: error 0." in first and "; linear optimum 0.0" in first
    run(train_denoiser, tmp_path / "d", folder, "--four")  # again: nothing is trained, all numbers come again
    again = capsys.readouterr().out
    assert "going on from step 25" in again and again.splitlines()[2:-1] == first.splitlines()[2:-1]
    assert "of a run with sigma 0.5, not None; pass" in fails(
        capsys, train_denoiser.main, "--quick", "--data", folder, "--out", tmp_path / "d", "--pure-noise"
    )
    assert images.read_metadata(tmp_path / "d" / "noising.png")["command"] == "python -m minidiff.mnist.train_denoiser"
    config, tensors = models.read(tmp_path / "d", "denoiser")
    UNet(UNetConfig(**config["unet"])).load_state_dict(tensors)
    assert run(train_denoiser, tmp_path / "p", folder, "--pure-noise", "--preset", "small") == [
        "mean-image.png", "noising.png", "samples/epoch-01.png", "training/loss.png",
    ]  # fmt: skip
    first = capsys.readouterr().out
    assert "outputs differ from the mean digit by 0." in first and titles["epoch-01.png"] == "epoch 1, noise alone"
    assert figures(train_denoiser, tmp_path / "d", tmp_path / "e", folder) == ["out-of-distribution.png"]
    capsys.readouterr()
    assert figures(train_denoiser, tmp_path / "p", tmp_path / "q", folder) == ["mean-image.png"]  # its config says so
    texts = first.splitlines() + capsys.readouterr().out.splitlines()
    lines = [line for line in texts if "outputs differ" in line]
    numbers = [[float(word) for word in line.split() if word[0].isdigit()] for line in lines]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)  # the network's, but for float16


@pytest.fixture
def scales(monkeypatch):
    """The guidance scales of all that is drawn, and how often the reference level withholds the class."""
    found, dropouts, guided, level = [], [], models.guided_unet, levels.of_task

    def note(unet, labels=None, scale=1.0):
        found.append(scale)
        return guided(unet, labels, scale)

    monkeypatch.setattr(models, "guided_unet", note)
    monkeypatch.setattr(train_flow, "guided_unet", note)
    monkeypatch.setattr(levels, "of_task", lambda task, x, p: dropouts.append(p) or level(task, x, p))
    return found, dropouts


def test_train_diffusion_makes_its_figures(folder, tmp_path, capsys, scales):
    made = run(train_diffusion, tmp_path / "d", folder, "--preset", "class", "--sampler", "dpm++")
    always = ["cleaned.png", "samples/epoch-01.png", "sampling.gif", "training/loss.png"]
    assert made == sorted([*always, "guidance.png", "unconditional.gif"])
    printed = capsys.readouterr().out
    assert "alpha_bar at the last of 300 times: 0.0481; 21.9%" in printed and "; training set known 0.0" in printed
    # samples, sampling.gif, unconditional.gif, guidance.png, cleaned.png
    assert scales[0] == [5.0, 5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert run(train_diffusion, tmp_path / "t", folder) == always and scales[1] == [0.1, 1.0]
    scales[0].clear()
    ends = ["cleaned.png", "guidance.png", "sampling.gif", "unconditional.gif"]
    assert figures(train_diffusion, tmp_path / "d", tmp_path / "e", folder) == ends
    assert images.read_metadata(tmp_path / "e" / "cleaned.png")["preset"] == "class"
    assert scales[0] == [5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert "nothing to guide; leave out --guidance-scale" in fails(
        capsys, train_diffusion.main, "--data", folder, "--out", tmp_path / "u", "--guidance-scale", 2
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_samples_of_ddpm_are_drawn_by_the_sampler_that_is_named(sampler, folder, tmp_path, monkeypatch):
    names, walk = [], models.walk
    monkeypatch.setattr(models, "walk", lambda *args: names.append(args[4]) or walk(*args))
    run(train_diffusion, tmp_path / "n", folder, "--sampler", sampler)
    assert set(names) == {sampler}


def test_train_flow_makes_its_figures(folder, tmp_path, scales):
    made = run(train_flow, tmp_path / "f", folder, "--preset", "class", "--guidance-scale", "3")
    # samples, .gif, guidance.png, solvers.png, straightness
    assert scales == ([3.0, 3.0, 0.0, 1.0, 5.0, 10.0, 3.0, 1.0], [0.1])
    assert made == ["guidance.png", "samples/epoch-01.png", "sampling.gif", "solvers.png", "training/loss.png"]
    edit_config(tmp_path / "f", dataset="fashion")
    ends = ["guidance.png", "sampling.gif", "solvers.png"]
    assert figures(train_flow, tmp_path / "f", tmp_path / "g", tmp_path / "no data") == ends
    assert images.read_metadata(tmp_path / "g" / "guidance.png")["dataset"] == "fashion"


@pytest.fixture
def teacher(folder, tmp_path):
    """A network of 4 channels that draws "fashion"."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True, num_classes=10))
    config = {"kind": "flow", "dataset": "fashion", "unet": asdict(unet.config)}
    models.write(tmp_path / "f", unet, config)
    return tmp_path / "f"


def test_reflow_starts_from_its_teacher(teacher, folder, tmp_path, capsys):
    """With a learning rate of 0 it ends there, too."""
    made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow", "--teacher", str(teacher), "--lr", "0")
    printed = capsys.readouterr().out
    assert "reflow.png" in made and "; the teacher " in printed and "(0 is straight): the teacher" in printed
    (_, before), (config, after) = (models.read(path, "flow") for path in (teacher, tmp_path / "r"))
    assert config["dataset"] == "fashion" and config["teacher"] == str(teacher)
    assert all(torch.equal(after[k], v) for k, v in before.items() if "running" not in k and "num_" not in k)
    (tmp_path / "r" / "config.json").unlink()
    (tmp_path / "r" / "training" / "checkpoint.pt").unlink()
    flags = ["--quick", "--preset", "reflow", "--teacher", teacher]
    assert "holds pairs of another teacher or other settings" in fails(
        capsys, train_flow.main, *flags, "--out", tmp_path / "r", "--seed", "5"
    )
    few = ["--out", tmp_path / "few", "--pairs"]
    assert "--pairs 10 is too few: a tenth is kept" in fails(capsys, train_flow.main, *flags, *few, 10)


def test_reflow_names_its_two_networks_and_keeps_a_tenth_for_the_test(teacher, folder, tmp_path, monkeypatch, capsys):
    """Also where the teacher was moved meanwhile, and with --figures, whose config says who the teacher was."""
    named, split, fit = {}, [], trainer.fit
    monkeypatch.setattr(train_flow, "few_steps", lambda fields, x_0, _: named.update(fields) or ([x_0], ["x"]))
    monkeypatch.setattr(trainer, "fit", lambda *args: split.append(args[3:5]) or fit(*args))
    shutil.copytree(teacher, tmp_path / "moved")
    flags = ["--preset", "reflow", "--pairs", "200", "--teacher"]
    for place in (teacher, tmp_path / "moved"):
        run(train_flow, tmp_path / "q", folder, *flags, str(place))
    assert "going on from step 11" in capsys.readouterr().out
    x, time = draw_noise((10, 1, 28, 28), seeded(range(10))), torch.full((10,), 0.7)
    folders = {"the teacher": teacher, "this model": tmp_path / "q"}
    expected = {}
    for name, path in folders.items():
        unet = models.load(path, "flow", torch.device("cpu"))[0]
        expected[name] = models.velocity(models.guided_unet(unet, torch.arange(10)))(x, time)
    assert (expected["the teacher"] - expected["this model"]).abs().max() > 0.01
    for how in ("trained", "figures"):
        for name, value in expected.items():
            torch.testing.assert_close(named.pop(name)(x, time), value, rtol=0.01, atol=2e-3)
        if how == "trained":
            ends = ["guidance.png", "reflow.png", "sampling.gif", "solvers.png"]
            assert figures(train_flow, tmp_path / "q", tmp_path / "z", folder) == ends
    train, test = ({tuple(noise.flatten().tolist()) for noise in part.images[:, 1]} for part in split[0])
    assert (len(train), len(test)) == (180, 20) and not train & test
    edit_config(tmp_path / "q", teacher=str(tmp_path / "gone"))
    message = fails(capsys, train_flow.main, "--figures", tmp_path / "q", "--out", tmp_path / "z")
    assert f"there is no folder {tmp_path / 'gone'}, the teacher of reflow; pass the right one as --teacher" in message


def test_what_reflow_cannot_do_is_said_before_a_pair_is_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_flow, "kept_pairs", lambda *args: pytest.fail("pairs were drawn"))
    run(train_flow, tmp_path / "f", folder, "--preset", "class")
    flags, out = ["--quick", "--preset", "reflow"], ["--out", tmp_path / "x"]
    message = fails(capsys, train_flow.main, *flags, "--out", tmp_path / "f")
    assert "is of a run with preset class, not reflow; pass the settings of that run" in message
    assert "--teacher and --pairs are for --preset reflow" in fails(capsys, train_flow.main, "--pairs", "100", *out)
    without = UNet(UNetConfig(4, time=True))
    models.write(tmp_path / "t", without, {"kind": "flow", "unet": asdict(without.config)})
    message = fails(capsys, train_flow.main, *flags, "--teacher", tmp_path / "t", "--guidance-scale", 2, *out)
    assert "nothing to guide; leave out --guidance-scale" in message
    message = fails(capsys, train_flow.main, *flags, "--dataset", "fashion", *out)
    assert "draws mnist, which is what reflow learns; leave out --dataset" in message


def test_quick_reflow_of_the_embedded_teacher_is_quick(folder, tmp_path):
    """A bound on the work that is the same on every machine: images that go through the large network."""
    count, forward = [], UNet.forward

    def counted(self, x, *more):
        count.append(len(x))
        return forward(self, x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", counted)
        made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow")
    assert "reflow.png" in made and "solvers.png" in made and sum(count) < 4000, sum(count)


@pytest.mark.parametrize(("module", "kind"), [(train_diffusion, "ddpm"), (train_flow, "flow")])
def test_animations_lead_from_the_noise_to_the_sample(module, kind, folder, tmp_path, monkeypatch):
    """With the class in the first, and in the second only zeros; the strip after the last epoch ends alike."""
    walks, samples, classes, forward = [], [], [], UNet.forward

    def kept(self, x, time=None, c=None):
        classes.append(c)
        return forward(self, x, time, c)

    monkeypatch.setattr(UNet, "forward", kept)

    def note(states, path):
        classes.clear()
        states = list(states)
        walks.append((path.name, states, torch.cat(classes)))

    monkeypatch.setattr(models, "save_animation", note)
    monkeypatch.setattr(models, "save_samples", lambda x, *_: samples.append(x))
    run(module, tmp_path / "n", folder, "--preset", "class")
    name, states, rows = walks[0]
    assert name == "sampling.gif" and rows.sum(1).max() == 1 and len(states) == {"ddpm": 7, "flow": 4}[kind]
    assert torch.equal(states[0], draw_noise((10, 1, 28, 28), seeded(range(10))))
    torch.testing.assert_close(states[-1], samples[-1][:10], rtol=0, atol=1e-4)
    if kind == "ddpm":
        assert walks[1][0] == "unconditional.gif" and not walks[1][2].any()
        assert torch.equal(walks[1][1][0], states[0]) and not torch.equal(walks[1][1][-1], states[-1])


def at_step(monkeypatch, step, act):
    """Something happens in a training step, counted from 1."""
    original, steps = training._step, itertools.count(1)
    monkeypatch.setattr(training, "_step", lambda *args: (act() if next(steps) == step else None, original(*args)))


@pytest.mark.parametrize(
    ("module", "kind"), [(train_denoiser, "denoiser"), (train_diffusion, "ddpm"), (train_flow, "flow")]
)
def test_a_run_that_is_stopped_leaves_its_network_and_goes_on_to_the_same_numbers(
    module, kind, fashion, tmp_path, monkeypatch, capsys
):
    flags = ["--dataset", "fashion", "--seed", "4", "--dtype", "float32"]
    run(module, tmp_path / "whole", fashion, *flags)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 10, lambda: signal.raise_signal(signal.SIGINT))
        run(module, tmp_path / "n", fashion, *flags)
    assert "stopped: the same command goes on from here" in capsys.readouterr().out
    config, tensors = models.read(tmp_path / "n", kind)
    assert config["trained"] == "0.4 of 1 epochs"  # 10 of 25 steps
    assert config["dataset"] == "fashion" and config["preset"] in ("course", "time") and config["seed"] == 4
    assert config["plan"] == {"epochs": 1, "batch_size": 16, "lr": 0.01, "lr_decay": 1.0}
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(tensors["down1.0.0.weight"], kept["down1.0.0.weight"].half().float())
    run(module, tmp_path / "n", fashion, *flags)
    whole, parts = (models.read(tmp_path / name, kind) for name in ("whole", "n"))
    assert whole[0] == parts[0] and all(torch.equal(whole[1][k], parts[1][k]) for k in whole[1])


def test_the_network_that_is_written_and_drawn_is_the_average(folder, tmp_path):
    run(train_flow, tmp_path / "n", folder, "--ema", "0.9")
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)
    tensors = models.read(tmp_path / "n", "flow")[1]
    average, plain = (kept[key]["down1.0.0.weight"].half().float() for key in ("ema", "model"))
    assert torch.equal(tensors["down1.0.0.weight"], average) and not torch.equal(average, plain)


def test_a_network_can_be_drawn_from_after_its_first_epoch(folder, tmp_path, monkeypatch):
    """Not before, and the run is not taken for one that never began."""

    def kill():
        raise KeyboardInterrupt

    out = tmp_path / "n"
    for step in (16, 41):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            at_step(patch, step, kill)
            run(train_flow, out, folder, "--preset", "class", "--epochs", "2")
        if step == 16:
            with pytest.raises(ValueError, match="no network in .* yet, only a run that has begun: it is written"):
                models.read(out, "flow")
    assert models.read(out, "flow")[0]["trained"] == "1 of 2 epochs"


def test_a_trained_network_is_not_replaced_by_a_new_run(teacher, folder, capsys):
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", teacher)
    assert "holds a trained network, which this would replace; pass another --out" in message
    assert not (teacher / "training" / "checkpoint.pt").exists()


def test_one_kind_of_network_does_not_go_on_as_another(folder, tmp_path, capsys):
    """The same network, the same plan: only the loss would be another."""
    run(train_diffusion, tmp_path / "n", folder, "--preset", "class")
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--preset", "class", "--out", tmp_path / "n")
    assert "is of a run with kind ddpm, not flow; pass" in message
    assert models.read(tmp_path / "n", "ddpm")[0]["kind"] == "ddpm"


def test_the_home_folder_is_found_without_a_shell(folder, tmp_path, monkeypatch):
    """--out=~/n reaches a program as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train_flow.main(["--quick", "--data", str(folder), "--out=~/n"])
    models.read(tmp_path / "n", "flow")
    sample.main(["--quick", "--model=~/n", "--out=~/s.png"])
    assert (tmp_path / "s.png").is_file()


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_an_unusable_folder_is_named_before_the_work(module, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(levels, "spectrum", lambda x: pytest.fail("levels were computed"))
    flags = ["--quick", "--data", folder, "--out", tmp_path / "file" / "n"]
    assert "cannot write to" in fails(capsys, module.main, *flags)


def test_flags_out_of_range_are_refused(folder, tmp_path, capsys):
    for epochs in ([0], [2, 11]):
        message = fails(capsys, train_flow.main, "--out", tmp_path / "x", "--sample-epochs", *epochs)
        assert f"--sample-epochs must lie in 1..10, the epochs there are, got {epochs}" in message
    for flags in (["--seed", -1], ["--seed", 2**32], ["--ema", 1]):
        message = fails(capsys, train_flow.main, "--out", tmp_path / "x", *flags)
        assert "--seed must lie in 0..2^32 - 1 and --ema in [0, 1), got" in message
    flags = ["--quick", "--data", folder, "--out", tmp_path / "x", "--batch-size", 500]
    assert "batch_size must lie in 1..400, the digits there are, got 500" in fails(capsys, train_flow.main, *flags)


@pytest.mark.parametrize("module", [train_diffusion, train_flow])
def test_samples_are_drawn_after_the_epochs_that_are_named_and_the_last(module, folder, tmp_path):
    flags = ["--epochs", "5", "--batch-size", "200"]
    made = run(module, tmp_path / "a", folder, *flags, "--sample-epochs", "2", "3")
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (2, 3, 5)]
    made = run(module, tmp_path / "b", folder, *flags)
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (1, 5)]


def test_samples_that_are_no_numbers_do_not_end_the_training(folder, tmp_path, capsys):
    """Guidance of 1e30 makes them so; the run comes to its end, and its network is there."""
    made = run(train_flow, tmp_path / "n", folder, "--preset", "class", "--guidance-scale", "1e30")
    assert "samples/epoch-01.png" in made and "solvers.png" in made
    message = "warning: 10 of the digits in .*epoch-01.png hold values that are not finite"
    assert re.search(message, capsys.readouterr().err)
    assert models.read(tmp_path / "n", "flow")[0]["trained"] == "1 of 1 epochs"


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_every_preset_begins_a_run_and_stands_in_the_help(module, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    for name, preset in module.PRESETS.items():
        assert f"{name:{max(map(len, module.PRESETS))}}  {preset.plan}" in printed
    if module is train_diffusion:
        assert "20 epochs, batches of 128, learning rate 0.001, falling to 0.000112; 64 channels" in printed
    begun = []
    monkeypatch.setattr(trainer, "fit", lambda args, model, *more: begun.append((args.preset, model.config)))
    for name in set(module.PRESETS) - {"reflow"}:
        module.main(["--quick", "--data", str(folder), "--out", str(tmp_path / name), "--preset", name])
        assert begun[-1] == (name, replace(module.PRESETS[name].unet, hidden=4))


def test_a_loss_that_explodes_ends_in_one_line(folder, tmp_path, capsys):
    flags = ["--quick", "--data", folder, "--out", tmp_path / "n", "--lr", "1e30", "--epochs", 2]
    assert re.search(r"error: the loss or its gradient is (nan|inf) at step", fails(capsys, train_flow.main, *flags))


def test_the_presets_are_the_courses():
    """Batch, epochs, rate and width of the course's pages, and its schedule."""
    denoiser, diffusion, flows = (module.PRESETS for module in (train_denoiser, train_diffusion, train_flow))
    assert denoiser["course"] == Preset(Plan(5, 256, 1e-4), UNetConfig(128)) and train_denoiser.SIGMA == 0.5
    for name, classes in (("time", 0), ("class", 10)):
        assert diffusion[name].plan == Plan(20, 128, 1e-3, 0.1) and flows[name].plan == Plan(10, 64, 1e-2, 0.1)
        for unet in (diffusion[name].unet, flows[name].unet):
            assert (unet.hidden, unet.time, unet.num_classes) == (64, True, classes)
    assert flows["time"].unet.modulate == "mul" and diffusion["time"].unet.modulate == "add"
    assert flows["no-scheduler"].plan == Plan(15, 64, 5e-3) and flows["no-scheduler"].unet == flows["class"].unet
    assert flows["better"].plan == Plan(50, 64, 1e-2, 0.1)  # the course's 0.05 is worse: walkthrough, chapter 12
    assert flows["better"].unet == UNetConfig(128, time=True, modulate="mul")
    betas = 1 - models.course_schedule().alphas_cumprod[1:] / models.course_schedule().alphas_cumprod[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 300, dtype=torch.float64)[1:])
    assert (models.FLOW_STEPS, models.DROPOUT, models.GUIDANCE_SCALE) == (50, 0.1, 5.0)
