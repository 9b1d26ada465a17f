"""A prompt becomes a picture: 64x64 from pure noise, then 256x256.

    python -m minidiff.generate "a rocket ship"
    python -m minidiff.generate "a castle" --num-images 4 --guidance-scale 5 --seed 7
    python -m minidiff.generate "a volcano" --steps 5 20 50           the same seed with more and more steps
    python -m minidiff.generate "a castle" --guidance-scale 1 7 --num-images 5 --stage2 none     without and with CFG
    python -m minidiff.generate "a castle" --show-steps               what happens on the way
    python -m minidiff.generate "a rocket ship" --model IF-I-M-v1.0   the released weights

Writes a labelled strip, 64 and 256 pixels side by side. One seed is one picture: image i of --num-images uses seed + i
whatever the others are. Several --guidance-scale make one row each, the pictures of all seeds side by side.
--show-steps writes a second strip beside the first, OUT-steps: x_t, the estimate of the clean picture and eps at eight
steps, with sigma, the most noise that may be added after it (the network chooses how much of that).

Reading order of a run: tokenizer, t5, prompts, unet, stages, guidance, sampling, ddpm, schedule, images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff import cli, images
from minidiff.cascade import Cascade, add_cascade_flags, fill_in, walk_of
from minidiff.schedule import Schedule

SHOWN_STEPS = 8


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    steps_out = args.out.with_name(f"{args.out.stem}-steps{args.out.suffix}")
    if args.show_steps:
        images.check_output(steps_out)
    plans = [(steps, scale) for steps in args.steps for scale in args.guidance_scale]
    cascade = Cascade(args, [args.prompt])
    condition, seen = cascade.prompted(), []
    walks = [walk_of(steps) for steps, _ in plans]
    watch = (lambda *step: seen.append(step)) if args.show_steps else None
    small = cascade.draw(condition, walks, [scale for _, scale in plans], watch)
    # With one --steps it is stage 1 that is compared; with several, stage 2 takes as many steps.
    second = args.steps if len(args.steps) > 1 else [args.stage2_steps]
    large = cascade.enlarge(condition, [walk_of(s) for s in second for _ in args.guidance_scale], small)
    rows, labels = [], []
    if len(args.guidance_scale) > 1:
        for (steps, scale), pictures in zip(plans, large or [x for x, _ in small]):
            rows.append(list(pictures))
            labels.append([f"guidance {scale:g}, {steps} steps, seed {args.seed + i}" for i in range(args.num_images)])
    else:
        for k, (steps, _) in enumerate(plans):
            for i in range(args.num_images):
                rows.append([small[k][0][i]] + [pictures[i] for pictures in large[k : k + 1]])
                label = f"seed {args.seed + i}, {steps} steps, {small[k][0].shape[-1]} px"
                labels.append([label, f"256 px, {second[k]} steps"][: len(rows[-1])])
    scales = ", ".join(f"{scale:g}" for scale in args.guidance_scale)
    title = f"{args.prompt or '(empty prompt)'}   [{args.model}, guidance {scales}]"
    cascade.finish("generate", rows, labels, title)
    if args.show_steps:
        rows_of_steps = show_steps(seen, walks[0].timesteps, walks[0].final_step, cascade.base.schedule)
        images.save(images.strip(*rows_of_steps, title), steps_out, cli.settings(args, "generate"))
        print(f"wrote {steps_out}")


def show_steps(
    seen: list[tuple[int, int, Tensor, Tensor, Tensor]], timesteps: Tensor, final_step: bool, schedule: Schedule
) -> tuple[list[list[Tensor]], list[list[str]]]:
    """Rows and labels of the first picture at SHOWN_STEPS of the steps seen: x_t, the estimate, eps.

    seen: the arguments of `on_step`, (i, t, x_t, pred_x_start, eps).  sigma is the larger bound, sqrt(beta_t).
    """
    following = timesteps[1:].tolist() + ([-1] if final_step else [])
    chosen = torch.linspace(0, len(seen) - 1, min(SHOWN_STEPS, len(seen))).round().int().tolist()
    rows, labels = [[], [], []], [[], [], []]
    for i, t, x_t, pred_x_start, eps in (seen[k] for k in chosen):
        alpha_bar_t, alpha_bar_prev = (schedule.alpha_bar(torch.tensor([s])) for s in (t, following[i]))
        sigma = (1 - alpha_bar_t / alpha_bar_prev).sqrt().item() if following[i] >= 0 else 0.0
        for row, x in zip(rows, (x_t[0], pred_x_start[0], eps[0] / 3)):  # eps reaches about 3: shown in [-1, 1]
            row.append(x.cpu())
        snr = (alpha_bar_t / (1 - alpha_bar_t)).item()
        labels[0].append(f"x_t, t = {t}, signal / noise {snr:.2g}")
        labels[1].append(f"estimate, rms {pred_x_start[0].square().mean().sqrt():.2f}")
        labels[2].append(f"eps / 3, then sigma <= {sigma:.2f}")
    return rows, labels


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__, "out/generate.png")
    p.add_argument("prompt")
    add_cascade_flags(p, "")
    p.add_argument("--show-steps", action="store_true", help="also write a strip of what happens on the way")
    args = p.parse_intermixed_args(argv)
    if args.steps and len(args.steps) > 1 and args.stage2_steps:
        raise ValueError("with several --steps stage 2 takes as many each time; leave out --stage2-steps")
    args = fill_in(args, sweeps=True)
    if args.show_steps and len(args.steps) * len(args.guidance_scale) > 1:
        raise ValueError("--show-steps looks at one run: pass one --steps and one --guidance-scale")
    return args


if __name__ == "__main__":
    main()
