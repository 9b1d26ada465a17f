"""A prompt becomes an image: 64x64 from pure noise, then 256x256.

    python -m minidiff.generate "a volcano"
    python -m minidiff.generate --prompts                             what the embedded model knows
    python -m minidiff.generate "a volcano" --seed 0 1 3 4 5          an image of each seed
    python -m minidiff.generate "waterfalls" "a volcano" --steps 5 20   a row for each prompt and number of steps
    python -m minidiff.generate "a volcano" --guidance-scale 1 7 --num-images 5 --stage2 none    without and with CFG
    python -m minidiff.generate "a volcano" --show-every 3            what happens on the way
    python -m minidiff.generate "a volcano" --model IF-I-M-v1.0   the released weights

Writes the image itself, at its own size (several: OUT-0, OUT-1, ...), and a labelled sheet beside it, OUT-sheet. One
seed is one image, whatever is drawn with it. With several --steps, stage 2 takes as many, unless --stage2-steps says
otherwise. --show-every K writes OUT-steps, too: x_t, the estimate of the clean image and eps at every K-th step, with
sigma, the largest deviation of the noise that the step may add (the network chooses how much of it).
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from minidiff import cli, flags, images, weights
from minidiff.cascade import Cascade
from minidiff.deepfloyd import vocabulary
from minidiff.factorized import Part
from minidiff.sampling import Step
from minidiff.schedule import Schedule

EMPTY = "(empty prompt)"


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    steps_out = args.out.with_name(f"{args.out.stem}-steps.png")
    beside = [steps_out] if args.show_every else []
    seeds, cascade = flags.seeds_of(args), flags.load_cascade(args, compares=True, beside=beside)
    if args.list:
        if cascade.vocabulary is None:
            raise ValueError(f"{args.model} brings no list of what it knows (vocabulary.json); mini does")
        return print(vocabulary.listing(cascade.vocabulary))
    rows, labels, differences, record = [], [], [], []
    cascade.encode(*args.prompts)
    for words, settings in plans(args, cascade):
        parts = [Part(settings["prompt"])]
        small, large = cascade.make(parts, seeds, through=lambda steps: flags.noted(steps, record))
        rows.append(list(small if large is None else large))
        labels.append([", ".join([*(word or EMPTY for word in words), f"seed {seed}"]) for seed in seeds])
        differences += [settings] * len(seeds)
    results, seeds = [x for row in rows for x in row], seeds * len(rows)
    if len(results) == 1 and cascade.has_upper:
        rows, labels = [[small[0], large[0]]], [["64 px, " + labels[0][0], "256 px"]]
    title = (args.prompts[0] or EMPTY) if len(args.prompts) == 1 else ""
    metadata = flags.finish(args, "generate", results, seeds, rows, labels, title, cascade, differences)
    if args.show_every:
        sheet = images.sheet(*steps_sheet(record[:: args.show_every], cascade.stage(1).schedule), title)
        images.save(sheet, steps_out, metadata | {"minidiff": "sheet"})
        print(f"wrote {steps_out}")


def plans(args: argparse.Namespace, cascade: Cascade) -> Iterator[tuple[list[str], dict[str, object]]]:
    """What is to be drawn, one after the other: the words that tell it from the rest, and its prompt and settings.

    Sets the cascade's settings before each.
    """
    base, upper = cascade.settings
    scales, counts = args.guidance_scale or [base.guidance_scale], args.steps or [base.steps]
    for prompt, steps, scale in product(args.prompts, counts, scales):
        seconds = args.stage2_steps or ([steps] if len(counts) > 1 else [upper.steps])
        for second in seconds:
            cascade.settings[:] = base.but(steps=steps, guidance_scale=scale), upper.but(steps=second)
            words = [prompt] if len(args.prompts) > 1 else []
            words += [f"{steps} steps"] if len(counts) > 1 else []
            words += [f"guidance {scale:g}"] if len(scales) > 1 else []
            words += [f"stage 2: {second} steps"] if len(seconds) > 1 else []
            own = {"prompt": prompt, "steps": steps, "guidance_scale": scale}
            yield words, own | ({"stage2_steps": second} if cascade.has_upper else {})


def steps_sheet(record: Sequence[Step], schedule: Schedule) -> tuple[list[list[Tensor]], list[list[str]]]:
    """Rows and labels of the first image at these steps: x_t, the estimate, eps.    sigma is sqrt(beta_t)."""
    rows, labels = [[], [], []], [[], [], []]
    for step in record:
        alpha_bar_t, alpha_bar_prev = (schedule.alpha_bar(torch.tensor([s])) for s in (step.t, step.t_prev))
        sigma = (1 - alpha_bar_t / alpha_bar_prev).sqrt().item() if step.t_prev >= 0 else 0.0
        for row, x in zip(rows, (step.x_t[0], step.x_start[0], step.eps[0] / 3)):  # eps reaches about 3
            row.append(x.cpu())
        snr = (alpha_bar_t / (1 - alpha_bar_t)).item()
        labels[0].append(f"x_t, t = {step.t}, signal / noise {snr:.2g}")
        labels[1].append(f"estimate, rms {step.x_start[0].square().mean().sqrt():.2f}")
        labels[2].append(f"eps / 3, then sigma <= {sigma:.2f}")
    return rows, labels


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/generate.png")
    p.add_argument("prompts", nargs="*", metavar="PROMPT")
    p.add_argument("--prompts", action="store_true", dest="list", help="list what the model knows, draw nothing")
    p.add_argument("--show-every", type=int, metavar="K", help="also write a sheet of every K-th step")
    args = p.parse_intermixed_args(argv)
    if not args.prompts and not args.list:
        raise ValueError('no prompt; pass one, such as "a volcano", or --prompts to list what the model knows')
    if args.prompts and args.list:
        raise ValueError("--prompts lists what the model knows and draws nothing; leave it out, or the prompt")
    if args.list and args.model.removeprefix("DeepFloyd/") in weights.RELEASED:  # which need not be fetched for this
        raise ValueError(f"{args.model} brings no list of what it knows; mini does")
    if args.show_every is not None:
        if args.show_every < 1:
            raise ValueError(f"--show-every must be at least 1, got {args.show_every}")
        if len(args.prompts) * len(args.steps or "1") * len(args.guidance_scale or "1") > 1:
            raise ValueError("--show-every looks at one run: pass one prompt, one --steps and one --guidance-scale")
    return args


if __name__ == "__main__":
    main()
