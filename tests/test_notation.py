"""Notations: each formula by hand, round trips in float64, and identities between papers that only right ones obey."""

import math

import pytest
import torch
from torch import Tensor

from minidiff import ddpm, flow, notation, solvers, toy
from minidiff.schedule import squaredcos_cap_v2
from tests.reference.fill import normal

COSINE = squaredcos_cap_v2()
TIMES = torch.tensor([0, 1, 500, 998, 999])
ALPHA_BAR = COSINE.alpha_bar(TIMES)
SHAPE = (5, 3, 4, 4)
EPS, X_START = normal("test_notation.eps", *SHAPE).double(), normal("test_notation.x_start", *SHAPE).double()
X_T = ddpm.add_noise(X_START, EPS, ALPHA_BAR)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected.double(), rtol=rtol, atol=atol)


# --- how noisy --------------------------------------------------------------------------------------------------------


def test_letters_by_hand():
    """alpha_bar 0.64 has the roots 0.8 and 0.6: sigma = 0.6 / 0.8, time = 0.8 / 1.4, lambda = log(0.8 / 0.6); at 0.5
    image and noise are equal: 1, 1/2 and 0; at 0.1, sigma = sqrt(0.9 / 0.1) = 3 and time = 1 / (1 + 3)."""
    alpha_bar = column(0.64, 0.5, 0.1)
    close(notation.sigma_of(alpha_bar), column(0.75, 1.0, 3.0))
    close(notation.time_of(alpha_bar), column(4 / 7, 0.5, 0.25))
    close(notation.lambda_of(alpha_bar), column(math.log(4 / 3), 0.0, -math.log(3)))


@pytest.mark.parametrize("letter", ["sigma", "time", "lambda"])
def test_letters_there_and_back(letter):
    """At every time of the cosine schedule, where alpha_bar is 0.99996 to 2.4e-9."""
    alpha_bar = COSINE.alpha_bar(torch.arange(1000))
    there, back = getattr(notation, f"{letter}_of"), getattr(notation, f"alpha_bar_of_{letter}")
    close(back(there(alpha_bar)), alpha_bar, atol=0)


def test_letters_agree_with_the_rest_of_the_package():
    """lambda as `solvers.dpm_step` has it, -log sigma, and the time of `flow.clock`."""
    alpha_bar = COSINE.alpha_bar(torch.arange(1000))
    close(notation.lambda_of(alpha_bar), solvers._half_log_snr(alpha_bar))
    close(notation.lambda_of(alpha_bar), -notation.sigma_of(alpha_bar).log())
    close(notation.time_of(alpha_bar).flatten(), flow.clock(COSINE))


# --- the scale of the mixture -----------------------------------------------------------------------------------------


def test_scales_by_hand_and_by_their_mixtures():
    """alpha_bar 0.64, x_start 0.5, eps -2: x_t = 0.4 - 1.2 = -0.8. On EDM's scale -0.8 / 0.8 = 0.5 + 0.75 * (-2) = -1;
    on the flow's -0.8 / 1.4 = 4/7 * 0.5 + 3/7 * (-2) = -4/7."""
    close(notation.to_edm(column(-0.8), column(0.64)), column(-1.0))
    close(notation.to_flow(column(-0.8), column(0.64)), column(-4 / 7))
    close(notation.to_edm(X_T, ALPHA_BAR), X_START + notation.sigma_of(ALPHA_BAR) * EPS)
    close(notation.to_flow(X_T, ALPHA_BAR), flow.path(EPS, X_START, notation.time_of(ALPHA_BAR).flatten()))


def test_a_ddim_step_is_an_euler_step_in_sigma():
    """x_prev = x + (sigma_prev - sigma) eps on EDM's scale, also from t = 999 and to the clean image, sigma 0."""
    t, t_prev = torch.tensor([999, 998, 500, 500, 0]), torch.tensor([998, 500, 499, -1, -1])
    before, after = COSINE.alpha_bar(t), COSINE.alpha_bar(t_prev)
    found, _ = solvers.ddim_step(COSINE, X_T, t, t_prev, EPS, None, torch.zeros_like(X_T))
    euler = notation.to_edm(X_T, before) + (notation.sigma_of(after) - notation.sigma_of(before)) * EPS
    close(notation.to_edm(found, after) * after.sqrt(), euler * after.sqrt(), rtol=1e-8, atol=1e-8)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_by_hand():
    """alpha_bar 0.64, x_start 0.5, eps -2: v = 0.8 * (-2) - 0.6 * 0.5 = -1.9, score = 2 / 0.6, velocity = 0.5 + 2."""
    eps, x_start, alpha_bar = column(-2.0), column(0.5), column(0.64)
    close(notation.v_of(eps, x_start, alpha_bar), column(-1.9))
    close(notation.score_of(eps, alpha_bar), column(10 / 3))
    close(notation.velocity_of(eps, x_start), column(2.5))


@pytest.mark.parametrize("kind", ["x_start", "v", "score", "velocity"])
def test_answers_there_and_back(kind):
    """Each answer made of eps and x_start gives both back; scaled by the roots, against rounding at both ends."""
    answer = {
        "x_start": X_START, "v": notation.v_of(EPS, X_START, ALPHA_BAR), "score": notation.score_of(EPS, ALPHA_BAR),
        "velocity": notation.velocity_of(EPS, X_START),
    }[kind]  # fmt: skip
    eps, x_start = getattr(notation, f"from_{kind}")(X_T, answer, ALPHA_BAR)
    close(eps * (1 - ALPHA_BAR).sqrt(), EPS * (1 - ALPHA_BAR).sqrt())
    close(x_start * ALPHA_BAR.sqrt(), X_START * ALPHA_BAR.sqrt())


def test_v_is_the_derivative_by_the_angle():
    """With sqrt(alpha_bar) = cos phi, x_t = cos phi x_start + sin phi eps; by central differences."""
    phi, h = torch.acos(ALPHA_BAR.sqrt()), 1e-5
    ends = [torch.cos(p) * X_START + torch.sin(p) * EPS for p in (phi + h, phi - h)]
    close(notation.v_of(EPS, X_START, ALPHA_BAR), (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-7)


def test_edms_network_with_data_of_deviation_1_answers_minus_v():
    """EDM's Table 1, sigma_data = 1: D = x / (1 + sigma^2) + sigma / sqrt(1 + sigma^2) F, where D is x_start."""
    x, sigma = notation.to_edm(X_T, ALPHA_BAR), notation.sigma_of(ALPHA_BAR)
    _, x_start = notation.from_v(X_T, EPS, ALPHA_BAR)  # any answer will do: here v = EPS
    close(x_start, x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * EPS)


def test_the_score_of_a_gaussian():
    """x_t of data N(0.3, 0.4^2) is N(sqrt(alpha_bar) 0.3, alpha_bar 0.16 + 1 - alpha_bar); its gradient is known."""
    eps, _ = toy.gaussian(COSINE, 0.3, 0.4)(X_T, TIMES)
    exact = -(X_T - ALPHA_BAR.sqrt() * 0.3) / (ALPHA_BAR * 0.16 + 1 - ALPHA_BAR)
    close(notation.score_of(eps, ALPHA_BAR), exact)


def test_the_velocity_is_that_of_the_flow():
    predict, alpha_bar = toy.gaussian(COSINE, 0.3, 0.4), ALPHA_BAR[:3]
    field = flow.from_eps(predict, COSINE)
    x_t, times = X_T[:3], TIMES[:3]
    eps, x_start = notation.from_velocity(
        x_t, field(notation.to_flow(x_t, alpha_bar), notation.time_of(alpha_bar).flatten()), alpha_bar
    )
    close(eps, predict(x_t, times)[0], rtol=1e-8, atol=1e-8)
    close(x_start, ddpm.predict_x_start(x_t, eps, alpha_bar), rtol=1e-8, atol=1e-8)


def test_float32_images_keep_their_type():
    x_t = X_T.float()
    for pair in (notation.from_v, notation.from_score, notation.from_velocity, notation.from_x_start):
        assert {x.dtype for x in pair(x_t, EPS.float(), ALPHA_BAR)} == {torch.float32}
    assert notation.to_edm(x_t, ALPHA_BAR).dtype == notation.to_flow(x_t, ALPHA_BAR).dtype == torch.float32
