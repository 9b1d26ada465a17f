"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --kind flow                            from the embedded flow model
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
from torch import Tensor
from tqdm import tqdm

from minidiff import flow, images, weights
from minidiff.cli import Clock, command, device_of, settings
from minidiff.hub import WEIGHTS
from minidiff.mnist import drawing, judge, training
from minidiff.mnist.data import CLASSES
from minidiff.mnist.unet import UNet
from minidiff.sampling import seeded

STEPS = {"ddpm": drawing.T, "flow": drawing.FLOW_STEPS}
SOLVERS = (*flow.METHODS, "dormand-prince")
EMBEDDED_JUDGE = WEIGHTS / "mnist" / "judge"
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
    p.add_argument("--judge", type=Path, help="who judges samples of MNIST (default: the embedded one)")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    if args.solver != "euler" and args.kind == "ddpm":
        raise ValueError("--solver is for --kind flow; a DDPM is sampled by its own steps")
    if args.solver == "dormand-prince" and args.steps is not None:
        raise ValueError("dormand-prince chooses its own steps; leave out --steps")
    images.check_output(args.out)
    if args.tensors:
        images.check_output(args.tensors, (".safetensors",))
    if args.judge:
        judge.load(args.judge)  # so that a wrong one is told before anything is drawn
    device, clock = device_of(args.device), Clock()
    labels = torch.tensor(parse_digits(args.digits)).repeat(args.num_images)
    steps = 4 if args.quick else STEPS[args.kind] if args.steps is None else args.steps
    rows, texts = [], []
    for folder in args.model or [WEIGHTS / "mnist" / args.kind]:
        unet = drawing.load(folder, args.kind, device)
        dataset = training.read(folder, args.kind)[0].get("dataset", "mnist")
        told = labels if unet.config.num_classes else None
        if told is None and len(args.guidance_scale) > 1:
            raise ValueError(f"{folder} is not told the digit, so there is nothing to guide; pass one --guidance-scale")
        for scale in args.guidance_scale:
            what = f"{folder.name}, scale {scale:g}"
            x = draw(unet, args.kind, labels, scale, args.seed, device, steps, args.solver, what)
            if args.tensors and not rows:
                kept = {"images": x, "seed": torch.tensor(args.seed)} | ({} if told is None else {"labels": told})
                weights.save(kept, args.tensors)
            if dataset == "mnist" and (args.judge or EMBEDDED_JUDGE.is_dir()):
                print("\n  ".join([f"{what}:", *judge.report(args.judge or EMBEDDED_JUDGE, x, told, args.seed)]))
            for i, row in enumerate(x[:SHOWN].split(10)):
                rows.append(row)
                texts.append("" if i else what)
    how = args.solver if args.solver == "dormand-prince" else f"{steps} steps"
    title = f"{args.kind}, {how}, seeds {args.seed} to {args.seed + len(labels) - 1}"
    drawing.save_strip(rows, texts, title, args.out, settings(args, "mnist.sample"))
    print(f"wrote {args.out}   ({clock})")


def draw(
    unet: UNet, kind: str, labels: Tensor, scale: float, seed: int, device: torch.device, steps: int, solver: str,
    what: str,
) -> Tensor:  # fmt: skip
    """A digit for each label, (B, 1, 28, 28), the i-th from seed + i, BATCH at a time."""
    parts, starts = [], range(0, len(labels), BATCH)
    with tqdm(total=steps * len(starts), desc=what, unit="step", disable=solver == "dormand-prince") as bar:
        for i in starts:
            part = labels[i : i + BATCH]
            seeds = seeded(seed + i, len(part))
            if kind == "ddpm":
                predict = drawing.prediction(unet, part, scale)
                parts.append(drawing.draw_ddpm(predict, seeds, device, steps, lambda *_: bar.update()))
            else:
                v = drawing.velocity(unet, part, scale)
                parts.append(drawing.draw_flow(v, seeds, device, steps, solver, lambda *_: bar.update()))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
