"""A picture made anew from the middle: keep its coarse shapes, let the model draw the rest.

    python -m minidiff.sdedit drawing.png "a castle"
    python -m minidiff.sdedit photo.png --i-start 1 3 5 7 10 20
    python -m minidiff.sdedit sketch.png "a castle" --i-start 25 --guidance-scale 7 --seed 9 --stage2 mini
    python -m minidiff.sdedit photo.png "a rocket ship" --box 20 0 44 30           only inside a box

The picture (any size and kind; a drawing with transparency is laid over white) is noised to the i-th of the steps 990,
960, ..., 0 and denoised from there. A small i is nearly pure noise and leaves little of it, a large i little to draw.
With a mask or a box the rest is put back after every step. The third line is the recipe of course logos: one's own
sketch, a long prompt and a late start.

Source: SDEdit Alg. 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minidiff import cli, images
from minidiff.cascade import (
    Cascade,
    add_cascade_flags,
    add_edit_flags,
    edited,
    fill_in,
    last_start,
    neutral_prompt,
    upper_walk,
    walk_of,
)

STARTS = [1, 3, 5, 7, 10, 20]


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    cascade = Cascade(args, [args.prompt])
    original = images.load(args.image, cascade.size)
    condition, walk = cascade.prompted(), walk_of(args.steps[0])
    walks = [edited(walk, args, cascade.size, cascade.base.schedule, i_start=i) for i in args.i_start]
    small = cascade.draw(condition, walks, args.guidance_scale * len(walks))
    large = cascade.enlarge(condition, [upper_walk(cascade) for _ in walks], small)
    results = large or [x for x, _ in small]
    rows = [[x[i] for x in results] + [original[0]] for i in range(args.num_images)]
    labels = [[f"i_start = {i}, t = {int(w.timesteps[0])}" for i, w in zip(args.i_start, walks)] + ["original"]]
    title = f"{args.image.name}: {args.prompt or '(empty prompt)'}   [guidance {args.guidance_scale[0]:g}]"
    cascade.finish("sdedit", rows, labels * args.num_images, title)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/sdedit.png")
    p.add_argument("image", type=Path)
    p.add_argument("prompt", nargs="?", help="what to draw (default: nothing; a high quality photo for other models)")
    p.add_argument("--i-start", type=int, nargs="+", help="where on the steps to begin (default 1 3 5 7 10 20)")
    add_edit_flags(p, image=False)
    add_cascade_flags(p, "course", stage2=False)
    args = fill_in(p.parse_intermixed_args(argv))
    args.prompt = neutral_prompt(args.model) if args.prompt is None else args.prompt
    if args.i_start is None:  # those of the usual ones that lie on the steps
        last = last_start(walk_of(args.steps[0]))
        args.i_start = [i for i in (STARTS[:3] if args.quick else STARTS) if i <= last] or [last]
    return args


if __name__ == "__main__":
    main()
