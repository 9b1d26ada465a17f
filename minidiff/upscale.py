"""Any image four times as large: stage 2 as a super-resolution network of its own.

    python -m minidiff.upscale small.png "a volcano"
    python -m minidiff.upscale photo.jpg "a dog" --model IF-II-M-v1.0 --noise-level 100
    python -m minidiff.upscale photo.jpg "a volcano" --i-start 10              start from the image itself (SDEdit)
    python -m minidiff.upscale photo.jpg "a volcano" --box 16 16 48 48         enlarge inside a box only
    python -m minidiff.upscale anagram.png "a snowy mountain village" "a volcano" --view identity rotate_180

The image is cropped to a square and shrunk to 64x64, enlarged again bilinearly, and noised to --noise-level: beside
this, stage 2 draws 256x256. More noise lets the network invent more.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from minidiff import cli, editing, flags, images, views
from minidiff.cascade import Cascade, Mask
from minidiff.checks import number
from minidiff.deepfloyd.stages import NOISE_LEVEL, upsample
from minidiff.factorized import averaged, through_views
from minidiff.sampling import seeded


def upscale(
    cascade: Cascade, image: object, prompts: str | Sequence[str] = "", seeds: Sequence[int] = (0,), *,
    view_names: str | Sequence[str] = "identity", noise_level: int = NOISE_LEVEL, i_start: int | None = None,
    mask: Mask | None = None, feather: float = 0.0,
) -> Tensor:  # fmt: skip
    """The image at 256x256, once for each seed: (B, 3, 256, 256) in [-1, 1].

    image: a file, a Pillow image or a tensor, of which 64x64 pixels are used.  view_names: one for each prompt.
    noise_level: 0..999.  i_start: start from the image itself, noised to this place on the steps.  mask: as for
    `Cascade.make`; only there the image is drawn.    Source: Imagen Sec. 2.4.
    """
    parts = averaged(*through_views(prompts, view_names))
    small, generators = images.load(image, 64), seeded(seeds)
    return cascade.enlarge(
        small.expand(len(generators), -1, -1, -1), parts, generators, noise_level=noise_level,
        keep=editing.kept(image, mask, 256, "renoise", feather),
        image=None if i_start is None else images.load(image, 256), i_start=i_start or 0,
    )  # fmt: skip


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    seeds, mask, cascade = flags.seeds_of(args), args.mask or args.box, flags.load_cascade(args)
    results = upscale(cascade, args.image, args.prompts, seeds, view_names=args.view, noise_level=args.noise_level,
                      i_start=args.i_start, mask=mask, feather=args.feather)  # fmt: skip
    small, count = images.load(args.image, 64), len(args.view)
    rows = [[small[0], upsample(small, (256, 256))[0]]]
    labels = [["64 px", "bilinear"]]
    for x, seed in zip(results, seeds):
        rows[-1] += [views.named(name).view(x) for name in args.view]
        labels[-1] += [f"stage 2, seed {seed}" + (f", {name}" if count > 1 else "") for name in args.view]
    title = f"{args.image.name}: {' / '.join(args.prompts) or '(empty prompt)'}"
    flags.finish(args, "upscale", list(results), seeds, rows, labels, title, cascade)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/upscale.png", stage2=None)
    p.add_argument("image", type=cli.file_path)
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="what it shows (default: the empty prompt)")
    p.add_argument("--view", nargs="+", default=["identity"], help="one per prompt, as for minidiff.anagram")
    p.add_argument("--i-start", type=int, help="start from the image, noised to this place on the steps")
    p.add_argument("--noise-level", type=int, default=NOISE_LEVEL, help="0 to 999 (default %(default)s)")
    p.add_argument("--text-model", help="whose text encoder (default: mini's, or the one of the released models)")
    flags.add_edit_flags(p, image=False)
    args = p.parse_intermixed_args(argv)
    if len(args.guidance_scale or []) > 1 or len(args.steps or []) > 1:
        raise ValueError("this command takes one --guidance-scale and one --steps; minidiff.generate compares several")
    args.model, args.stage2 = "none", args.model  # --model is stage 2 here
    args.stage2_steps, args.steps = args.steps, None
    args.stage2_guidance_scale, args.guidance_scale = (args.guidance_scale or [None])[0], None
    args.prompts = args.prompts or [""]
    number("--noise-level", args.noise_level, 0, 999, whole=True)
    through_views(args.prompts, args.view)  # so that wrong ones show now
    return args


if __name__ == "__main__":
    main()
