"""The cascade assembled: with a prompt's states, noise becomes 64x64, and 64x64 becomes 256x256.

Read `text.py`, `unet.py` and `guidance.py` first. A stage is a UNet with the schedule it was trained for;
`base_model` and `super_resolution_model` make it a model (a network waiting for its text), a condition gives it the
text, and `sampling.denoise` walks. `sample_base` and `sample_super_resolution` do just that, with IF's settings, from
noise or from a given picture.

Next: `pictures.py`, where making such a cascade begins; or `minidiff/generate.py`, which runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.checkpoint import Checkpoint, built, fill
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.editing import Keep
from minidiff.guidance import Condition, Model, dynamic_threshold
from minidiff.sampling import Prediction, denoise, draw_noise, noised
from minidiff.schedule import Schedule
from minidiff.weights import read_process

NOISE_LEVEL = 250  # how noisy stage 2 is told its low-resolution picture is: hides stage 1's small mistakes


@dataclass(frozen=True)
class Stage:
    """A UNet with its process: schedule, dynamic thresholding, and for stage 2 the schedule of the added noise."""

    unet: UNet
    schedule: Schedule
    threshold_ratio: float
    threshold_max: float
    noising: Schedule

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def fix_x_start(self) -> Callable[[Tensor], Tensor]:
        return dynamic_threshold(self.threshold_ratio, self.threshold_max)


def load_stage(folder: Path, dtype: torch.dtype | None, device: str) -> Stage:
    """The UNet and scheduler of a folder in the released layout.    Raises WeightsError as `plan_stage`."""
    stage, checkpoint = plan_stage(folder, dtype)
    fill(stage.unet, checkpoint, dtype).to(device)
    return stage


def plan_stage(folder: Path, dtype: torch.dtype | None) -> tuple[Stage, Checkpoint]:
    """A stage whose UNet has no numbers yet, and the file that has them: in a moment, all that could be wrong is told.

    Raises WeightsError if files are missing or broken, or describe another architecture or process.
    """
    checkpoint = Checkpoint(folder, "unet", dtype)
    unet = built(lambda config: UNet(UNetConfig.from_dict(config)), checkpoint)
    return Stage(unet, *read_process(folder, unet.config.in_channels)), checkpoint


def base_model(unet: UNet) -> Model:
    """Stage 1 as a model: (x_t, t, prompt_embeds) -> (eps, pred_var)."""

    def model(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return unet(x_t, t, prompt_embeds).float().chunk(2, dim=1)

    return model


def super_resolution_model(unet: UNet, noise_level: int) -> Model:
    """Stage 2 as a model. Its x_t has 6 channels: the noisy picture and the low-resolution one, upsampled and noised.

    Both go through guidance and views together, so that a turned picture is enlarged from a turned one.
    """

    def model(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return unet(x_t, t, prompt_embeds, torch.full_like(t, noise_level)).float().chunk(2, dim=1)

    return model


def beside(low_res: Tensor, predict: Prediction) -> Prediction:
    """A prediction for 6 channels as one for the noisy 3: low_res (B, 3, H, W) is put beside x_t at every step."""
    return lambda x_t, t: predict(torch.cat([x_t, low_res], dim=1), t)


def upsample(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as both IF codes do it (not F.interpolate's default)."""
    return F.interpolate(low_res, size, mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class Walk:
    """How a stage is walked: the times, and what happens on the way. The defaults are IF's.

    timesteps, final_step, jumps, on_step: as for `sampling.denoise`.
    threshold: dynamic thresholding of the estimate; the course's loops have none.
    x_start: (1 or B, 3, H, W) in [-1, 1], the picture to start from, noised to timesteps[0]; None: pure noise.
    keep: as for `sampling.denoise`; also applied to the start.
    """

    timesteps: Tensor
    final_step: bool = True
    threshold: bool = True
    x_start: Tensor | None = None
    keep: Keep | None = None
    jumps: tuple[int, int] | None = None
    on_step: Callable | None = None


def sample_base(
    stage: Stage,
    condition: Condition,
    walk: Walk,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float = 7.0,
    size: tuple[int, int] = (64, 64),
) -> Tensor:
    """Stage 1: one picture per generator, (B, 3, H, W) float32 in [-1, 1].    Draws x_T, then one noise per step."""
    x_t = _start(stage, walk, generators, size)
    return _go(stage, condition(base_model(stage.unet), guidance_scale), walk, generators, x_t)


def sample_super_resolution(
    stage: Stage,
    low_res: Tensor,
    condition: Condition,
    walk: Walk,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float = 4.0,
    noise_level: int = NOISE_LEVEL,
) -> Tensor:
    """Stage 2: each low_res picture (B, 3, h, w) in [-1, 1] at four times its size, (B, 3, 4h, 4w) in [-1, 1].

    low_res is upsampled and noised to noise_level once (0: hardly at all), before the loop.
    Draws x_T, the noise on low_res, then one noise per step.
    Raises ValueError if noise_level is out of range or low_res is not (B, 3, h, w).    Source: Imagen Sec. 2.4.
    """
    if low_res.ndim != 4 or low_res.shape[1] != 3 or len(low_res) != len(generators):
        raise ValueError(f"low_res must be (B, 3, h, w) with B = {len(generators)}, got {tuple(low_res.shape)}")
    if not 0 <= noise_level < stage.noising.num_train_timesteps:
        raise ValueError(f"noise_level must lie in 0..{stage.noising.num_train_timesteps - 1}, got {noise_level}")
    size = (4 * low_res.shape[2], 4 * low_res.shape[3])
    x_t = _start(stage, walk, generators, size)
    seen = noised(upsample(low_res.float(), size), noise_level, stage.noising, generators).to(stage.device)
    predict = beside(seen, condition(super_resolution_model(stage.unet, noise_level), guidance_scale))
    return _go(stage, predict, walk, generators, x_t)


def _start(stage: Stage, walk: Walk, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
    """Pure noise, or the given picture noised; (B, 3, H, W). Raises ValueError if the picture has another size."""
    t = int(walk.timesteps[0])
    if walk.x_start is None:
        x_t = draw_noise((len(generators), 3, *size), generators)
    elif walk.x_start.shape[1:] != (3, *size):
        raise ValueError(
            f"the picture to start from must be (B, 3, {size[0]}, {size[1]}), got {tuple(walk.x_start.shape)}"
        )
    else:
        x_t = noised(walk.x_start.float(), t, stage.schedule, generators)
    x_t = x_t.to(stage.device)
    return x_t if walk.keep is None else walk.keep(x_t, t)


def _go(stage: Stage, predict: Prediction, walk: Walk, generators: Sequence[torch.Generator], x_t: Tensor) -> Tensor:
    return denoise(
        predict, x_t, walk.timesteps, stage.schedule,
        generators=generators, fix_x_start=stage.fix_x_start if walk.threshold else None, keep=walk.keep,
        final_step=walk.final_step, jumps=walk.jumps, on_step=walk.on_step,
    )  # fmt: skip
