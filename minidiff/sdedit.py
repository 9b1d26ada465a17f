"""An image made anew from the middle of the walk: its coarse shapes stay, the model draws the rest.

    python -m minidiff.sdedit drawing.png "a rocket ship"
    python -m minidiff.sdedit photo.png --i-start 1 3 5 7 10 20
    python -m minidiff.sdedit sketch.png "a volcano" --i-start 25 --guidance-scale 7 --seed 9 --stage2 mini
    python -m minidiff.sdedit photo.png "waterfalls" --box 20 0 44 30           only inside a box

The image (any size and kind; a drawing with transparency is laid over white) is noised to the i-th of the steps 990,
960, ..., 0 and walked down from there. A small i is nearly pure noise and leaves little of the image; a large i leaves
little to draw. With a mask or a box, all that lies outside is put back after every step. The third line is the recipe
for a logo as the course wants it: a sketch and a late start. Give it a long prompt of your own.

Source: SDEdit Alg. 1.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from minidiff import cli, flags
from minidiff.cascade import Cascade, Mask, last_start
from minidiff.checks import number
from minidiff.factorized import Part

STARTS = [1, 3, 5, 7, 10, 20]


def sdedit(
    cascade: Cascade, image: object, prompt: str = flags.NEUTRAL, i_start: int = 10, seeds: Sequence[int] = (0,), *,
    mask: Mask | None = None, feather: float = 0.0, **changes: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The image drawn anew from the i_start-th of the steps on: (small, large or None), each (B, 3, H, W) in [-1, 1].

        x_t = sqrt(alpha_bar_t) image + sqrt(1 - alpha_bar_t) noise,    t = timesteps[i_start], where the walk begins

    image: a file, a Pillow image or a tensor.  mask: only there it is drawn anew.
    mask, feather, changes: as for `Cascade.make`.
    The command walks the steps "course" without stage 2; here `cascade.settings` and its stages decide.
    Raises ValueError if i_start lies outside the steps.    Source: SDEdit Alg. 1.
    """
    return cascade.make([Part(prompt)], seeds, image=image, i_start=i_start, mask=mask, feather=feather, **changes)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    seeds, mask, cascade = flags.seeds_of(args), args.mask or args.box, flags.load_cascade(args)
    last = last_start(cascade.settings[0].steps)
    starts = args.i_start or [i for i in STARTS if i <= last] or [last]
    for start in starts:
        number("--i-start on these steps", start, 0, last, whole=True)
    columns = []
    for i_start in starts:
        small, large = sdedit(cascade, args.image, args.prompt, i_start, seeds, mask=mask, feather=args.feather)
        columns.append(small if large is None else large)
    results = [x for row in zip(*columns) for x in row]
    inputs, names = flags.inputs_shown(args.image, mask, args.feather, results[0].shape[-1])
    rows = [[*row, *inputs] for row in zip(*columns)]
    labels = [[*(f"i_start {i_start}, seed {seed}" for i_start in starts), *names] for seed in seeds]
    title = f"{args.image.name}: {args.prompt or '(empty prompt)'}"
    per_image = [seed for seed in seeds for _ in starts]
    flags.finish(args, "sdedit", results, per_image, rows, labels, title, cascade)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/sdedit.png", steps="course", stage2="none")
    p.add_argument("image", type=cli.file_path)
    p.add_argument("prompt", nargs="?", default=flags.NEUTRAL, help=f"what it becomes (default: {flags.NEUTRAL})")
    p.add_argument("--i-start", type=int, nargs="+", help=f"where on the steps to begin (default {STARTS})")
    flags.add_edit_flags(p, image=False)
    return p.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
