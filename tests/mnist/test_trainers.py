"""The three trainers and the sampler: what their losses ask for, and that every command makes its pictures."""

import functools
import os
import signal
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from minidiff import flow, images
from minidiff.hub import WEIGHTS
from minidiff.mnist import drawing, judge, sample, train_denoiser, train_diffusion, train_flow, training
from minidiff.mnist.data import Digits, generator
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import seeded
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
    assert times.min().round() >= 1 and times.max().round() <= 300 and abs(times.mean() - 150.5) < 5 * 86.6 / 5000**0.5


def test_the_flows_target_is_the_line_from_noise_to_digit(digits):
    some = digits[:50]
    seen = {}

    def perfect(x_t, time):
        seen["x_0"] = (x_t - time.view(-1, 1, 1, 1) * some.images) / (1 - time.view(-1, 1, 1, 1))
        return some.images - seen["x_0"]

    assert train_flow.FlowMatching()(Told(perfect), some, generator("cpu", 0)) < 1e-4
    n = seen["x_0"].numel()
    assert abs(seen["x_0"].std() - 1) < 5 / (2 * n) ** 0.5 + 1e-3


def test_reflow_learns_the_lines_it_is_given(digits):
    x_0 = torch.randn(50, 1, 28, 28)
    pairs = Digits(torch.cat([digits.images[:50], x_0], dim=1), digits.labels[:50])
    line = digits.images[:50] - x_0
    net = Told(lambda x, time: line)
    assert train_flow.FlowMatching()(net, pairs, generator("cpu", 0)) == 0
    x, time, _ = net.seen[0]
    torch.testing.assert_close(x, flow.path(x_0, digits.images[:50], time))


def test_pairs_join_each_noise_to_where_the_teacher_leads_it_for_its_class():
    torch.manual_seed(0)
    teacher, cpu = UNet(UNetConfig(4, time=True, num_classes=10)).eval(), torch.device("cpu")
    pairs = train_flow.make_pairs(teacher, 13, 0, cpu, 3, batch_size=5)
    x_1, x_0 = pairs.images.split(1, dim=1)
    assert pairs.labels.tolist() == [*range(10), 0, 1, 2] and abs(x_0.std() - 1) < 5 / (2 * x_0.numel()) ** 0.5
    torch.testing.assert_close(flow.solve(drawing.velocity(teacher, pairs.labels), x_0, flow.grid(3)), x_1)


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
    table = train_denoiser.errors_by_sigma(lambda z: z, digits, torch.ones(3))
    # Doing nothing leaves sigma^2; of variance 1 the best is sigma^2 / (1 + sigma^2).
    for sigma, error, linear in table:
        assert error == pytest.approx(sigma**2, rel=0.02) and linear == pytest.approx(sigma**2 / (1 + sigma**2))


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


def run(module, out, folder, *flags):
    module.main(["--quick", "--data", str(folder), "--out", str(out), *flags])
    return sorted(str(p.relative_to(out)) for p in out.rglob("*.*") if p.suffix in (".png", ".gif"))


def test_train_denoiser_makes_its_pictures(folder, tmp_path, capsys):
    made = run(train_denoiser, tmp_path / "d", folder, "--four")
    assert made == ["noising.png", "out-of-distribution.png", "samples/epoch-01.png"]
    shown = capsys.readouterr().out
    assert "loss on 100 test pictures: 0." in shown and "sigma 0.8: error 0." in shown
    run(train_denoiser, tmp_path / "d", folder, "--four")  # again: nothing is trained, all is said as before
    assert capsys.readouterr().out.splitlines()[1:-1] == shown.splitlines()[1:-1]
    assert "of a run with another what (course, 400 pictures of mnist, now pure-noise, 400 pictures" in fails(
        capsys, train_denoiser.main, "--quick", "--data", folder, "--out", tmp_path / "d", "--preset", "pure-noise"
    )
    assert images.read_metadata(tmp_path / "d" / "noising.png")["command"] == "python -m minidiff.mnist.train_denoiser"
    config, tensors = training.read(tmp_path / "d", "denoiser")
    UNet(UNetConfig(**config["unet"])).load_state_dict(tensors)
    assert run(train_denoiser, tmp_path / "p", folder, "--preset", "pure-noise") == [
        "mean-image.png", "noising.png", "samples/epoch-01.png",
    ]  # fmt: skip
    assert "outputs differ from the mean digit by 0." in capsys.readouterr().out


def test_train_diffusion_makes_its_pictures(folder, tmp_path, capsys):
    made = run(train_diffusion, tmp_path / "d", folder, "--preset", "class")
    assert made == ["cleaned.png", "guidance.png", "samples/epoch-01.png", "sampling.gif", "unconditional.gif"]
    assert "alpha_bar at the last of 300 times: 0.0481; 21.9%" in capsys.readouterr().out
    assert Image.open(tmp_path / "d" / "sampling.gif").n_frames >= 6
    assert run(train_diffusion, tmp_path / "t", folder) == ["cleaned.png", "samples/epoch-01.png", "sampling.gif"]


def test_train_flow_makes_its_pictures_and_reflow_starts_from_its_teacher(folder, tmp_path, capsys):
    made = run(train_flow, tmp_path / "f", folder, "--preset", "class")
    assert made == ["guidance.png", "samples/epoch-01.png", "sampling.gif", "solvers.png"]
    made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow", "--teacher", str(tmp_path / "f"), "--lr", "0")
    assert "reflow.png" in made and "the teacher" in capsys.readouterr().out
    student, teacher = (training.read(tmp_path / name, "flow")[1] for name in ("r", "f"))
    assert all(torch.equal(student[k], v) for k, v in teacher.items() if "running" not in k and "num_" not in k)
    assert "holds pairs of another teacher or other settings" in fails(
        capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "r", "--preset", "reflow",
        "--teacher", tmp_path / "f", "--seed", "5",
    )  # fmt: skip
    flags = ["--preset", "reflow", "--teacher", tmp_path / "f", "--out", tmp_path / "few"]
    assert "--pairs 70 is too few: a tenth is kept" in fails(capsys, train_flow.main, *flags, "--pairs", 70)
    sample.main(["--kind", "flow", "--model", str(tmp_path / "f"), str(tmp_path / "r"), "--digits", "3,7-8",
                 "--num-images", "2", "--quick", "--guidance-scale", "1", "5",
                 "--tensors", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "s.png")])  # fmt: skip
    kept = training.load_file(tmp_path / "s.safetensors")
    assert kept["labels"].tolist() == [3, 7, 8, 3, 7, 8] and kept["images"].shape == (6, 1, 28, 28)
    net = drawing.load(tmp_path / "f", "flow", torch.device("cpu"))
    with torch.no_grad():
        again = drawing.draw_flow(
            drawing.velocity(net, kept["labels"], 1.0), sample.seeded(0, 6), torch.device("cpu"), 4
        )
    torch.testing.assert_close(kept["images"], again, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--digits", "7-3"], "--digits must be like 0-9, 3,7 or 0-2,9, got '7-3'"),
        (["--digits", "ten"], "got 'ten'"),
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (
            ["--model", "nowhere"],
            "no trained ddpm in nowhere; train one with `python -m minidiff.mnist.train_d",
        ),
        (["--out", "digits.xyz"], "must end in one of"),
        (["--solver", "heun"], "--solver is for --kind flow"),
        (["--kind", "flow", "--solver", "dormand-prince", "--steps", "9"], "chooses its own steps; leave out --steps"),
        (["--steps", "0"], "cannot take 0 steps out of 300; choose 1 to 300"),
        (["--judge", "nowhere", "--quick"], "no trained judge in nowhere"),
        (["--tensors", "digits.pt"], "must end in one of .safetensors"),
    ],
)
def test_wrong_flags_are_told_in_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        sample.main(["--out", str(tmp_path / "s.png"), *flags])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_a_network_that_is_not_told_the_digit_is_not_asked_for_one(tmp_path, capsys):
    unet = UNet(UNetConfig(4, time=True))
    training.write(tmp_path / "f", unet, {"kind": "flow", "unet": asdict(unet.config)})
    flags = ["--kind", "flow", "--model", str(tmp_path / "f"), "--quick", "--out", str(tmp_path / "s.png")]
    sample.main([*flags, "--tensors", str(tmp_path / "s.safetensors")])
    assert "labels" not in training.load_file(tmp_path / "s.safetensors")
    assert "agreement" not in capsys.readouterr().out
    assert "nothing to guide; pass one --guidance-scale" in fails(capsys, sample.main, *flags, "--guidance-scale", 0, 5)


@pytest.mark.parametrize(
    ("module", "kind"), [(train_denoiser, "denoiser"), (train_diffusion, "ddpm"), (train_flow, "flow")]
)
def test_a_run_that_is_stopped_leaves_its_network(module, kind, folder, tmp_path, monkeypatch):
    original = training.Run.one_step

    def interrupted(self, batch, step):
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, step)

    monkeypatch.setattr(training.Run, "one_step", interrupted)
    run(module, tmp_path / "n", folder)
    config, tensors = training.read(tmp_path / "n", kind)
    assert config["trained"] == "0.4 of 1 epochs"  # 10 of 25 steps
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(tensors["down1.0.0.weight"], kept["down1.0.0.weight"].half().float())


def test_a_loss_that_explodes_is_told_in_one_line(folder, tmp_path, capsys):
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "n", "--lr", "1e30",
                    "--epochs", 2)  # fmt: skip
    assert "error: loss is nan at step" in message or "error: loss is inf at step" in message


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_the_embedded_networks_draw_the_digits_they_are_asked_for(kind):
    labels, cpu = torch.arange(10).repeat(2), torch.device("cpu")
    unet = drawing.load(WEIGHTS / "mnist" / kind, kind, cpu)
    if kind == "ddpm":
        x = drawing.draw_ddpm(drawing.prediction(unet, labels, 5.0), seeded(0, 20), cpu, 30)
    else:
        x = drawing.draw_flow(drawing.velocity(unet, labels, 5.0), seeded(0, 20), cpu, 10)
    verdicts = judge.look(judge.load(WEIGHTS / "mnist" / "judge")[0], x)[1]
    assert judge.agreement(verdicts, labels) >= 0.85


def test_digits_are_parsed():
    assert sample.parse_digits("0-2,9,4") == [0, 1, 2, 9, 4]
