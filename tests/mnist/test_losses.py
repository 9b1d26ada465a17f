"""The losses of the three trainers, and their figures: values by hand, and the answers that have no loss."""

import functools

import numpy as np
import pytest
import torch

from minidiff import flow
from minidiff.mnist import levels, models, train_denoiser, train_diffusion, train_flow
from minidiff.mnist.data import Digits, generator
from minidiff.mnist.unet import UNet, UNetConfig


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
    monkeypatch.setattr(models, "at_once", lambda device: 2)
    pairs = train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)
    x_1, x_0 = pairs.images.split(1, dim=1)
    assert pairs.labels.tolist() == [*range(10), 0, 1, 2] and abs(x_0.std() - 1) < 5 / (2 * x_0.numel()) ** 0.5
    v = models.velocity(models.guided_unet(teacher, pairs.labels))
    torch.testing.assert_close(flow.solve(v, x_0, flow.grid(3)), x_1)
    # Killed after the second of three files: the third is made, the others are not, and all is as if in one go.
    (tmp_path / "000010.safetensors").unlink()
    made, make = [], train_flow.make_pairs
    monkeypatch.setattr(train_flow, "make_pairs", lambda *args: made.append(args) or make(*args))
    again = train_flow.kept_pairs(tmp_path, teacher, 13, 0, 3)
    assert len(made) == 1 and torch.equal(again.images, pairs.images) and torch.equal(again.labels, pairs.labels)


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


def test_the_noising_figure_uses_one_digit_and_one_noise_along_a_row(digits):
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
    assert names == ["clean", "noisy", "denoised"] and torch.equal(torch.cat(rows[::3]), digits.images[:20])
    for clean, noisy, denoised in zip(rows[::3], rows[1::3], rows[2::3]):
        assert torch.equal(denoised, -noisy) and 0.4 < (noisy - clean).std() < 0.6


def test_the_out_of_distribution_figure_has_a_row_for_each_sigma_with_the_answers_below(digits):
    """Three digits beside each other, the same noise at every sigma: 0.6 has six tenths of what 1.0 adds."""
    table = [(sigma, 0.1 * sigma, 0.2) for sigma in (0.0, 0.5, 0.6, 1.0)]
    rows, names = train_denoiser.out_of_distribution(lambda z: 0.25 - z, digits[:3], table)
    assert names == [f"sigma {s}: error {e}, best linear 0.2000" for s, e in
                     ((0.0, "0.0000"), (0.5, "0.0500"), (0.6, "0.0600"), (1.0, "0.1000"))]  # fmt: skip
    assert [row.shape for row in rows] == [(1, 1, 56, 84)] * 4
    clean = torch.cat(list(digits.images[:3]), dim=-1)
    noise = rows[3][0, :, :28] - clean
    assert torch.equal(rows[0][0, :, :28], clean) and 0.9 < noise.std() < 1.1
    assert not torch.equal(noise[..., :28], noise[..., 28:56])
    for row, (sigma, *_) in zip(rows, table):
        torch.testing.assert_close(row[0, :, :28], clean + sigma * noise, rtol=0, atol=1e-6)
        assert torch.equal(row[0, :, 28:], 0.25 - row[0, :, :28])


def test_the_mean_image_is_recognised_as_such(digits):
    mean = digits.images.mean(0, keepdim=True)
    *_, distance = train_denoiser.pure_noise_figure(lambda z: (mean + 0.1).expand_as(z), digits)
    assert distance == pytest.approx(0.1, rel=1e-5)
    *_, distance = train_denoiser.pure_noise_figure(lambda z: mean + 0.2 * z, digits)  # each by itself
    assert distance == pytest.approx(0.2, rel=0.02)


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
