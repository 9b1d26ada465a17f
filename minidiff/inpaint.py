"""A region of a picture painted anew: the mask is white where new content goes.

    python -m minidiff.inpaint photo.png mask.png "a castle"
    python -m minidiff.inpaint photo.png "a castle" --box 16 16 48 48 --feather 1
    python -m minidiff.inpaint photo.png mask.png --method renoise clean repaint         three ways side by side
    python -m minidiff.inpaint photo.png mask.png "a castle" --num-images 8              choose the best of eight

After every step the known region is put back: noised to the new time (renoise, the course's way), clean (IF's own
way), or noised with jumps back up in the walk, after which both regions agree better (repaint; --jump-length and
--jump-n-sample). Stage 2 paints the same region at 256 pixels, beside the known pixels of the original at that size.

Source: RePaint Eq. 8 and `editing.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from minidiff import cli, editing, images
from minidiff.cascade import (
    Cascade,
    add_cascade_flags,
    add_edit_flags,
    edited,
    fill_in,
    load_mask,
    neutral_prompt,
    upper_walk,
    walk_of,
)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    jumps = (args.jump_length, args.jump_n_sample)
    cascade = Cascade(args, [args.prompt])
    condition, walk = cascade.prompted(), walk_of(args.steps[0])
    walks = [edited(walk, args, cascade.size, cascade.base.schedule, method=m, jumps=jumps) for m in args.method]
    small = cascade.draw(condition, walks, args.guidance_scale * len(walks))
    # Jumps at stage 1 only, where it is decided what goes into the hole; at stage 2 repaint is renoise.
    uppers = [upper_walk(cascade, method="renoise" if m == "repaint" else m) for m in args.method]
    results = cascade.enlarge(condition, uppers, small) or [x for x, _ in small]
    size = results[0].shape[-1]
    original, mask = images.load(args.image, size)[0], load_mask(args, size)[0]
    hole = torch.where(mask > 0.5, original.mean(), original)
    rows = [[original, 2 * mask - 1, hole] + [x[0] for x in results]]
    labels = [["original", "mask", "hole"] + [f"{m}, seed {args.seed}" for m in args.method]]
    for i in range(1, args.num_images):
        rows.append([x[i] for x in results])
        labels.append([f"{m}, seed {args.seed + i}" for m in args.method])
    if len(args.method) == 1 and args.num_images > 1:  # a contact sheet
        rows = [rows[0][:3], list(results[0])]
        labels = [labels[0][:3], [f"seed {args.seed + i}" for i in range(args.num_images)]]
    title = f"{args.image.name}: {args.prompt or '(empty prompt)'}   [{', '.join(args.method)}]"
    cascade.finish("inpaint", rows, labels, title)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/inpaint.png")
    p.add_argument("image", type=Path)
    p.add_argument("words", nargs="*", metavar="MASK PROMPT", help="the mask, unless --box gives it, and the prompt")
    p.add_argument("--method", nargs="+", choices=editing.METHODS, default=["renoise"], help="(default renoise)")
    p.add_argument("--jump-length", type=int, help=f"of repaint (default {editing.JUMPS[0]})")
    p.add_argument("--jump-n-sample", type=int, help=f"of repaint (default {editing.JUMPS[1]})")
    add_edit_flags(p, image=False)
    add_cascade_flags(p, "")
    args = fill_in(p.parse_intermixed_args(argv))
    if "repaint" not in args.method and (args.jump_length is not None or args.jump_n_sample is not None):
        raise ValueError("--jump-length and --jump-n-sample go with --method repaint")
    steps = len(walk_of(args.steps[0]).timesteps)
    if args.jump_length is None:
        args.jump_length = min(editing.JUMPS[0], max(steps // 2, 1))
    args.jump_n_sample = editing.JUMPS[1] if args.jump_n_sample is None else args.jump_n_sample
    if not 1 <= args.jump_length < steps or args.jump_n_sample < 1:
        raise ValueError(
            f"--jump-length must lie in 1..{steps - 1} for {steps} steps and --jump-n-sample be at least 1, got "
            f"{args.jump_length} and {args.jump_n_sample}"
        )
    words = list(args.words)
    if args.mask is None and args.box is None:
        if not words:
            raise ValueError("which region? pass a mask picture after the image, or --box X0 Y0 X1 Y1")
        if len(words) == 1 and not Path(words[0]).suffix:  # a prompt, and no mask
            raise ValueError("which region? pass a mask picture after the image, or --box X0 Y0 X1 Y1")
        args.mask = Path(words.pop(0))
    elif words and Path(words[0]).suffix.lower() in images.KNOWN and os.path.isfile(os.path.expanduser(words[0])):
        raise ValueError(f"{words[0]} is a picture, but --mask or --box says where to paint already; leave one out")
    if len(words) > 1:
        raise ValueError(f"too many words: {words}; put the prompt in quotation marks, and pass one mask or --box")
    args.prompt = words[0] if words else neutral_prompt(args.model)
    del args.words
    return args


if __name__ == "__main__":
    main()
