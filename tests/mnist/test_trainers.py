"""The three trainers and the sampler: what their losses ask for, and that every command makes its pictures."""

import functools
import json
import re
import shutil
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minidiff import flow, images
from minidiff.mnist import (
    drawing,
    flags,
    floors,
    networks,
    sample,
    train_denoiser,
    train_diffusion,
    train_flow,
    training,
)
from minidiff.mnist.data import Digits, generator
from minidiff.mnist.training import Plan
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
from minidiff.weights import WEIGHTS
from tests.test_commands import fails

pytestmark = pytest.mark.usefixtures("fast")


class Told:
    """Stands for a network: notes what it is asked, and answers what it is told to."""

    def __init__(self, answer, classes=0):
        self.answer, self.config, self.seen = answer, UNetConfig(4, time=True, num_classes=classes), []

    def __call__(self, x, time=None, c=None):
        self.seen.append((x, time, c))
        return self.answer(x, time)


def test_the_denoisers_loss_is_the_error_against_the_clean_digit(digits):
    net = Told(lambda z, time: z)
    found = train_denoiser.Denoising(0.5)(net, digits, generator("cpu", 0))
    noise = (net.seen[0][0] - digits.images) / 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.std() - 1) < 5 / (2 * n) ** 0.5
    assert found.item() == pytest.approx(0.25 * noise.square().mean().item(), rel=1e-5)
    net = Told(lambda z, time: torch.zeros_like(z))
    found = train_denoiser.Denoising(None)(net, digits, generator("cpu", 0))
    assert found.item() == pytest.approx(digits.images.square().mean().item(), rel=1e-6)
    assert abs((net.seen[0][0] * digits.images).mean()) < 5 * (digits.images.square().mean() / n) ** 0.5  # only noise


def test_noise_alone_is_best_answered_by_the_mean(digits):
    """At the answer "mean" neither a shift nor a share of z lowers the loss."""
    mean, share = digits.images.mean(0), torch.zeros((), requires_grad=True)
    shift = torch.zeros(1, 28, 28, requires_grad=True)
    loss = train_denoiser.Denoising(None)(lambda z: mean + shift + share * z, digits, generator("cpu", 0))
    loss.backward()
    assert loss.item() == pytest.approx(floors.mean_image_mse(digits.images), rel=1e-5)
    # dL / dshare = 2 mean((mean - x) z), of standard error 2 sqrt(L / n).
    assert shift.grad.abs().max() < 1e-7 and abs(share.grad) < 10 * (loss.item() / digits.images.numel()) ** 0.5


@pytest.mark.parametrize(
    "loss",
    [train_denoiser.Denoising(0.5), train_denoiser.Denoising(None),
     train_diffusion.Diffusion(drawing.course_schedule()), train_flow.FlowMatching()],
)  # fmt: skip
def test_all_chance_in_a_loss_comes_from_its_generator(loss, digits):
    """So a resumed run asks what the uninterrupted one would have asked, and every step something new."""
    net = Told(lambda x, time: x, classes=10)
    for step, of_torch in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_torch)
        loss(net, digits[:50], generator("cpu", step))
    first, again, other = ([value for value in asked if value is not None] for asked in net.seen)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_a_perfect_noise_predictor_has_loss_0_and_others_what_they_miss(digits):
    schedule = drawing.course_schedule()
    some = digits[:50]

    def perfect(x_t, time):
        alpha_bar = schedule.alpha_bar((time * 300).round().long() - 1).float()
        return (x_t - alpha_bar.sqrt() * some.images) / (1 - alpha_bar).sqrt()

    loss = train_diffusion.Diffusion(schedule)
    assert loss(Told(perfect), some, generator("cpu", 0)) < 1e-5
    net = Told(lambda x, time: torch.zeros_like(x))
    assert loss(net, some, generator("cpu", 0)).item() == pytest.approx(1, abs=5 * (2 / some.images.numel()) ** 0.5)
    times = torch.cat([loss(net, digits, generator("cpu", i)) * 0 + net.seen[-1][1] for i in range(10)]) * 300
    assert times.min().round() == 1 and times.max().round() == 300 and abs(times.mean() - 150.5) < 5 * 86.6 / 5000**0.5


def test_the_flows_target_is_the_line_from_noise_to_digit(digits):
    some = digits[:50]
    seen = {}

    def perfect(x_t, time):
        seen["x_0"] = (x_t - time.view(-1, 1, 1, 1) * some.images) / (1 - time.view(-1, 1, 1, 1))
        return some.images - seen["x_0"]

    assert train_flow.FlowMatching()(Told(perfect), some, generator("cpu", 0)) < 1e-4
    n = seen["x_0"].numel()
    assert abs(seen["x_0"].std() - 1) < 5 / (2 * n) ** 0.5 + 1e-3
    net = Told(lambda x, time: x)
    for i in range(10):
        train_flow.FlowMatching()(net, digits, generator("cpu", i))
    times = torch.cat([time for _, time, _ in net.seen])  # 5,000, each digit's its own, over all of [0, 1]
    assert 0 <= times.min() < 0.005 and 0.995 < times.max() <= 1 and abs(times.mean() - 0.5) < 5 / (12 * 5000) ** 0.5


def test_reflow_learns_the_lines_it_is_given(digits):
    x_0 = torch.randn(50, 1, 28, 28)
    pairs = Digits(torch.cat([digits.images[:50], x_0], dim=1), digits.labels[:50])
    line = digits.images[:50] - x_0
    net = Told(lambda x, time: line)
    assert train_flow.FlowMatching()(net, pairs, generator("cpu", 0)) == 0
    x, time, _ = net.seen[0]
    torch.testing.assert_close(x, flow.path(x_0, digits.images[:50], time))


def test_the_best_student_of_reflow_walks_straight_and_arrives_in_one_step():
    """Data 1 or -1, so that E[x_1 | x_t] = tanh(t x_t / (1 - t)^2). Paths in one dimension never cross, so neither do
    the lines between their ends; the student that interpolates these has no loss, and its one step is the teacher's 50.
    """

    def teacher(x, time):
        t = time.view(-1, 1, 1, 1)
        return ((t * x / (1 - t) ** 2).tanh() - x) / (1 - t)

    x_0 = torch.randn(2, 1, 28, 28, dtype=torch.float64, generator=generator("cpu", 0))
    pairs = train_flow.make_pairs(Told(teacher), torch.zeros(2, dtype=torch.int64), x_0, 50)
    order = x_0.flatten().argsort()
    start, end = x_0.flatten()[order].numpy(), pairs.images[:, 0].flatten()[order].numpy()
    assert (np.diff(end) >= 0).all()

    def student(x, time):
        rows = [np.interp(r.numpy().ravel(), start + t * (end - start), end - start) for r, t in zip(x, time.tolist())]
        return torch.from_numpy(np.stack(rows)).view_as(x)

    assert train_flow.FlowMatching()(Told(student), pairs, generator("cpu", 0)) < 1e-9
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
    torch.testing.assert_close(flow.solve(drawing.velocity(teacher, pairs.labels), x_0, flow.grid(3)), x_1)
    # Killed after the second of three files: the third is made, the others are not, and all is as if in one go.
    (tmp_path / "pairs-000010.safetensors").unlink()
    made, make = [], train_flow.make_pairs
    monkeypatch.setattr(train_flow, "make_pairs", lambda *args: made.append(args) or make(*args))
    again = train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)
    assert len(made) == 1 and torch.equal(again.images, pairs.images) and torch.equal(again.labels, pairs.labels)
    (tmp_path / "pairs-000005.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="pairs-000005.safetensors is damaged .*; delete it"):
        train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)


@pytest.mark.parametrize("loss", [train_diffusion.Diffusion(drawing.course_schedule()), train_flow.FlowMatching()])
def test_classes_are_told_and_a_tenth_of_them_dropped(digits, loss):
    net = Told(lambda x, time: x, classes=10)
    loss(net, digits, generator("cpu", 0))
    c = net.seen[0][2]
    kept = c.sum(1) == 1
    assert torch.equal(c.argmax(1)[kept], digits.labels[kept]) and 20 <= (~kept).sum() <= 84  # 50 +- 5 sigma of 500


def test_what_is_always_dropped_is_never_learned(digits, monkeypatch):
    """Dropped with probability 1, classes are zeros: nothing that reads them has a gradient, all else has."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(4, time=True, num_classes=10))
    drop = train_flow.dropped
    for probability, told in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(train_flow, "dropped", functools.partial(drop, probability=probability))
        net.zero_grad()
        train_flow.FlowMatching()(net, digits[:50], generator("cpu", 0)).backward()
        for name, p in net.named_parameters():
            assert bool(p.grad.any()) is (told or name not in ("fc1_c.0.weight", "fc2_c.0.weight")), name


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

    x_0 = draw_noise((2, 1, 28, 28), seeded(0, 2))
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


def test_the_mean_picture_is_recognised_as_such(digits):
    mean = digits.images.mean(0, keepdim=True)
    *_, distance, spread = train_denoiser.pure_noise_figure(lambda z: (mean + 0.1).expand_as(z), digits)
    assert distance == pytest.approx(0.1, rel=1e-5) and spread == pytest.approx(0, abs=1e-6)
    *_, distance, spread = train_denoiser.pure_noise_figure(lambda z: mean + 0.2 * z, digits)  # each by itself
    assert distance == pytest.approx(0.2, rel=0.02) and spread == pytest.approx(0.2, rel=0.02)


def test_cleaning_starts_at_its_time_and_ends_at_the_digit(digits):
    """With the exact eps of one digit, every noised copy is led back to it."""
    schedule, one = drawing.course_schedule(), digits[:1]

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
    """What --figures makes of a trained network: pictures alone, and nothing in the network's folder."""
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


def test_train_denoiser_makes_its_pictures(folder, tmp_path, capsys, titles):
    made = run(train_denoiser, tmp_path / "d", folder, "--four")
    assert titles["out-of-distribution.png"] == "Trained at sigma 0.5, asked at others (errors on 100 test digits)"
    assert titles["epoch-01.png"] == "epoch 1, sigma 0.5"
    assert made == ["noising.png", "out-of-distribution.png", "samples/epoch-01.png", "training/loss.png"]
    shown = capsys.readouterr().out
    assert "loss on 100 test pictures: 0." in shown and "sigma 0.8: error 0." in shown
    run(train_denoiser, tmp_path / "d", folder, "--four")  # again: nothing is trained, all is said as before
    assert capsys.readouterr().out.splitlines()[2:-1] == shown.splitlines()[2:-1]
    assert "of a run training denoiser course, 400 pictures of mnist, not denoiser course, from" in fails(
        capsys, train_denoiser.main, "--quick", "--data", folder, "--out", tmp_path / "d", "--pure-noise"
    )
    assert images.read_metadata(tmp_path / "d" / "noising.png")["command"] == "python -m minidiff.mnist.train_denoiser"
    config, tensors = networks.read(tmp_path / "d", "denoiser")
    UNet(UNetConfig(**config["unet"])).load_state_dict(tensors)
    assert run(train_denoiser, tmp_path / "p", folder, "--pure-noise", "--preset", "small") == [
        "mean-image.png", "noising.png", "samples/epoch-01.png", "training/loss.png",
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "outputs differ from the mean digit by 0." in shown and titles["epoch-01.png"] == "epoch 1, noise alone"
    assert figures(train_denoiser, tmp_path / "d", tmp_path / "e", folder) == ["out-of-distribution.png"]
    capsys.readouterr()
    assert figures(train_denoiser, tmp_path / "p", tmp_path / "q", folder) == ["mean-image.png"]  # its config says so
    said = [line for text in (shown, capsys.readouterr().out) for line in text.splitlines() if "outputs differ" in line]
    numbers = [[float(word) for word in line.split() if word[0].isdigit()] for line in said]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)  # the network's, but for float16


@pytest.fixture
def asked(monkeypatch):
    """The guidance scales of all that is drawn, and how often the memorisation floors drop the class."""
    scales, dropouts = [], []
    guided, eps, velocities = drawing.guided_unet, floors.memorised_eps_loss, floors.memorised_flow_loss
    monkeypatch.setattr(drawing, "guided_unet", lambda unet, c, scale: scales.append(scale) or guided(unet, c, scale))
    monkeypatch.setattr(floors, "memorised_eps_loss", lambda x, s, p: dropouts.append(p) or eps(x, s, p))
    monkeypatch.setattr(floors, "memorised_flow_loss", lambda x, p: dropouts.append(p) or velocities(x, p))
    return scales, dropouts


def test_train_diffusion_makes_its_pictures(folder, tmp_path, capsys, asked):
    made = run(train_diffusion, tmp_path / "d", folder, "--preset", "class")
    always = ["cleaned.png", "samples/epoch-01.png", "sampling.gif", "training/loss.png"]
    assert made == sorted([*always, "guidance.png", "unconditional.gif"])
    shown = capsys.readouterr().out
    assert "alpha_bar at the last of 300 times: 0.0481; 21.9%" in shown and "; memorisation 0.0" in shown
    # samples, sampling.gif, unconditional.gif, guidance.png, cleaned.png
    assert asked[0] == [5.0, 5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert run(train_diffusion, tmp_path / "t", folder) == always and asked[1] == [0.1, 1.0]
    asked[0].clear()
    ends = ["cleaned.png", "guidance.png", "sampling.gif", "unconditional.gif"]
    assert figures(train_diffusion, tmp_path / "d", tmp_path / "e", folder) == ends
    assert images.read_metadata(tmp_path / "e" / "cleaned.png")["preset"] == "class"
    assert asked[0] == [5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert "nothing to guide; leave out --guidance-scale" in fails(
        capsys, train_diffusion.main, "--data", folder, "--out", tmp_path / "u", "--guidance-scale", 2
    )


def test_train_flow_makes_its_pictures_and_reflow_starts_from_its_teacher(folder, tmp_path, capsys, monkeypatch, asked):
    made = run(train_flow, tmp_path / "f", folder, "--preset", "class", "--guidance-scale", "3")
    assert asked == (
        [3.0, 3.0, 0.0, 1.0, 5.0, 10.0, 3.0, 1.0],
        [0.1],
    )  # samples, .gif, guidance.png, solvers.png, straight
    edit_config(tmp_path / "f", dataset="fashion")
    assert made == ["guidance.png", "samples/epoch-01.png", "sampling.gif", "solvers.png", "training/loss.png"]
    ends = ["guidance.png", "sampling.gif", "solvers.png"]
    assert figures(train_flow, tmp_path / "f", tmp_path / "g", tmp_path / "no data") == ends
    assert images.read_metadata(tmp_path / "g" / "guidance.png")["dataset"] == "fashion"
    made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow", "--teacher", str(tmp_path / "f"), "--lr", "0")
    shown = capsys.readouterr().out
    assert "reflow.png" in made and "; the teacher 0." in shown and "(0 is straight): the teacher" in shown
    (_, teacher), (config, student) = (networks.read(tmp_path / name, "flow") for name in ("f", "r"))
    assert config["dataset"] == "fashion"  # the teacher's
    assert all(torch.equal(student[k], v) for k, v in teacher.items() if "running" not in k and "num_" not in k)
    flags = ["--preset", "reflow", "--teacher", tmp_path / "f", "--out", tmp_path / "few"]
    assert "--pairs 70 is too few: a tenth is kept" in fails(capsys, train_flow.main, *flags, "--pairs", 70)
    sample.main(["--model", str(tmp_path / "f"), str(tmp_path / "r"), "--digits", "3,7-8",
                 "--num-images", "2", "--quick", "--guidance-scale", "1", "5",
                 "--tensors", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "s.png")])  # fmt: skip
    kept = load_file(tmp_path / "s.safetensors")
    assert kept["labels"].tolist() == [3, 7, 8, 3, 7, 8] and kept["images"].shape == (6, 1, 28, 28)
    net = drawing.load(tmp_path / "f", "flow", torch.device("cpu"))
    with torch.no_grad():
        again = drawing.draw_flow(
            drawing.velocity(net, kept["labels"], 1.0), sample.seeded(0, 6), torch.device("cpu"), 4
        )
    torch.testing.assert_close(kept["images"], again, rtol=0, atol=1e-4)
    (tmp_path / "r" / "config.json").unlink()
    (tmp_path / "r" / "training" / "checkpoint.pt").unlink()
    assert "holds pairs of another teacher or other settings" in fails(
        capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "r", "--preset", "reflow",
        "--teacher", tmp_path / "f", "--seed", "5",
    )  # fmt: skip
    # With a learning rate: the names in the figure and in the print are those of the networks.
    named, split, original = {}, [], training.Run
    monkeypatch.setattr(train_flow, "few_steps", lambda models, x_0, _: named.update(models) or ([x_0], ["x"]))
    monkeypatch.setattr(train_flow, "Run", lambda *args, **more: split.append(args[2:4]) or original(*args, **more))
    shutil.copytree(tmp_path / "f", tmp_path / "moved")
    for name in ("f", "moved"):  # the second time it goes on from there: the same teacher, wherever it lies
        run(train_flow, tmp_path / "q", folder, "--preset", "reflow", "--teacher", str(tmp_path / name))
    assert "going on from step 11 of" in capsys.readouterr().out
    x, time = draw_noise((10, 1, 28, 28), seeded(0, 10)), torch.full((10,), 0.7)
    nets = {"the teacher": net, "this model": drawing.load(tmp_path / "q", "flow", torch.device("cpu"))}
    told = {name: drawing.velocity(network, torch.arange(10))(x, time) for name, network in nets.items()}
    assert (told["the teacher"] - told["this model"]).abs().max() > 0.01
    for how in ("trained", "figures"):
        for name, expected in told.items():
            torch.testing.assert_close(named.pop(name)(x, time), expected, rtol=0.01, atol=2e-3)
        if how == "trained":  # the second time: the config of the network says who its teacher was
            assert figures(train_flow, tmp_path / "q", tmp_path / "z", folder) == sorted([*ends, "reflow.png"])
    edit_config(tmp_path / "q", teacher=str(tmp_path / "gone"))
    message = fails(capsys, train_flow.main, "--figures", tmp_path / "q", "--out", tmp_path / "z")
    assert f"there is no folder {tmp_path / 'gone'}, the teacher of reflow; pass the right one as --teacher" in message
    train, test = ({tuple(noise.flatten().tolist()) for noise in part.images[:, 1]} for part in split[0])
    assert (len(train), len(test)) == (180, 20) and not train & test
    # Onto another run: told before any pair is drawn.
    monkeypatch.setattr(train_flow, "kept_pairs", lambda *args: pytest.fail("pairs were drawn"))
    assert "of a run training flow class, 400 pictures of mnist, not flow reflow, 180 pictures of" in fails(
        capsys, train_flow.main, "--quick", "--preset", "reflow", "--out", tmp_path / "f"
    )
    assert "--teacher and --pairs are for --preset reflow" in fails(
        capsys, train_flow.main, "--quick", "--pairs", "100", "--out", tmp_path / "x"
    )
    untold = UNet(UNetConfig(4, time=True))
    networks.write(tmp_path / "t", untold, {"kind": "flow", "unet": asdict(untold.config)})
    assert "nothing to guide; leave out --guidance-scale" in fails(
        capsys, train_flow.main, "--preset", "reflow", "--teacher", tmp_path / "t", "--guidance-scale", 2,
        "--out", tmp_path / "x",
    )  # fmt: skip
    assert "draws mnist, which is what reflow learns; leave out --dataset" in fails(
        capsys, train_flow.main, "--quick", "--preset", "reflow", "--dataset", "fashion", "--out", tmp_path / "x"
    )


@pytest.mark.parametrize(("module", "kind"), [(train_diffusion, "ddpm"), (train_flow, "flow")])
def test_animations_lead_from_the_noise_to_the_sample(module, kind, folder, tmp_path, monkeypatch):
    """The class is told in the first, and in the second only zeros; the strip after the last epoch ends alike."""
    walks, samples, told = [], [], []
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, time=None, c=None: told.append(c) or forward(self, x, time, c))

    def note(draw, steps, path):
        seen = []
        told.clear()
        end = draw(lambda i, t, x, *_: seen.append(x))
        walks.append((path.name, seen, end, torch.cat(told)))
        assert len(seen) == steps

    monkeypatch.setattr(module, "save_animation", note)
    monkeypatch.setattr(module, "save_samples", lambda x, *_: samples.append(x))
    run(module, tmp_path / "n", folder, "--preset", "class")
    name, seen, end, classes = walks[0]
    assert name == "sampling.gif" and classes.sum(1).max() == 1
    assert torch.equal(seen[0], draw_noise((10, 1, 28, 28), seeded(0, 10)))
    torch.testing.assert_close(end, samples[-1][:10], rtol=0, atol=1e-4)
    if kind == "ddpm":
        assert walks[1][0] == "unconditional.gif" and not walks[1][3].any()
        assert torch.equal(walks[1][1][0], seen[0]) and not torch.equal(walks[1][2], end)


@pytest.mark.parametrize(
    ("module", "kind"), [(train_denoiser, "denoiser"), (train_diffusion, "ddpm"), (train_flow, "flow")]
)
def test_a_run_that_is_stopped_leaves_its_network_and_what_it_is(module, kind, fashion, tmp_path, monkeypatch):
    original = training.Run.one_step

    def interrupted(self, batch, step):
        if step == 9:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch, step)

    monkeypatch.setattr(training.Run, "one_step", interrupted)
    run(module, tmp_path / "n", fashion, "--dataset", "fashion", "--seed", "4")
    config, tensors = networks.read(tmp_path / "n", kind)
    assert config["trained"] == "0.4 of 1 epochs"  # 10 of 25 steps
    assert config["dataset"] == "fashion" and config["preset"] in ("course", "time") and config["seed"] == 4
    assert config["plan"] == {"epochs": 1, "batch_size": 16, "lr": 0.01, "lr_decay": 1.0}
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(tensors["down1.0.0.weight"], kept["down1.0.0.weight"].half().float())


def test_a_network_can_be_drawn_from_after_its_first_epoch(folder, tmp_path, monkeypatch):
    """Not before, and the run is not taken for one that never began."""
    out, original = tmp_path / "n", training.Run.one_step

    def killed_at(last):
        def one_step(self, batch, step):
            if step == last:
                raise KeyboardInterrupt
            return original(self, batch, step)

        monkeypatch.setattr(training.Run, "one_step", one_step)
        with pytest.raises(SystemExit):
            run(train_flow, out, folder, "--preset", "class", "--epochs", "2")

    killed_at(15)
    with pytest.raises(
        ValueError, match="no network in .* yet, only a run that has begun: it is written after the first epoch"
    ):
        networks.read(out, "flow")
    killed_at(40)
    assert networks.read(out, "flow")[0]["trained"] == "1 of 2 epochs"


def test_without_out_the_folder_has_the_name_of_what_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def out(*given):
        p = flags.parser("", "flow", train_flow.PRESETS)
        p.add_argument("--pure-noise", action="store_true")
        p.add_argument("--teacher")
        return flags.parsed(p, "flow", train_flow.PRESETS, given).out.as_posix()

    assert out() == out("--preset", "time") == "out/mnist/flow" and out("--preset", "class") == "out/mnist/flow-class"
    assert out("--dataset", "fashion", "--quick") == "out/mnist/flow-fashion-quick" and out("--out", "x") == "x"
    assert out("--pure-noise", "--preset", "class", "--quick") == "out/mnist/flow-class-pure-noise-quick"
    assert out("--figures", str(WEIGHTS / "mnist" / "flow")) == "out/mnist/flow-class-figures"


@pytest.mark.parametrize(
    ("module", "flags", "idle"),
    [(train_flow, ["--lr", "1", "--preset", "class", "--dataset", "fashion"], "--preset, --lr, --dataset"),
     (train_denoiser, ["--pure-noise", "--four", "--compile"], "--compile, --pure-noise, --four"),
     (train_denoiser, ["--seed", "7"], "--seed"),
     (train_diffusion, ["--sample-epochs", "1"], "--sample-epochs"), (train_flow, ["--pairs", "9"], "--pairs")],
)  # fmt: skip
def test_flags_of_training_are_not_for_figures(module, flags, idle, capsys, tmp_path):
    embedded = WEIGHTS / "mnist" / ("ddpm" if module is train_diffusion else "flow")
    message = fails(capsys, module.main, "--figures", embedded, "--out", tmp_path, *flags)
    assert "--figures trains nothing" in message and message.rstrip().endswith(f"leave out {idle}")


def test_the_folder_of_figures_is_tried_before_the_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(drawing, "load", lambda *args: pytest.fail("loaded"))
    message = fails(capsys, train_flow.main, "--figures", WEIGHTS / "mnist" / "flow", "--out", tmp_path / "file")
    assert "cannot write to" in message and "pass another --out" in message


def test_one_kind_of_network_does_not_go_on_as_another(folder, tmp_path, capsys):
    """The same network, the same plan: only the loss would be another."""
    run(train_diffusion, tmp_path / "n", folder, "--preset", "class")
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--preset", "class", "--out", tmp_path / "n")
    assert "of a run training ddpm class, 400 pictures of mnist, not flow class, 400 pictures" in message
    assert networks.read(tmp_path / "n", "ddpm")[0]["kind"] == "ddpm"


def test_the_home_folder_is_found_without_a_shell(folder, tmp_path, monkeypatch):
    """--out=~/n is what a program is told by bash."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train_flow.main(["--quick", "--data", str(folder), "--out=~/n"])
    networks.read(tmp_path / "n", "flow")
    assert (tmp_path / "n" / "training" / "checkpoint.pt").is_file()
    train_flow.main(["--quick", "--data", str(folder), "--figures=~/n", "--out=~/f"])
    sample.main(["--quick", "--model=~/n", "--out=~/s.png"])
    assert (tmp_path / "f" / "solvers.png").is_file() and (tmp_path / "s.png").is_file()


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_an_unusable_folder_is_told_before_the_floors_are_computed(module, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("spectrum", "mean_image_mse"):
        monkeypatch.setattr(floors, name, lambda x: pytest.fail("floors were computed"))
    assert "cannot write to" in fails(
        capsys, module.main, "--quick", "--data", folder, "--out", tmp_path / "file" / "n"
    )


def test_epochs_to_sample_after_must_be_in_the_plan(capsys, tmp_path):
    for epochs in ([0], [2, 11]):
        message = fails(capsys, train_flow.main, "--out", tmp_path / "x", "--sample-epochs", *epochs)
        assert f"--sample-epochs must lie in 1..10, the epochs there are, got {epochs}" in message


@pytest.mark.parametrize("module", [train_diffusion, train_flow])
def test_samples_are_drawn_after_the_epochs_that_are_asked_for_and_the_last(module, folder, tmp_path):
    flags = ["--epochs", "5", "--batch-size", "200"]
    made = run(module, tmp_path / "a", folder, *flags, "--sample-epochs", "2", "3")
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (2, 3, 5)]
    made = run(module, tmp_path / "b", folder, *flags)
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (1, 5)]


def test_samples_that_are_no_numbers_do_not_end_the_training(folder, tmp_path, capsys):
    """Guidance of 1e30 makes them so; the run comes to its end, and its network is there."""
    made = run(train_flow, tmp_path / "n", folder, "--preset", "class", "--guidance-scale", "1e30")
    assert "samples/epoch-01.png" in made and "solvers.png" in made
    assert re.search(
        "warning: 10 of the digits in .*epoch-01.png hold values that are not finite", capsys.readouterr().err
    )
    assert networks.read(tmp_path / "n", "flow")[0]["trained"] == "1 of 1 epochs"


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_every_preset_begins_a_run_and_is_told_in_the_help(module, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    for name, preset in module.PRESETS.items():
        assert f"{name:{max(map(len, module.PRESETS))}}  {preset.plan}; " in shown
    if module is train_diffusion:
        assert "20 epochs, batches of 128, learning rate 0.001, falling to 0.000112; 64 channels" in shown
    for name in set(module.PRESETS) - {"reflow"}:
        monkeypatch.setattr(training.Run, "complete", lambda *args: False)
        module.main(["--quick", "--data", str(folder), "--out", str(tmp_path / name), "--preset", name])
        assert (tmp_path / name / "training" / "checkpoint.pt").is_file()


def test_a_loss_that_explodes_is_told_in_one_line(folder, tmp_path, capsys):
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "n", "--lr", "1e30",
                    "--epochs", 2)  # fmt: skip
    assert "error: loss is nan at step" in message or "error: loss is inf at step" in message
    assert "--seed must lie in 0..2^63 - 1, got -1" in fails(capsys, train_flow.main, "--seed", -1)
    assert "--seed must lie in 0..2^63 - 1, got 9223372036854775808" in fails(capsys, train_flow.main, "--seed", 2**63)


def test_the_presets_are_the_courses():
    """Batch, epochs, rate and width of the course's pages, and its schedule."""
    from minidiff.mnist.train_denoiser import PRESETS as denoiser
    from minidiff.mnist.train_diffusion import PRESETS as diffusion
    from minidiff.mnist.train_flow import PRESETS as flows

    assert denoiser["course"] == train_denoiser.Preset(Plan(5, 256, 1e-4), UNetConfig(128))
    assert train_denoiser.SIGMA == 0.5
    for name, classes in (("time", 0), ("class", 10)):
        assert diffusion[name].plan == Plan(20, 128, 1e-3, 0.1) and flows[name].plan == Plan(10, 64, 1e-2, 0.1)
        for unet in (diffusion[name].unet, flows[name].unet):
            assert (unet.hidden, unet.time, unet.num_classes) == (64, True, classes)
    assert flows["time"].unet.modulate == "mul" and diffusion["time"].unet.modulate == "add"
    assert flows["no-scheduler"].plan == Plan(15, 64, 5e-3) and flows["no-scheduler"].unet == flows["class"].unet
    assert flows["better"].plan == Plan(50, 64, 1e-2, 0.1)  # the course's 0.05 is worse: walkthrough, chapter 12
    assert flows["better"].unet == UNetConfig(128, time=True, modulate="mul")
    betas = 1 - drawing.course_schedule().alphas_cumprod[1:] / drawing.course_schedule().alphas_cumprod[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 300, dtype=torch.float64)[1:])
    assert (drawing.FLOW_STEPS, drawing.DROPOUT, drawing.GUIDANCE_SCALE) == (50, 0.1, 5.0)
