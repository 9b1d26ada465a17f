"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --kind flow                            from the embedded flow model
    python -m minidiff.mnist.sample --digits 3,7 --num-images 8 --guidance-scale 0 1 5 10
    python -m minidiff.mnist.sample --kind flow --solver euler midpoint heun --steps 5 10
    python -m minidiff.mnist.sample --model out/mnist/flow-class out/mnist/flow-reflow   two models, the same noise
    python -m minidiff.mnist.sample --num-images 100 --tensors out/digits.safetensors  a file for `judge score`

One row for each model, guidance scale, solver and number of steps; image i of a row comes from seed + i in all of
them. A scale of 0 ignores the digit asked for, 1 is no guidance. Ctrl-C in a long row keeps what is drawn.

Read `mnist/train_diffusion.py` and `mnist/train_flow.py` first. Next: `mnist/anagram.py`, the last file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import checkpoint, flow, images
from minidiff.checkpoint import WeightsError, read_config
from minidiff.cli import Clock, command, device_of, file_path, finite, settings, stopped_between_steps
from minidiff.mnist import drawing, judge
from minidiff.mnist.data import CLASSES
from minidiff.mnist.unet import UNet
from minidiff.sampling import seeded
from minidiff.schedule import respaced
from minidiff.weights import WEIGHTS

STEPS = {"ddpm": drawing.T, "flow": drawing.FLOW_STEPS}
SOLVERS = (*flow.METHODS, "dormand-prince")
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


def kind_of(folder: Path) -> str:
    """What a trained network is, as its config says; "ddpm" if it does not, which `drawing.load` will complain of."""
    try:
        kind = read_config(folder).get("kind")
    except (WeightsError, OSError):
        return "ddpm"
    return kind if kind in STEPS else "ddpm"


@dataclass(frozen=True)
class Row:
    """What a row of the figure is drawn with.  scale: None if the network is not told the digit."""

    unet: UNet
    config: dict
    name: str
    scale: float | None
    solver: str
    steps: int

    def words(self) -> tuple[str, str, str]:
        """The network, what it is told, and how it is followed."""
        told = "not told the digit" if self.scale is None else f"scale {self.scale:g}"
        how = {"ddpm": f"{self.steps} steps", "dormand-prince": self.solver}
        return self.name, told, how.get(self.solver, f"{self.solver}, {self.steps} steps")

    def __str__(self) -> str:
        return ", ".join(self.words())

    def draw(self, labels: Tensor, seed: int, device: torch.device, stopped: Callable[[], bool]) -> Tensor:
        """A digit for each label, (B, 1, 28, 28), the i-th from seed + i, n at a time; fewer if stopped()."""
        parts, n = [], drawing.at_once(device)
        starts = range(0, len(labels), n)
        silent = self.solver == "dormand-prince"
        with tqdm(total=self.steps * len(starts), desc=str(self), unit="step", disable=silent) as bar:
            for i in starts:
                if i and stopped():
                    break
                told = None if self.scale is None else labels[i : i + n]
                seeds = seeded(seed + i, len(labels[i : i + n]))
                if self.solver == "ddpm":
                    predict = drawing.prediction(self.unet, told, self.scale)
                    parts.append(drawing.draw_ddpm(predict, seeds, device, self.steps, lambda *_: bar.update()))
                else:
                    v = drawing.velocity(self.unet, told, self.scale)
                    parts.append(drawing.draw_flow(v, seeds, device, self.steps, self.solver, lambda *_: bar.update()))
        return torch.cat(parts)


def planned(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows that the flags ask for. Raises ValueError on what cannot be drawn, before anything is."""
    args.kind = args.kind or (kind_of(args.model[0]) if args.model else "ddpm")
    if args.kind == "ddpm" and args.solver:
        raise ValueError("--solver is for --kind flow; a DDPM is sampled by its own steps")
    solvers = ["ddpm"] if args.kind == "ddpm" else args.solver or ["euler"]
    if solvers == ["dormand-prince"] and args.steps:
        raise ValueError("dormand-prince chooses its own steps; leave out --steps")
    counts = [4] if args.quick else args.steps or [STEPS[args.kind]]
    for steps in counts:
        respaced(steps, drawing.T) if args.kind == "ddpm" else flow.grid(steps)  # raise on wrong ones
    rows, folders = [], args.model or [WEIGHTS / "mnist" / args.kind]
    for folder in folders:
        alike = [other for other in folders if other.name == folder.name]
        name = folder.name if folder.name and len(alike) == 1 else str(folder)
        unet, config = drawing.load(folder, args.kind, device), read_config(folder)
        scales = args.guidance_scale or [drawing.GUIDANCE_SCALE]
        if not unet.config.num_classes:
            if args.guidance_scale:
                raise ValueError(f"{folder} is not told the digit, so there is nothing to guide; "
                                 "leave out --guidance-scale")  # fmt: skip
            if args.digits:
                warnings.warn(f"{folder} is not told the digit: --digits only says how many", stacklevel=2)
            scales = [None]
        for scale, solver in itertools.product(scales, solvers):
            for steps in counts[:1] if solver == "dormand-prince" else counts:
                rows.append(Row(unet, config, name, scale, solver, steps))
    return rows


def described(row: Row, x: Tensor, labels: Tensor | None, seed: int, judging: judge.Loaded) -> str:
    """What is printed of a row x (B, 1, 28, 28): how it was drawn, and what the judge says.  labels: as asked for."""
    dataset, judges = row.config.get("dataset", "mnist"), judging[1].get("dataset", "mnist")
    if dataset == judges:
        verdict = judge.report(judging, x, labels, seed)
    else:
        verdict = [f"not judged: the judge knows {judges}, these are of {dataset}"]
    trained = f", trained {row.config['trained']}" if "trained" in row.config else ""
    return "\n  ".join([f"{row}{trained}:", *verdict])


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=list(STEPS), help="default: what --model holds, or ddpm")
    p.add_argument("--model", type=file_path, nargs="+", help="folders of trained networks (default: the embedded one)")
    p.add_argument("--digits", help="like 0-9, 3,7 or 0-2,9 (default 0-9)")
    p.add_argument("--num-images", type=int, default=1, help="of each digit (default %(default)s)")
    p.add_argument("--guidance-scale", type=finite, nargs="+", help="default 5")
    p.add_argument("--steps", type=int, nargs="+", help="default: ddpm 300, flow 50")
    p.add_argument("--solver", choices=SOLVERS, nargs="+", help="of flow (default euler)")
    p.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digits.png"), help="picture (default %(default)s)")
    p.add_argument("--tensors", type=file_path, help="also write the samples of the first row, for judge score")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="who judges them (default: the embedded)")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2^63 - 1, got {args.seed}")
    images.check_output(args.out)
    if args.tensors:
        images.check_output(args.tensors, (".safetensors",))
    judging = judge.load(args.judge)
    device, clock = device_of(args.device), Clock()
    labels = torch.tensor(parse_digits(args.digits or "0-9")).repeat(args.num_images)
    rows = planned(args, device)
    shared = set.intersection(*(set(row.words()) for row in rows))  # said in the title, not under every digit
    pictures, texts, most = [], [], 0
    long = len(labels) > drawing.at_once(device)
    with stopped_between_steps() if long else contextlib.nullcontext(lambda: False) as stopped:
        for row in rows:
            try:
                x = row.draw(labels, args.seed, device, stopped)
            except ValueError as error:  # Dormand-Prince is stuck
                if row is rows[0] if args.tensors else row is rows[-1] and not pictures:
                    raise  # nothing is left to be written
                warnings.warn(f"no row for {row}: {error}", stacklevel=2)
                continue
            most = max(most, len(x))
            asked = {} if row.scale is None else {"labels": labels[: len(x)]}
            if args.tensors and row is rows[0]:
                kept = {"images": x, "seed": torch.tensor(args.seed)} | asked
                checkpoint.save(kept, args.tensors, {"dataset": row.config.get("dataset", "mnist")})
            print(described(row, x, asked.get("labels"), args.seed, judging))
            pictures += (shown := x[:SHOWN].split(10))
            texts += [""] * (len(shown) - 1) + [", ".join(word for word in row.words() if word not in shared)]
            if stopped():
                print(f"stopped after {len(x)} of {len(labels)} of this row")
                break
    common = [word for word in rows[0].words() if word in shared]
    title = ", ".join([*common, f"seeds {args.seed} to {args.seed + most - 1}"])
    drawing.save_strip(pictures, texts, title, args.out, settings(args, "mnist.sample"))
    print(f"wrote {args.out}   ({clock})")


if __name__ == "__main__":
    main()
