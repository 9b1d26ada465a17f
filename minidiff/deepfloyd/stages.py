"""The cascade assembled: with a prompt's states, noise becomes 64x64, and 64x64 becomes 256x256.

Read `prompts.py`, `unet.py` and `guidance.py` first. A stage is a UNet with the schedule it was trained for;
`base_model` and `super_resolution_model` make it a model (a network waiting for its text), `guidance.guided` gives it
the text, and `sampling.denoise` walks. `sample_base` and `sample_super_resolution` do just that, with IF's settings.

Next: `train.py`, how such a cascade is made; or `minidiff/generate.py`, which runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff import weights
from minidiff.ddpm import add_noise
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.guidance import Model, dynamic_threshold, guided
from minidiff.sampling import denoise, draw_noise
from minidiff.schedule import Schedule, squaredcos_cap_v2

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
    def fix_x_start(self) -> Callable[[Tensor], Tensor]:
        return dynamic_threshold(self.threshold_ratio, self.threshold_max)


def load_stage(folder: Path, dtype: torch.dtype | None, device: str) -> Stage:
    """The UNet and scheduler of a folder in the released layout.    Raises hub.WeightsError, ValueError."""
    checkpoint = weights.Checkpoint(folder, "unet", dtype)
    with weights.on_meta():
        unet = UNet(UNetConfig.from_dict(checkpoint.config))
    weights.load(unet, checkpoint, dtype).to(device)
    process = _read_json(folder / "scheduler" / "scheduler_config.json")
    noising = folder / "image_noising_scheduler" / "scheduler_config.json"
    return Stage(
        unet,
        Schedule.from_config(process),
        process.get("dynamic_thresholding_ratio", 0.95),
        process.get("sample_max_value", 1.5 if unet.config.in_channels == 3 else 1.0),
        Schedule.from_config(_read_json(noising)) if noising.is_file() else squaredcos_cap_v2(),
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy it from the model's repository") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; download it again") from None


def base_model(unet: UNet) -> Model:
    """Stage 1 as a model: (x_t, t, prompt_embeds) -> (eps, pred_var)."""

    def model(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return unet(x_t, t, prompt_embeds).float().chunk(2, dim=1)

    return model


def super_resolution_model(unet: UNet, low_res: Tensor, noise_level: int) -> Model:
    """Stage 2 as a model, conditioned on an already upsampled and noised picture.

    low_res: (B, 3, H, W), the size of x_t, noised to noise_level.  x_t may hold a multiple of B pictures (both
    branches of guidance, several views): they share the low-resolution pictures in turn.
    """

    def model(x_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.cat([x_t, low_res.repeat(len(x_t) // len(low_res), 1, 1, 1)], dim=1)  # (n B, 6, H, W)
        return unet(stacked, t, prompt_embeds, torch.full_like(t, noise_level)).float().chunk(2, dim=1)

    return model


def upsample(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as both IF codes do it (not F.interpolate's default)."""
    return F.interpolate(low_res, size, mode="bilinear", align_corners=True)


def sample_base(
    stage: Stage,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    timesteps: Tensor,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float = 7.0,
    size: tuple[int, int] = (64, 64),
    split_batch: bool = False,
    on_step: Callable | None = None,
) -> Tensor:
    """Stage 1: one picture per generator, (B, 3, H, W) float32 in [-1, 1].

    prompt_embeds, negative_prompt_embeds: (B, L, D) or (1, L, D).  Draws x_T, then one noise per step.
    """
    device = stage.unet.conv_in.weight.device
    x_t = draw_noise((len(generators), 3, *size), generators).to(device)
    embeds = (prompt_embeds.to(device), negative_prompt_embeds.to(device))
    predict = guided(base_model(stage.unet), *embeds, guidance_scale, split_batch)
    return denoise(
        predict, x_t, timesteps, stage.schedule,
        generators=generators, fix_x_start=stage.fix_x_start, on_step=on_step,
    )  # fmt: skip


def sample_super_resolution(
    stage: Stage,
    low_res: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor,
    timesteps: Tensor,
    generators: Sequence[torch.Generator],
    *,
    guidance_scale: float = 4.0,
    noise_level: int = NOISE_LEVEL,
    split_batch: bool = False,
    on_step: Callable | None = None,
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
    device = stage.unet.conv_in.weight.device
    size = (4 * low_res.shape[2], 4 * low_res.shape[3])
    x_t = draw_noise((len(generators), 3, *size), generators).to(device)
    noise = draw_noise(x_t.shape, generators).to(device)
    alpha_bar = stage.noising.alpha_bar(torch.tensor([noise_level])).to(device)
    noised = add_noise(upsample(low_res.to(device).float(), size), noise, alpha_bar)
    embeds = (prompt_embeds.to(device), negative_prompt_embeds.to(device))
    predict = guided(super_resolution_model(stage.unet, noised, noise_level), *embeds, guidance_scale, split_batch)
    return denoise(
        predict, x_t, timesteps, stage.schedule,
        generators=generators, fix_x_start=stage.fix_x_start, on_step=on_step,
    )  # fmt: skip
