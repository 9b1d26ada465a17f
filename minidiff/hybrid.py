"""A picture that is one thing from afar and another from nearby: hybrid images, and other divided pictures.

    python -m minidiff.hybrid "a skull" "a waterfall"                         far, near
    python -m minidiff.hybrid "a castle" "a lion" "a rocket ship" --kind triple
    python -m minidiff.hybrid "a castle" "a fire" --kind color                in grey, with colour
    python -m minidiff.hybrid "a dog" "a castle" --kind motion                moving, still
    python -m minidiff.hybrid "a castle" "a volcano" --kind scale --weights 0.5 0.5      composition (negative: without)
    python -m minidiff.hybrid "a castle" --reference photo.png                far is the photograph, near is new

Each prompt decides one component of the noise (`components.py`); together they are the whole. With --reference the
first component is taken from a picture instead of a prompt, and the prompts are for the others.

Writes the picture, each component of it, and how it looks from afar (64 and 20 pixels); and an animation that walks
away from it (or, for other kinds, from the picture to its first component), OUT.gif.

Source: the Factorized Diffusion paper; see `factorized.py`. Sigma 2 and kernel 33, at 64 pixels, are the course's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff import cli, components, editing, images
from minidiff.cascade import (
    Cascade,
    add_cascade_flags,
    add_edit_flags,
    check_optional_image,
    edited,
    fill_in,
    upper_walk,
    walk_of,
)
from minidiff.deepfloyd.stages import Stage, Walk
from minidiff.factorized import Part
from minidiff.sampling import seeded

FAR = 20  # pixels; what is left of the picture across the room
FRAMES = 30


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    animation = cli.animation_beside(args)
    chosen = components.of_kind(args.kind, args.sigma, args.weights)
    cascade = Cascade(args, args.prompts)
    # A given component needs no prompt; what the network says of it is replaced, so the first prompt may say it.
    embeds = [cascade.prompts[0]] * (len(chosen) - len(args.prompts)) + cascade.prompts
    condition = cascade.factorized([Part(e, component=c) for e, c in zip(embeds, chosen)])
    walk = edited(walk_of(args.steps[0]), args, cascade.size, cascade.base.schedule, i_start=args.i_start)
    upper = upper_walk(cascade)
    if args.reference:
        walk = _with_reference(walk, args, chosen[0], cascade.base, cascade.size, stream=1)
        if cascade.upper is not None:
            upper = _with_reference(upper, args, chosen[0], cascade.upper, 4 * cascade.size, stream=2)
    small = cascade.draw(condition, [walk], args.guidance_scale)
    results = (cascade.enlarge(condition, [upper], small) or [x for x, _ in small])[0]
    rows, labels = [], []
    names = [args.reference.name] * (len(chosen) - len(args.prompts)) + args.prompts if args.reference else args.prompts
    for i, x in enumerate(results):
        rows.append([x])
        labels.append([f"seed {args.seed + i}, {x.shape[-1]} px"])
        if args.kind in ("frequency", "triple"):
            rows[-1] += [_from_afar(x, 64), _from_afar(x, FAR)]
            labels[-1] += ["64 px: some steps away", f"{FAR} px: across the room"]
        if args.kind != "scale":
            parts = [component(x[None])[0] for component in chosen]
            rows[-1] += parts
            labels[-1] += [f"component {k + 1}: {name}" for k, name in enumerate(names)]
    title = f"{' / '.join(names)}   [{args.kind}, {args.model}, guidance {args.guidance_scale[0]:g}]"
    cascade.finish("hybrid", rows, labels, title)
    images.save_gif(frames(results[0], args.kind, chosen[0]), animation, 0.06)
    print(f"wrote {animation}")


def _with_reference(
    walk: Walk, args: argparse.Namespace, component: components.Component, stage: Stage, size: int, stream: int
) -> Walk:
    """The walk keeping this component of --reference, noised with random numbers of its own."""
    own = seeded(args.seed, args.num_images, stream)
    return replace(walk, keep=editing.reference(images.load(args.reference, size), component, stage.schedule, own))


def _from_afar(x: Tensor, size: int) -> Tensor:
    """The picture (3, H, H) shrunk to size pixels, shown as large as before."""
    small = F.interpolate(x[None], size, mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic").clamp(-1, 1)[0]


def frames(x: Tensor, kind: str, first: components.Component) -> list[Image.Image]:
    """Walking away from a hybrid of frequencies; of other kinds, fading to the first component and back."""
    picture, size = images.to_pil(x), x.shape[-1]
    way = []
    for k in range(FRAMES):
        part = k / (FRAMES - 1)
        if kind in ("frequency", "triple"):
            small = round(size * (FAR / size) ** part)
            page = Image.new("RGB", (size, size), "white")
            shrunk = picture.resize((small, small), Image.Resampling.BICUBIC)
            page.paste(shrunk, ((size - small) // 2, (size - small) // 2))
        else:
            page = images.to_pil(torch.lerp(x, first(x[None])[0], part))
        way.append(page)
    return way + way[::-1]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/hybrid.png")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="one per component: low frequencies first")
    p.add_argument("--kind", choices=["frequency", "triple", "color", "motion", "scale"], default="frequency",
                   help="how the picture is divided (default %(default)s)")  # fmt: skip
    p.add_argument("--sigma", type=cli.finite, help="of the low pass, pixels of 64 (default 2)")
    p.add_argument("--weights", type=cli.finite, nargs="+", help="of --kind scale, one per prompt")
    p.add_argument("--reference", type=Path, metavar="IMAGE", help="a picture whose first component is kept")
    p.add_argument("--i-start", type=int, help="with --image: where on the steps to begin")
    add_edit_flags(p)
    add_cascade_flags(p, "")
    args = fill_in(p.parse_intermixed_args(argv))
    check_optional_image(args)
    if args.weights and args.kind != "scale":
        raise ValueError(f"--weights go with --kind scale, not {args.kind}")
    if args.sigma is not None and args.kind not in ("frequency", "triple"):
        raise ValueError(f"--sigma goes with --kind frequency and triple, not {args.kind}")
    args.sigma = components.SIGMA if args.sigma is None else args.sigma
    if args.sigma < 0:
        raise ValueError(f"--sigma must be at least 0, got {args.sigma:g}")
    needed = len(components.of_kind(args.kind, args.sigma, args.weights)) - (args.reference is not None)
    if len(args.prompts) != needed:
        what = f"{args.kind} with --reference" if args.reference else args.kind
        raise ValueError(f"{what} needs {needed} prompts, got {len(args.prompts)}")
    if args.reference and (args.mask or args.box):
        raise ValueError("--reference and a mask both say what is kept; pass one of them")
    return args


if __name__ == "__main__":
    main()
