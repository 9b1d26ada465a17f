"""Every equation of the package, one test each, in reading order: `python -m minidiff.equations` lists them.

A test has the tag of its equation as its name, and as its docstring the formula with its arithmetic, worked by hand.
Where no number says enough, the formula is compared in float64 with another that it must equal.
"""

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from minidiff import components, ddpm, editing, equations, factorized, flow, guidance, notation, schedule, solvers
from minidiff.cascade import Cascade, Settings
from minidiff.deepfloyd import initial, t5, train, unet
from minidiff.deepfloyd.stages import Stage, upsample
from minidiff.factorized import Part
from minidiff.sampling import draw_noise, seeded
from minidiff.schedule import Schedule
from minidiff.sdedit import sdedit
from minidiff.views import IDENTITY, named
from tests.reference.fill import fill, normal, read_json

COSINE = schedule.squaredcos_cap_v2()
SHAPE = (2, 3, 8, 8)
JUMPS = [(999, 998), (999, 500), (500, 499), (900, 30), (30, 0), (1, 0)]  # neighbours, long jumps, both ends
jumps = pytest.mark.parametrize(("t", "t_prev"), JUMPS)


def column(*numbers: float) -> Tensor:
    """(N, 1, 1, 1) float64: images of one value each, or one alpha-bar for each image."""
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


def values(name: str, *shape: int) -> Tensor:
    return normal(f"test_equations.{name}", *(shape or SHAPE)).double()


def close(found: Tensor, expected: object, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def alpha_bars(t: int, t_prev: int) -> tuple[Tensor, Tensor]:
    return COSINE.alpha_bar(torch.tensor([t])), COSINE.alpha_bar(torch.tensor([t_prev]))


def levels(*numbers: float) -> Schedule:
    """A schedule with these alpha-bars at t = 0, 1, ..."""
    return Schedule.from_betas(1 - torch.tensor([b / a for a, b in zip((1.0, *numbers), numbers)], dtype=torch.float64))


# --- schedule.py ------------------------------------------------------------------------------------------------------


def test_ddpm_sec2_alphas_cumprod():
    """DDPM Sec. 2: alpha_bar_t = (1 - beta_0) ... (1 - beta_t). Betas 0.1, 0.2, 0.5 leave 0.9, 0.9 * 0.8 = 0.72 and
    0.72 * 0.5 = 0.36."""
    close(Schedule.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)).alphas_cumprod, [0.9, 0.72, 0.36])


def test_iddpm_eq17_cosine_schedule():
    """iDDPM Eq. 17: alpha_bar_t = f((t + 1) / T) / f(0), since the quotients in beta_t = 1 - f((t + 1) / T) / f(t / T)
    telescope; only the last beta, which would be 1, is cut to 0.999. Some betas and alpha-bars to eleven digits."""
    made = schedule.squaredcos_cap_v2()
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    close(made.alphas_cumprod[:-1], f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    close(made.betas[-1], 0.999)
    close(made.betas[[0, 250, 990]], [4.1284224822e-05, 1.3272239542e-03, 1.8998754207e-01], rtol=2e-10)
    expected = [9.9995871578e-01, 8.4588798650e-01, 4.9228517245e-01, 2.3616108794e-02, 2.4287669070e-09]
    close(made.alphas_cumprod[[0, 250, 500, 900, 999]], expected, rtol=2e-10, atol=0)


def test_ddpm_sec4_linear_betas():
    """DDPM Sec. 4: from 1e-4 to 0.02 in equal steps; of three the middle one is (1e-4 + 0.02) / 2 = 0.01005."""
    close(schedule.linear(3).betas, [1e-4, 0.01005, 0.02])
    close(schedule.linear().betas[[0, 1, -1]], [1e-4, 1e-4 + 0.0199 / 999, 0.02])


def test_iddpm_sec4_respaced():
    """iDDPM Sec. 4: t_k = begin + round(k (n - 1) / (m - 1)). Ten times in two sections of 5: three steps at 0, 2, 4
    and two at 5, 9. 10 / 3 leaves one over, which the first section gets: 0..3, 4..6, 7..9. Three steps in 0..5 fall
    on 0, 2.5 and 5, and 2.5 rounds to the even 2; four in 0..8 on 0, 2.67, 5.33 and 8."""
    assert schedule.respaced("3,2", 10).tolist() == [9, 5, 4, 2, 0]
    assert schedule.respaced("2,1,2", 10).tolist() == [9, 7, 4, 3, 0]
    assert schedule.respaced(4, 10).tolist() == [9, 6, 3, 0]
    assert schedule.respaced(3, 6).tolist() == [5, 2, 0]
    assert schedule.respaced(4, 9).tolist() == [8, 5, 3, 0]
    assert schedule.respaced(1, 10).tolist() == [9]


# --- ddpm.py: forward and back ----------------------------------------------------------------------------------------


def test_ddpm_eq4_forward():
    """DDPM Eq. 4: x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise. With alpha_bar 0.64 the roots are 0.8
    and 0.6: 0.8 * 0.5 + 0.6 * (-2) = -0.8. With 1 it is the image, with 0 the noise."""
    x_start, noise = column(0.5, 0.5, 0.5), column(-2.0, -2.0, -2.0)
    close(ddpm.add_noise(x_start, noise, column(0.64, 1.0, 0.0)), column(-0.8, 0.5, -2.0))


def test_ddpm_eq2_forward_step():
    """DDPM Eq. 2: x_later = sqrt(alpha) x_t + sqrt(1 - alpha) noise. From alpha_bar 0.64 to 0.36, alpha = 0.5625:
    0.75 * 2 + sqrt(0.4375) * 4 = 4.1457513. One step has alpha = 1 - beta. 400 such steps, with what they keep of the
    image and of the noise's variance carried along, are one jump of DDPM Eq. 4."""
    t, later = torch.tensor([0]), torch.tensor([1])
    close(ddpm.add_more_noise(levels(0.64, 0.36), column(2.0), t, later, column(4.0)), column(4.1457513110645907))
    share, variance = 1.0, 0.0
    for beta in COSINE.betas[:400].tolist():
        share, variance = share * math.sqrt(1 - beta), variance * (1 - beta) + beta
    clean, t = torch.tensor([-1]), torch.tensor([399])
    close(ddpm.add_more_noise(COSINE, column(1.0), clean, t, column(0.0)), column(share))
    close(ddpm.add_more_noise(COSINE, column(0.0), clean, t, column(1.0)), column(math.sqrt(variance)))


def test_ddpm_eq15_x_start_from_eps():
    """DDPM Eq. 15: x_start = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t): (-0.8 - 0.6 * (-2)) / 0.8 = 0.5.
    It inverts DDPM Eq. 4 at every time; scaled by sqrt(alpha_bar), against the growth of rounding near t = 999."""
    close(ddpm.predict_x_start(column(-0.8), column(-2.0), column(0.64)), column(0.5))
    x_start, noise = values("x_start"), values("noise")
    for t in (0, 1, 500, 998, 999):
        alpha_bar = COSINE.alpha_bar(torch.tensor([t, t]))
        back = ddpm.predict_x_start(ddpm.add_noise(x_start, noise, alpha_bar), noise, alpha_bar)
        close(back * alpha_bar.sqrt(), x_start * alpha_bar.sqrt())


# --- ddpm.py: the reverse step ----------------------------------------------------------------------------------------


def test_ddpm_eq7_posterior_mean():
    """DDPM Eq. 7: from alpha_bar 0.36 to 0.72, alpha_t = beta_t = 0.5. On x_start sqrt(0.72) 0.5 / 0.64 = 0.6629126,
    on x_t sqrt(0.5) 0.28 / 0.64 = 0.3093592."""
    mean = ddpm.posterior_mean(column(1.0, 0.0), column(0.0, 1.0), column(0.36), column(0.72))
    close(mean, column(0.6629126073623883, 0.30935921676911454))


@jumps
def test_ddpm_eq6_posterior_is_bayes_rule(t, t_prev):
    """DDPM Eq. 6: q(x_prev | x_t, x_start) = N(mean, beta_tilde_t). By Bayes it is the product of two Gaussians in
    x_prev, q(x_t | x_prev) and q(x_prev | x_start): precisions add, and the mean is weighted by them. With
    x_prev = x_t / sqrt(alpha_t) from the first, precision alpha_t / beta_t, and sqrt(alpha_bar_prev) x_start from the
    second, precision 1 / (1 - alpha_bar_prev)."""
    alpha_bar_t, alpha_bar_prev = alpha_bars(t, t_prev)
    alpha_t = alpha_bar_t / alpha_bar_prev
    of_x_t, of_x_start = alpha_t / (1 - alpha_t), 1 / (1 - alpha_bar_prev)
    x_start, x_t = values("x_start"), values("x_t")
    mean = (of_x_t * x_t / alpha_t.sqrt() + of_x_start * alpha_bar_prev.sqrt() * x_start) / (of_x_t + of_x_start)
    close(ddpm.posterior_mean(x_start, x_t, alpha_bar_t, alpha_bar_prev), mean)
    close(ddpm.posterior_variance(alpha_bar_t, alpha_bar_prev), 1 / (of_x_t + of_x_start))


def test_ddpm_eq7_posterior_variance():
    """DDPM Eq. 7: beta_tilde_t = (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t: 0.28 / 0.64 * 0.5 = 0.21875. It is 0
    when the step before is clean."""
    close(ddpm.posterior_variance(column(0.36, 0.36), column(0.72, 1.0)), column(0.21875, 0.0))


def test_iddpm_eq15_learned_log_var():
    """iDDPM Eq. 15: log_var = f log beta_t + (1 - f) log beta_tilde_t, f = (pred_var + 1) / 2. From alpha_bar 0.36 to
    0.72: -1 gives log 0.21875, 1 gives log 0.5, 0 their mean, 3 goes on beyond, 2 log 0.5 - log 0.21875. In the step to
    the clean image beta_tilde is 0, and its log is taken at 1e-20."""
    low, high = math.log(0.21875), math.log(0.5)
    log_var = ddpm.learned_log_var(column(-1.0, 1.0, 0.0, 3.0), column(0.36), column(0.72))
    close(log_var, column(low, high, (low + high) / 2, 2 * high - low))
    close(ddpm.learned_log_var(column(-1.0, 1.0), column(0.36), column(1.0)), column(math.log(1e-20), math.log(0.64)))


def step(t: int, t_prev: int, noise: Tensor, process: Schedule = COSINE) -> Tensor:
    times = torch.full((2,), t), torch.full((2,), t_prev)
    return ddpm.step(process, values("x_t"), *times, values("eps"), None, noise)[0]


@jumps
def test_ddpm_alg2_step(t, t_prev):
    """DDPM Alg. 2: line 4, x_prev = mean + sigma z, with sigma^2 = beta_t where no variance is learned. The step to the
    clean image has z = 0 and gives the estimate itself."""
    alpha_bar_t, alpha_bar_prev = alpha_bars(t, t_prev)
    x_start, z = ddpm.predict_x_start(values("x_t"), values("eps"), alpha_bar_t), values("noise")
    mean = ddpm.posterior_mean(x_start, values("x_t"), alpha_bar_t, alpha_bar_prev)
    close(step(t, t_prev, z), mean + (1 - alpha_bar_t / alpha_bar_prev).sqrt() * z)
    close(step(t, -1, z), x_start)


@jumps
def test_ddpm_eq11_mean_from_eps(t, t_prev):
    """DDPM Eq. 11: mean = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) is DDPM Eq. 7 at the estimate of
    DDPM Eq. 15. From alpha_bar 0.36 to 0.72, x_t = 1, eps = 0.5: (1 - 0.5 / 0.8 * 0.5) / sqrt(0.5) = 0.9722718."""
    alpha_bar_t, alpha_bar_prev = alpha_bars(t, t_prev)
    alpha_t = alpha_bar_t / alpha_bar_prev
    expected = (values("x_t") - (1 - alpha_t) / (1 - alpha_bar_t).sqrt() * values("eps")) / alpha_t.sqrt()
    mean = step(t, t_prev, torch.zeros(SHAPE, dtype=torch.float64))
    close(mean / expected.abs().max(), expected / expected.abs().max(), rtol=1e-9, atol=1e-9)
    by_hand = levels(0.72, 0.36), column(1.0), torch.tensor([1]), torch.tensor([0]), column(0.5), None, column(0.0)
    close(ddpm.step(*by_hand)[0], column(0.9722718241315028))


def test_iddpm_sec4_a_jump_is_a_step():
    """iDDPM Sec. 4: times left out make a process of its own, beta_t = 1 - alpha_bar_t / alpha_bar_prev. A step between
    neighbours there is our jump."""
    kept = torch.tensor([0, 30, 200, 650, 999])
    alpha_bar = COSINE.alphas_cumprod[kept]
    shorter = Schedule.from_betas(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))
    for i in range(1, 5):
        ours = step(int(kept[i]), int(kept[i - 1]), values("noise"))
        theirs = step(i, i - 1, values("noise"), shorter)
        close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=1e-8, atol=1e-8)


# --- ddpm.py: losses --------------------------------------------------------------------------------------------------


def test_ddpm_eq14_simple_loss():
    """DDPM Eq. 14: L_simple = mean |noise - eps|^2. (1 - 0)^2, (0 - 2)^2, (3 - 3)^2, (-1 - 0)^2 have the mean 6 / 4,
    the second image by itself 4 / 4."""
    noise = torch.tensor([[1.0, 0.0, 3.0, -1.0], [1.0, 1.0, 1.0, 1.0]]).view(2, 1, 2, 2)
    eps = torch.tensor([[0.0, 2.0, 3.0, 0.0], [1.0, 1.0, 1.0, 3.0]]).view(2, 1, 2, 2)
    loss = ddpm.loss(COSINE, torch.zeros(2, 1, 2, 2), noise, torch.tensor([5, 900]), eps, None)
    assert loss.tolist() == [1.5, 1.0]


def bound_inputs() -> tuple[Tensor, ...]:
    x_start = (values("x_start").clamp(-1, 1) * 127.5).round() / 127.5
    return x_start, values("noise"), values("noise") + 0.1 * values("error"), values("pred_var").tanh()


def test_iddpm_eq16_hybrid_loss():
    """iDDPM Eq. 16: L_hybrid = L_simple + 0.001 T bound, and the bound moves only the variance. 0.001 * 1000 = 1 term
    of the bound; with T = 100 a tenth of it."""
    x_start, noise, eps, pred_var = bound_inputs()
    eps.requires_grad_(), pred_var.requires_grad_()
    for process, times, share in ((COSINE, [300, 0], 1.0), (schedule.linear(100), [30, 7], 0.1)):
        t = torch.tensor(times)
        simple = ddpm.loss(process, x_start, noise, t, eps, None)
        bound = ddpm.bound(process, x_start, noise, t, eps, pred_var)
        hybrid = ddpm.loss(process, x_start, noise, t, eps, pred_var)
        close(hybrid, simple + share * bound)
        of_hybrid = torch.autograd.grad(hybrid.sum(), [eps, pred_var], retain_graph=True)
        close(of_hybrid[0], torch.autograd.grad(simple.sum(), eps)[0])
        close(of_hybrid[1], share * torch.autograd.grad(bound.sum(), pred_var)[0])
        weight = torch.tensor([3.0, 0.5])
        close(ddpm.loss(process, x_start, noise, t, eps, pred_var, weight), weight * simple + share * bound)


@pytest.mark.parametrize("times", [[999, 500], [30, 1]])
def test_ddpm_eq5_bound(times):
    """DDPM Eq. 5: for t > 0 the term is KL(true posterior || ours), here by torch's own formula for two Gaussians, a
    mean over values, in bits."""
    x_start, noise, eps, pred_var = bound_inputs()
    t = torch.tensor(times)
    ab_t, ab_prev = COSINE.alpha_bar(t), COSINE.alpha_bar(t - 1)
    x_t = ddpm.add_noise(x_start, noise, ab_t)
    mean = ddpm.posterior_mean(ddpm.predict_x_start(x_t, eps, ab_t), x_t, ab_t, ab_prev)
    true_mean = ddpm.posterior_mean(x_start, x_t, ab_t, ab_prev)
    true_std = ddpm.posterior_variance(ab_t, ab_prev).sqrt().expand(SHAPE)
    std = (0.5 * ddpm.learned_log_var(pred_var, ab_t, ab_prev)).exp()
    expected = kl_divergence(Normal(true_mean, true_std), Normal(mean, std)).flatten(1).mean(1) / math.log(2)
    close(ddpm.bound(COSINE, x_start, noise, t, eps, pred_var), expected, rtol=1e-8)


def test_iddpm_eq6_bound_by_hand():
    """iDDPM Eq. 6: KL between Gaussians of equal mean and variances beta_tilde = q beta and beta is
    (q - 1 - log q) / 2. A right eps gives the equal mean, pred_var 1 the variance beta; from alpha_bar 0.36 to 0.72,
    q = 0.28 / 0.64 = 0.4375: (0.4375 - 1 + 0.8266786) / 2 = 0.1320893 nats, 0.1905646 bits. pred_var -1 leaves 0."""
    process, x_start, noise, t = levels(0.72, 0.36), column(0.2, 0.2), column(1.5, 1.5), torch.tensor([1, 1])
    bits = ddpm.bound(process, x_start, noise, t, noise, column(1.0, -1.0))
    close(bits, [(0.4375 - 1 - math.log(0.4375)) / 2 / math.log(2), 0])
    assert bits[0].item() == pytest.approx(0.1905646, abs=1e-6)


def test_iddpm_eq5_bound_of_the_last_step():
    """iDDPM Eq. 5: at t = 0 the term is -log2 P(x_start's own 8-bit value). A right eps puts the mean on x_start, and
    pred_var 1 makes the deviation sqrt(beta_0) = 0.0064253. Inner values get erf(1/255 / (0.0064253 sqrt 2)) =
    0.458360, the outermost the half beyond their bin's middle too: 0.5 + 0.458360 / 2."""
    inside = math.erf(1 / 255 / (math.sqrt(COSINE.betas[0].item()) * math.sqrt(2)))
    assert inside == pytest.approx(0.458360, abs=1e-6)
    x_start, noise, t = column(1 / 255, 1.0, -1.0), values("noise", 3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    bits = ddpm.bound(COSINE, x_start, noise, t, noise, torch.ones_like(noise))
    expected = torch.tensor([inside, 0.5 + inside / 2, 0.5 + inside / 2], dtype=torch.float64)
    close(bits, -expected.log2(), rtol=1e-8)


def test_ddpm_eq13_probability_of_8bit_values():
    """DDPM Eq. 13: a Gaussian's mass on the 256 bins of width 2/255, the outermost reaching to infinity, is 1 in all;
    the bin around its own mean holds erf(1/255 / (std sqrt 2)), with std 1/255 erf(1 / sqrt 2) = 0.6826895."""
    bins = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(1, 1, 16, 16)
    for mean, std in ((0.0, 0.1), (0.9, 0.3), (-1.2, 0.01), (7.3 / 255, 1 / 255)):
        total = ddpm._log_prob_of_8bit(bins, torch.full_like(bins, mean), torch.full_like(bins, 2 * math.log(std)))
        close(total.exp().sum(), 1.0, rtol=1e-8)
    own = ddpm._log_prob_of_8bit(column(1 / 255), column(1 / 255), column(2 * math.log(1 / 255))).exp()
    close(own, column(math.erf(1 / math.sqrt(2))))


# --- solvers.py -------------------------------------------------------------------------------------------------------


def test_ddim_eq12_step_without_noise():
    """DDIM Eq. 12: x_prev = sqrt(alpha_bar_prev) x_start + sqrt(1 - alpha_bar_prev) eps. From alpha_bar 0.36 to 0.64,
    x_t = 1 and eps = 0.5: x_start = (1 - 0.8 * 0.5) / 0.6 = 1, x_prev = 0.8 * 1 + 0.6 * 0.5 = 1.1. The step to the
    clean image is the estimate."""
    t, t_prev = torch.tensor([1, 1]), torch.tensor([0, -1])
    moved = solvers.ddim_step(levels(0.64, 0.36), column(1.0, 1.0), t, t_prev, column(0.5, 0.5), None, column(9.0, 9.0))
    close(moved[0], column(1.1, 1.0))
    close(moved[1], column(1.0, 1.0))


def test_ddim_eq16_sigma():
    """DDIM Eq. 16: sigma = eta sqrt(0.36 / 0.64) sqrt(1 - 0.36 / 0.64), with eta = 0.5: 0.5 * 0.75 * 0.6614378 =
    0.2480392. With eps = 0.5 and noise 2, x_prev = 0.8 + sqrt(0.36 - 0.0615234) 0.5 + 0.2480392 * 2 = 1.5692434. No
    noise in the step to the clean image."""
    arguments = levels(0.64, 0.36), column(1.0, 1.0), torch.tensor([1, 1]), torch.tensor([0, -1]), column(0.5, 0.5)
    x_prev, _ = solvers.ddim_step(*arguments, None, column(2.0, 2.0), eta=0.5)
    close(x_prev, column(1.5692434, 1.0), rtol=2e-8)


@pytest.mark.parametrize(("before", "direction"), [(2, 1 + 0.8 / 2), (3, 1 + 0.8 / 6)])
def test_dpm_solver_alg2_second_order_step(before, direction):
    """DPM-Solver++ Alg. 2: from alpha_bar 0.5 to 0.8, sqrt(alpha_bar / (1 - alpha_bar)) doubles: h = log 2. With
    x_t = sqrt(2) and eps = 1 the estimate is 1; before it was 0.2. From alpha_bar 0.2 the step before has length h,
    r = 1, D = 1 + 0.8 / 2; from 1 / 65 it has length 3 h, r = 3, D = 1 + 0.8 / 6.
    x_prev = sqrt(0.2 / 0.5) sqrt(2) + sqrt(0.8) (1 - 1 / 2) D = sqrt(0.8) (1 + D / 2). Without a step before, D = 1."""
    process, t = levels(0.8, 0.5, 0.2, 1 / 65), [torch.tensor([time]) for time in (1, 0, before)]
    arguments = process, column(math.sqrt(2)), t[0], t[1], column(1.0), None, column(9.0), None
    close(solvers.dpm_step(*arguments, (t[2], column(0.2)))[0], column(math.sqrt(0.8) * (1 + direction / 2)))
    close(solvers.dpm_step(*arguments)[0], column(math.sqrt(0.8) * 1.5))


def test_ddim_sec43_inversion():
    """DDIM Sec. 4.3: x_later = sqrt(alpha_bar_later) x_start + sqrt(1 - alpha_bar_later) eps, eps asked at the later
    time. From the clean 1 to alpha_bar 0.64 with eps 0.5: 0.8 + 0.6 * 0.5 = 1.1; there x_start = (1.1 - 0.3) / 0.8 = 1
    for eps 0.5, but with the eps of t = 1, which is 0.25: (1.1 - 0.15) / 0.8 = 1.1875, so to alpha_bar 0.36
    0.6 * 1.1875 + 0.8 * 0.25 = 0.9125."""
    process, eps = levels(0.64, 0.36), {0: 0.5, 1: 0.25}
    predict = lambda x_t, t: (torch.full_like(x_t, eps[int(t[0])]), None)  # noqa: E731
    for timesteps, expected in (([0], 1.1), ([1, 0], 0.9125)):
        found = solvers.invert(predict, column(1.0), torch.tensor(timesteps), process)
        close(found.double(), column(expected), rtol=1e-6)


# --- guidance.py ------------------------------------------------------------------------------------------------------


def test_imagen_eq2_guidance():
    """Imagen Eq. 2: eps = uncond + scale (cond - uncond): 2 + 3 (5 - 2) = 11. The CFG paper's form (1 + w) cond -
    w uncond is the same at scale w + 1: 3 * 5 - 2 * 2 = 11. 0 is unconditional, 1 conditional."""
    scales = {3.0: 11.0, 0.0: 2.0, 1.0: 5.0}
    for scale, expected in scales.items():
        close(guidance.combine(column(2.0), column(5.0), scale), column(expected))
        close(scale * column(5.0) - (scale - 1) * column(2.0), column(expected))


def test_imagen_sec23_dynamic_threshold():
    """Imagen Sec. 2.3: s = the quantile of |x_start|, at least 1; x_start = clamp(x_start, -s, s) / s. Of 0, 0.5, 1,
    1.5, 2 the 75 % quantile is 1.5; a cap of 1.2 is IF's; below 1 nothing happens."""
    x = torch.tensor([0.0, -0.5, 1.0, -1.5, 2.0]).view(1, 1, 1, 5)
    for cap, s in ((1.5, 1.5), (1.2, 1.2), (1.0, 1.0)):
        expected = torch.tensor([0.0, -0.5 / s, 1 / s, -1, 1])
        torch.testing.assert_close(guidance.dynamic_threshold(0.75, cap)(x).flatten(), expected)
    assert torch.equal(guidance.dynamic_threshold(0.75, 1.5)(x / 2), x / 2)


# --- flow.py ----------------------------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.4


def of_gaussian(x: Tensor, time: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t] for data N(MEAN, STD^2): x_t has variance v = (1-t)^2 + t^2 STD^2, and by Bayes
    E[x_1 | x_t] = MEAN + t STD^2 / v (x_t - t MEAN),  E[x_0 | x_t] = (1-t) / v (x_t - t MEAN)."""
    t = time.view(-1, 1, 1, 1)
    centred = (x - t * MEAN) / ((1 - t) ** 2 + t**2 * STD**2)
    return MEAN + t * STD**2 * centred - (1 - t) * centred


def test_fm_eq22_path():
    """FM Eq. 22: x_t = (1 - t) x_0 + t x_1. A quarter of the way from 2 to 10 is 4, from -1 to 3 it is 0; t = 0 is the
    noise, t = 1 the data, and each image has its own time."""
    x_0, x_1 = column(2.0, -1.0), column(10.0, 3.0)
    for time, expected in (((0.25, 0.25), (4, 0)), ((0, 0), (2, -1)), ((1, 1), (10, 3)), ((0.0, 1.0), (2, 3))):
        assert flow.path(x_0, x_1, torch.tensor(time)).flatten().tolist() == list(expected)


def test_fm_eq20_distribution_on_the_path():
    """FM Eq. 20: for one x_1 = 5 and noise x_0, x_0.75 ~ N(0.75 * 5, 0.25^2). 10,000 values, 5 standard errors."""
    x_0 = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)).double()
    x_t = flow.path(x_0, torch.full_like(x_0, 5), torch.tensor([0.75]))
    assert abs(x_t.mean().item() - 3.75) < 5 * 0.25 / 100
    assert abs(x_t.std().item() / 0.25 - 1) < 5 / 20_000**0.5


def test_fm_eq23_loss():
    """FM Eq. 23: L = mean |velocity - (x_1 - x_0)|^2. Targets 10 - 2 = 8 and 3 - (-1) = 4; the answers 7 and 4 miss by
    1 and 0."""
    assert flow.loss(column(2.0, -1.0), column(10.0, 3.0), column(7.0, 4.0)).tolist() == [1.0, 0.0]


def test_fm_eq21_velocity_of_a_line():
    """FM Eq. 21: the target is (x_1 - x_t) / (1 - t). From 2 to 10 at t = 0.25, x_t = 4: (10 - 4) / 0.75 = 8, and the
    loss of that answer is 0. It is also the path's derivative."""
    x_0, x_1, time = column(2.0, -1.0), column(10.0, 3.0), torch.tensor([0.25, 0.7], dtype=torch.float64)
    x_t = flow.path(x_0, x_1, time)
    close(flow.loss(x_0, x_1, (x_1 - x_t) / (1 - time.view(-1, 1, 1, 1))), [0.0, 0.0])
    close(flow.loss(x_0, x_1, (flow.path(x_0, x_1, time + 0.1) - x_t) / 0.1), [0.0, 0.0])


def test_dormand_prince():
    """Dormand-Prince: one step of dx/dt = x gives 1 + h + h^2/2 + ... + h^5/120 and a part h^6 / 600, as the published
    polynomial has it, so the coefficients have order 5; their error estimate has no part below h^5. Each row of WEIGHTS
    sums to its NODE. The tolerance holds on a Gaussian's flow, x_1 = MEAN + STD x_0."""
    polynomials = []  # of stage i in h: 1 + h sum_j w_ij polynomial_j
    for node, row in zip(flow.NODES, flow.WEIGHTS):
        assert sum(row) == pytest.approx(node, abs=1e-14)
        polynomial = [1.0] + [0.0] * 7
        for w, stage in zip(row, polynomials):
            polynomial = [polynomial[0], *(polynomial[k + 1] + w * stage[k] for k in range(7))]
        polynomials.append(polynomial)
    assert polynomials[-1] == pytest.approx([1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 600, 0], abs=1e-14)
    estimate = [sum(e * stage[k] for e, stage in zip(flow.ERROR, polynomials)) for k in range(4)]
    assert estimate == pytest.approx([0] * 4, abs=1e-15)
    x_1, _ = flow.dormand_prince(of_gaussian, values("x_0"), rtol=1e-8, atol=1e-8)
    close(x_1, MEAN + STD * values("x_0"), rtol=0, atol=2e-7)


def test_rectified_flow_sec22_straightness():
    """Rectified Flow Sec. 2.2: S = mean |(x_1 - x_0) - v|^2. It is 0 on lines at constant speed. In two steps at the
    speeds 1 and 3, x_1 - x_0 = 2: the mean of (2 - 1)^2 and (2 - 3)^2 is 1. Round a quarter circle
    v = pi/2 (-sin, cos)(pi t / 2): the mean of |v|^2 is pi^2 / 4, of which the chord's 2 is not counted, for 2 values:
    (pi^2 / 4 - 2) / 2 = 0.2337."""
    x_0, x_1 = values("x_0"), values("x_1")
    assert flow.straightness(lambda x, time: x_1 - x_0, x_0).max() < 1e-12
    speeds = lambda x, time: (1 + 4 * time).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    close(flow.straightness(speeds, column(0.0), steps=2), [1.0])

    def circle(x, time):
        angle = math.pi / 2 * time
        return math.pi / 2 * torch.stack([-angle.sin(), angle.cos()], 1).view(-1, 1, 1, 2)

    found = flow.straightness(circle, torch.zeros(1, 1, 1, 2, dtype=torch.float64), 2000).item()
    assert found == pytest.approx((math.pi**2 / 4 - 2) / 2, rel=1e-3)


def test_ffjord_divergence():
    """FFJORD: v = J x has divergence trace J everywhere. A probe e of +1 and -1 gives e . J e, and over all 4 probes of
    2 values the mean is the trace: J = (1, 2; 3, 4), e . J e = 10 or 0, mean 5 = 1 + 4."""
    J = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    field = lambda x, time: (x.flatten(1) @ J.T).view(x.shape)  # noqa: E731
    x, time = values("x", 4, 1, 1, 2), torch.zeros(4)
    close(flow.divergence(field, x, time)[1], [5.0] * 4)
    probes = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64).view(4, 1, 1, 2)
    close(flow.divergence(field, x, time, probes)[1], [10.0, 0.0, 0.0, 10.0])


def test_neural_ode_likelihood():
    """Neural ODE: log p(x_1) = log N(x_0; 0, I) - integral of the divergence. A Gaussian's flow makes N(MEAN, STD^2):
    log p = -sum (x - MEAN)^2 / (2 STD^2) - 6 log(STD sqrt(2 pi)) for 6 values."""
    x_1 = MEAN + 1.5 * STD * values("likelihood", 20, 1, 2, 3)
    expected = -0.5 * ((x_1 - MEAN) / STD).square().flatten(1).sum(1) - 6 * math.log(STD * math.sqrt(2 * math.pi))
    close(flow.log_likelihood(of_gaussian, x_1, flow.grid(200)), expected, rtol=0, atol=1e-3)


# --- notation.py -----------------------------------------------------------------------------------------------------


def test_progressive_distillation_sec4_v():
    """Progressive Distillation Sec. 4: v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_start. With alpha_bar 0.64,
    eps -2 and x_start 0.5: 0.8 * (-2) - 0.6 * 0.5 = -1.9."""
    close(notation.v_of(column(-2.0), column(0.5), column(0.64)), column(-1.9))


# --- components.py, factorized.py, editing.py -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frequency", "triple", "color", "motion"])
def test_factorized_diffusion_components_add_up(kind):
    """Factorized Diffusion: C_1(x) + ... + C_K(x) = x, and no component is empty."""
    x = values("components", 1, 3, 64, 64)
    parts = [component(x) for component in components.of_kind(kind)]
    close(sum(parts), x)
    assert all(part.square().mean() > 1e-4 for part in parts)


def asymmetric(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for a network that no turn leaves alone."""
    place = torch.linspace(-1, 1, x_t.shape[-1], dtype=x_t.dtype)
    eps = (x_t * (1 + place) + place[:, None] * prompt_embeds.sum((1, 2)).view(-1, 1, 1, 1)).sin()
    return eps, (eps * place).tanh()


T, PROMPTS, EMPTY = torch.tensor([300, 700]), [column(k).view(1, 1, 1) for k in (1.0, -2.0)], column(0.5).view(1, 1, 1)


def guided(x: Tensor, k: int, scale: float) -> Tensor:
    uncond, cond = (asymmetric(x, T, e.expand(2, 1, 1))[0] for e in (EMPTY, PROMPTS[k]))
    return uncond + scale * (cond - uncond)


def test_factorized_diffusion_sum_over_prompts():
    """Factorized Diffusion: eps = sum_k C_k(V_k^-1(CFG(V_k x_t, prompt_k))), term by term: a quarter turn with a ramp
    as its component, and a negation with weight 0.3. V turns clockwise, V^-1 back; the ramp comes after it."""
    x, ramp = values("x_t"), torch.linspace(0, 1, 8, dtype=torch.float64)
    parts = [Part(PROMPTS[0], named("rotate_cw"), lambda y: ramp * y),
             Part(PROMPTS[1], named("negate"), components.scaled(0.3))]  # fmt: skip
    eps, _ = factorized.factorized(asymmetric, parts, EMPTY, 2.5)(x, T)
    turned, negated = guided(x.rot90(-1, (-2, -1)), 0, 2.5).rot90(1, (-2, -1)), -guided(-x, 1, 2.5)
    close(eps, ramp * turned + 0.3 * negated)


def test_visual_anagrams_mean_of_views():
    """Visual Anagrams: eps = 1/K sum_k V_k^-1(CFG(V_k x_t, prompt_k)), here the mean of the image as it is and upside
    down."""
    x = values("x_t")
    parts = factorized.averaged(Part(PROMPTS[0], IDENTITY), Part(PROMPTS[1], named("rotate_180")))
    eps, _ = factorized.factorized(asymmetric, parts, EMPTY, 4.0)(x, T)
    upside_down = guided(x.flip(-1, -2), 1, 4.0).flip(-1, -2)
    close(eps, (guided(x, 0, 4.0) + upside_down) / 2)


def test_repaint_eq8_known_region():
    """RePaint Eq. 8: x_prev = mask x_prev + (1 - mask) known, with known = 0.8 * 0.5 + 0.6 z at alpha_bar 0.64. Under a
    mask of 0.25, x_prev = 2: 0.25 * 2 + 0.75 * (0.4 + 0.6 z) = 0.8 + 0.45 z; under 1 still 2; under 0 in the step to
    the clean image the image itself. (The paper's m is 1 - mask.)"""
    image, mask = torch.full((1, 1, 1, 3), 0.5), torch.tensor([0.25, 1.0, 0.0]).view(1, 1, 1, 3)
    z = draw_noise(image.shape, seeded([5])).flatten()
    keep = editing.renoise(image, mask)(levels(0.64), seeded([5]))
    found = keep(torch.full_like(image, 2.0), 0).flatten()
    torch.testing.assert_close(found, torch.stack([0.8 + 0.45 * z[0], torch.tensor(2.0), 0.4 + 0.6 * z[2]]))
    assert keep(torch.full_like(image, 2.0), -1).flatten().tolist() == [0.875, 2.0, 0.5]


def test_factorized_diffusion_reference():
    """Factorized Diffusion: x_prev = x_prev - C(x_prev) + C(image). With grey as C, the colours (1, 2, 6), whose mean
    is 3, become (-2, -1, 3) + 5 where the image's mean is 5. The image is noised to t_prev first."""
    image, x_prev = column(4.0, 5.0, 6.0).view(1, 3, 1, 1), column(1.0, 2.0, 6.0).view(1, 3, 1, 1)
    keep = editing.reference(image, components.grey)(levels(0.64), seeded([5]))
    close(keep(x_prev, -1).flatten(), [3.0, 4.0, 8.0])
    z = draw_noise(image.shape, seeded([5])).mean().item()
    close(keep(x_prev, 0).flatten() - 0.8 * 5 - 0.6 * z, [-2.0, -1.0, 3.0], rtol=0, atol=1e-6)


# --- deepfloyd/t5.py --------------------------------------------------------------------------------------------------

TINY_T5 = t5.T5Config.from_dict(read_json("t5")["config"])


def test_t5_sec21_rms_norm():
    """T5 Sec. 2.1: y = x / sqrt(mean(x^2) + eps) weight. The mean square of 3, 4, 0, 0 is 25 / 4, so they become 1.2,
    1.6, 0, 0 times the weight: no mean is taken off. Numbers of the size sqrt(eps) come out smaller by sqrt(2)."""
    norm = t5.RMSNorm(4, 1e-6)
    norm.weight.data = torch.tensor([1.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])), torch.tensor([1.2, 0.8, 0.0, 0.0]))
    assert norm(torch.full((4,), 1e-3))[0].item() == pytest.approx(1 / math.sqrt(2), rel=1e-6)


@torch.inference_mode()
def test_t5_sec21_attention():
    """T5 Sec. 2.1: softmax(q k^T + bias) v, head by head, without 1 / sqrt(d), in float64."""
    attention = fill(t5.SelfAttention(TINY_T5, owns_bias=False)).double()
    x, bias = values("t5.x", 2, 5, 32), values("t5.bias", 1, 6, 5, 5)
    q, k, v = attention.q(x), attention.k(x), attention.v(x)
    heads = []
    for h in range(6):
        part = slice(8 * h, 8 * h + 8)
        heads.append((q[..., part] @ k[..., part].mT + bias[:, h]).softmax(-1) @ v[..., part])
    close(attention(x, bias), attention.o(torch.cat(heads, -1)))


@torch.inference_mode()
def test_geglu_feed_forward():
    """GEGLU: W_o (gelu(W_0 x) * (W_1 x)), gelu(a) = a / 2 (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))): the tanh form,
    which at a = 1 is 0.841192 and not 0.841345."""
    ff = fill(t5.GatedFeedForward(TINY_T5)).double()
    x = values("t5.x", 2, 5, 32)
    a = ff.wi_0(x)
    gelu = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    close(ff(x), ff.wo(gelu * ff.wi_1(x)))


def test_t5_sec21_relative_buckets():
    """T5 Sec. 2.1: distances 0 to 7 have a bucket each. From 8 on, floor(8 + 8 ln(a / 8) / ln 16) gives 8 at 8, 9 at 12
    (8 + 8 * 0.1462 = 9.17), 12 at 32 (8 + 8 / 2), 15 at 91 and beyond. Later keys add 16."""
    far = {8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12, 45: 12, 46: 13, 63: 13, 64: 14, 90: 14}
    far |= {91: 15, 128: 15, 10_000: 15}
    for distance, bucket in {**{a: a for a in range(8)}, **far}.items():
        assert t5.relative_bucket(torch.tensor(-distance)).item() == bucket
        if distance:
            assert t5.relative_bucket(torch.tensor(distance)).item() == 16 + bucket


# --- deepfloyd/unet.py, deepfloyd/stages.py ---------------------------------------------------------------------------


def config(**more: object) -> unet.UNetConfig:
    return unet.UNetConfig.from_dict({**read_json("unet")["networks"]["stage_1"]["config"], **more})


def test_attention_is_all_you_need_sec35_sinusoid():
    """Attention Is All You Need Sec. 3.5: cos(t f_k), then sin(t f_k), f_k = 10000^(-k / n): halves, cosines first.
    t = 37, n = 96: cos(37) = 0.765414, cos(37 * 0.908518) = -0.587873; sin(37) = -0.643538. The slowest wave of n = 3
    has f_2 = 10000^(-2/3)."""
    waves = unet.sinusoid(torch.tensor([37]), 192)[0]
    torch.testing.assert_close(waves[:3], torch.tensor([0.765414, -0.587873, 0.640251]), rtol=0, atol=2e-6)
    torch.testing.assert_close(waves[96:99], torch.tensor([-0.643538, 0.808953, -0.768166]), rtol=0, atol=2e-6)
    assert unet.sinusoid(torch.tensor([0]), 6).tolist() == [[1, 1, 1, 0, 0, 0]]
    slow = [math.cos(999 * 10000 ** (-2 / 3)), math.sin(999 * 10000 ** (-2 / 3))]
    torch.testing.assert_close(unet.sinusoid(torch.tensor([999]), 6)[0, [2, 5]], torch.tensor(slow), rtol=0, atol=1e-5)


def exact_gelu(y: Tensor) -> Tensor:
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


@pytest.mark.parametrize("skip_time_act", [False, True])
@pytest.mark.parametrize("resample", ["", "down", "up"])
@torch.inference_mode()
def test_film_scale_and_shift(resample, skip_time_act):
    """FiLM: h = norm2(conv1(resample(gelu(norm1(x))))) (1 + scale) + shift, out = (skip + conv2(gelu(h))) / out_scale;
    scale is the first half of the time's linear layer, gelu(x) = x Phi(x), and out_scale 1 / 0.7071."""
    block = unet.ResnetBlock(config(resnet_skip_time_act=skip_time_act), 32, 64, 1 / 0.7071, resample)
    block = fill(block).double()
    x, temb = values("resnet.x", 2, 32, 4, 6), values("resnet.temb", 2, 128)

    def resized(y: Tensor) -> Tensor:
        if resample == "down":
            return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
        return y.repeat_interleave(2, -1).repeat_interleave(2, -2) if resample == "up" else y

    e = block.time_emb_proj(temb if skip_time_act else exact_gelu(temb))[:, :, None, None]
    h = block.norm2(block.conv1(resized(exact_gelu(block.norm1(x))))) * (1 + e[:, :64]) + e[:, 64:]
    close(block(x, temb), (block.conv_shortcut(resized(x)) + block.conv2(exact_gelu(h))) * 0.7071)


@pytest.mark.parametrize("only_cross", [False, True])
@torch.inference_mode()
def test_glide_one_softmax(only_cross):
    """GLIDE: out = x + W_o softmax(q [k_text, k_image]^T / sqrt(16)) [v_text, v_image], head by head, in float64; the
    text is normalised in 32 groups of 2 channels over all 5 tokens together."""
    attention = fill(unet.Attention(config(), 32, only_cross)).double()
    x, text = values("attention.x", 2, 32, 2, 3), values("attention.text", 2, 5, 64)
    n = F.group_norm(x, 32, attention.group_norm.weight, attention.group_norm.bias, 1e-5).view(2, 32, 6).mT
    groups = text.view(2, 5, 32, 2)
    mean, var = groups.mean((1, 3), keepdim=True), groups.var((1, 3), keepdim=True, unbiased=False)
    g = ((groups - mean) / (var + 1e-5).sqrt()).view(2, 5, 64) * attention.norm_cross.weight + attention.norm_cross.bias
    k, v = attention.add_k_proj(g), attention.add_v_proj(g)
    if not only_cross:
        k, v = torch.cat([k, attention.to_k(n)], 1), torch.cat([v, attention.to_v(n)], 1)
    heads = []
    for h in range(2):  # 32 channels in heads of 16
        part = slice(16 * h, 16 * h + 16)
        heads.append((attention.to_q(n)[..., part] @ k[..., part].mT / 4).softmax(-1) @ v[..., part])
    close(attention(x, text), x + attention.to_out[0](torch.cat(heads, -1)).mT.reshape(2, 32, 2, 3))


class Recorder(nn.Module):
    """Stands in for a UNet of 8 pixels: notes its inputs, and answers 0."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.config, self.inputs = nn.Conv2d(1, 1, 1), SimpleNamespace(sample_size=8), []

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.inputs.append((x.clone(), int(t[0]), None if class_labels is None else class_labels.tolist()))
        return torch.zeros(len(x), 6, *x.shape[2:])


def recording_cascade() -> tuple[Cascade, list]:
    stage = Stage(Recorder(), COSINE, 0.95, 1.0, COSINE)
    cascade = Cascade(lambda: stage, None, lambda texts: torch.zeros(len(texts), 1, 1), [Settings(5, 1.0)] * 2)
    cascade._stages[1] = stage
    return cascade, stage.unet.inputs


def is_noised(pairs: list[tuple[Tensor, Tensor, float]]) -> None:
    """pairs: (noisy, clean, alpha_bar). All have one and the same noise, of mean 0 and variance 1."""
    noises = [(noisy.double() - a**0.5 * clean.double()) / (1 - a) ** 0.5 for noisy, clean, a in pairs]
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-4)
    n = noises[0].numel()
    assert abs(noises[0].mean()) < 5 / n**0.5 and abs(noises[0].var() - 1) < 5 * (2 / n) ** 0.5


def test_imagen_sec24_noise_conditioning(monkeypatch):
    """Imagen Sec. 2.4: the network reads [x_t, low_res] and the level, low_res = sqrt(alpha_bar_level) upsample(small)
    + sqrt(1 - alpha_bar_level) noise: the same in each step, and for each level and image the same noise."""
    pairs, black, ramp = [], torch.full((1, 3, 4, 4), -1.0), torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    for small, level in ((ramp, 250), (ramp, 600), (black, 250)):
        cascade, inputs = recording_cascade()
        monkeypatch.setattr(type(cascade), "stage", lambda self, number: self._stages[1])
        cascade.enlarge(small, [Part(*cascade.encode("x"))], [3], noise_level=level)
        assert len(inputs) == 5 and all(labels == [level] for _, _, labels in inputs)
        low_res = [x[:, 3:] for x, _, _ in inputs]
        assert all(torch.equal(x, low_res[0]) for x in low_res)
        pairs.append((low_res[0], upsample(small, (16, 16)), COSINE.alphas_cumprod[level].item()))
    is_noised(pairs)


def test_sdedit_alg1_start():
    """SDEdit Alg. 1: the walk begins at t = timesteps[i_start] with x_t = sqrt(alpha_bar_t) image + sqrt(1 -
    alpha_bar_t) noise. Of five steps 999, 749, 500, 250, 0 the second to fourth are starts; the noise is the seed's."""
    pairs, black, ramp = [], torch.full((1, 3, 8, 8), -1.0), (torch.arange(192) / 127.5 - 1).view(1, 3, 8, 8)
    for image, i_start, t in ((ramp, 1, 749), (ramp, 2, 500), (black, 3, 250)):
        cascade, inputs = recording_cascade()
        sdedit(cascade, image, "x", i_start, [3])
        assert [time for _, time, _ in inputs] == [999, 749, 500, 250, 0][i_start:]
        pairs.append((inputs[0][0], image, COSINE.alphas_cumprod[t].item()))
    is_noised(pairs)


# --- deepfloyd/initial.py, deepfloyd/train.py, mnist/ -----------------------------------------------------------------


class Texts(nn.Module):
    """Stands in for a text encoder: the state of token id k is (k, 1 - k) everywhere."""

    def __init__(self):
        super().__init__()
        self.shared, self.config = nn.Embedding(1, 1), SimpleNamespace(d_model=2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([ids.float(), 1 - ids.float()], -1) + 0 * self.shared.weight.sum()


def test_clip_infonce(monkeypatch):
    """CLIP: L = cross entropy of softmax(s <text_i, image_j>) both ways. Two captions are equal, so each of their
    images has both as its target, half each: rows (1/2, 1/2, 0), (1/2, 1/2, 0), (0, 0, 1). Scores are s = exp(2.7)
    times cosines, rows for images and then for texts."""
    texts, calls, cross_entropy = ["a", "a", "b"], [], F.cross_entropy
    monkeypatch.setattr(initial, "CONTRASTIVE_STEPS", 1)
    monkeypatch.setattr(F, "cross_entropy", lambda *pair: calls.append(pair) or cross_entropy(*pair))
    tokenizer = lambda some: (torch.tensor([[int(x == "b")] * 2 for x in some]), torch.ones(3, 2).long())  # noqa: E731
    pictures = SimpleNamespace(draw=lambda *arguments, **more: (values("clip", 3, 3, 32, 32).float(), texts))
    initial.match_captions(Texts(), tokenizer, pictures, 0, "float32", quiet=True)
    (scores, target), (scores_of_texts, target_of_texts) = calls
    half = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert target.tolist() == target_of_texts.tolist() == half
    assert torch.equal(scores_of_texts, scores.T) and torch.equal(scores[:, 0], scores[:, 1])
    assert 0 < (scores.abs().max().item()) <= math.exp(2.7) * 1.00001


def test_progressive_distillation_sec4_weight():
    """Progressive Distillation Sec. 4: the loss of x_start weighed by SNR + 1 is the loss of v = sqrt(alpha_bar) eps -
    sqrt(1 - alpha_bar) x_start. An error e in eps is sqrt(1 - alpha_bar) / sqrt(alpha_bar) e in x_start, and
    sqrt(alpha_bar) e + (1 - alpha_bar) / sqrt(alpha_bar) e = e / sqrt(alpha_bar) in v: weight 1 / alpha_bar on eps."""
    alpha_bar, e = alpha_bars(700, 200)[0].item(), 0.1
    snr, error_of_x_start = alpha_bar / (1 - alpha_bar), (1 - alpha_bar) ** 0.5 / alpha_bar**0.5 * e
    answer = torch.cat([torch.full((1, 3, 8, 8), e), -torch.ones(1, 3, 8, 8)], 1)
    model = train.Trainee(1, lambda x, t, embeds, labels: answer, lambda ids, mask: None, COSINE)
    zeros, t = torch.zeros(1, 3, 8, 8), torch.tensor([700])
    random = {"noise": zeros, "t": t}
    bound = train.MAX_BOUND_WEIGHT * ddpm.bound(COSINE, zeros, zeros, t, answer[:, :3], answer[:, 3:])
    found = model(zeros, torch.zeros(1, 1), torch.zeros(1, 1), random) - bound
    assert found.item() == pytest.approx((snr + 1) * error_of_x_start**2, rel=1e-4)
    assert found.item() == pytest.approx(e**2 / alpha_bar, rel=1e-4)


def test_simple_diffusion_sec32_coarse_loss():
    """simple diffusion Sec. 3.2: errors of areas count once more, by their mean square over areas of 16 x 16 and of
    64 x 64. An error of 0.5 in a quarter of the image: of 16 areas four, 0.25 / 4 = 0.0625, and one of 0.5 / 4,
    0.015625. In all 0.078125. Grain, +-0.5 in turns, has the same mean square and costs nothing."""
    error = torch.zeros(2, 3, 64, 64)
    error[0, :, :32, :32] = 0.5
    error[1, :, ::2] = 0.5
    error[1, :, 1::2] = -0.5
    assert train.coarse_loss(error).tolist() == train.coarse_loss(-error).tolist() == [0.078125, 0.0]


def test_min_snr_sec34_times():
    """Min-SNR Sec. 3.4: times are drawn in proportion to min(1, 5 / SNR), SNR = alpha_bar / (1 - alpha_bar), but at
    least 0.4. Of 40,000, those of 0..49 (share 0.4), 170..219 and 500..549 (share 1), to 5 standard errors."""
    t = train.random_numbers(1, 40_000, 1, COSINE, torch.Generator().manual_seed(0))["t"]
    share = (5 * (1 - COSINE.alphas_cumprod) / COSINE.alphas_cumprod).clamp(0.4, 1)
    for start in (0, 170, 500):
        expected = 40_000 * (share[start : start + 50].sum() / share.sum()).item()
        assert abs(((t >= start) & (t < start + 50)).sum().item() - expected) < 5 * expected**0.5


def test_wilson_interval():
    """Wilson interval: (share + z^2 / 2n +- z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96. Of
    93 of 100: (0.93 + 0.019208 +- 1.96 * 0.027332) / 1.038416 = 0.8625 and 0.9657. Its ends solve
    |share - end| = z sqrt(end (1 - end) / n)."""
    from minidiff.mnist import judge

    assert judge.wilson(0.93, 100) == pytest.approx((0.862503, 0.965681), abs=1e-6)
    for end in judge.wilson(0.3, 50):
        assert abs(0.3 - end) == pytest.approx(1.96 * (end * (1 - end) / 50) ** 0.5, rel=1e-10)


def test_frechet_distance():
    """Frechet distance: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)). One dimension: (3 - 1)^2 +
    (2 - 5)^2 = 13 for deviations 2 and 5. Variances (4, 9) against (1, 1): (2 - 1)^2 + (3 - 1)^2 = 5. Turned by 45
    degrees, C1 = (2.5, 1.5; 1.5, 2.5) has the variances 4 and 1: against 1 it is 1."""
    from minidiff.mnist import judge

    def gaussian(mean: list[float], covariance: list[list[float]]) -> tuple[Tensor, Tensor]:
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)

    one = gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    assert judge.frechet(gaussian([3.0], [[4.0]]), gaussian([1.0], [[25.0]])) == pytest.approx(13, abs=1e-10)
    assert judge.frechet(gaussian([0.0, 1.0], [[4.0, 0.0], [0.0, 9.0]]), one) == pytest.approx(5, abs=1e-10)
    assert judge.frechet(gaussian([0.0, 1.0], [[2.5, 1.5], [1.5, 2.5]]), one) == pytest.approx(1, abs=1e-10)


class Teacher:
    """Stands in for a network of digits without classes: a Gaussian's flow."""

    config = SimpleNamespace(num_classes=0)

    def __call__(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return of_gaussian(x, time)


def test_rectified_flow_sec21_reflow():
    """Rectified Flow Sec. 2.1: pairs (x_0, where the teacher leads x_0) are MEAN + STD x_0 for a Gaussian's flow, up to
    the teacher's steps. Their lines do not cross: x_t = (1 - t) x_0 + t (MEAN + STD x_0) has one x_0, and the student
    that answers its x_1 - x_0 has no loss, walks straight, and arrives in one step."""
    from minidiff.mnist import train_flow

    x_0 = values("reflow", 2, 1, 28, 28)
    pairs = train_flow.make_pairs(Teacher(), torch.zeros(2, dtype=torch.int64), x_0, 400)
    x_1, kept = pairs.images.split(1, dim=1)
    assert torch.equal(kept, x_0)
    close(x_1, MEAN + STD * x_0, rtol=0, atol=1e-2)

    def student(x, time):
        t = time.view(-1, 1, 1, 1)
        return MEAN + (STD - 1) * (x - t * MEAN) / (1 - t + t * STD)

    time = torch.tensor([0.2, 0.9], dtype=torch.float64)
    exact = MEAN + STD * x_0
    close(flow.loss(x_0, exact, student(flow.path(x_0, exact, time), time)), [0.0, 0.0])
    close(flow.solve(student, x_0, flow.grid(1)), exact)
    assert flow.straightness(student, x_0).max() < 1e-12 and flow.straightness(of_gaussian, x_0).min() > 1e-3


# --- the table --------------------------------------------------------------------------------------------------------

ROOT = Path(equations.__file__).parents[1]
ROWS = equations.rows()


def test_every_row_is_filled_and_its_home_and_test_exist():
    own = Path(__file__).read_text()
    for row in ROWS:
        assert all(row), row
        file, name = row.home.split("::")
        assert re.search(rf"^(def|class) {name}\b", (ROOT / "minidiff" / file).read_text(), re.MULTILINE), row.home
        assert f"\ndef {row.test}(" in own and row.worked.startswith(row.tag + ":")
        assert len(row.formula) < 400 and "  " not in row.formula


def test_every_equation_tag_of_the_package_has_a_row_and_every_row_its_test():
    code = {tag for path in (ROOT / "minidiff").rglob("*.py") if path.stem != "equations"
            for tag in re.findall(r"\b[A-Za-z]+ Eq\. \d+", path.read_text())}  # fmt: skip
    assert code <= {row.tag for row in ROWS}, code - {row.tag for row in ROWS}
    assert len({(row.tag, row.home) for row in ROWS}) == len({row.test for row in ROWS}) == len(ROWS) >= 45


def test_the_tests_stand_in_the_order_of_the_rows():
    own, used = Path(__file__).read_text(), list(dict.fromkeys(row.test for row in ROWS))
    assert [own.index(f"def {test}(") for test in used] == sorted(own.index(f"def {test}(") for test in used)


def test_the_chapter_of_a_tag_is_the_first_that_names_it(tmp_path, monkeypatch):
    for name, text in (("03-x.md", "DDPM Eq. 14"), ("12-y.md", "DDPM Eq. 14, DDPM Eq. 4"), ("course.md", "DDPM Eq. 2")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(equations, "WALKTHROUGH", tmp_path)
    chapters = {row.tag: row.chapter for row in equations.rows()}
    assert [chapters[f"DDPM Eq. {n}"] for n in (14, 4, 2)] == ["3", "12", "-"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "minidiff.equations", *arguments], capture_output=True, text=True)


def test_the_command_prints_the_table_or_one_equation():
    lines = run().stdout.splitlines()
    assert lines[0].split() == ["tag", "formula", "home", "test", "chapter"] and len(lines) == len(ROWS) + 1
    one = run("ddpm eq.7 ").stdout
    assert one.startswith("DDPM Eq. 7    minidiff/ddpm.py::posterior_mean    walkthrough, chapter ")
    for part in ("posterior_variance", "test_ddpm_eq7_posterior_mean", "0.28 / 0.64 * 0.5 = 0.21875"):
        assert part in one
    wrong = run("DDPM Eq. 99")
    assert wrong.returncode == 2 and "no equation 'DDPM Eq. 99'; choose from DDPM Sec. 2, " in wrong.stderr


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen([sys.executable, "-m", "minidiff.equations"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_it_imports_no_library_and_needs_neither_tests_nor_walkthrough(monkeypatch):
    code = "import sys, minidiff.equations; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    monkeypatch.setattr(equations, "TESTS", ROOT / "none.py")
    monkeypatch.setattr(equations, "WALKTHROUGH", ROOT / "none")
    head, *body = equations.table()
    assert head == ["tag", "formula", "home"] and len(body) == len(ROWS) and all(all(cells) for cells in body)
    assert "0.28 / 0.64" not in equations.in_full("DDPM Eq. 7")


def test_the_table_in_markdown_is_the_one_in_the_readme():
    lines = equations.markdown().splitlines()
    assert len(lines) == len(ROWS) + 2 and lines[1] == "| --- | --- | --- | --- | --- |"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)
    readme = (ROOT / "README.md").read_text()
    if "<!-- equations -->" in readme:
        assert readme.partition("<!-- equations -->")[2].partition("<!-- /equations -->")[0].strip() == "\n".join(lines)
        references = readme.partition("## References")[2]
        missing = [key for key in {row.tag: row for row in ROWS} if not any(
            key.startswith(k) for k in re.findall(r"^\| ([^|]+?) \|", references, re.MULTILINE))]  # fmt: skip
        assert not missing, f"not among README's references: {missing}"
