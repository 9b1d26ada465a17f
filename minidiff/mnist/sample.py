"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --digits 3,7 --num-images 8 --guidance-scale 0 1 5 10
    python -m minidiff.mnist.sample --kind flow --model out/mnist/flow out/mnist/reflow    two models, the same noise
    python -m minidiff.mnist.sample --num-images 100 --tensors out/digits.safetensors  a file for `judge score`

One row for each model and guidance scale; image i of a row comes from seed + i in all of them. A scale of 0 ignores
the digit asked for, 1 is no guidance. Read `mnist/train_diffusion.py` and `mnist/train_flow.py` first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff import flow, images, weights
from minidiff.cli import Clock, command, settings
from minidiff.hub import WEIGHTS
from minidiff.mnist import drawing, judge, training
from minidiff.mnist.data import CLASSES
from minidiff.sampling import seeded

STEPS = {"ddpm": drawing.T, "flow": drawing.FLOW_STEPS}
SOLVERS = (*flow.METHODS, "dormand-prince")
BATCH = 250
SHOWN = 100  # pictures of one row of the figure, at most


def parse_digits(text: str) -> list[int]:
    """ "0-9", "3,7" or "0-2,9" to digits. Raises ValueError on anything else."""
    digits: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < CLASSES):
            raise ValueError(f"--digits must be like 0-9, 3,7 or 0-2,9, got {text!r}")
        digits += range(int(first), int(last or first) + 1)
    return digits


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=list(STEPS), default="ddpm", help="default %(default)s")
    p.add_argument("--model", type=Path, nargs="+", help="folders of trained networks (default: the embedded one)")
    p.add_argument("--digits", default="0-9", help="like 0-9, 3,7 or 0-2,9 (default %(default)s)")
    p.add_argument("--num-images", type=int, default=1, help="of each digit (default %(default)s)")
    p.add_argument("--guidance-scale", type=float, nargs="+", default=[5.0], help="default 5")
    p.add_argument("--steps", type=int, help="default: ddpm 300, flow 50")
    p.add_argument("--solver", choices=SOLVERS, default="euler", help="of flow (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=Path, default=Path("out/digits.png"), help="picture (default %(default)s)")
    p.add_argument("--tensors", type=Path, help="also write the samples of the first row, for judge score")
    p.add_argument("--judge", type=Path, default=WEIGHTS / "mnist" / "judge", help="who judges, if it is there")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    images.check_output(args.out)
    if args.tensors:
        images.check_output(args.tensors, (".safetensors",))
    device, clock = training.device(args.device), Clock()
    labels = torch.tensor(parse_digits(args.digits)).repeat(args.num_images)
    folders = args.model or [WEIGHTS / "mnist" / args.kind]
    steps = 4 if args.quick else args.steps or STEPS[args.kind]
    rows, texts = [], []
    for folder in folders:
        unet = drawing.load(folder, args.kind, device)
        told = labels if unet.config.num_classes else None
        for scale in args.guidance_scale:
            what = f"{folder.name}, scale {scale:g}"
            parts = []
            for i in tqdm(range(0, len(labels), BATCH), desc=what, disable=len(labels) <= BATCH):
                part = labels[i : i + BATCH]
                seeds = seeded(args.seed + i, len(part))
                if args.kind == "ddpm":
                    parts.append(drawing.draw_ddpm(drawing.prediction(unet, part, scale), seeds, device, steps))
                else:
                    v = drawing.velocity(unet, part, scale)
                    parts.append(drawing.draw_flow(v, seeds, device, steps, args.solver))
            x = torch.cat(parts)
            if args.tensors and not rows:
                weights.save({"images": x, "labels": labels, "seed": torch.tensor(args.seed)}, args.tensors)
            if (args.judge / "config.json").is_file():
                print("\n  ".join([f"{what}:", *judge.report(args.judge, x, told, args.seed)]))
            for i, row in enumerate(x[:SHOWN].split(10)):
                rows.append(row)
                texts.append("" if i else what)
    title = f"{args.kind}, {steps} steps, seeds {args.seed} to {args.seed + len(labels) - 1}"
    drawing.save_strip(rows, texts, title, args.out, settings(args, "mnist.sample"))
    print(f"wrote {args.out}   ({clock})")


if __name__ == "__main__":
    main()
