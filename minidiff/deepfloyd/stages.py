"""A stage of the cascade: a UNet with the process it was trained for, found in a folder, and asked as a model.

Read `text.py`, `unet.py` and `guidance.py` first. `plan_stage` builds and checks a stage without its weights, and
returns a function that reads them. `base_model` and `super_resolution_model` make the UNet a model: a network that
waits for text.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.checkpoint import Checkpoint, blaming, built, default_dtype, fill, read_json
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.guidance import Model, dynamic_threshold
from minidiff.sampling import Prediction
from minidiff.schedule import Schedule, squaredcos_cap_v2

NOISE_LEVEL = 250  # of the noise on stage 2's low-resolution image unless a call says otherwise: hides small mistakes


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


def plan_stage(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> tuple[Stage, Callable[[], Stage]]:
    """A stage whose UNet has no numbers yet, and a function that reads them. Errors show before anything large is read.
    dtype: what to compute in; None: what the device is fast at.
    Raises WeightsError if files are missing or broken, or describe another architecture or process."""
    dtype = dtype or default_dtype(device)
    checkpoint = Checkpoint(folder, "unet", dtype)
    unet = built(lambda config: UNet(UNetConfig.from_dict(config)), checkpoint)
    stage = Stage(unet, *read_process(folder, unet.config.in_channels))

    def read() -> Stage:
        fill(unet, checkpoint, dtype).to(device)
        return stage

    return stage, read


def read_process(folder: Path, in_channels: int) -> tuple[Schedule, float, float, Schedule]:
    """What a UNet was trained for: schedule, ratio and largest value of thresholding, schedule of the noise on low_res.
    Raises WeightsError if the schedulers of the folder are missing, or describe no process of IF."""
    path, noising = (folder / name / "scheduler_config.json" for name in ("scheduler", "image_noising_scheduler"))
    config = read_json(path)
    ratio = config.get("dynamic_thresholding_ratio", 0.95)
    largest = config.get("sample_max_value", 1.5 if in_channels == 3 else 1.0)
    with blaming(path, "describes no process of IF"):
        dynamic_threshold(ratio, largest)
    for key, expected in (("variance_type", "learned_range"), ("thresholding", True)):
        if config.get(key, expected) != expected:
            warnings.warn(f"{path}: {key} is {config[key]!r}; IF's {expected!r} is used", stacklevel=1)
    return _read_schedule(path), ratio, largest, _read_schedule(noising) if noising.exists() else squaredcos_cap_v2()


def _read_schedule(path: Path) -> Schedule:
    with blaming(path, "describes no process of IF"):
        schedule = Schedule.from_config(read_json(path))
        if (T := schedule.num_train_timesteps) != 1000:
            raise ValueError(f"num_train_timesteps is {T}, but drawing visits 0 to 999")
    return schedule


def base_model(unet: UNet) -> Model:
    """Stage 1 as a model: (x_t, t, prompt_embeds) -> (eps, pred_var)."""
    return lambda x_t, t, prompt_embeds: unet(x_t, t, prompt_embeds).float().chunk(2, dim=1)


def super_resolution_model(unet: UNet, noise_level: int) -> Model:
    """Stage 2 as a model. Its x_t has 6 channels: the noisy image and the low-resolution one, upsampled and noised.

        low_res = sqrt(alpha_bar_level) upsample(small) + sqrt(1 - alpha_bar_level) noise
        eps, pred_var = unet([x_t, low_res], t, text, noise_level)

    low_res is noised once, before the loop, and the network reads the level: noise conditioning.
    Both go through guidance and views together, so that a turned image is enlarged from a turned one.
    Source: Imagen Sec. 2.4.
    """
    return lambda x_t, t, embeds: unet(x_t, t, embeds, torch.full_like(t, noise_level)).float().chunk(2, dim=1)


def upsample(low_res: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, as IF's own code and diffusers do it (not F.interpolate's default)."""
    return F.interpolate(low_res, size, mode="bilinear", align_corners=True)


def beside(low_res: Tensor, predict: Prediction) -> Prediction:
    """A prediction for 6 channels as one for the noisy 3: low_res (B, 3, H, W) is put beside x_t at every step."""
    return lambda x_t, t: predict(torch.cat([x_t, low_res], dim=1), t)
