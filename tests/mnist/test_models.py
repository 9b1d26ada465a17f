"""A trained network as a prediction and as a velocity: its clock, its guidance, and the course's sampling loop."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minidiff import flow
from minidiff.guidance import combine
from minidiff.mnist import models
from minidiff.mnist.data import one_hot
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import denoise, draw_noise, final, seeded
from minidiff.schedule import respaced
from minidiff.toy import gaussian
from minidiff.weights import WEIGHTS


def net(classes=True):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True, num_classes=10 if classes else 0)).eval().requires_grad_(False)
    for block in (unet.fc1_t, unet.fc2_t, *([unet.fc1_c, unet.fc2_c] if classes else [])):
        block[2].weight *= 300  # so that time and class are felt
    return unet


def last(states):
    *_, end = states
    return end


X, LABELS = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 1, 7])


def test_time_300_of_the_course_is_index_299_and_is_told_as_1():
    unet = net(classes=False)
    predict = models.prediction(models.guided_unet(unet))
    for t, told in ((299, 1.0), (0, 1 / 300), (149, 0.5)):
        assert torch.equal(predict(X, torch.full((3,), t))[0], unet(X, torch.full((3,), told)))
    half = torch.full((3,), 0.5)
    assert torch.equal(models.velocity(models.guided_unet(unet))(X, half), unet(X, half))


def test_the_courses_schedule_leaves_22_percent():
    """alpha_bar_300 = 0.04806, computed by hand from prod (1 - beta)."""
    product = 1.0
    for i in range(300):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 299)
    schedule = models.course_schedule()
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(product, rel=1e-12) == pytest.approx(0.04806, abs=5e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_is_the_one_formula_with_zeros_for_no_class(scale):
    unet, t = net(), torch.full((3,), 99)
    cond, uncond = unet(X, (t + 1) / 300, one_hot(LABELS)), unet(X, (t + 1) / 300, torch.zeros(3, 10))
    assert (cond - uncond).abs().max() > 1e-3
    expected = combine(uncond, cond, scale)
    answer = models.guided_unet(unet, LABELS, scale)
    torch.testing.assert_close(models.prediction(answer)(X, t)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(models.velocity(answer)(X, (t + 1) / 300), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(models.prediction(models.guided_unet(unet))(X, t)[0], uncond, rtol=0, atol=1e-6)


def test_dropped_classes_are_zero_rows_as_often_as_asked():
    labels = torch.arange(10_000) % 10
    with_classes = net()
    c = models.dropped(with_classes, labels, torch.Generator().manual_seed(0))
    kept = c.sum(1) == 1
    assert torch.equal(c[kept], one_hot(labels)[kept]) and (c[~kept] == 0).all()
    assert abs((~kept).float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5
    assert (models.dropped(with_classes, labels, torch.Generator(), 1.0) == 0).all()
    assert torch.equal(models.dropped(with_classes, labels, torch.Generator(), 0.0), one_hot(labels))
    assert models.dropped(net(classes=False), labels, torch.Generator()) is None


def test_ddpm_sampling_equals_the_courses_algorithm_written_out():
    """The course's loop in its own letters, t = T..1: x_0 estimate, posterior mean, sqrt(beta_t) z, z = 0 at t = 1."""
    unet, T = net(classes=False), 300
    beta = [0.0] + [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
    alpha_bar = [1.0]
    for b in beta[1:]:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    start = 12  # the last 12 steps: the end is where mistakes of indexing are seen
    generators = seeded([3, 4])
    x = noise = draw_noise((2, 1, 28, 28), generators)
    for t in range(start, 0, -1):
        z = draw_noise(x.shape, generators) if t > 1 else torch.zeros_like(x)
        eps = unet(x, torch.full((2,), t / T))
        x_0 = (x - (1 - alpha_bar[t]) ** 0.5 * eps) / alpha_bar[t] ** 0.5
        x = (alpha_bar[t - 1] ** 0.5 * beta[t] / (1 - alpha_bar[t]) * x_0
             + (1 - beta[t]) ** 0.5 * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * x + beta[t] ** 0.5 * z)  # fmt: skip
    generators = seeded([3, 4])
    draw_noise((2, 1, 28, 28), generators)
    predict, times = models.prediction(models.guided_unet(unet)), torch.arange(start - 1, -1, -1)
    found = final(denoise(predict, noise, times, models.course_schedule(), generators))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm-lower", "ddpm-clip", "ddpm-lower-clip"])
def test_fewer_steps_are_the_same_algorithm_between_the_times_they_keep(sampler):
    """Walked from t to s, beta is 1 - alpha_bar_t / alpha_bar_s. The smaller variance is beta times (1 - alpha_bar_s) /
    (1 - alpha_bar_t). Estimates of x_0 are clipped to [0, 1] only by the samplers that say so."""
    unet, T = net(classes=False), 300
    alpha_bar = [1.0]
    for i in range(T):
        alpha_bar.append(alpha_bar[-1] * (1 - (1e-4 + (0.02 - 1e-4) * i / (T - 1))))
    times = [300, 200, 101, 1, 0]  # in the course's counting: evenly spread, both ends
    generators = seeded([3, 4])
    x = draw_noise((2, 1, 28, 28), generators)
    for t, s in zip(times, times[1:]):
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        eps = unet(x, torch.full((2,), t / T))
        x_0 = (x - (1 - alpha_bar[t]) ** 0.5 * eps) / alpha_bar[t] ** 0.5
        x_0 = x_0.clamp(0, 1) if "clip" in sampler else x_0
        x = (alpha_bar[s] ** 0.5 * beta / (1 - alpha_bar[t]) * x_0
             + (1 - beta) ** 0.5 * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * x)  # fmt: skip
        variance = beta * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) if "lower" in sampler else beta
        x = x + variance**0.5 * draw_noise(x.shape, generators) if s else x
    found = last(models.walk(models.guided_unet(unet), seeded([3, 4]), torch.device("cpu"), 4, sampler))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-3)
    assert (found.max().item() > 1.5) is ("clip" not in sampler)  # as far out as clipping would not leave it


def test_a_walk_may_begin_as_training_ended():
    """ddpm-twice: five steps to a first digit, which is clamped and noised to t = 299 with new noise: sqrt(a) digit +
    sqrt(1 - a) noise. From there it goes on as ddpm-lower does."""
    a, times = models.course_schedule().alphas_cumprod[-1].item(), []
    unet_answer = models.guided_unet(net(), LABELS)

    def answer(x, time):
        times.append(round(300 * float(time[0])) - 1)
        return unet_answer(x, time)

    states = list(models.walk(answer, seeded([1, 2, 3]), torch.device("cpu"), 3, "ddpm-twice"))
    assert times == [299, 224, 150, 75, 0, 299, 150, 0] and len(states) == 4
    generators = seeded([1, 2, 3])
    noise, predict = draw_noise((3, 1, 28, 28), generators), models.prediction(unet_answer, lower=True)
    digit = final(denoise(predict, noise, respaced(5, 300), models.course_schedule(), generators)).clamp(0, 1)
    torch.testing.assert_close(states[0], a**0.5 * digit + (1 - a) ** 0.5 * draw_noise(noise.shape, generators))
    rest = denoise(predict, states[0], respaced(3, 300), models.course_schedule(), generators)
    assert torch.equal(states[-1], final(rest)) and digit.max() == 1


def test_a_folder_a_device_and_labels_may_be_plain_values(tmp_path):
    config = {"kind": "ddpm", "unet": asdict(net().config)}
    models.write(tmp_path, net(), config)
    unet, _ = models.load(str(tmp_path), "cpu", "ddpm")
    drawn = models.draw(lambda part: models.guided_unet(unet, [3, 1, 7][part], 5.0), [1, 2, 3], "cpu", 2, "ddim")
    assert torch.equal(drawn, models.draw(lambda part: models.guided_unet(unet, LABELS[part], 5.0), [1, 2, 3],
                                          torch.device("cpu"), 2, "ddim"))  # fmt: skip
    assert models.guided_unet(unet, np.array([3, 4], np.uint8)) and models.guided_unet(unet, torch.tensor([3]).int())
    for labels in (3, [10], [-1], [0.5], [], ["3"], "3", [True, False], torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="labels are a row of classes 0 to 9, such as .3, 4., got "):
            models.guided_unet(unet, labels)
    with pytest.raises(ValueError, match="no kind of network 'DDPM'; choose from judge, denoiser, ddpm, flow"):
        models.load(tmp_path, "cpu", "DDPM")
    with pytest.raises(ValueError, match="no sampler 'ddmp'; choose from ddpm-twice, ddpm-lower, ddpm"):
        list(models.walk(models.guided_unet(unet), [0], torch.device("cpu"), 2, "ddmp"))
    with pytest.raises(ValueError, match="holds a judge, not a ddpm or flow or denoiser"):
        models.load(WEIGHTS / "mnist" / "judge")
    with torch.no_grad():
        unet.out.bias.fill_(torch.nan)
    models.write(tmp_path / "nan", unet, config)
    with pytest.raises(ValueError, match="the network in .*nan holds NaN or infinity; train one with"):
        models.load(tmp_path / "nan")


def test_clipping_reaches_the_samplers_without_noise():
    """An answer of 0: the estimate x_t / sqrt(alpha_bar) of the last step is the end, and lies outside [0, 1]."""
    for sampler in ("ddim", "dpm++"):
        ends = [last(models.walk(lambda x, time: (torch.zeros_like(x), None), seeded([0]), torch.device("cpu"),
                                        4, name)) for name in (sampler, f"{sampler}-clip")]  # fmt: skip
        assert ends[0].min() < -3 and ends[0].max() > 3
        assert ends[1].min() == 0 and ends[1].max() == pytest.approx(1)


@pytest.mark.parametrize("sampler", [name for name in models.SAMPLERS["ddpm"] if "twice" not in name])
def test_ddpm_asks_once_for_every_time(sampler):
    times, cpu = [], torch.device("cpu")

    def answer(x_t, time):
        times.append(round(float(time[0]) * 300) - 1)
        return torch.zeros_like(x_t), None

    states = list(models.walk(answer, seeded([0]), cpu, 4, sampler))
    assert times == ([299, 224, 150, 75] if "dpm++" in sampler else [299, 199, 100, 0]) and len(states) == 5
    assert torch.equal(states[0], draw_noise((1, 1, 28, 28), seeded([0])))
    times.clear()
    list(models.walk(answer, seeded([0]), cpu, 300, sampler))
    assert times == list(range(299, -1, -1))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_other_samplers_lead_each_noise_to_one_digit_the_nearer_the_more_steps(sampler):
    """Data N(0.2, 0.3^2), whose eps is known; DDPM, which draws noise of its own, ends elsewhere."""
    exact = gaussian(models.course_schedule(), 0.2, 0.3)

    def end(sampler, steps):
        answer = lambda x_t, time: exact(x_t, (time * 300).round().long() - 1)  # noqa: E731
        return last(models.walk(answer, seeded([0, 1]), torch.device("cpu"), steps, sampler))

    full = end("ddim", 300)
    few, many = ((end(sampler, steps) - full).abs().mean() for steps in (10, 40))
    assert many < 0.5 * few and few < 0.1 and (end("ddpm", 40) - full).abs().mean() > 10 * many


def test_flow_starts_from_the_seeds_noise_and_follows_the_solver():
    def answer(x, time):
        return time.view(-1, 1, 1, 1) - x, None

    x_0, cpu, v = draw_noise((2, 1, 28, 28), seeded([5, 6])), torch.device("cpu"), models.velocity(answer)
    found = last(models.walk(answer, seeded([5, 6]), cpu, 7, "heun"))
    assert torch.equal(found, flow.solve(v, x_0, flow.grid(7), "heun"))
    found = last(models.walk(answer, seeded([5, 6]), cpu, 50, "dormand-prince"))
    torch.testing.assert_close(found, (x_0 + 1) * np.exp(-1), rtol=0, atol=1e-3)  # x(1) = (x_0 + 1) / e


def test_strips_and_animations_show_what_they_are_given(tmp_path):
    black, white = torch.zeros(2, 1, 28, 28), torch.ones(2, 1, 28, 28)
    page = models.strip([black, white], ["black", "white"])
    assert np.array_equal(page, models.strip([black, white], [["black"] * 2, ["white"] * 2]))
    assert page.getpixel((100, 100)) == (0, 0, 0)
    states = [torch.rand(7, 1, 28, 28) * (i + 1) / 64 for i in range(64)]

    models.save_animation(iter([*states, black.repeat(4, 1, 1, 1)[:7]]), tmp_path / "a.gif")
    animation = Image.open(tmp_path / "a.gif")
    means = []
    for i in range(animation.n_frames):
        animation.seek(i)
        means.append(np.asarray(animation.convert("L"))[10:100, 10:100].mean())
    assert len(means) == 23 and animation.info["duration"] > 500  # every third of 64, then the end, on which it rests
    assert np.corrcoef(means[:-1], range(22))[0, 1] > 0.99 and means[-1] == min(means)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 1, 3, 1, 1))


def test_networks_are_written_in_half_precision_and_read_back(tmp_path):
    net = small()
    with torch.no_grad():
        net[1].running_var.fill_(1e-9)  # float16 would make it 0
    models.write(tmp_path / "n", net, {"kind": "flow", "more": 3}, {"extra": torch.ones(2, 2)})
    config, tensors = models.read(tmp_path / "n", "flow")
    assert config == {"kind": "flow", "more": 3} and torch.equal(tensors.pop("extra"), torch.ones(2, 2))
    assert tensors["1.running_var"].tolist() == [pytest.approx(1e-9)] * 4
    assert torch.equal(tensors["0.weight"], net[0].weight.half().float())
    net.load_state_dict(tensors)


def test_missing_and_wrong_networks_are_told(tmp_path):
    with pytest.raises(ValueError, match="no trained ddpm in .*none; train one with `python -m minidiff.mnist.train_d"):
        models.read(tmp_path / "none", "ddpm")
    models.write(tmp_path / "n", small(), {"kind": "flow"})
    with pytest.raises(ValueError, match="holds a flow, not a judge; train one with .*judge train"):
        models.read(tmp_path / "n", "judge")
    with pytest.raises(ValueError, match="holds a flow, not a ddpm or denoiser"):
        models.read(tmp_path / "n", "ddpm", "denoiser")
    for unet in ({}, {"unet": {"hidden": -3}}, {"unet": {"depth": 3}}, {"unet": {"hidden": 4}}):
        models.write(tmp_path / "n", small(), {"kind": "flow"} | unet)
        with pytest.raises(ValueError, match="n cannot be built: "):
            models.load(tmp_path / "n", torch.device("cpu"), "flow")
    (tmp_path / "n" / "model.fp16.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="n cannot be read .*train one with"):
        models.read(tmp_path / "n", "flow")


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "heun"])
def test_each_of_many_is_what_its_label_and_seed_draw_alone(sampler, monkeypatch):
    """Six of them, four at a time, from seed 3 on, with guidance 5."""
    monkeypatch.setattr(models, "at_once", lambda device: 4)
    unet, labels, cpu = net(), torch.tensor([3, 1, 4, 1, 5, 9]), torch.device("cpu")
    found = models.draw(lambda part: models.guided_unet(unet, labels[part], 5.0), range(3, 9), cpu, 3, sampler)
    for i in range(6):
        answer = models.guided_unet(unet, labels[i : i + 1], 5.0)
        expected = last(models.walk(answer, seeded([3 + i]), cpu, 3, sampler))
        assert ((expected > 0) & (expected < 1)).sum() > 20  # clamped, the rest is 0 or 1
        torch.testing.assert_close(found[i : i + 1], expected.clamp(0, 1), rtol=1e-4, atol=1e-3)


def test_a_sampler_of_another_kind_of_network_is_refused(tmp_path):
    """Where the kind is known: of a network that was read, with and without a class."""
    for classes, kind, sampler in ((True, "ddpm", "euler"), (False, "ddpm", "dormand-prince"), (True, "flow", "ddim")):
        unet = net(classes)
        models.write(tmp_path, unet, {"kind": kind, "unet": asdict(unet.config)})
        answer = models.guided_unet(models.load(tmp_path, torch.device("cpu"), kind)[0], LABELS, 5.0)
        with pytest.raises(ValueError, match=f"sampler {sampler} is for another kind of network; of {kind}: "):
            models.draw(lambda part, answer=answer: answer, range(3), torch.device("cpu"), 2, sampler)
