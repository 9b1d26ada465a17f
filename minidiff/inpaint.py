"""A region of an image painted anew: the mask is white where new content goes.

    python -m minidiff.inpaint photo.png mask.png "a volcano"
    python -m minidiff.inpaint photo.png "a volcano" --box 16 16 48 48 --feather 1
    python -m minidiff.inpaint photo.png mask.png --method renoise clean repaint         three ways side by side
    python -m minidiff.inpaint photo.png mask.png "a volcano" --num-images 8             choose the best of eight

After every step the known region is put back: noised to the new time (renoise, the course's way), clean (IF's way), or
noised with jumps back up in the walk, after which both regions agree better (repaint; --jump-length and
--jump-n-sample). Stage 2 paints the same region at 256 pixels, beside the known pixels of the original at that size.

Source: RePaint Eq. 8 and `editing.py`.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from minidiff import cli, editing, flags, images
from minidiff.cascade import Cascade, Mask
from minidiff.factorized import Part
from minidiff.solvers import times_for


def inpaint(
    cascade: Cascade, image: object, mask: Mask, prompt: str = flags.NEUTRAL, seeds: Sequence[int] = (0,), *,
    method: str = "renoise", jumps: tuple[int, int] | None = None, feather: float = 0.0, **changes: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The image painted anew where the mask is: (small, large or None), each (B, 3, H, W) in [-1, 1].

    image: a file, a Pillow image or a tensor.  mask, method, jumps, feather, changes: as for `Cascade.make`.
    Source: RePaint Eq. 8.
    """
    parts = [Part(prompt)]
    return cascade.make(parts, seeds, image=image, mask=mask, method=method, jumps=jumps, feather=feather, **changes)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    seeds, mask, cascade = flags.seeds_of(args), args.mask or args.box, flags.load_cascade(args)
    jumps = _jumps(args, len(times_for("ddpm", cascade.settings[0].steps)))
    results, labels = [], []
    for method in args.method:
        small, large = inpaint(cascade, args.image, mask, args.prompt, seeds, method=method,
                               jumps=jumps if method == "repaint" else None, feather=args.feather)  # fmt: skip
        results += list(small if large is None else large)
        labels += [f"{method}, seed {seed}" for seed in seeds]
    inputs, names = flags.inputs_shown(args.image, mask, args.feather, results[0].shape[-1])
    title = f"{args.image.name}: {args.prompt or '(empty prompt)'}   [{', '.join(args.method)}]"
    rows, labels, per_image = [[*inputs, *results]], [[*names, *labels]], seeds * len(args.method)
    flags.finish(args, "inpaint", results, per_image, rows, labels, title, cascade)


def _jumps(args: argparse.Namespace, steps: int) -> tuple[int, int]:
    """RePaint's jumps for so many steps. Raises ValueError if the flags do not fit them."""
    if "repaint" not in args.method and (args.jump_length or args.jump_n_sample):
        raise ValueError("--jump-length and --jump-n-sample go with --method repaint")
    return editing.jumps_for(steps, args.jump_length, args.jump_n_sample)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/inpaint.png")
    p.add_argument("image", type=cli.file_path)
    p.add_argument("words", nargs="*", metavar="MASK PROMPT", help="the mask, unless --box gives it, and the prompt")
    p.add_argument("--method", nargs="+", choices=editing.METHODS, default=["renoise"], help="(default renoise)")
    p.add_argument("--jump-length", type=int, help=f"of repaint (default {editing.JUMPS[0]})")
    p.add_argument("--jump-n-sample", type=int, help=f"of repaint (default {editing.JUMPS[1]})")
    flags.add_edit_flags(p, image=False)
    args = p.parse_intermixed_args(argv)
    words = args.words
    looks_like_file = bool(words) and cli.file_path(words[0]).suffix.lower() in images.KNOWN
    if args.mask is None and args.box is None:
        if not looks_like_file:
            raise ValueError("which region? pass a mask image after the image, or --box X0 Y0 X1 Y1")
        args.mask, words = cli.file_path(words[0]), words[1:]
    elif looks_like_file and cli.file_path(words[0]).is_file():
        raise ValueError(f"{words[0]} is an image, but --mask or --box says where to paint already; leave one out")
    if len(words) > 1:
        raise ValueError(f"too many words: {words}; put the prompt in quotation marks, and pass one mask or --box")
    args.prompt = words[0] if words else flags.NEUTRAL
    del args.words
    return args


if __name__ == "__main__":
    main()
