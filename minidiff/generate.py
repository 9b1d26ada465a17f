"""A prompt becomes a picture: 64x64 from pure noise, then 256x256.

    python -m minidiff.generate "a rocket ship"
    python -m minidiff.generate "a castle" --num-images 4 --guidance-scale 5 --seed 7
    python -m minidiff.generate "a volcano" --steps 5 20 50          the same seed with more and more steps
    python -m minidiff.generate "a rocket ship" --model IF-I-M-v1.0  the released weights

Writes a labelled strip, 64 and 256 pixels side by side. One seed is one picture: image i of --num-images uses seed + i
whatever the others are.

Reading order of a run: tokenizer, t5, prompts, unet, stages, guidance, sampling, ddpm, schedule, images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff import cli, hub, images
from minidiff.deepfloyd import stages
from minidiff.sampling import seeded

# If no flag says otherwise: steps and guidance of both stages. The miniature is best with little guidance.
MINI_STEPS, MINI_GUIDANCE = ("27", "20"), (5.0, 1.0)
RELEASED_STEPS, RELEASED_GUIDANCE = ("100", "50"), (7.0, 4.0)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    clock = cli.Clock()
    images.check_output(args.out)
    device, dtype = cli.choose(args)
    plans = _plans(args)
    base = hub.resolve(args.model, 1, ("unet",), print)
    upper = None if args.stage2 == "none" else hub.resolve(args.stage2, 2, ("unet",), print)
    prompt_embeds, negative = cli.encode(args, args.model, [args.prompt, args.negative_prompt])[:, None]
    _check_widths([base] if upper is None else [base, upper], prompt_embeds)
    small, draws = _run_base(args, stages.load_stage(base, dtype, device), plans, prompt_embeds, negative)
    columns = [small]
    if upper is not None:
        stage = stages.load_stage(upper, dtype, device)
        columns.append(_run_upper(args, stage, plans, small, draws, prompt_embeds, negative))
    rows, labels = [], []
    for k, (first, second) in enumerate(plans):
        for i in range(args.num_images):
            rows.append([column[k][i] for column in columns])
            label = f"seed {args.seed + i}, {first} steps"
            labels.append([f"{label}, 64 px", f"256 px, {second} steps"][: len(columns)])
    title = f"{args.prompt or '(empty prompt)'}   [{args.model}, guidance {args.guidance_scale:g}]"
    cli.finish(args, "generate", rows, labels, title, clock)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/generate.png")
    p.add_argument("prompt")
    p.add_argument("--model", default="mini", help="mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--stage2", help="mini, a released name, a folder, or none (default: mini, or IF-II-M-v1.0 after a "
                   "released stage 1, or none after a folder)")  # fmt: skip
    p.add_argument("--steps", nargs="+", help="steps of both stages: a count, smart27, ...; several make a comparison "
                   "(default: mini 27 and 20, others 100 and 50)")  # fmt: skip
    p.add_argument("--guidance-scale", type=float, help="of stage 1; 1 is none (default: mini 5, others 7)")
    p.add_argument("--stage2-guidance-scale", type=float, help="of stage 2 (default: mini 1, others 4)")
    p.add_argument("--num-images", type=int, default=1)
    cli.add_text_flags(p)
    args = p.parse_args(argv)
    if args.stage2 is None:
        args.stage2 = {"mini": "mini"}.get(args.model, "IF-II-M-v1.0" if args.model in hub.RELEASED else "none")
    if args.guidance_scale is None:
        args.guidance_scale = (MINI_GUIDANCE if args.model == "mini" else RELEASED_GUIDANCE)[0]
    if args.stage2_guidance_scale is None:
        args.stage2_guidance_scale = (MINI_GUIDANCE if args.stage2 == "mini" else RELEASED_GUIDANCE)[1]
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    return args


def _plans(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(steps of stage 1, steps of stage 2) of each run, checked before any work."""
    if args.quick:
        plans = [(cli.QUICK_STEPS, cli.QUICK_STEPS)]
    else:
        plans = [(s, s) for s in args.steps] if args.steps else [MINI_STEPS if args.model == "mini" else RELEASED_STEPS]
    for plan in plans:
        for steps in plan:
            cli.timesteps(steps)
    return plans


def _check_widths(folders: list[Path], prompt_embeds: Tensor) -> None:
    """Before hours of work: do all stages read states of the width that the text encoder (or file) gives?"""
    for folder in folders:
        width = hub.read_config(folder / "unet").get("encoder_hid_dim")
        if width != prompt_embeds.shape[-1]:
            raise ValueError(
                f"{folder.name} reads text states of width {width}, but these have {prompt_embeds.shape[-1]}: stages "
                "and text encoder must be of one family; choose another --stage2 or --prompt-embeds"
            )


def _run_base(
    args: argparse.Namespace, stage: stages.Stage, plans: list[tuple[str, str]], prompt_embeds: Tensor, negative: Tensor
) -> tuple[list[Tensor], list[list[torch.Generator]]]:
    """Stage 1 once per plan: the pictures (num_images, 3, 64, 64), and the generators for stage 2 to draw on from."""
    size, pictures, draws = stage.unet.config.sample_size, [], []
    _announce(args, "64 px", stage, args.guidance_scale, size, prompt_embeds, [first for first, _ in plans])
    for steps, _ in plans:
        generators = seeded(args.seed, args.num_images)
        ts = cli.timesteps(steps)
        pictures.append(stages.sample_base(
            stage, prompt_embeds, negative, ts, generators, guidance_scale=args.guidance_scale, size=(size, size),
            split_batch=args.split_batch, on_step=cli.progress(len(ts), "64 px"),
        ).cpu())  # fmt: skip
        draws.append(generators)
    return pictures, draws


def _run_upper(
    args: argparse.Namespace, stage: stages.Stage, plans: list[tuple[str, str]], small: list[Tensor],
    draws: list[list[torch.Generator]], prompt_embeds: Tensor, negative: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Stage 2 on each result of stage 1: the pictures (num_images, 3, 256, 256)."""
    pictures = []
    size, guidance = 4 * small[0].shape[-1], args.stage2_guidance_scale
    _announce(args, "256 px", stage, guidance, size, prompt_embeds, [second for _, second in plans])
    for (_, steps), low_res, generators in zip(plans, small, draws):
        ts = cli.timesteps(steps)
        pictures.append(stages.sample_super_resolution(
            stage, low_res, prompt_embeds, negative, ts, generators, guidance_scale=args.stage2_guidance_scale,
            split_batch=args.split_batch, on_step=cli.progress(len(ts), "256 px"),
        ).cpu())  # fmt: skip
    return pictures


def _announce(
    args: argparse.Namespace, what: str, stage: stages.Stage, guidance: float, size: int, prompt_embeds: Tensor,
    steps: list[str],
) -> None:  # fmt: skip
    calls = sum(len(cli.timesteps(s)) for s in steps)
    branches = 1 if guidance == 1 else 2
    if args.split_batch:
        calls, branches = calls * branches, 1
    cli.announce(what, stage.unet, branches * args.num_images, (size, size), prompt_embeds, calls)


if __name__ == "__main__":
    main()
