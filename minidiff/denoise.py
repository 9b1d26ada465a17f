"""Noise added to a picture, and three ways to take it away again.

    python -m minidiff.denoise photo.png
    python -m minidiff.denoise photo.png "a castle" --t 250 500 750 --i-start 10

Read `ddpm.py` first. The forward process (DDPM Eq. 4) noises the picture to each --t. Then, for each, a Gaussian blur
and the network's one-step estimate (DDPM Eq. 15); and from the --i-start-th of the steps 990, 960, ..., 0 the whole
walk, every fifth picture of it shown. Under each result stands its distance to the original.

The lesson of the last row: walking all the way gives a *larger* mean squared error than one step. One step returns the
mean of all pictures that could lie below the noise, which is the best guess and a blurred one; the walk draws one of
them, which looks like a picture and is another one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minidiff import cli, components, images
from minidiff.cascade import Cascade, add_cascade_flags, fill_in, neutral_prompt, walk_of
from minidiff.deepfloyd import stages
from minidiff.sampling import noised, one_step, seeded

BLUR_SIGMA, BLUR_KERNEL = 2.0, 13
SHOWN_EVERY = 5


def mse(x: Tensor, original: Tensor) -> float:
    """Mean squared error of two pictures in [-1, 1]."""
    return (x.clamp(-1, 1) - original).square().mean().item()


def psnr(error: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error of values in [-1, 1]: 10 log10(2^2 / error)."""
    return math.inf if error == 0 else 10 * math.log10(4 / error)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    cascade = Cascade(args, [args.prompt])
    original = images.load(args.image, cascade.size)
    base, walk = cascade.base, walk_of(args.steps[0])
    start = int(walk.timesteps[args.i_start])
    predict = cascade.prompted()(stages.base_model(base.unet), args.guidance_scale[0])

    rows, labels = [], []
    for t in [*args.t, start]:
        x_t = noised(original, t, base.schedule, seeded(args.seed, 1))
        blurred = components.blur(x_t, args.blur_sigma, args.blur_kernel)
        estimate = one_step(predict, x_t.to(base.device), t, base.schedule).cpu()
        rows.append([original[0], x_t[0], blurred[0], estimate[0]])
        scores = [_score("blur", blurred, original), _score("one step", estimate, original)]
        labels.append(["original", f"noised, t = {t}", *scores])

    shown: list[tuple[int, Tensor]] = []
    walk = replace(walk, timesteps=walk.timesteps[args.i_start :], x_start=original)
    [(result, _)] = cascade.draw(cascade.prompted(), [walk], args.guidance_scale,
                                 lambda i, t, x, *_: shown.append((t, x[0].cpu())))  # fmt: skip
    rows.append([x for _, x in shown[::SHOWN_EVERY]])
    labels.append([f"t = {t}" for t, _ in shown[::SHOWN_EVERY]])
    rows.append([original[0], result[0], estimate[0], blurred[0]])
    labels.append(["original", _score("iterative", result, original), *scores[::-1]])
    title = f"{args.image.name}, {args.prompt!r}: noise and three ways to take it away"
    cascade.finish("denoise", rows, labels, title)


def _score(what: str, x: Tensor, original: Tensor) -> str:
    error = mse(x, original)
    return f"{what}\nMSE {error:.4f}\n{psnr(error):.1f} dB"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/denoise.png")
    p.add_argument("image", type=Path)
    p.add_argument("prompt", nargs="?", help="what it shows (default: nothing; a high quality photo for other models)")
    p.add_argument("--t", type=int, nargs="+", default=[250, 500, 750], help="times to look at (default 250 500 750)")
    p.add_argument("--i-start", type=int, help="where the walk begins on its steps (default 10, or a third of them)")
    p.add_argument("--blur-sigma", type=cli.finite, default=BLUR_SIGMA, help="pixels of 64 (default %(default)s)")
    p.add_argument("--blur-kernel", type=int, default=BLUR_KERNEL, help="pixels of 64 (default %(default)s)")
    add_cascade_flags(p, "course", only_stage1=True, guidance="1")
    args = p.parse_intermixed_args(argv)
    args.guidance_scale = args.guidance_scale or [1.0]
    args = fill_in(args)
    args.prompt = neutral_prompt(args.model) if args.prompt is None else args.prompt
    for t in args.t:
        if not 0 <= t < 1000:
            raise ValueError(f"--t must lie in 0..999, got {t}")
    if args.i_start is None:
        args.i_start = min(10, len(walk_of(args.steps[0]).timesteps) // 3)
    components.blur(torch.zeros(3, 64, 64), args.blur_sigma, args.blur_kernel)  # so that wrong ones are told now
    return args


if __name__ == "__main__":
    main()
