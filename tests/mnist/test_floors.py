"""The levels in the plots, against brute force on real digits; the values for all of MNIST are in the README."""

import pytest
import torch

from minidiff.mnist import floors
from minidiff.schedule import linear


@pytest.fixture(scope="module")
def images(digits):
    return digits.images.double()


@pytest.fixture(scope="module")
def variances(images):
    return floors.spectrum(images)


def test_the_mean_picture_is_the_best_constant(images):
    mean = images.mean(0)
    assert floors.mean_image_mse(images) == pytest.approx((images - mean).square().mean().item(), rel=1e-10)
    assert floors.mean_image_mse(images) < (images - mean - 0.01).square().mean().item()


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (0.3, 0.9), (0.0, 1.0)])
def test_the_linear_optimum_is_that_of_the_normal_equations(images, variances, a, b):
    """W = a C (a^2 C + b^2 I)^-1 gives E|x - W (a x + b n)|^2 = tr((I - a W) C (I - a W)^T) + b^2 |W|^2."""
    x = images.flatten(1) - images.flatten(1).mean(0)
    C, one = x.T @ x / len(x), torch.eye(784, dtype=torch.float64)
    W = torch.linalg.solve(a**2 * C + b**2 * one, a * C).T
    rest = one - a * W
    brute = ((rest @ C * rest).sum() + b**2 * W.square().sum()) / 784
    assert floors.linear_mse(variances, a, b).item() == pytest.approx(brute.item(), rel=1e-8)


def test_the_linear_optimum_at_its_ends(images, variances):
    assert floors.linear_mse(variances, 1, 0).item() == 0
    assert floors.linear_mse(variances, 1, 1e6).item() == pytest.approx(floors.mean_image_mse(images), rel=1e-6)


def test_the_losses_of_gaussian_data_by_hand():
    """One direction of variance 1. eps: error alpha_bar at every time, as a^2 + b^2 = 1. Velocity: the error is
    1 / (t^2 + (1 - t)^2), whose integral is pi / 2."""
    one = torch.ones(1, dtype=torch.float64)
    schedule = linear(300)
    assert floors.linear_eps_loss(one, schedule) == pytest.approx(schedule.alphas_cumprod.mean().item(), rel=1e-10)
    assert floors.linear_flow_loss(one) == pytest.approx(torch.pi / 2, rel=1e-6)


def test_the_posterior_mean_is_bayes_rule(images):
    known, a, b = images[:20], torch.tensor([0.7, 0.2]), torch.tensor([0.3, 2.0])
    x_t = a.view(-1, 1, 1, 1) * images[3:5] + b.view(-1, 1, 1, 1) * torch.randn(2, 1, 28, 28, dtype=torch.float64)
    found = floors.posterior_mean(x_t, a, b, known)
    for i in range(2):
        density = torch.distributions.Normal(a[i].double() * known, b[i].double()).log_prob(x_t[i]).sum((1, 2, 3))
        share = (density - density.max()).exp()
        expected = (share.view(-1, 1, 1, 1) * known).sum(0) / share.sum()
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-9)


def test_knowing_by_heart_beats_the_linear_optimum_and_ends_at_the_mean(images, variances):
    ones = torch.ones(len(images), dtype=torch.float64)
    at = {b: floors.memorised_mse(images, images, ones, b * ones, ones) for b in (0.1, 0.5, 1e4)}
    assert at[0.1] < 1e-6 and at[0.5] < 0.5 * floors.linear_mse(variances, 1, 0.5)
    assert at[1e4] == pytest.approx(floors.mean_image_mse(images), rel=1e-3)
    assert 0 < floors.memorised_eps_loss(images, linear(300)) < 0.1 * floors.linear_eps_loss(variances, linear(300))
    assert 0 < floors.memorised_flow_loss(images) < 0.3 * floors.linear_flow_loss(variances)


def test_two_pictures_known_by_heart_by_brute_force():
    """A pixel that is 1 or -1: E[x | x_t] = tanh(x_t / b^2), and the error is the mean of 1 - tanh^2."""
    pair = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    ones = torch.ones(20_000, dtype=torch.float64)
    x = pair.repeat(10_000, 1, 1, 1)
    found = floors.memorised_mse(x, pair, ones, 1.5 * ones, 3 * ones)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5
    answer = ((1 - ((1 + 1.5 * z) / 2.25).tanh()).square() * density).sum() * (z[1] - z[0])
    assert found == pytest.approx(3 * answer.item(), rel=0.05)  # 20,000 draws: standard error about 1 %


def test_the_memorised_losses_of_two_pictures_by_quadrature():
    """A pixel that is 1 or -1, x_t = a x + b n: E[x | x_t] = tanh(a x_t / b^2). Error in eps: a / b times that in x;
    in the velocity: 1 / b times, with a = t, b = 1 - t."""
    images = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1).repeat(2000, 1, 1, 1)
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None]
    density = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5 * 0.01

    def mse(a, b):
        return ((1 - (a * (a + b * z) / b**2).tanh()).square() * density).sum(0)

    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    alpha_bar = linear(300).alphas_cumprod
    flow = (mse(t, 1 - t) / (1 - t) ** 2).mean().item()
    eps = (alpha_bar / (1 - alpha_bar) * mse(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())).mean().item()
    assert floors.memorised_flow_loss(images, 4000) == pytest.approx(flow, rel=0.1)
    assert floors.memorised_eps_loss(images, linear(300), 4000) == pytest.approx(eps, rel=0.1)
