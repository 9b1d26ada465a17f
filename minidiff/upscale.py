"""Any picture four times as large: stage 2 as a super-resolution network of its own.

    python -m minidiff.upscale small.png "a castle"
    python -m minidiff.upscale photo.jpg "a dog" --model IF-II-M-v1.0 --noise-level 100
    python -m minidiff.upscale photo.jpg "a castle" --i-start 10               start from the picture itself (SDEdit)
    python -m minidiff.upscale photo.jpg "a castle" --box 16 16 48 48          enlarge inside a box only
    python -m minidiff.upscale anagram.png "a castle" "a skull" --view identity rotate_180

The picture is cropped to a square and shrunk to 64x64, enlarged again bilinearly, and noised to --noise-level: beside
this, stage 2 draws 256x256. More noise lets the network invent more. Writes a strip: 64 pixels, bilinear enlargement,
stage 2 (as each view sees it).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minidiff import cli, images, views, weights
from minidiff.cascade import (
    add_edit_flags,
    check_negative,
    check_pictures,
    check_widths,
    edited,
    encode,
    progress,
    walk_of,
)
from minidiff.checkpoint import read_config
from minidiff.deepfloyd import stages
from minidiff.factorized import Part, averaged, factorized
from minidiff.sampling import seeded


def text_model_of(model: str) -> str:
    """Whose text encoder a stage 2 reads: mini's or, whoever else's it is, the one that all released models share."""
    mini = weights.WEIGHTS / weights.MINI[2]
    for folder in (mini,) if model == "mini" else (cli.file_path(model), weights.WEIGHTS / model):
        if (folder / "unet" / "config.json").is_file():
            widths = [read_config(f / "unet").get("encoder_hid_dim") for f in (folder, mini)]
            return "mini" if widths[0] == widths[1] else "IF-I-XL-v1.0"
    return "IF-I-XL-v1.0"


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    clock = cli.Clock()
    images.check_output(args.out)
    check_pictures(args, args.steps)
    check_negative(args, [args.guidance_scale])
    low_res = images.load(args.image, 64)
    chosen = [views.named(name) for name in args.view]
    device, dtype = cli.choose(args)
    folder = weights.resolve(args.model, 2, ("unet",), print)
    stages.plan_stage(folder, dtype)  # tells what is wrong with it before the prompts are encoded
    embeds = encode(args, args.text_model, [args.negative_prompt, *args.prompts])[:, None]
    check_widths([folder], embeds)
    stage = stages.load_stage(folder, dtype, device)
    walk = walk_of(args.steps)
    walk = edited(walk, args, 256, stage.schedule, i_start=args.i_start)
    parts = averaged([Part(e, view) for e, view in zip(embeds[1:], chosen)])
    x = stages.sample_super_resolution(
        stage, low_res, lambda model, scale: factorized(model, parts, embeds[0], scale, args.split_batch),
        replace(walk, on_step=progress(walk, "256 px")), seeded(args.seed, 1),
        guidance_scale=args.guidance_scale, noise_level=args.noise_level,
    ).cpu()  # fmt: skip
    row = [low_res[0], stages.upsample(low_res, x.shape[2:])[0]] + [view.view(x[0]) for view in chosen]
    seen = [f"stage 2, {len(walk.timesteps)} steps" + (f", {view.name}" if len(chosen) > 1 else "") for view in chosen]
    title = f"{args.image.name}: {' / '.join(args.prompts) or '(empty prompt)'}"
    cli.finish(args, "upscale", [row], [["64 px", "bilinear", *seen]], title, clock)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/upscale.png")
    p.add_argument("image", type=Path)
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="what it shows (default: the empty prompt)")
    p.add_argument("--view", nargs="+", default=["identity"], help="one per prompt, as for minidiff.anagram")
    p.add_argument("--i-start", type=int, help="start from the picture, noised to this place on the steps")
    p.add_argument("--model", default="mini", help="stage 2: mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--text-model", help="whose text encoder (default: mini, or the released one)")
    p.add_argument("--steps", help="a count, smart27, ... (default: mini 20, others 50)")
    p.add_argument("--guidance-scale", type=cli.finite, help="1 is none (default: mini 1, others 4)")
    p.add_argument("--noise-level", type=int, default=stages.NOISE_LEVEL, help="0 to 999 (default %(default)s)")
    add_edit_flags(p, image=False)
    cli.add_text_flags(p)
    args = p.parse_intermixed_args(argv)
    args.model = weights.short_name(args.model, 2)
    mini = args.model == "mini"
    args.prompts, args.num_images = args.prompts or [""], 1
    args.guidance_scale = args.guidance_scale if args.guidance_scale is not None else 1.0 if mini else 4.0
    args.text_model = weights.short_name(args.text_model or text_model_of(args.model), 1)
    if not 0 <= args.noise_level < 1000:
        raise ValueError(f"--noise-level must lie in 0..999, got {args.noise_level}")
    for name in args.view:
        views.named(name).view(torch.zeros(3, 256, 256))  # so that one that does not fit is told now
    args.steps = cli.QUICK_STEPS if args.quick else args.steps or ("20" if mini else "50")
    if len(args.view) != len(args.prompts):
        raise ValueError(f"{len(args.prompts)} prompts need as many views, got {len(args.view)}: pass --view")
    return args


if __name__ == "__main__":
    main()
