"""An image that is one thing, and another when it is turned: visual anagrams.

    python -m minidiff.anagram "a mountain lake at sunset" "a volcano" --view identity rotate_180
    python -m minidiff.anagram "a snowy mountain village" "a volcano" "waterfalls" --view identity rotate_cw rotate_ccw
    python -m minidiff.anagram "a volcano" "waterfalls" --view identity jigsaw --num-images 6
    python -m minidiff.anagram "a volcano" "waterfalls" --image photo.png --box 16 16 48 48      inside an image
    python -m minidiff.anagram --check square_hinge                                              is this a good view?

Each prompt sees x_t through its view; its eps is turned back, and the mean of all is taken (or, with --reduction
alternate, they take turns). --view lists the views. Some take a number: skew:1.5, skew_by:50, patch_permute:8,
jigsaw:SEED. Those that end in _failure are there for comparison.

Writes the image, a sheet of it as every prompt sees it, and an animation into each view and back, OUT.gif.
--check measures a view instead, and says why a bad one is bad (exit status 1).

Source: the papers Visual Anagrams and, for the sum over prompts, Factorized Diffusion; see `factorized.py`.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from minidiff import cli, flags, images, views
from minidiff.cascade import Cascade, Mask
from minidiff.checks import short
from minidiff.factorized import InTurns, averaged, through_views

FRAMES, HOLD = 16, 6  # of the animation: on the way into a view, and standing still before and after


def anagram(
    cascade: Cascade, prompts: Sequence[str], view_names: str | Sequence[str] = ("identity", "rotate_180"),
    seeds: Sequence[int] = (0,), *, in_turns: bool = False, image: object = None, mask: Mask | None = None,
    i_start: int | None = None, feather: float = 0.0, **changes: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An image that shows each prompt in its view: (small, large or None), each (B, 3, H, W) in [-1, 1].

    view_names: one for each prompt, as for `views.named`.  in_turns: one prompt at each step, not the mean of all.
    image, mask, i_start, feather, changes: as for `Cascade.make`.    Source: the Visual Anagrams paper.
    """
    if not isinstance(in_turns, bool):
        raise ValueError(f"in_turns is True or False, got {short(in_turns)}")
    parts = through_views(prompts, view_names)
    parts = InTurns(parts) if in_turns else averaged(*parts)
    return cascade.make(parts, seeds, image=image, mask=mask, i_start=i_start, feather=feather, **changes)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.check:
        sys.exit(report(args.check))
    animation = flags.animation_beside(args)
    seeds, mask, cascade = flags.seeds_of(args), args.mask or args.box, flags.load_cascade(args, beside=[animation])
    for name in dict.fromkeys(args.view):
        for measure in views.check(views.named(name)):
            if measure.fault:
                print(f"warning: view {name}: {measure.fault}", file=sys.stderr)
    small, large = anagram(cascade, args.prompts, args.view, seeds, in_turns=args.reduction == "alternate",
                           image=args.image, mask=mask, i_start=args.i_start, feather=args.feather)  # fmt: skip
    results, chosen = list(small if large is None else large), [views.named(name) for name in args.view]
    rows = [[view.view(x) for view in chosen] for x in results]
    labels = [[f"{name}: {p}, seed {seed}" for name, p in zip(args.view, args.prompts)] for seed in seeds]
    flags.finish(args, "anagram", results, seeds, rows, labels, " / ".join(args.prompts), cascade)
    images.save_gif(frames(results[0], chosen), animation, 0.06)
    print(f"wrote {animation}")


def frames(x: Tensor, chosen: Sequence[views.View]) -> list[Image.Image]:
    """The animation of one image (3, H, H): into each view but the identity and back, easing in and out."""
    result, parts = [], [k / (FRAMES - 1) for k in range(FRAMES)]
    for view in chosen:
        if view.name != "identity":
            there = [images.to_pil(travel(x.cpu(), view, part * part * (3 - 2 * part))) for part in parts]
            result += [there[0]] * HOLD + there + [there[-1]] * HOLD + there[::-1]
    return result or [images.to_pil(x)]


def travel(x: Tensor, view: views.View, part: float) -> Tensor:
    """The image on its way to its view: part 0 is x, 1 is view(x), on a white square half as large again.

    x: (3, H, H) in [-1, 1].  Pixels of a permutation travel straight, or about the view's turning points; other views
    fade over.  Returns (3, 3H/2, 3H/2).
    """
    size = views.side_of(x)
    margin = size // 4
    page = x.new_ones(3, size + 2 * margin, size + 2 * margin)
    if view.order is None:
        page[:, margin : margin + size, margin : margin + size] = torch.lerp(x, view.view(x), part)
        return page
    order, to = view.order(size), views.positions(size)
    start = to[order]
    if view.turns is None:
        where = torch.lerp(start, to, part)
    else:
        centre = view.turns(size)
        a, b = start - centre, to - centre
        angle = torch.atan2(a[:, 1] * b[:, 0] - a[:, 0] * b[:, 1], (a * b).sum(1))
        angle = torch.where(angle < 1e-3 - math.pi, angle + 2 * math.pi, angle) * part
        y = angle.cos() * a[:, 0] + angle.sin() * a[:, 1]
        where = centre + torch.stack([y, angle.cos() * a[:, 1] - angle.sin() * a[:, 0]], 1)
    where, colours, side = where + margin, x.flatten(1)[:, order], page.shape[-1]
    for corner in ((1, 1), (1, 0), (0, 1), (0, 0)):  # a pixel between places covers all of them, so no gap opens
        place = (where + 1e-3 + torch.tensor(corner) * (1 - 2e-3)).floor().long().clamp(0, side - 1)
        page.view(3, -1)[:, place[:, 0] * side + place[:, 1]] = colours
    return page


def report(name: str) -> int:
    """Print what `views.check` measures of a view; 0 if it is good, 1 if not."""
    measures = views.check(views.named(name))
    faults = [measure.fault for measure in measures if measure.fault]
    rows = [f"  {m.name:<32}{m.value:>10.3g}   (good: {m.ideal:g} +- {m.bound:.2g})" for m in measures]
    verdict = [f"  bad: {fault}" for fault in faults] or ["  good: linear, orthogonal, and the same at both sizes"]
    print("\n".join([views.named(name).name, *rows, *verdict]))
    return 1 if faults else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/anagram.png")
    p.add_argument("prompts", nargs="*", metavar="PROMPT")
    p.add_argument("--view", nargs="+", help="one per prompt (default, of two prompts: identity rotate_180), of "
                   + ", ".join(views.VIEWS))  # fmt: skip
    p.add_argument("--reduction", choices=["mean", "alternate"], default="mean", help="(default %(default)s)")
    p.add_argument("--check", metavar="VIEW", help="measure a view, draw nothing")
    flags.add_edit_flags(p)
    args = p.parse_intermixed_args(argv)
    if args.check:
        if args.prompts:
            raise ValueError("--check measures a view and draws nothing; leave it out, or the prompts")
        return args
    if not args.prompts:
        raise ValueError('no prompts; pass one for each view, before --view: "a coast" "a fire" --view identity flip')
    if args.view is None and len(args.prompts) == 2:
        args.view = ["identity", "rotate_180"]
    through_views(args.prompts, args.view or [])  # so that wrong ones show now
    return args


if __name__ == "__main__":
    main()
