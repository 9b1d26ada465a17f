"""Denoisers with a known answer: what a perfect network would say if the data were a Gaussian, or a mixture of them.

Read `guidance.py` first. A trained network is a black box; to know that a sampler is right one needs a model whose
exact output can be written down. For data N(mean, std^2) everything that diffusion does is Gaussian, so the best
possible eps follows from Bayes. A mixture with one component per "prompt" adds what guidance needs: unconditional
(all components) and conditional (one of them) answers. An image is any tensor (B, C, H, W); a point in the plane
is (B, 2, 1, 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.sampling import Prediction
from minidiff.schedule import Schedule


def gaussian(schedule: Schedule, mean: Tensor | float, std: float) -> Prediction:
    """The exact prediction for data N(mean, std^2 I).

        E[x_start | x_t] = mean + sqrt(alpha_bar) std^2 / (alpha_bar std^2 + 1 - alpha_bar) (x_t - sqrt(alpha_bar) mean)
        eps = (x_t - sqrt(alpha_bar) E[x_start | x_t]) / sqrt(1 - alpha_bar)

    mean: a number, or a tensor that broadcasts to (B, C, H, W).  std: 0 for a single image.
    pred_var is -1, the lower bound, which is exact for std 0 (DDPM Sec. 3.2); the bounds meet as steps shrink.
    """

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = schedule.alpha_bar(t).to(x_t.dtype).to(x_t.device)
        x_start = mean + alpha_bar.sqrt() * std**2 / _variance(alpha_bar, std) * (x_t - alpha_bar.sqrt() * mean)
        eps = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        return eps, torch.full_like(eps, -1)

    return predict


@dataclass(frozen=True)
class Mixture:
    """Data from K Gaussians: a model for `guidance.guided`.
    means: (K, C, H, W).  std: of every component.  A "prompt" is a row of K numbers, as prompt_embeds (B, 1, K): which
    components it allows and how likely each is. `prompt(k)` asks for one component, `empty_prompt()` for any."""

    schedule: Schedule
    means: Tensor
    std: float

    def prompt(self, k: int) -> Tensor:
        """(1, 1, K): component k and no other. Raises ValueError if there is no such component."""
        if not 0 <= k < len(self.means):
            raise ValueError(f"the mixture has components 0..{len(self.means) - 1}, got {k}")
        return torch.eye(len(self.means))[None, None, k]

    def empty_prompt(self) -> Tensor:
        """(1, 1, K): any component."""
        return torch.full((1, 1, len(self.means)), 1 / len(self.means))

    def __call__(self, x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """The exact eps: each component's answer, weighted by how likely it is to have produced x_t.

        p(k | x_t) is proportional to prompt_k N(x_t; sqrt(alpha_bar) mean_k, alpha_bar std^2 + 1 - alpha_bar)
        """
        alpha_bar = self.schedule.alpha_bar(t).to(x_t.dtype).to(x_t.device)  # (B, 1, 1, 1)
        distance = (x_t[:, None] - alpha_bar.sqrt()[:, None] * self.means.to(x_t)).square().flatten(2).sum(2)  # (B, K)
        log_weight = prompt_embeds[:, 0].to(x_t).log() - 0.5 * distance / _variance(alpha_bar, self.std).flatten(1)
        share = log_weight.softmax(1)  # (B, K)
        answers = torch.stack([gaussian(self.schedule, m.to(x_t), self.std)(x_t, t)[0] for m in self.means], dim=1)
        eps = (share[:, :, None, None, None] * answers).sum(1)
        return eps, torch.full_like(eps, -1)


def _variance(alpha_bar: Tensor, std: float) -> Tensor:
    return alpha_bar * std**2 + 1 - alpha_bar
