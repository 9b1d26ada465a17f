"""DDIM and DPM-Solver++(2M): against diffusers' whole walks, by their orders, and there and back again."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from minidiff import ddpm, flow, solvers, toy
from minidiff.guidance import dynamic_threshold
from minidiff.schedule import linear, respaced, squaredcos_cap_v2
from tests.reference.fill import HERE, normal, read

COSINE = squaredcos_cap_v2()
SHAPE = (2, 1, 2, 2)
RECORDED = read("solvers")
with safe_open(HERE / "solvers.safetensors", "pt") as file:
    ABOUT = json.loads(file.metadata()["provenance"])
MEAN, STD = 0.3, 0.4
steps = pytest.mark.parametrize("count", [5, 10, 15, 25])


def noise(count: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(step, predict, x, times, schedule=COSINE, fix_x_start=None, noises=None):
    """[(x_prev, pred_x_start)] of each step down the times; a plain loop."""
    previous, rows = None, []
    for i, (time, time_prev) in enumerate(zip(times, times[1:])):
        t, t_prev = torch.full((len(x),), time), torch.full((len(x),), time_prev)
        z = torch.zeros_like(x) if noises is None else noises(i)
        eps = predict(x, t)[0]
        x, x_start = step(schedule, x, t, t_prev, eps, None, z, fix_x_start, previous)
        previous = (t, x_start)
        rows.append((x, x_start))
    return rows


def with_eta(eta: float):
    return lambda *arguments: solvers.ddim_step(*arguments, eta=eta)


# --- single steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "t_prev"), [(998, 997), (999, 500), (500, 30), (1, 0)])
def test_ddim_eq16_with_eta_1_is_the_ddpm_step_with_the_smaller_variance(t, t_prev):
    """DDIM Eq. 16 with eta = 1 is beta_tilde of DDPM Eq. 7, and DDIM Eq. 12 then has the mean of DDPM Eq. 7."""
    x_start, eps, z = (normal(f"test_solvers.{name}", *SHAPE).double() for name in ("x_start", "eps", "noise"))
    t, t_prev = torch.full((2,), t), torch.full((2,), t_prev)
    x_t = ddpm.add_noise(x_start, eps, COSINE.alpha_bar(t))
    found, _ = with_eta(1.0)(COSINE, x_t, t, t_prev, eps, None, z, None)
    expected, _ = ddpm.step(COSINE, x_t, t, t_prev, eps, torch.full_like(eps, -1), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [solvers.ddim_step, with_eta(0.7), solvers.dpm_step], ids=["ddim", "eta", "dpm"])
def test_images_at_different_times_and_no_use_of_the_learned_variance(step):
    """Each image of a batch moves as it would alone, and pred_var changes nothing."""
    x_t, eps, z, x_before, pred_var = (normal(f"test_solvers.{name}", *SHAPE).double() for name in "abcde")
    t, t_prev, t_before = torch.tensor([900, 40]), torch.tensor([700, 2]), torch.tensor([950, 60])
    found = step(COSINE, x_t, t, t_prev, eps, pred_var, z, dynamic_threshold(), (t_before, x_before))
    for i in range(2):
        k = slice(i, i + 1)
        before = t_before[k], x_before[k]
        alone = step(COSINE, x_t[k], t[k], t_prev[k], eps[k], None, z[k], dynamic_threshold(), before)
        for one, two in zip(found, alone):
            torch.testing.assert_close(one[k], two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [with_eta(0.7), solvers.dpm_step], ids=["eta", "dpm"])
def test_float32_stays_float32_with_coefficients_from_float64(step):
    """Ten steps from t = 995 to the clean image end within 1e-5 of the float64 walk."""
    x, z, times = normal("test_solvers.x", *SHAPE), normal("test_solvers.z", *SHAPE), [*range(995, 0, -100), -1]

    def found(dtype):
        def predict(x_t, t):
            return answer(x_t.double(), t)[0].to(dtype), None

        return walk(step, predict, x.to(dtype), times, noises=lambda i: z.to(dtype))[-1][0]

    assert found(torch.float32).dtype == torch.float32
    torch.testing.assert_close(found(torch.float32).double(), found(torch.float64), rtol=0, atol=1e-5)


# --- against diffusers ------------------------------------------------------------------------------------------------


def answer(x_t: Tensor, t: Tensor) -> tuple[Tensor, None]:
    """The formula of tests/reference/walks.py: an estimate that is smooth in x_t and t and leaves [-1, 1]."""
    alpha_bar = COSINE.alpha_bar(t)
    x_start = 1.8 * torch.tanh(0.7 * x_t + 0.3 * torch.cos(t.double() / 100).view(-1, 1, 1, 1))
    return (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt(), None


def compare(name: str, step, times: list[int], threshold: bool, released_within: float) -> None:
    """Every x_prev and every estimate of the walk. The estimate at t = 999 is a difference magnified by 20291, and
    `dynamic_threshold` works in float32: 1e-6 allows for both."""
    found = walk(
        step, answer, normal("solvers.x_T", *SHAPE).double(), [*times, -1],
        fix_x_start=dynamic_threshold(0.95, 1.5) if threshold else None,
        noises=lambda i: normal(f"solvers.{i}.noise", *SHAPE).double(),
    )  # fmt: skip
    rows = torch.stack([torch.stack(row) for row in found])
    torch.testing.assert_close(rows, RECORDED[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[-1, 0].float(), RECORDED[f"{name}.released"], rtol=0, atol=released_within)


@steps
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_walks_against_diffusers(count, eta, threshold):
    """DDIMScheduler, whose eps stays the model's where the estimate is thresholded. With tables as released, float32,
    alpha_bar at t = 999 is 1e-4 off, and so is the end."""
    name = f"ddim{'_eta' if eta else ''}{'_threshold' if threshold else ''}.respaced.{count}"
    compare(name, with_eta(eta), respaced(count).tolist(), threshold, 2e-4)


@steps
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_with_eps_from_the_thresholded_estimate_against_diffusers(count, eta):
    """DDIMScheduler with use_clipped_model_output: eps is what x_t and the thresholded estimate leave. Without noise
    it is DPM-Solver++ of first order, which also sees the estimate alone."""

    def new_eps(schedule, x_t, t, t_prev, eps, pred_var, z, fix_x_start, previous):
        alpha_bar = schedule.alpha_bar(t)
        x_start = fix_x_start(ddpm.predict_x_start(x_t, eps, alpha_bar))
        eps = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        return solvers.ddim_step(schedule, x_t, t, t_prev, eps, pred_var, z, None, previous, eta)

    name, times = f"ddim{'_eta' if eta else ''}_threshold_new_eps.respaced.{count}", respaced(count).tolist()
    compare(name, new_eps, times, True, 2e-4)
    if eta == 0:
        compare(name, lambda *arguments: solvers.dpm_step(*arguments[:-1], None), times, True, 2e-4)


@steps
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("times", ["respaced", "default"])
def test_dpm_walks_against_diffusers(count, times, threshold):
    """DPMSolverMultistepScheduler on our times, from 999, and on its list, from 995. As released it computes in
    float32, where the estimate at t = 999 is only known to 1e-3."""
    listed = ABOUT["times"][f"dpm.{times}.{count}"]
    name = f"dpm{'_threshold' if threshold else ''}.{times}.{count}"
    compare(name, solvers.dpm_step, listed, threshold, 1e-5 if times == "default" else 1e-3)


@steps
def test_the_times_that_diffusers_chooses(count):
    """lambda_min_clipped = -5.1 only shortens the list: it starts at 995, the last time with lambda above -5.1, and is
    `respaced` on the times up to there, without its 0. A list that starts at 999 is walked as it is."""
    lambdas = (0.5 * (COSINE.alphas_cumprod / (1 - COSINE.alphas_cumprod)).log()).tolist()
    assert ABOUT["dpm_first_time"] == 995 == max(t for t in range(1000) if lambdas[t] > -5.1)
    assert ABOUT["dpm_lambda_at_994_to_999"] == pytest.approx(lambdas[994:], rel=1e-9)
    assert ABOUT["times"][f"dpm.default.{count}"] == respaced(count + 1, 996).tolist()[:-1]
    assert ABOUT["times"][f"dpm.respaced.{count}"] == respaced(count).tolist()
    assert ABOUT["dpm_sigma_of_a_custom_list_at_999"] == pytest.approx(20291, rel=1e-3)
    assert ABOUT["ddim_final_alpha_bar"] == 1


# --- orders of convergence --------------------------------------------------------------------------------------------


def gaussian_at(x: Tensor, t: int, later: int) -> Tensor:
    """Where the probability-flow ODE of N(MEAN, STD^2) leads from x at time t to another time: it keeps
    (x_t - sqrt(alpha_bar) MEAN) / sqrt(alpha_bar STD^2 + 1 - alpha_bar)."""
    a, b = (COSINE.alpha_bar(torch.tensor([time])) for time in (t, later))
    constant = (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    return b.sqrt() * MEAN + (b * STD**2 + 1 - b).sqrt() * constant


@pytest.mark.parametrize(("step", "order"), [(solvers.ddim_step, 1), (solvers.dpm_step, 2)], ids=["ddim", "dpm"])
def test_the_error_falls_with_the_solvers_order(step, order):
    """From t = 900 to 100, against the closed form: twice the steps divide the error by 2^order."""
    x, predict = noise(), toy.gaussian(COSINE, MEAN, STD)
    errors = []
    for count in (50, 100, 200, 400):
        times = list(range(900, 99, -800 // count))
        errors.append((walk(step, predict, x, times)[-1][0] - gaussian_at(x, 900, 100)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    print(f"errors {errors}, slopes {slopes}")
    assert slopes == pytest.approx([order] * 3, abs=0.25)


@pytest.mark.parametrize(("step", "order"), [(solvers.ddim_step, 1), (solvers.dpm_step, 2)], ids=["ddim", "dpm"])
def test_the_order_of_the_whole_walk_from_pure_noise_to_clean(step, order):
    """From t = 999, where alpha_bar is 2.4e-9, to the clean image, the first and the last step in first order. In
    float32, where x_start at t = 999 is only known to 1e-3, the end is as good: that step hardly uses it."""
    x, predict = noise(), toy.gaussian(COSINE, MEAN, STD)
    errors = []
    for count in (40, 80, 160):
        times = [*respaced(count).tolist(), -1]
        end = walk(step, predict, x, times)[-1][0]
        torch.testing.assert_close(walk(step, predict, x.float(), times)[-1][0].double(), end, rtol=0, atol=2e-5)
        errors.append((end - gaussian_at(x, 999, -1)).square().mean().sqrt().item())
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:])] == pytest.approx([order] * 2, abs=0.25)


def test_dpm_with_few_steps_is_better_without_the_time_0():
    """The step into t = 0 is long in lambda, and D goes too far. diffusers' own list has no t = 0."""
    x, predict = noise(), toy.gaussian(COSINE, MEAN, STD)
    for count in (10, 20):
        with_0, without = [*respaced(count).tolist(), -1], [*respaced(count + 1).tolist()[:-1], -1]
        ends = [walk(solvers.dpm_step, predict, x, times)[-1][0] for times in (with_0, without)]
        errors = [(end - gaussian_at(x, 999, -1)).square().mean().sqrt().item() for end in ends]
        assert errors[1] < 0.3 * errors[0]


def test_steps_are_counts_names_sections_times_or_the_course():
    def times(steps, sampler="ddpm", of=1000):
        return solvers.times_for(sampler, steps, of).tolist()

    assert times(4) == times("4") == [999, 666, 333, 0]
    assert times("smart27", "dpm++") == respaced("smart27").tolist()
    assert times(3, "dpm++") == times("3", "dpm++") == [999, 666, 333]  # not 0
    assert times(3, "ddim") == [999, 500, 0] and len(times(1000, "dpm++")) == 1000
    assert times("1,1,1") == [667, 334, 0]
    assert times(torch.tensor([5, 3])) == [5, 3]
    assert times("course") == list(range(990, -1, -30))
    with pytest.raises(ValueError, match="got 'course'"):  # of another number of times there is no such walk
        times("course", of=300)


def test_euler_steps_on_the_flows_clock_are_ddim():
    """The flow's state is x_t / (sqrt(alpha_bar) + sqrt(1 - alpha_bar))."""
    schedule, kept, x = linear(300), [299, 200, 90, 7], noise(5)

    def predict(x_t, t):
        return x_t.tanh() + t.view(-1, 1, 1, 1) / 300, None

    expected = walk(solvers.ddim_step, predict, x, [*kept, -1], schedule)[-1][0]
    times = torch.cat([flow.clock(schedule)[kept], torch.ones(1, dtype=torch.float64)])
    a = schedule.alphas_cumprod[299]
    found = flow.solve(flow.from_eps(predict, schedule), x / (a.sqrt() + (1 - a).sqrt()), times)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- inversion --------------------------------------------------------------------------------------------------------


def test_inversion_against_diffusers():
    """DDIMInverseScheduler asks the model at the noisier of the two times of each step."""
    times = torch.tensor(ABOUT["times"]["inverse"])
    assert times.tolist() == list(range(0, 1000, 100))
    x_start = normal("solvers.image", *SHAPE).double().tanh()
    for last in range(1, 11):
        found = solvers.invert(answer, x_start, times[:last].flip(0), COSINE).double()
        torch.testing.assert_close(found, RECORDED["inverse"][last - 1], rtol=0, atol=1e-5)  # state may be float32


def test_inversion_of_a_gaussian_finds_its_noise():
    """The noise at t = 980 in closed form; twice the steps halve the error."""
    x_start, errors = MEAN + STD * noise(), []
    for stride in (20, 10, 5):
        times = torch.arange(0, 981, stride).flip(0)
        found = solvers.invert(toy.gaussian(COSINE, MEAN, STD), x_start, times, COSINE)
        errors.append((found - gaussian_at(x_start, -1, 980)).abs().max().item())
    assert errors[2] < 0.05
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:])] == pytest.approx([1, 1], abs=0.25)


def test_inversion_and_back_misses_less_with_more_steps():
    """Images of a mixture of three Gaussians, up to t = 980 and down again by DDIM."""
    means = torch.stack([torch.full((1, 2, 3), m, dtype=torch.float64) for m in (-0.8, 0.1, 0.7)])
    mixture = toy.Mixture(COSINE, means, 0.3)

    def predict(x_t, t):
        return mixture(x_t, t, mixture.empty_prompt().expand(len(x_t), -1, -1))

    x_start = means.repeat(4, 1, 1, 1) + 0.3 * noise(12)
    errors = []
    for stride in (140, 70, 20, 5):
        times = torch.arange(0, 981, stride).flip(0)
        x_T = solvers.invert(predict, x_start, times, COSINE)
        back = walk(solvers.ddim_step, predict, x_T, [*times.tolist(), -1])[-1][0]
        errors.append((back - x_start).square().mean().sqrt().item())
    print(f"errors {errors}")
    assert all(b < 0.7 * a for a, b in zip(errors, errors[1:])) and errors[3] < 0.02


def test_a_count_is_written_in_digits():
    """"²" is a digit to str.isdigit, and no number."""
    with pytest.raises(ValueError, match="steps must be a count, a list like .*, got '²'"):
        solvers.times_for("dpm++", "²")
