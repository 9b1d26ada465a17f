"""What a run of the cascade's trainer shows after a checkpoint: the error on held-out images, and samples.

Read `deepfloyd/dataset.py` first. Next: `deepfloyd/train.py`.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import ddpm, images
from minidiff.cascade import Cascade
from minidiff.deepfloyd import stages
from minidiff.deepfloyd.dataset import CaptionedImages
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.factorized import Part

EXAMINED = (300, 600, 800, 950)  # times at which the held-out error is measured
PREVIEWS = 16  # prompts that are drawn after a checkpoint


@torch.inference_mode()
def examine(model: nn.Module, tokenizer: Tokenizer, x_start: Tensor, texts: list[str]) -> list[tuple]:
    """A prompt's worth: (t, error with the right prompt, with another image's, with none) for EXAMINED times.

    The error is the mean squared difference between x_start (N, 3, H, W) and its estimate, clipped, with one noise for
    all. Stage 1 only.
    """
    device, rows = x_start.device, []
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).to(device)
    columns = (texts, texts[1:] + texts[:1], [""] * len(texts))
    states = [model.text_encoder(*(x.to(device) for x in tokenizer(column))) for column in columns]
    for time in EXAMINED:
        t = torch.full((len(x_start),), time, device=device)
        alpha_bar, errors = model.schedule.alpha_bar(t), []
        x_t = ddpm.add_noise(x_start, noise, alpha_bar)
        for embeds in states:
            out = torch.cat([model.unet(*part) for part in zip(x_t.split(32), t.split(32), embeds.split(32))])
            estimate = ddpm.predict_x_start(x_t, out.float()[:, :3], alpha_bar).clamp(-1, 1)
            errors.append((estimate - x_start).square().mean().item())
        rows.append((time, *errors))
    return rows


def preview(out: Path, stage: int, path: Path, text_encoder: Path | None, dataset: CaptionedImages) -> None:
    """Samples of the weights just written: captions of held-out images drawn, or two training images enlarged."""
    if stage == 1:
        texts = dataset.held_out()[1]
        prompts = texts[:: math.ceil(len(texts) / PREVIEWS)]
        cascade, seeds = Cascade.load(str(out), "none", dtype=torch.float32), range(len(prompts))
        x = cascade.draw([Part(torch.cat(cascade.encode(*prompts)))], seeds, steps=20, guidance_scale=4.0)
        sheet = images.sheet(*images.grid(list(x), prompts))
    else:
        cascade = Cascade.load("none", str(out), text_model=str(text_encoder), dtype=torch.float32)
        x_start, texts = dataset.draw(2, torch.Generator().manual_seed(1))
        low_res = F.avg_pool2d(x_start, 4)
        x = cascade.enlarge(low_res, [Part(torch.cat(cascade.encode(*texts)))], range(2), steps=10)
        rows = [[stages.upsample(low_res, (256, 256))[i], x[i], x_start[i]] for i in range(2)]
        sheet = images.sheet(rows, [["bilinear", "stage 2", "original"]] * 2)
    images.save(sheet, path, {"minidiff": "sheet"})
