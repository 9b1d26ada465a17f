"""The closed-form denoisers are themselves checked: against brute-force Bayes on a grid."""

import pytest
import torch

from minidiff import toy
from minidiff.schedule import squaredcos_cap_v2

SCHEDULE = squaredcos_cap_v2()


def expected_eps(density, x_t, t):
    """E[noise | x_t] by summing over a fine grid of clean values; one number at a time."""
    a = SCHEDULE.alphas_cumprod[t]
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    likelihood = torch.exp(-0.5 * (x_t - a.sqrt() * grid) ** 2 / (1 - a)) * density(grid)
    noise = (x_t - a.sqrt() * grid) / (1 - a).sqrt()
    return ((likelihood * noise).sum() / likelihood.sum()).item()


def gaussian_density(mean, std):
    return lambda x: torch.exp(-0.5 * ((x - mean) / std) ** 2)


@pytest.mark.parametrize("t", [20, 300, 700, 990])
def test_gaussian_equals_bayes_on_a_grid(t):
    x_t = torch.tensor([-0.7, 0.1, 1.3], dtype=torch.float64).view(3, 1, 1, 1)
    eps, pred_var = toy.gaussian(SCHEDULE, 0.4, 0.5)(x_t, torch.full((3,), t))
    by_grid = [expected_eps(gaussian_density(0.4, 0.5), x, t) for x in x_t.flatten()]
    assert eps.flatten().tolist() == pytest.approx(by_grid, rel=1e-6, abs=1e-9)
    assert (pred_var == -1).all()


@pytest.mark.parametrize("t", [20, 300, 700, 990])
def test_mixture_equals_bayes_on_a_grid(t):
    mixture = toy.Mixture(SCHEDULE, torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64).view(3, 1, 1, 1), 0.3)
    x_t = torch.tensor([-0.7, 0.1, 1.3], dtype=torch.float64).view(3, 1, 1, 1)
    parts = [gaussian_density(m, 0.3) for m in (-1.0, 0.2, 0.9)]
    eps, _ = mixture(x_t, torch.full((3,), t), mixture.empty_prompt().expand(3, -1, -1))
    by_grid = [expected_eps(lambda x: sum(p(x) for p in parts), x, t) for x in x_t.flatten()]
    assert eps.flatten().tolist() == pytest.approx(by_grid, rel=1e-6, abs=1e-9)
    eps, _ = mixture(x_t, torch.full((3,), t), mixture.prompt(2).expand(3, -1, -1))
    by_grid = [expected_eps(parts[2], x, t) for x in x_t.flatten()]
    assert eps.flatten().tolist() == pytest.approx(by_grid, rel=1e-6, abs=1e-9)


def test_mixture_of_one_is_the_gaussian():
    means = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mixture = toy.Mixture(SCHEDULE, means, 0.2)
    x_t, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 800])
    torch.testing.assert_close(
        mixture(x_t, t, mixture.prompt(0).expand(2, -1, -1))[0], toy.gaussian(SCHEDULE, means, 0.2)(x_t, t)[0]
    )


def test_no_such_component_is_told():
    with pytest.raises(ValueError, match="components 0..1, got 5"):
        toy.Mixture(SCHEDULE, torch.zeros(2, 1, 1, 1), 0.3).prompt(5)
