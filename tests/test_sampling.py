"""The loop: against closed-form denoisers, and its promises about times, noise, records and final steps."""

import math
import re

import numpy as np
import pytest
import torch

from minidiff import ddpm, toy
from minidiff.guidance import dynamic_threshold
from minidiff.sampling import denoise, draw_noise, final, network_calls, noised, one_step, other_stream, seeded, visits
from minidiff.schedule import leading, linear, respaced, squaredcos_cap_v2, strided
from minidiff.solvers import STEPS

SCHEDULE = squaredcos_cap_v2()


def test_a_single_image_is_recovered_exactly():
    """A perfect denoiser of one image leads from any noise to that image, whatever the steps and the sampler."""
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    predict = toy.gaussian(SCHEDULE, image, 0.0)
    walks = [(timesteps, ddpm.step) for timesteps in (leading(7), strided(), respaced("smart27"))]
    for timesteps, step in [*walks, *((respaced(10), step) for step in STEPS.values())]:
        x_t = draw_noise((2, 3, 4, 4), seeded([3, 4]))
        x = final(denoise(predict, x_t, timesteps, SCHEDULE, seeded([5, 6]), step=step))
        torch.testing.assert_close(x, image.expand(2, -1, -1, -1), rtol=0, atol=2e-5)


def test_gaussian_data_comes_out_with_its_mean_and_variance():
    """20,000 samples of N(0.3, 0.4^2) through 100 steps; bound: 5 standard errors plus the 1 % bias of finite steps."""
    n, mean, std = 20_000, 0.3, 0.4
    x_t = torch.randn(1, 1, 100, n // 100, generator=torch.Generator().manual_seed(0))
    x = final(denoise(toy.gaussian(SCHEDULE, mean, std), x_t, respaced(100), SCHEDULE, seeded([1])))
    assert abs(x.mean().item() - mean) < 5 * std / n**0.5 + 0.004
    assert abs(x.std().item() - std) < 5 * std / (2 * n) ** 0.5 + 0.012


def test_the_times_are_exactly_the_list_and_the_next_is_the_next_entry():
    timesteps = torch.tensor([950, 731, 12, 3])
    calls, pairs = [], []

    def step(schedule, x_t, t, t_prev, *rest):
        pairs.append((t.tolist(), t_prev.tolist()))
        return ddpm.step(schedule, x_t, t, t_prev, *rest)

    def predict(x_t, t):
        calls.append(t.tolist())
        return torch.zeros_like(x_t), None

    final(denoise(predict, torch.zeros(2, 1, 2, 2), timesteps, SCHEDULE, seeded([0, 1]), step=step))
    assert calls == [[t, t] for t in (950, 731, 12, 3)]
    assert pairs == [([a, a], [b, b]) for a, b in ((950, 731), (731, 12), (12, 3), (3, -1))]


def test_the_course_walk_of_34_times_makes_33_calls_and_ends_slightly_noisy():
    """strided(990, 0, 30) without the final step stops at t = 0, with sqrt(1 - alpha_bar) = 0.0064 of noise left."""
    predict = toy.gaussian(SCHEDULE, 0.5, 0.0)
    x_t = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    record = list(denoise(predict, x_t, strided(), SCHEDULE, seeded([0]), final_step=False))
    assert len(record) == 33 and (record[0].t, record[-1].t, record[-1].t_prev) == (990, 30, 0)
    expected = (1 - SCHEDULE.alphas_cumprod[0]).sqrt().item()
    left = record[-1].x_prev - 0.5 * SCHEDULE.alphas_cumprod[0].sqrt()
    assert abs(left.std().item() - expected) < 5 * expected / 20_000**0.5


def test_a_seed_gives_one_image_whatever_the_batch():
    predict = toy.gaussian(SCHEDULE, 0.0, 0.7)

    def run(*seeds):
        generators = seeded(seeds)
        x_t = draw_noise((len(seeds), 3, 4, 4), generators)
        return final(denoise(predict, x_t, respaced(10), SCHEDULE, generators))

    batch = run(10, 5, 13, 14, 17)
    assert torch.equal(batch[2:4], run(13, 14)) and torch.equal(batch[4:], run(17))
    assert not torch.equal(batch[0], batch[1])


def test_keep_is_applied_after_every_step_with_the_new_time():
    times = []

    def keep(x_prev, t_prev):
        times.append(t_prev)
        return torch.full_like(x_prev, 0.25)

    steps = denoise(toy.gaussian(SCHEDULE, 0.0, 1.0), torch.zeros(1, 1, 2, 2), torch.tensor([900, 400, 0]), SCHEDULE,
                    seeded([0]), keep=keep)  # fmt: skip
    record = list(steps)
    assert times == [400, 0, -1] and all((step.x_prev == 0.25).all() for step in record)


# --- the records ------------------------------------------------------------------------------------------------------


def test_a_record_holds_both_ends_of_its_step_and_the_fixed_estimate():
    x_T = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    predict = toy.gaussian(SCHEDULE, 3.0, 0.0)
    record = list(denoise(predict, x_T, torch.tensor([900, 400]), SCHEDULE, seeded([0]),
                          fix_x_start=dynamic_threshold(1.0, 1.0)))  # fmt: skip
    assert [(step.i, step.t, step.t_prev, step.x_start.max().item()) for step in record] == [
        (0, 900, 400, 1.0), (1, 400, -1, 1.0)]  # fmt: skip
    first, second = record
    assert torch.equal(first.x_t, x_T) and torch.equal(second.x_t, first.x_prev)
    assert torch.equal(first.eps, predict(x_T, torch.tensor([900]))[0])
    assert torch.equal(second.x_prev, torch.ones(1, 1, 2, 2))  # the step to clean returns the estimate


def test_a_walk_takes_a_step_only_when_it_is_asked_for_one():
    """Who stops to iterate stops the network; nothing is computed ahead."""
    calls = []

    def predict(x_t, t):
        calls.append(int(t[0]))
        return torch.zeros_like(x_t), None

    steps = denoise(predict, torch.zeros(1, 1, 2, 2), torch.tensor([900, 600, 300]), SCHEDULE, seeded([0]))
    assert calls == []
    next(steps)
    assert calls == [900]
    next(steps)
    assert calls == [900, 600]


def test_the_records_outlive_the_walk():
    """No tensor of a record is changed by a later step."""
    steps = denoise(toy.gaussian(SCHEDULE, 0.2, 0.5), torch.ones(1, 1, 2, 2), respaced(6), SCHEDULE, seeded([0]))
    copies, record = [], []
    for step in steps:
        record.append(step)
        copies.append([x.clone() for x in step[3:]])
    for step, copy in zip(record, copies):
        assert all(torch.equal(x, y) for x, y in zip(step[3:], copy))


def test_on_a_walk_with_jumps_the_records_are_those_of_the_steps_down():
    """Down to the first entry, up two, down again: i counts calls of the network, and a jump up is no record."""
    timesteps = torch.tensor([900, 600, 300, 0])
    steps = denoise(toy.gaussian(SCHEDULE, 0.0, 1.0), torch.ones(1, 1, 2, 2), timesteps, SCHEDULE, seeded([0]),
                    jumps=(2, 2))  # fmt: skip
    record = [(step.i, step.t, step.t_prev) for step in steps]
    assert record == [(0, 900, 600), (1, 600, 300), (2, 300, 0), (3, 600, 300), (4, 300, 0), (5, 0, -1)]
    assert len(record) == network_calls(visits(timesteps, True, (2, 2)))


def test_a_jump_makes_the_solver_forget_its_previous_estimate():
    """What DPM-Solver++ remembers belongs to the walk down; after a jump up it begins anew."""
    befores = []

    def step(schedule, x_t, t, t_prev, eps, pred_var, noise, fix_x_start, previous):
        befores.append(None if previous is None else int(previous[0][0]))
        return ddpm.step(schedule, x_t, t, t_prev, eps, pred_var, noise, fix_x_start)

    final(denoise(toy.gaussian(SCHEDULE, 0.0, 1.0), torch.ones(1, 1, 2, 2), torch.tensor([900, 600, 300, 0]), SCHEDULE,
                  seeded([0]), step=step, jumps=(2, 2)))  # fmt: skip
    assert befores == [None, 900, 600, None, 600, 300]


def test_final_returns_the_last_x_prev_and_refuses_a_walk_without_steps():
    predict, x_t = toy.gaussian(SCHEDULE, 0.2, 0.5), torch.ones(1, 1, 2, 2)
    (*_, last) = denoise(predict, x_t, respaced(4), SCHEDULE, seeded([0]))
    assert torch.equal(final(denoise(predict, x_t, respaced(4), SCHEDULE, seeded([0]))), last.x_prev)
    with pytest.raises(ValueError, match="the walk has no step: a single timestep needs the final step"):
        final(denoise(predict, x_t, torch.tensor([500]), SCHEDULE, seeded([0]), final_step=False))
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the walk leads to NaN or infinity: its start, .* try --dtype float32"):
            final(denoise(predict, odd * x_t, respaced(4), SCHEDULE, seeded([0])))
    with pytest.raises(ValueError, match=r"timesteps must lie in -1\.\.999, got \[-5\]"):  # would be the clean image
        noised(x_t, -5, SCHEDULE, seeded([0]))


# --- schedules, errors, random numbers --------------------------------------------------------------------------------


def test_it_walks_any_schedule():
    """The linear schedule of MNIST with T = 300, all 300 steps, largest variance: a perfect denoiser still arrives."""
    schedule = linear(300)

    def predict(x_t, t):
        return toy.gaussian(schedule, 0.2, 0.0)(x_t, t)[0], None

    x_t = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = final(denoise(predict, x_t, torch.arange(299, -1, -1), schedule, seeded([0])))
    torch.testing.assert_close(x, torch.full_like(x, 0.2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "count", "message"),
    [([30, 10, 20], 2, "timesteps must descend, got 10 before 20"),
     ([30, 10], 1, "need one generator per image: 2 images, 1 generators"),
     ([1000, 3], 2, "timesteps must lie in 0..999, got 1000 to 3"), ([], 2, "timesteps are empty")],
)  # fmt: skip
def test_bad_input_has_one_clear_line(times, count, message):
    predict, timesteps = toy.gaussian(SCHEDULE, 0.0, 1.0), torch.tensor(times, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        final(denoise(predict, torch.zeros(2, 1, 2, 2), timesteps, SCHEDULE, seeded(range(count))))


def test_streams_of_a_seed_are_independent():
    """Stream 1 of seed 3 gives other numbers than stream 0 of any seed near it, uncorrelated over 10,000."""
    shape = (1, 1, 100, 100)
    other = draw_noise(shape, seeded([3], stream=1))
    for seed in (2, 3, 4):
        assert abs((other * draw_noise(shape, seeded([seed]))).mean().item()) < 5 / 100
    assert torch.equal(other, draw_noise(shape, seeded([3], stream=1)))


def test_another_stream_of_generators_begins_at_its_beginning():
    """Stream 2 counted from stream 1 is stream 3 of the seeds, however much the generators were used before."""
    generators = seeded([3, 2**32 - 1], stream=1)
    draw_noise((2, 1, 5, 5), generators)
    other = draw_noise((2, 1, 5, 5), other_stream(generators, 2))
    assert torch.equal(other, draw_noise((2, 1, 5, 5), seeded([3, 2**32 - 1], stream=3)))


def test_seeds_are_torchs_own_and_others_are_refused():
    """Stream 0 of seed 5 is what torch gives for seed 5. A generator keeps 32 bits, so larger seeds would repeat."""
    expected = torch.randn(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.randn(4, generator=seeded(s for s in (1, 5))[1]), expected)
    assert len(seeded([0, 2**32 - 1])) == 2 and seeded([]) == []
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"a seed must lie in 0\.\.2\^32 - 1, got {seed}; no number stands for a"):
            seeded([0, seed])


@pytest.mark.parametrize("seeds", [1.5, ["a"], "12", [0, 1.5], None])
def test_seeds_of_another_type_are_refused_in_one_line(seeds):
    message = f"seeds must be a list of whole numbers, such as [0, 1], got {seeds!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        seeded(seeds)
    (first, second), (generator,) = seeded(np.array([4, 5])), seeded([4])
    assert first.initial_seed() == 4 and second.initial_seed() == 5
    assert seeded([generator])[0] is generator  # which goes on where it stands


def test_one_step_is_the_best_guess_and_the_walk_is_one_sample():
    """For data N(0.2, 0.4^2) noised to t = 690, one step (DDPM Eq. 15) has the posterior variance
    v = s^2 (1 - a) / (a s^2 + 1 - a) as its mean squared error, the least there is. The whole walk draws from the
    posterior, so its error is 2 v and its variance that of the data, up to the finite steps of the walk."""
    n, mean, s, t = 40_000, 0.2, 0.4, 690
    a = SCHEDULE.alphas_cumprod[t].item()
    v = s**2 * (1 - a) / (a * s**2 + 1 - a)
    x_start = mean + s * torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    x_t, predict = noised(x_start, t, SCHEDULE, seeded([1])), toy.gaussian(SCHEDULE, mean, s)
    guess = one_step(predict, x_t, t, SCHEDULE)
    bound = 5 * (2 / n) ** 0.5
    assert abs((guess - x_start).square().mean().item() / v - 1) < bound
    walked = final(denoise(predict, x_t, torch.arange(t, -1, -1), SCHEDULE, seeded([2])))
    assert abs((walked - x_start).square().mean().item() / (2 * v) - 1) < bound + 0.03
    assert abs(walked.var().item() / s**2 - 1) < bound + 0.03
    assert guess.var().item() < 0.8 * s**2


def test_an_image_edited_with_the_seed_that_made_it_does_not_find_itself():
    """Data N(0, 0.7^2), 10,000 values, SDEdit from t = 960. With the generators that made the image its noise returns,
    and the walk finds the image again; with another stream the distance is that of another seed, twice the variance of
    the image, to 5 %."""
    predict, timesteps, shape = toy.gaussian(SCHEDULE, 0.0, 0.7), strided()[1:], (1, 1, 100, 100)

    def walk(x_t, generators):
        return final(denoise(predict, x_t, timesteps, SCHEDULE, generators))

    generators = seeded([0])
    image = walk(draw_noise(shape, generators), generators)

    def distance(generators):
        return (walk(noised(image, 960, SCHEDULE, generators), generators) - image).square().mean().item()

    other = distance(seeded([1]))
    assert abs(other / (2 * image.var().item()) - 1) < 0.05
    assert abs(distance(seeded([0], stream=3)) / other - 1) < 0.05
    assert distance(seeded([0])) < 0.1 * other
