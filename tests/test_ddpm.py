"""The process: its promises, and its steps against diffusers. Its equations: test_equations.py."""

import math

import pytest
import torch
from torch import Tensor

from minidiff import ddpm, schedule, solvers
from minidiff.guidance import dynamic_threshold
from tests.reference.fill import normal, read, relative_l2

COSINE = schedule.squaredcos_cap_v2()
SHAPE = (2, 3, 8, 8)


def values(name: str, *shape: int) -> Tensor:
    return normal(f"test_ddpm.{name}", *(shape or SHAPE)).double()


def bars(*alpha_bars: float) -> Tensor:
    return torch.tensor(alpha_bars, dtype=torch.float64).view(-1, 1, 1, 1)


def image(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


def close(x: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(x, expected, rtol=rtol, atol=1e-12)


# Pairs of times a strided walk jumps between: neighbours, long jumps, both ends of the table.
JUMPS = [(999, 998), (999, 500), (500, 499), (900, 30), (30, 0), (1, 0)]
jumps = pytest.mark.parametrize(("t", "t_prev"), JUMPS)


def alpha_bars(t: int, t_prev: int) -> tuple[Tensor, Tensor]:
    return COSINE.alpha_bar(torch.tensor([t])), COSINE.alpha_bar(torch.tensor([t_prev]))


# --- coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_are_cast_after_they_are_formed():
    """float32 pictures stay float32, and their coefficients are the float64 ones, rounded once."""
    x_start = torch.ones(1, 1, 1, 1)
    alpha_bar = COSINE.alpha_bar(torch.tensor([0]))
    x_t = ddpm.add_noise(torch.zeros_like(x_start), x_start, alpha_bar)
    assert x_t.dtype == torch.float32
    assert x_t.item() == torch.tensor(math.sqrt(1 - COSINE.alphas_cumprod[0].item()), dtype=torch.float32).item()


def test_iddpm_eq15_values_of_a_walk_of_50_steps():
    """iDDPM Eq. 15: lower bound, middle and upper bound of three jumps of 20, worked out with 30 digits from the
    cosines of iDDPM Eq. 17."""
    expected = {
        980: (-0.27405997027, -0.272650209712, -0.271240449155),
        500: (-2.88456098585, -2.85288967609, -2.82121836634),
        20: (-10.1171244952, -8.20631862083, -6.29551274645),
    }
    for t, row in expected.items():
        log_var = ddpm.learned_log_var(image(-1.0, 0.0, 1.0), *alpha_bars(t, t - 20))
        torch.testing.assert_close(log_var, image(*row), rtol=1e-10, atol=0)


# --- step -------------------------------------------------------------------------------------------------------------


def take_step(t: int, t_prev: int, pred_var: Tensor | None, noise: Tensor, fix_x_start=None) -> tuple[Tensor, Tensor]:
    times = torch.full((2,), t), torch.full((2,), t_prev)
    return ddpm.step(COSINE, values("x_t"), *times, values("eps"), pred_var, noise, fix_x_start)


@jumps
def test_step_with_a_learned_variance(t, t_prev):
    """The same mean, and the standard deviation of iDDPM Eq. 15 on the noise."""
    noise, pred_var = values("noise"), values("pred_var")
    quiet, _ = take_step(t, t_prev, pred_var, torch.zeros(SHAPE, dtype=torch.float64))
    x_prev, _ = take_step(t, t_prev, pred_var, noise)
    std = (0.5 * ddpm.learned_log_var(pred_var, *alpha_bars(t, t_prev))).exp()
    close((x_prev - quiet) / std, noise, rtol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_step_to_the_clean_picture_adds_no_noise_and_returns_the_estimate(learned):
    pred_var = values("pred_var") if learned else None
    x_prev, x_start = take_step(30, -1, pred_var, values("noise"))
    close(x_prev, x_start)


def test_step_fixes_the_estimate_before_it_is_used():
    noise = torch.zeros(SHAPE, dtype=torch.float64)
    x_prev, x_start = take_step(500, 400, None, noise, fix_x_start=lambda x: x.clamp(-0.1, 0.1))
    assert x_start.abs().max() == 0.1
    close(x_prev, ddpm.posterior_mean(x_start, values("x_t"), *alpha_bars(500, 400)))


def test_step_takes_another_time_for_each_picture():
    x_t, eps, noise, pred_var = (values(name) for name in ("x_t", "eps", "noise", "pred_var"))
    t, t_prev = torch.tensor([900, 20]), torch.tensor([800, -1])
    together, _ = ddpm.step(COSINE, x_t, t, t_prev, eps, pred_var, noise)
    for i in range(2):
        one = slice(i, i + 1)
        alone, _ = ddpm.step(COSINE, x_t[one], t[one], t_prev[one], eps[one], pred_var[one], noise[one])
        close(together[one], alone)


# --- step, against diffusers' DDPMScheduler ---------------------------------------------------------------------------

REFERENCE = read("ddpm")
WALKS = {"ten": 1.5, "twenty_seven": 1.0, "fifty": 1.5, "hundred": 1.0, "fast27": 1.5}  # sample_max_value of each


def reference_step(walk: str, i: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Step i of a recorded walk, with the stand-in for a network and the noise of reference/make.py."""
    times = [*REFERENCE[f"{walk}.timesteps"].tolist(), -1]
    alpha_bar_t = COSINE.alphas_cumprod[times[i]].item()
    eps = (1 - alpha_bar_t) ** 0.5 * x_t + 0.3 * alpha_bar_t**0.5 * normal(f"{walk}.{i}.eps", *SHAPE)
    pred_var = 1.2 * torch.tanh(normal(f"{walk}.{i}.pred_var", *SHAPE))
    t, t_prev = (torch.tensor([time, time]) for time in (times[i], times[i + 1]))
    noise = normal(f"{walk}.{i}.noise", *SHAPE)
    return ddpm.step(COSINE, x_t, t, t_prev, eps, pred_var, noise, dynamic_threshold(0.95, WALKS[walk]))


@pytest.mark.parametrize("walk", WALKS)
def test_single_steps_against_diffusers(walk):
    """From the same x_t. Two tolerances are wider, for diffusers multiplies up its alpha-bars in float32: that moves
    1 - alpha_bar_0 by 6e-4 relative, and with it the noise of the step into t = 0; and alpha_bar_999 by 1.3e-5, and
    with it half of that of the estimate there."""
    timesteps = REFERENCE[f"{walk}.timesteps"].tolist()
    written = [i for i in range(len(timesteps)) if f"{walk}.{i}.x_t" in REFERENCE]
    assert len(written) >= 2
    for i in written:
        x_prev, x_start = reference_step(walk, i, REFERENCE[f"{walk}.{i}.x_t"])
        into_0, from_999 = i == len(timesteps) - 2, timesteps[i] == 999
        error = (x_start - REFERENCE[f"{walk}.{i}.pred_x_start"]).abs().max().item()
        assert error <= (1e-5 if from_999 else 5.5e-6), (i, error)
        error = (x_prev - REFERENCE[f"{walk}.{i}.x_prev"]).abs().max().item()
        assert error <= (1e-4 if into_0 else 1.5e-5), (i, error)


@pytest.mark.parametrize("walk", WALKS)
def test_whole_walks_against_diffusers(walk):
    """With diffusers' tables computed in float64, as ours are, nothing but rounding is left; as released, its float32
    tables leave the difference of the step into t = 0."""
    assert REFERENCE[f"{walk}.timesteps"].tolist() == {
        "ten": schedule.leading(10), "twenty_seven": schedule.leading(27), "fifty": schedule.leading(50),
        "hundred": schedule.leading(100), "fast27": schedule.respaced("fast27"),
    }[walk].tolist()  # fmt: skip
    x = normal(f"{walk}.x_T", *SHAPE)
    for i in range(len(REFERENCE[f"{walk}.timesteps"])):
        x, _ = reference_step(walk, i, x)
    assert relative_l2(x, REFERENCE[f"{walk}.final.float64"]) <= 2e-6
    assert relative_l2(x, REFERENCE[f"{walk}.final.released"]) <= 1e-4


# --- loss -------------------------------------------------------------------------------------------------------------


def bound_inputs() -> tuple[Tensor, ...]:
    x_start = (values("x_start").clamp(-1, 1) * 127.5).round() / 127.5
    return x_start, values("noise"), values("noise") + 0.1 * values("error"), values("pred_var").tanh()


def test_ddpm_eq12_bound_with_the_true_variance():
    """DDPM Eq. 12: where both variances are sigma^2 = beta_tilde, the bound is the squared error of eps times
    beta^2 / (2 sigma^2 alpha (1 - alpha_bar))."""
    x_start, noise, eps, _ = bound_inputs()
    t = torch.tensor([700, 3])
    ab_t, ab_prev = COSINE.alpha_bar(t), COSINE.alpha_bar(t - 1)
    alpha, beta, variance = ab_t / ab_prev, 1 - ab_t / ab_prev, ddpm.posterior_variance(ab_t, ab_prev)
    expected = (beta**2 / (2 * variance * alpha * (1 - ab_t)) * (noise - eps) ** 2).flatten(1).mean(1) / math.log(2)
    close(ddpm.bound(COSINE, x_start, noise, t, eps, torch.full_like(noise, -1.0)), expected, rtol=1e-8)


def test_iddpm_eq4_7_terms_of_the_bound():
    """iDDPM Eq. 4-7: a perfect network leaves nothing of any term but the last, the cost of naming an 8-bit value."""
    x_start, noise, _, _ = bound_inputs()
    for t in (999, 400, 1):
        bits = ddpm.bound(COSINE, x_start, noise, torch.tensor([t, t]), noise, torch.full_like(noise, -1.0))
        assert bits.abs().max() < 1e-9
    assert (ddpm.bound(COSINE, x_start, noise, torch.tensor([0, 0]), noise, torch.ones_like(noise)) > 0.5).all()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_shapes_must_agree():
    small, large, bar = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8), bars(0.5)
    with pytest.raises(ValueError, match=r"shapes must agree, got x_start \(1, 3, 4, 4\), noise \(1, 3, 8, 8\)"):
        ddpm.add_noise(small, large, bar)
    with pytest.raises(ValueError, match=r"shapes must agree, got x_t \(1, 3, 4, 4\), eps \(1, 3, 8, 8\)"):
        ddpm.predict_x_start(small, large, bar)
    with pytest.raises(ValueError, match=r"shapes must agree, got x_start \(1, 3, 4, 4\), x_t \(1, 3, 8, 8\)"):
        ddpm.posterior_mean(small, large, bar, bar)
    t = torch.tensor([10])
    with pytest.raises(ValueError, match=r"shapes must agree, got .*, noise \(1, 3, 8, 8\)"):
        ddpm.step(COSINE, small, t, t - 1, small, None, large)
    two, t = torch.zeros(2, 3, 4, 4), torch.tensor([10, 20])
    with pytest.raises(ValueError, match=r"shapes must agree, got .*, pred_var \(1, 3, 4, 4\)"):
        ddpm.step(COSINE, two, t, t - 1, two, small, two)
    with pytest.raises(ValueError, match=r"shapes must agree, got .*, eps \(1, 3, 4, 4\)"):
        ddpm.loss(COSINE, two, two, t, small, None)
    with pytest.raises(ValueError, match=r"shapes must agree, got .*, noise \(1, 3, 4, 4\)"):  # one noise for both
        solvers.ddim_step(COSINE, two, t, t - 1, two, None, small, eta=1.0)


def test_coefficients_belong_to_images_and_not_to_columns():
    """4 images 4 pixels wide: alpha-bars (4,) would give each column another noise, and no one would see it."""
    x, t = torch.zeros(4, 1, 4, 4), torch.arange(4)
    with pytest.raises(ValueError, match=r"must be \(B, 1, 1, 1\) for images \(4, 1, 4, 4\), got \(4,\); Schedule"):
        ddpm.add_noise(x, x, COSINE.alphas_cumprod[t])
    with pytest.raises(ValueError, match=r"for images \(1, 1, 4, 4\), got \(4, 1, 1, 1\)"):  # would be 4 images
        ddpm.add_noise(x[:1], x[:1], COSINE.alpha_bar(t))
    with pytest.raises(ValueError, match=r"images are floats in \[-1, 1\], got torch.uint8"):  # would be black
        ddpm.add_noise(x.byte(), x.byte(), COSINE.alpha_bar(t))


@pytest.mark.parametrize("process", [schedule.squaredcos_cap_v2(), schedule.linear(1000), schedule.linear(300)])
@pytest.mark.parametrize("pred_var", [-50.0, -10.0, -4.0, -1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("t", [0, 1, 5])
def test_iddpm_eq16_gradient_is_float64s_at_every_time_and_variance(process, pred_var, t):
    """At t = 0 the KL is not used and may overflow: exp(50) squared. Its branch must not make the gradient NaN."""
    x_start = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    grads = []
    for dtype in (torch.float32, torch.float64):
        var = torch.full((4, 3, 8, 8), pred_var, dtype=dtype, requires_grad=True)
        each = ddpm.loss(
            process, x_start.to(dtype), noise.to(dtype), torch.full((4,), t), (noise + 0.1).to(dtype), var
        )
        each.sum().backward()
        grads.append(var.grad.double())
    scale = grads[1].abs().max().clamp(min=1e-30)
    assert torch.isfinite(grads[0]).all() and ((grads[0] - grads[1]) / scale).abs().max() < 1e-3
