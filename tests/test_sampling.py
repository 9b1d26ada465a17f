"""The loop: against closed-form denoisers, and its promises about times, noise and final steps."""

import pytest
import torch

from minidiff import ddpm, toy
from minidiff.guidance import dynamic_threshold
from minidiff.sampling import denoise, draw_noise, noised, one_step, seeded
from minidiff.schedule import leading, linear, respaced, squaredcos_cap_v2, strided

SCHEDULE = squaredcos_cap_v2()


def test_a_single_picture_is_recovered_exactly():
    """A perfect denoiser of one picture leads from any noise to that picture, whatever the steps."""
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for timesteps in (respaced(10), leading(7), strided(990, 0, 30), respaced("smart27")):
        x_t = draw_noise((2, 3, 4, 4), seeded(3, 2))
        x = denoise(toy.gaussian(SCHEDULE, picture, 0.0), x_t, timesteps, SCHEDULE, generators=seeded(5, 2))
        torch.testing.assert_close(x, picture.expand(2, -1, -1, -1), rtol=0, atol=2e-5)


def test_gaussian_data_comes_out_with_its_mean_and_variance():
    """20,000 samples of N(0.3, 0.4^2) through 100 steps; bound: 5 standard errors plus the 1 % bias of finite steps."""
    n, mean, std = 20_000, 0.3, 0.4
    x_t = torch.randn(1, 1, 100, n // 100, generator=torch.Generator().manual_seed(0))
    predict = toy.gaussian(SCHEDULE, mean, std)
    x = denoise(predict, x_t, respaced(100), SCHEDULE, generators=seeded(1, 1))
    assert abs(x.mean().item() - mean) < 5 * std / n**0.5 + 0.004
    assert abs(x.std().item() - std) < 5 * std / (2 * n) ** 0.5 + 0.012


def test_times_asked_for_are_exactly_the_list_and_the_next_is_the_next_entry(monkeypatch):
    timesteps = torch.tensor([950, 731, 12, 3])
    asked, pairs = [], []
    original = ddpm.step
    monkeypatch.setattr(
        ddpm, "step", lambda s, x, t, p, *a: pairs.append((t.tolist(), p.tolist())) or original(s, x, t, p, *a)
    )

    def predict(x_t, t):
        asked.append(t.tolist())
        return torch.zeros_like(x_t), None

    denoise(predict, torch.zeros(2, 1, 2, 2), timesteps, SCHEDULE, generators=seeded(0, 2))
    assert asked == [[t, t] for t in (950, 731, 12, 3)]
    assert pairs == [([a, a], [b, b]) for a, b in ((950, 731), (731, 12), (12, 3), (3, -1))]


def test_the_course_walk_of_34_times_makes_33_calls_and_ends_slightly_noisy():
    """strided(990, 0, 30) without the final step stops at t = 0, with sqrt(1 - alpha_bar) = 0.0064 of noise left."""
    calls = []
    exact = toy.gaussian(SCHEDULE, 0.5, 0.0)

    def predict(x_t, t):
        calls.append(int(t[0]))
        eps, _ = exact(x_t, t)
        return eps, torch.full_like(eps, -1)

    x = denoise(predict, torch.randn(1, 1, 100, 100), strided(), SCHEDULE, generators=seeded(0, 1), final_step=False)
    assert len(calls) == 33 and calls[0] == 990 and calls[-1] == 30
    expected = (1 - SCHEDULE.alphas_cumprod[0]).sqrt().item()
    assert abs((x - 0.5 * SCHEDULE.alphas_cumprod[0].sqrt()).std().item() - expected) < 5 * expected / 20_000**0.5


def test_a_seed_gives_one_picture_whatever_the_batch():
    predict = toy.gaussian(SCHEDULE, 0.0, 0.7)

    def run(seed, n):
        generators = seeded(seed, n)
        x_t = draw_noise((n, 3, 4, 4), generators)
        return denoise(predict, x_t, respaced(10), SCHEDULE, generators=generators)

    batch = run(10, 8)
    assert torch.equal(batch[3:5], run(13, 2)) and torch.equal(batch[7:], run(17, 1))
    assert not torch.equal(batch[0], batch[1])


def test_keep_is_applied_after_every_step_with_the_new_time():
    seen = []

    def keep(x_prev, t_prev):
        seen.append(t_prev)
        return torch.full_like(x_prev, 0.25)

    x = denoise(toy.gaussian(SCHEDULE, 0.0, 1.0), torch.zeros(1, 1, 2, 2), torch.tensor([900, 400, 0]), SCHEDULE,
                generators=seeded(0, 1), keep=keep)  # fmt: skip
    assert seen == [400, 0, -1] and (x == 0.25).all()


def test_on_step_sees_every_step_and_the_fixed_estimate():
    seen = []
    denoise(toy.gaussian(SCHEDULE, 3.0, 0.0), torch.randn(1, 1, 2, 2), torch.tensor([900, 400]), SCHEDULE,
            generators=seeded(0, 1), fix_x_start=dynamic_threshold(1.0, 1.0),
            on_step=lambda i, t, x_t, pred_x_start, eps: seen.append((i, t, pred_x_start.max().item())))  # fmt: skip
    assert seen == [(0, 900, 1.0), (1, 400, 1.0)]


def test_it_walks_any_schedule():
    """The linear schedule of MNIST with T = 300, all 300 steps, largest variance: a perfect denoiser still arrives."""
    schedule = linear(300)

    def predict(x_t, t):
        return toy.gaussian(schedule, 0.2, 0.0)(x_t, t)[0], None

    x = denoise(predict, torch.randn(1, 1, 3, 3), torch.arange(299, -1, -1), schedule, generators=seeded(0, 1))
    torch.testing.assert_close(x, torch.full_like(x, 0.2), rtol=0, atol=1e-5)


def test_bad_input_is_told():
    predict, x_t = toy.gaussian(SCHEDULE, 0.0, 1.0), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="timesteps must descend, got 10 before 20"):
        denoise(predict, x_t, torch.tensor([30, 10, 20]), SCHEDULE, generators=seeded(0, 2))
    with pytest.raises(ValueError, match="one generator per picture: 2 pictures, 1 generators"):
        denoise(predict, x_t, torch.tensor([30, 10]), SCHEDULE, generators=seeded(0, 1))
    with pytest.raises(ValueError, match="timesteps must lie in 0..999, got 1000 to 3"):
        denoise(predict, x_t, torch.tensor([1000, 3]), SCHEDULE, generators=seeded(0, 2))
    with pytest.raises(ValueError, match="timesteps are empty"):
        denoise(predict, x_t, torch.tensor([], dtype=torch.long), SCHEDULE, generators=seeded(0, 2))


def test_streams_of_a_seed_are_independent():
    """Stream 1 of seed 3 gives other numbers than stream 0 of any seed near it, uncorrelated over 10,000."""
    shape = (1, 1, 100, 100)
    own = draw_noise(shape, seeded(3, 1, stream=1))
    for seed in (2, 3, 4):
        assert abs((own * draw_noise(shape, seeded(seed, 1))).mean().item()) < 5 / 100
    assert torch.equal(own, draw_noise(shape, seeded(3, 1, stream=1)))


def test_one_step_is_the_best_guess_and_the_walk_is_one_sample():
    """For data N(0.2, 0.4^2) noised to t = 690, one step (DDPM Eq. 15) has the posterior variance
    v = s^2 (1 - a) / (a s^2 + 1 - a) as its mean squared error, the least there is. The whole walk draws from the
    posterior, so its error is 2 v and its variance that of the data, up to the finite steps of the walk."""
    n, mean, s, t = 40_000, 0.2, 0.4, 690
    a = SCHEDULE.alphas_cumprod[t].item()
    v = s**2 * (1 - a) / (a * s**2 + 1 - a)
    x_start = mean + s * torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    x_t, predict = noised(x_start, t, SCHEDULE, seeded(1, 1)), toy.gaussian(SCHEDULE, mean, s)
    guess = one_step(predict, x_t, t, SCHEDULE)
    bound = 5 * (2 / n) ** 0.5
    assert abs((guess - x_start).square().mean().item() / v - 1) < bound
    walked = denoise(predict, x_t, torch.arange(t, -1, -1), SCHEDULE, generators=seeded(2, 1))
    assert abs((walked - x_start).square().mean().item() / (2 * v) - 1) < bound + 0.03
    assert abs(walked.var().item() / s**2 - 1) < bound + 0.03
    assert guess.var().item() < 0.8 * s**2
