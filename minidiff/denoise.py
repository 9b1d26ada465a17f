"""Noise added to an image, and three ways to take it away again.

    python -m minidiff.denoise photo.png
    python -m minidiff.denoise photo.png "a volcano" --t 250 500 750 --i-start 10

Read `ddpm.py` first. The forward process (DDPM Eq. 4) noises the image to each --t. A Gaussian blur and the network's
one-step estimate (DDPM Eq. 15) clean each of these images. The whole walk begins at the --i-start-th of the steps 990,
960, ..., 0, and the sheet shows every fifth image of it. Under each result stands its distance to the original.

The lesson of the last row: walking all the way gives a *larger* mean squared error than one step. One step returns the
mean of all images that could lie below the noise, which is the best guess and a blurred one; the walk draws one of
them, sharp, and sharp in the wrong places.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff import cli, components, flags, images
from minidiff.cascade import Cascade
from minidiff.checks import number, same_shape
from minidiff.deepfloyd.stages import base_model
from minidiff.factorized import Part, factorized
from minidiff.sampling import noised, one_step, seeded
from minidiff.solvers import times_for

BLUR_SIGMA, BLUR_KERNEL = 2.0, 13
SHOWN_EVERY = 5
NOISE = 3  # the stream of random numbers: an image noised by its own seed would find itself again


class Cleaned(NamedTuple):
    """An image noised to a time, and what two ways make of it: each (1, 3, 64, 64)."""

    noisy: Tensor
    blurred: Tensor
    estimate: Tensor


def denoise(
    cascade: Cascade, image: object, t: int, prompt: str = flags.NEUTRAL, seed: int = 0, *,
    blur_sigma: float = BLUR_SIGMA, blur_kernel: int = BLUR_KERNEL,
) -> Cleaned:  # fmt: skip
    """Noise an image to time t (0..999), then blur it, and let the network estimate the clean image in one step.

    image: a file, a Pillow image or a tensor. The command has guidance_scale 1; here `cascade.settings` decide.
    Raises ValueError if t lies outside 0..999.
    Source: DDPM Eq. 4 and DDPM Eq. 15.
    """
    number("t", t, 0, 999, whole=True)
    stage, settings = cascade.stage(1), cascade.settings[0]
    original = images.load(image, stage.unet.config.sample_size)
    noisy = noised(original, t, stage.schedule, seeded([seed], NOISE))
    blurred = components.blur(noisy, blur_sigma, blur_kernel)
    condition, negative = cascade.encode(prompt, settings.negative_prompt)
    predict = factorized(base_model(stage.unet), [Part(condition)], negative, settings.guidance_scale)
    return Cleaned(noisy, blurred, one_step(predict, noisy.to(stage.device), t, stage.schedule).cpu())


def mse(x: Tensor, original: Tensor) -> float:
    """Mean squared error of two images in [-1, 1]. Raises ValueError if their shapes differ."""
    same_shape(x=x, original=original)
    return (x.clamp(-1, 1) - original).square().mean().item()


def psnr(error: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error of values in [-1, 1]: 10 log10(2^2 / error)."""
    return math.inf if error == 0 else 10 * math.log10(4 / error)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    (seed,), cascade = flags.seeds_of(args), flags.load_cascade(args)
    setting = cascade.settings[0]
    timesteps = times_for(setting.sampler, setting.steps)
    i_start = min(10, len(timesteps) // 3) if args.i_start is None else args.i_start
    original = images.load(args.image, cascade.stage(1).unet.config.sample_size)
    rows, labels, record = [], [], []
    result, _ = cascade.make([Part(args.prompt)], [seed], image=original, i_start=i_start,
                             through=lambda steps: flags.noted(steps, record))  # fmt: skip
    for t in [*args.t, int(timesteps[i_start])]:
        each = denoise(cascade, original, t, args.prompt, seed, blur_sigma=args.blur_sigma,
                       blur_kernel=args.blur_kernel)  # fmt: skip
        rows.append([original[0], *(x[0] for x in each)])
        scores = [_score("blur", each.blurred, original), _score("one step", each.estimate, original)]
        labels.append(["original", f"noised, t = {t}", *scores])
    rows.append([step.x_t[0].cpu() for step in record[::SHOWN_EVERY]])
    labels.append([f"t = {step.t}" for step in record[::SHOWN_EVERY]])
    rows.append([original[0], result[0], each.estimate[0], each.blurred[0]])
    labels.append(["original", _score("iterative", result, original), *scores[::-1]])
    title = f"{args.image.name}, {args.prompt!r}: noise and three ways to take it away"
    flags.finish(args, "denoise", [result[0]], [seed], rows, labels, title, cascade)


def _score(what: str, x: Tensor, original: Tensor) -> str:
    error = mse(x, original)
    return f"{what}\nMSE {error:.4f}\n{psnr(error):.1f} dB"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/denoise.png", steps="course", stage2="none")
    p.add_argument("image", type=cli.file_path)
    p.add_argument("prompt", nargs="?", default=flags.NEUTRAL, help=f"what it shows (default: {flags.NEUTRAL})")
    p.add_argument("--t", type=int, nargs="+", default=[250, 500, 750], help="times to look at (default 250 500 750)")
    p.add_argument("--i-start", type=int, help="where the walk begins on its steps (default 10, or a third of them)")
    p.add_argument("--blur-sigma", type=cli.finite, default=BLUR_SIGMA, help="pixels of 64 (default %(default)s)")
    p.add_argument("--blur-kernel", type=int, default=BLUR_KERNEL, help="pixels of 64 (default %(default)s)")
    p.set_defaults(guidance_scale=[1.0])
    args = p.parse_intermixed_args(argv)
    for t in args.t:
        number("--t", t, 0, 999, whole=True)
    if args.stage2 != "none" or len(args.seed) > 1 or args.num_images > 1:
        raise ValueError("this command looks at one image of stage 1; leave out --stage2, and pass one --seed")
    components.blur(torch.zeros(3, 64, 64), args.blur_sigma, args.blur_kernel)  # so that wrong ones show now
    return args


if __name__ == "__main__":
    main()
