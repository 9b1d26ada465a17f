"""The reference levels, against brute force on real digits, and those of the README.

tests/reference/spectrum.npz holds the eigenvalues of the covariance (784 x 784) of MNIST's 60,000 training digits in
[0, 1], by numpy.cov and numpy.linalg.eigvalsh.
"""

import numpy as np
import pytest
import torch

from minidiff.mnist import levels
from minidiff.mnist.data import Digits
from minidiff.schedule import linear
from minidiff.toy import Mixture
from tests.mnist.real import FILE


def linear_loss(variances, task):
    a, b, weight = task(3000)
    return (weight * levels.linear_mse(variances, a, b)).mean().item()


def known_loss(known, task, dropout=1.0):
    return levels.known_mse(known, *task(len(known)), dropout)


@pytest.fixture(scope="module")
def images(digits):
    return digits.images.double()


@pytest.fixture(scope="module")
def variances(images):
    return levels.spectrum(images)


def test_the_mean_image_is_the_best_constant(images):
    mean = images.mean(0)
    assert levels.mean_image_mse(images) == pytest.approx((images - mean).square().mean().item(), rel=1e-10)
    assert levels.mean_image_mse(images) < (images - mean - 0.01).square().mean().item()


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (0.3, 0.9), (0.0, 1.0)])
def test_the_linear_optimum_is_that_of_the_normal_equations(images, variances, a, b):
    """W = a C (a^2 C + b^2 I)^-1 gives E|x - W (a x + b n)|^2 = tr((I - a W) C (I - a W)^T) + b^2 |W|^2."""
    x = images.flatten(1) - images.flatten(1).mean(0)
    C, one = x.T @ x / len(x), torch.eye(784, dtype=torch.float64)
    W = torch.linalg.solve(a**2 * C + b**2 * one, a * C).T
    rest = one - a * W
    brute = ((rest @ C * rest).sum() + b**2 * W.square().sum()) / 784
    assert levels.linear_mse(variances, a, b).item() == pytest.approx(brute.item(), rel=1e-8)


def test_the_linear_optimum_at_its_ends(images, variances):
    assert levels.linear_mse(variances, 1, 0).item() == 0
    assert levels.linear_mse(variances, 1, 1e6).item() == pytest.approx(levels.mean_image_mse(images), rel=1e-6)


def test_the_levels_of_all_of_mnist_are_those_of_the_readme():
    with np.load(FILE.with_name("spectrum.npz")) as file:
        variances = torch.from_numpy(file["variances"])
    assert f"{variances.mean():.4f}" == "0.0673"
    found = [levels.linear_mse(variances, 1, sigma).item() for sigma in (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)]
    assert ", ".join(f"{level:.4f}" for level in found) == "0.0080, 0.0163, 0.0201, 0.0235, 0.0295, 0.0346"
    assert f"{linear_loss(variances, levels.ddpm(linear(300))):.4f}" == "0.0797"
    assert f"{linear_loss(variances, levels.flow):.3f}" == "0.193"


def test_the_losses_of_gaussian_data_by_hand():
    """One direction of variance 1. eps: error alpha_bar at every time, as a^2 + b^2 = 1. Velocity: the error is
    1 / (t^2 + (1 - t)^2), whose integral is pi / 2."""
    one = torch.ones(1, dtype=torch.float64)
    schedule = linear(300)
    assert linear_loss(one, levels.ddpm(schedule)) == pytest.approx(schedule.alphas_cumprod.mean().item(), rel=1e-10)
    assert linear_loss(one, levels.flow) == pytest.approx(torch.pi / 2, rel=1e-6)


def test_the_posterior_mean_is_bayes_rule(images):
    known, a, b = Digits(images[:20], torch.arange(20) % 2), torch.tensor([0.7, 0.2]), torch.tensor([0.3, 2.0])
    x_t = a.view(-1, 1, 1, 1) * images[3:5] + b.view(-1, 1, 1, 1) * torch.randn(2, 1, 28, 28, dtype=torch.float64)
    found = levels.posterior_mean(x_t, a, b, known), levels.posterior_mean(x_t, a, b, known, torch.tensor([1, 0]))
    for i in range(2):
        for answer, among in zip(found, (known.images, known.images[1 - i :: 2])):
            density = torch.distributions.Normal(a[i].double() * among, b[i].double()).log_prob(x_t[i]).sum((1, 2, 3))
            share = (density - density.max()).exp()
            expected = (share.view(-1, 1, 1, 1) * among).sum(0) / share.sum()
            torch.testing.assert_close(answer[i], expected, rtol=1e-6, atol=1e-9)


def test_a_known_training_set_beats_the_linear_optimum_and_ends_at_the_mean(images, digits, variances):
    known = Digits(images, digits.labels)
    ones = torch.ones(len(images), dtype=torch.float64)
    at = {b: levels.known_mse(known, ones, b * ones, ones) for b in (0.1, 0.5, 1e4)}
    assert at[0.1] < 1e-6 and at[0.5] < 0.5 * levels.linear_mse(variances, 1, 0.5)
    assert at[1e4] == pytest.approx(levels.mean_image_mse(images), rel=1e-3)
    assert 0 < known_loss(known, levels.ddpm(linear(300))) < 0.1 * linear_loss(variances, levels.ddpm(linear(300)))
    assert 0 < known_loss(known, levels.flow) < 0.3 * linear_loss(variances, levels.flow)


def test_the_class_lowers_the_level_as_often_as_it_is_known(images, digits):
    """Far off, where nothing is seen: the mean of all, or of the class."""
    known, ones = Digits(images, digits.labels), torch.ones(len(images), dtype=torch.float64)
    of_class = torch.stack([images[digits.labels == k].mean(0) for k in range(10)])
    without, with_class = levels.mean_image_mse(images), (images - of_class[digits.labels]).square().mean().item()
    for dropout in (0.0, 0.1, 1.0):
        found = levels.known_mse(known, ones, 1e4 * ones, ones, dropout)
        assert found == pytest.approx(dropout * without + (1 - dropout) * with_class, rel=1e-3)
    assert known_loss(known, levels.flow, 0.1) < known_loss(known, levels.flow)
    assert known_loss(known, levels.ddpm(linear(300)), 0.1) < known_loss(known, levels.ddpm(linear(300)))


def test_two_known_images_by_brute_force():
    """A pixel that is 1 or -1: E[x | x_t] = tanh(x_t / b^2), and the error is the mean of 1 - tanh^2."""
    pair = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    known = Digits(pair.repeat(2000, 1, 1, 1), torch.arange(4000) % 2)
    ones = torch.ones(4000, dtype=torch.float64)
    found = levels.known_mse(known, ones, 1.5 * ones, 3 * ones)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5
    answer = ((1 - ((1 + 1.5 * z) / 2.25).tanh()).square() * density).sum() * (z[1] - z[0])
    assert found == pytest.approx(3 * answer.item(), rel=0.1)  # 4,000 draws: standard error about 2 %
    half = levels.known_mse(known, ones, 1.5 * ones, 3 * ones, 0.5)  # told which: no error
    assert half == pytest.approx(found / 2, rel=1e-9)


def test_the_losses_of_two_known_images_by_quadrature():
    """A pixel that is 1 or -1, x_t = a x + b n: E[x | x_t] = tanh(a x_t / b^2). Error in eps: a / b times that in x;
    in the velocity: 1 / b times, with a = t, b = 1 - t."""
    pair = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    known = Digits(pair.repeat(2000, 1, 1, 1), torch.zeros(4000))
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None]
    density = (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5 * 0.01

    def mse(a, b):
        return ((1 - (a * (a + b * z) / b**2).tanh()).square() * density).sum(0)

    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    alpha_bar = linear(300).alphas_cumprod
    flow = (mse(t, 1 - t) / (1 - t) ** 2).mean().item()
    eps = (alpha_bar / (1 - alpha_bar) * mse(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())).mean().item()
    assert known_loss(known, levels.flow) == pytest.approx(flow, rel=0.1)
    assert known_loss(known, levels.ddpm(linear(300))) == pytest.approx(eps, rel=0.1)
    for sigma in (0.5, 1.5):
        x = mse(torch.ones(1, dtype=torch.float64), torch.full((1,), sigma, dtype=torch.float64)).item()
        assert known_loss(known, levels.denoiser(sigma)) == pytest.approx(x, rel=0.15)


def test_the_posterior_mean_is_the_toy_mixture_of_points(images, digits):
    """`toy.Mixture` with std 0 at time 40 of 300: the same estimate, from its eps."""
    schedule, known, t = linear(300), Digits(images[:30], digits.labels[:30]), torch.full((4,), 40)
    alpha_bar = schedule.alpha_bar(t)
    x_t = alpha_bar.sqrt() * images[:4] + (1 - alpha_bar).sqrt() * torch.randn(4, 1, 28, 28, dtype=torch.float64)
    mixture = Mixture(schedule, known.images, 0.0)
    eps, _ = mixture(x_t, t, mixture.empty_prompt())
    expected = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    found = levels.posterior_mean(x_t, alpha_bar.sqrt().flatten(), (1 - alpha_bar).sqrt().flatten(), known)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_levels_of_a_task_are_named(images, digits):
    known = Digits(images, digits.labels)
    found = levels.of_task(levels.denoiser(0.5), known)
    linear_part = levels.linear_mse(levels.spectrum(images), 1, 0.5).item()
    known_part = known_loss(known, levels.denoiser(0.5))
    assert list(found) == ["linear optimum (training digits)", "training set known"]
    assert list(found.values()) == pytest.approx([linear_part, known_part], rel=1e-6)
