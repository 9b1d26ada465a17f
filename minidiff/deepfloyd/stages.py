"""A stage of the cascade: a UNet with the process it was trained for, found in a folder, and asked as a model.

Read `text.py`, `unet.py` and `guidance.py` first. `plan_stage` builds and checks a stage without its numbers,
`load_stage` reads them. `base_model` and `super_resolution_model` make the UNet a model, a network that waits for its
text.    Next: `minidiff/cascade.py`, which draws with two of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.checkpoint import Checkpoint, built, fill
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.guidance import Model, dynamic_threshold
from minidiff.sampling import Prediction
from minidiff.schedule import Schedule
from minidiff.weights import read_process

NOISE_LEVEL = 250  # the noise that stage 2 expects on its low-resolution image: it hides stage 1's small mistakes


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


def plan_stage(folder: Path, dtype: torch.dtype | None) -> tuple[Stage, Checkpoint]:
    """A stage whose UNet has no numbers yet, and the file that has them: in a moment, all that could be wrong shows.

    Raises WeightsError if files are missing or broken, or describe another architecture or process.
    """
    checkpoint = Checkpoint(folder, "unet", dtype)
    unet = built(lambda config: UNet(UNetConfig.from_dict(config)), checkpoint)
    return Stage(unet, *read_process(folder, unet.config.in_channels)), checkpoint


def load_stage(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> Stage:
    """The UNet and scheduler of a folder in the released layout.    Raises WeightsError as `plan_stage`."""
    stage, checkpoint = plan_stage(folder, dtype)
    fill(stage.unet, checkpoint, dtype).to(device)
    return stage


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
    """Bilinear with aligned corners, as both IF codes do it (not F.interpolate's default)."""
    return F.interpolate(low_res, size, mode="bilinear", align_corners=True)


def beside(low_res: Tensor, predict: Prediction) -> Prediction:
    """A prediction for 6 channels as one for the noisy 3: low_res (B, 3, H, W) is put beside x_t at every step."""
    return lambda x_t, t: predict(torch.cat([x_t, low_res], dim=1), t)
