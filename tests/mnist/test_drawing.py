"""A trained network as a prediction and as a velocity: its clock, its guidance, and the course's sampling loop."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import flow
from minidiff.guidance import combine
from minidiff.mnist import drawing
from minidiff.mnist.data import one_hot
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import denoise, draw_noise, seeded


def net(classes=True):
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True, num_classes=10 if classes else 0)).eval().requires_grad_(False)
    for block in (unet.fc1_t, unet.fc2_t, *([unet.fc1_c, unet.fc2_c] if classes else [])):
        block[2].weight *= 300  # so that time and class are felt
    return unet


X, LABELS = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 1, 7])


def test_time_300_of_the_course_is_index_299_and_is_told_as_1():
    unet = net(classes=False)
    predict = drawing.prediction(unet)
    for t, told in ((299, 1.0), (0, 1 / 300), (149, 0.5)):
        assert torch.equal(predict(X, torch.full((3,), t))[0], unet(X, torch.full((3,), told)))
    assert torch.equal(drawing.velocity(unet)(X, torch.full((3,), 0.5)), unet(X, torch.full((3,), 0.5)))


def test_the_courses_schedule_leaves_22_percent():
    """alpha_bar_300 = 0.04806, computed by hand from prod (1 - beta)."""
    product = 1.0
    for i in range(300):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 299)
    schedule = drawing.course_schedule()
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(product, rel=1e-12) == pytest.approx(0.04806, abs=5e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_is_the_one_formula_with_zeros_for_no_class(scale):
    unet, t = net(), torch.full((3,), 99)
    cond, uncond = unet(X, (t + 1) / 300, one_hot(LABELS)), unet(X, (t + 1) / 300, torch.zeros(3, 10))
    assert (cond - uncond).abs().max() > 1e-3
    expected = combine(uncond, cond, scale)
    torch.testing.assert_close(drawing.prediction(unet, LABELS, scale)(X, t)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawing.velocity(unet, LABELS, scale)(X, (t + 1) / 300), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawing.prediction(unet)(X, t)[0], uncond, rtol=0, atol=1e-6)


def test_dropped_classes_are_zero_rows_as_often_as_asked():
    labels = torch.arange(10_000) % 10
    c = drawing.dropped(labels, torch.Generator().manual_seed(0))
    kept = c.sum(1) == 1
    assert torch.equal(c[kept], one_hot(labels)[kept]) and (c[~kept] == 0).all()
    assert abs((~kept).float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5
    assert (drawing.dropped(labels, torch.Generator(), 1.0) == 0).all()
    assert torch.equal(drawing.dropped(labels, torch.Generator(), 0.0), one_hot(labels))


def test_ddpm_sampling_equals_the_courses_algorithm_written_out():
    """The course's loop in its own letters, t = T..1: x_0 estimate, posterior mean, sqrt(beta_t) z, z = 0 at t = 1."""
    unet, T = net(classes=False), 300
    beta = [0.0] + [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
    alpha_bar = [1.0]
    for b in beta[1:]:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    start = 12  # the last 12 steps: the end is where mistakes of indexing are seen
    generators = seeded(3, 2)
    x = noise = draw_noise((2, 1, 28, 28), generators)
    for t in range(start, 0, -1):
        z = draw_noise(x.shape, generators) if t > 1 else torch.zeros_like(x)
        eps = unet(x, torch.full((2,), t / T))
        x_0 = (x - (1 - alpha_bar[t]) ** 0.5 * eps) / alpha_bar[t] ** 0.5
        x = (alpha_bar[t - 1] ** 0.5 * beta[t] / (1 - alpha_bar[t]) * x_0
             + (1 - beta[t]) ** 0.5 * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * x + beta[t] ** 0.5 * z)  # fmt: skip
    generators = seeded(3, 2)
    draw_noise((2, 1, 28, 28), generators)
    found = denoise(drawing.prediction(unet), noise, torch.arange(start - 1, -1, -1), drawing.course_schedule(),
                    generators=generators)  # fmt: skip
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_fewer_steps_are_the_same_algorithm_between_the_times_they_keep():
    """Walked from t to s, beta is 1 - alpha_bar_t / alpha_bar_s; estimates of x_0 are not clipped."""
    unet, T = net(classes=False), 300
    alpha_bar = [1.0]
    for i in range(T):
        alpha_bar.append(alpha_bar[-1] * (1 - (1e-4 + (0.02 - 1e-4) * i / (T - 1))))
    times = [300, 200, 101, 1, 0]  # in the course's counting: evenly spread, both ends
    generators = seeded(3, 2)
    x = draw_noise((2, 1, 28, 28), generators)
    for t, s in zip(times, times[1:]):
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        eps = unet(x, torch.full((2,), t / T))
        x_0 = (x - (1 - alpha_bar[t]) ** 0.5 * eps) / alpha_bar[t] ** 0.5
        x = (alpha_bar[s] ** 0.5 * beta / (1 - alpha_bar[t]) * x_0
             + (1 - beta) ** 0.5 * (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * x)  # fmt: skip
        x = x + beta**0.5 * draw_noise(x.shape, generators) if s else x
    found = drawing.draw_ddpm(drawing.prediction(unet), seeded(3, 2), torch.device("cpu"), 4)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-3)
    assert found.max() > 1.5  # as far out as clipping would not leave it


def test_ddpm_asks_once_for_every_time():
    asked = []

    def predict(x_t, t):
        asked.append(int(t[0]))
        return torch.zeros_like(x_t), None

    drawing.draw_ddpm(predict, seeded(0, 1), torch.device("cpu"))
    assert asked == list(range(299, -1, -1))
    asked.clear()
    drawing.draw_ddpm(predict, seeded(0, 1), torch.device("cpu"), 4)
    assert asked == [299, 199, 100, 0]


def test_flow_starts_from_the_seeds_noise_and_follows_the_solver():
    def v(x, time):
        return time.view(-1, 1, 1, 1) - x

    x_0, cpu = draw_noise((2, 1, 28, 28), seeded(5, 2)), torch.device("cpu")
    found = drawing.draw_flow(v, seeded(5, 2), cpu, 7, "heun")
    torch.testing.assert_close(found, flow.solve(v, x_0, flow.grid(7), "heun"), rtol=0, atol=0)
    exact = 2 * torch.exp(torch.tensor(-1.0)) * x_0 / 2 + torch.exp(torch.tensor(-1.0))  # x(1) = (x_0 + 1) / e
    torch.testing.assert_close(
        drawing.draw_flow(v, seeded(5, 2), cpu, solver="dormand-prince"), exact, rtol=0, atol=1e-3
    )


def test_strips_and_animations_show_what_they_are_given(tmp_path):
    black, white = torch.zeros(2, 1, 28, 28), torch.ones(2, 1, 28, 28)
    drawing.save_strip([black, white], ["black", "white"], "", tmp_path / "s.png", {"seed": 3})
    picture = Image.open(tmp_path / "s.png")
    assert picture.text["seed"] == "3" and picture.getpixel((100, 100)) == (0, 0, 0)
    states = [torch.rand(7, 1, 28, 28) * (i + 1) / 64 for i in range(64)]

    def draw(on_step):
        for i, x in enumerate(states):
            on_step(i, -1, x)
        return black.repeat(4, 1, 1, 1)[:7]

    drawing.save_animation(draw, len(states), tmp_path / "a.gif")
    animation = Image.open(tmp_path / "a.gif")
    means = []
    for i in range(animation.n_frames):
        animation.seek(i)
        means.append(np.asarray(animation.convert("L"))[10:100, 10:100].mean())
    assert len(means) == 23 and animation.info["duration"] > 500  # every third of 64, then the end, on which it rests
    assert np.corrcoef(means[:-1], range(22))[0, 1] > 0.99 and means[-1] == min(means)
