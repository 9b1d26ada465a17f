"""What no network can beat and what any must: the levels that a loss curve is read against.

A loss of 0.03 says nothing alone. Three levels, all computed from the pictures themselves, say what it is worth:

    mean image      the best answer without looking at the input: what pure noise leaves to be known
    linear optimum  the best answer that is linear in the input, exact if pictures were Gaussian: anything that learns
                    shapes must fall well below it
    memorisation    the best answer for one who knows the training pictures by heart and nothing else: a loss on them
                    cannot fall below it. A network that is told the class is compared with one who is told, too, as
                    often as it is

All three are about x_t = a x_start + b noise. The denoiser has a = 1, b = sigma; DDPM a = sqrt(alpha_bar_t),
b = sqrt(1 - alpha_bar_t); flow matching a = t, b = 1 - t. An error e in x_start is an error a e / b in eps and e / b in
the velocity (with a = t, b = 1 - t), which is how one number serves all three.

Read `mnist/networks.py` first. Next: `mnist/training.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidiff.mnist.data import Digits, generator
from minidiff.schedule import Schedule


def mean_image_mse(images: Tensor) -> float:
    """Mean over pictures and pixels of |x - mean image|^2. images: (N, 1, 28, 28)."""
    return images.cpu().flatten(1).double().var(0, unbiased=False).mean().item()


def spectrum(images: Tensor) -> Tensor:
    """Variances of the pictures along their principal directions, the covariance's eigenvalues: (784,) float64."""
    x = images.cpu().flatten(1).double()
    x = x - x.mean(0)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).clamp(min=0)


def linear_mse(variances: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """The least mean square error, per pixel, of x_start told linearly from a x_start + b noise.

        mean over directions of v b^2 / (a^2 v + b^2)

    variances: (N,), of `spectrum`.  a, b: numbers or (K,).  Returns () or (K,).
    """
    a, b = (torch.as_tensor(k, dtype=torch.float64)[..., None] for k in (a, b))
    total = (a**2 * variances + b**2).clamp(min=1e-300)  # 0 / 0 is an unvarying pixel, and no error
    return (variances * b**2 / total).mean(-1)


def linear_eps_loss(variances: Tensor, schedule: Schedule) -> float:
    """The linear optimum of DDPM's loss, mean over all times."""
    alpha_bar = schedule.alphas_cumprod
    mse = linear_mse(variances, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return (alpha_bar / (1 - alpha_bar) * mse).mean().item()


def linear_flow_loss(variances: Tensor) -> float:
    """The linear optimum of flow matching's loss, mean over time (at the middles of equal sections)."""
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    return (linear_mse(variances, t, 1 - t) / (1 - t) ** 2).mean().item()


def posterior_mean(x_t: Tensor, a: Tensor, b: Tensor, known: Digits, labels: Tensor | None = None) -> Tensor:
    """E[x_start | x_t] if x_start is one of these pictures, all equally likely: the denoiser that knows them by heart.

        sum_i softmax_i( -|x_t - a x_i|^2 / (2 b^2) ) x_i

    x_t: (B, 1, 28, 28).  a, b: (B,).  labels: (B,), the classes if they are told; then the sum is over pictures x_i of
    that class.  Returns (B, 1, 28, 28).
    """
    a, b = a.view(-1, 1).to(x_t), b.view(-1, 1).to(x_t)
    x, flat = known.images.flatten(1), x_t.flatten(1)
    logits = a * (flat @ x.T - a / 2 * x.square().sum(1)) / b**2  # without |x_t|^2, which all share
    if labels is not None:
        logits = logits.masked_fill(labels[:, None] != known.labels, -torch.inf)
    return (logits.softmax(1) @ x).view_as(x_t)


def memorised_mse(digits: Digits, a: Tensor, b: Tensor, weight: Tensor, dropout: float = 1.0) -> float:
    """The mean of weight * |x - posterior mean|^2 over the first K digits x, one for each entry of a, b, weight: (K,).

    dropout: how often the class is not told; 1: never told.
    """
    some, device = digits[: len(a)], digits.images.device
    noise = torch.randn(some.images.shape, generator=generator(device, 0), device=device).to(some.images)
    total = 0.0
    for i in range(0, len(some), 500):
        part = slice(i, i + 500)
        x, labels, aa, bb, w = some.images[part], some.labels[part], *(v[part].to(noise) for v in (a, b, weight))
        x_t = aa.view(-1, 1, 1, 1) * x + bb.view(-1, 1, 1, 1) * noise[part]
        for told, share in ((None, dropout), (labels, 1 - dropout)):
            if share:
                error = (posterior_mean(x_t, aa, bb, digits, told) - x).square().flatten(1).mean(1)
                total += share * (w * error).sum().item()
    return total / len(some)


def memorised_denoiser_loss(digits: Digits, sigma: float, samples: int = 3000) -> float:
    """What the denoiser's loss on these digits cannot fall below at this sigma: estimated."""
    ones = torch.ones(min(samples, len(digits)))
    return memorised_mse(digits, ones, sigma * ones, ones)


def memorised_eps_loss(digits: Digits, schedule: Schedule, dropout: float = 1.0, samples: int = 3000) -> float:
    """What DDPM's loss on these digits cannot fall below: estimated at evenly spread times."""
    samples = min(samples, len(digits))
    t = torch.arange(samples) * schedule.num_train_timesteps // samples
    alpha_bar = schedule.alphas_cumprod[t]
    return memorised_mse(digits, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar / (1 - alpha_bar), dropout)


def memorised_flow_loss(digits: Digits, dropout: float = 1.0, samples: int = 3000) -> float:
    """What flow matching's loss on these digits cannot fall below: estimated at evenly spread times."""
    samples = min(samples, len(digits))
    t = (torch.arange(samples) + 0.5) / samples
    return memorised_mse(digits, t, 1 - t, (1 - t) ** -2, dropout)
