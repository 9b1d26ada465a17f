"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --kind flow                            from the embedded flow model
    python -m minidiff.mnist.sample --digits 3,7 --num-images 8 --guidance-scale 0 1 5 10
    python -m minidiff.mnist.sample --sampler ddpm ddim dpm++ --steps 10 20
    python -m minidiff.mnist.sample --kind flow --sampler euler midpoint heun --steps 5 10
    python -m minidiff.mnist.sample --model out/mnist/flow-class out/mnist/flow-reflow   two models, the same noise
    python -m minidiff.mnist.sample --num-images 100 --tensors out/digits.safetensors  a file for `judge score`

One row for each model, guidance scale, sampler and number of steps, from the same noise in all of them: image i of a
row comes from seed + i, or, if --seed lists several, every digit from each of these. A scale of 0 ignores the digit, 1
is no guidance. Ctrl-C in a long row keeps the images that are drawn.

Read `mnist/train_diffusion.py` and `mnist/train_flow.py` first. Next: `mnist/anagram.py`, the last file.
"""

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
from minidiff.cli import command, cost, device_of, file_path, finite, settings, stopped_between_steps
from minidiff.mnist import judge, models
from minidiff.mnist.data import CLASSES
from minidiff.mnist.models import FLOW_STEPS, SAMPLERS, T
from minidiff.mnist.unet import UNet
from minidiff.sampling import seeded
from minidiff.schedule import respaced
from minidiff.weights import WEIGHTS

STEPS = {"ddpm": T, "flow": FLOW_STEPS}
IN_FIGURE = 100  # images of one row of the figure, at most


def parse_digits(text: str) -> list[int]:
    """ "0-9", "3,7" or "0-2,9" to digits. Raises ValueError on anything else."""
    digits: list[int] = []
    for part in text.split(","):
        first, _, end = part.partition("-")
        if not (first.isdecimal() and (end or first).isdecimal() and int(first) <= int(end or first) < CLASSES):
            raise ValueError(f"--digits must be like 0-9, 3,7 or 0-2,9, got {text!r}")
        digits += range(int(first), int(end or first) + 1)
    return digits


def kind_of(folder: Path) -> str:
    """The kind of a trained network, as its config says; "ddpm" if it does not, of which `models.load` complains."""
    try:
        kind = read_config(folder).get("kind")
    except (WeightsError, OSError):
        return "ddpm"
    return kind if kind in STEPS else "ddpm"


@dataclass(frozen=True)
class Row:
    """How a row of the figure is drawn.  scale: None if the network takes no class."""

    unet: UNet
    config: dict
    name: str
    scale: float | None
    sampler: str
    steps: int

    def words(self) -> tuple[str, str, str]:
        """The network, its guidance, and the sampler."""
        scale = "no class" if self.scale is None else f"scale {self.scale:g}"
        how = self.sampler if self.sampler == "dormand-prince" else f"{self.sampler}, {self.steps} steps"
        return self.name, scale, how.removeprefix("ddpm, ")

    def __str__(self) -> str:
        return ", ".join(self.words())

    def draw(self, labels: Tensor, seeds: Sequence[int], stopped: Callable[[], bool]) -> Tensor:
        """A digit for each label from its seed, (B, 1, 28, 28), n at a time; fewer if stopped()."""
        device, parts = next(self.unet.parameters()).device, []
        n = models.at_once(device)
        starts, silent = range(0, len(labels), n), self.sampler == "dormand-prince"
        with tqdm(total=self.steps * len(starts), desc=str(self), unit="step", disable=silent) as bar:
            for i in starts:
                if i and stopped():
                    break
                classes = None if self.scale is None else labels[i : i + n]
                answer = models.guided_unet(self.unet, classes, self.scale)
                states = models.walk(answer, seeded(seeds[i : i + n]), device, self.steps, self.sampler)
                parts.append(models.last(states, bar.update))
        return torch.cat(parts)


def planned(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows that the flags ask for. Raises ValueError on what cannot be drawn, before anything is."""
    kind = args.kind = args.kind or (kind_of(args.model[0]) if args.model else "ddpm")
    samplers = args.sampler or SAMPLERS[kind][:1]
    if wrong := [name for name in samplers if name not in SAMPLERS[kind]]:
        raise ValueError(f"--sampler {wrong[0]} is for another kind of network; of {kind}: {', '.join(SAMPLERS[kind])}")
    if list(samplers) == ["dormand-prince"] and args.steps:
        raise ValueError("dormand-prince chooses its own steps; leave out --steps")
    counts = [4] if args.quick else args.steps or [STEPS[kind]]
    for steps in counts:
        respaced(steps, T) if kind == "ddpm" else flow.grid(steps)  # raise on wrong ones
    rows, folders = [], args.model or [WEIGHTS / "mnist" / kind]
    for folder in folders:
        alike = [other for other in folders if other.name == folder.name]
        name = folder.name if folder.name and len(alike) == 1 else str(folder)
        unet, config = models.load(folder, kind, device)
        if args.digits and not unet.config.num_classes:
            warnings.warn(f"{folder} takes no digit: --digits only says how many", stacklevel=2)
        scales = [models.scale_of(scale, unet, folder) for scale in args.guidance_scale or [None]]
        for scale, sampler in itertools.product(scales, samplers):
            for steps in counts[:1] if sampler == "dormand-prince" else counts:
                rows.append(Row(unet, config, name, scale, sampler, steps))
    return rows


def described(row: Row, x: Tensor, labels: Tensor | None, seed: object, judging: judge.Loaded) -> str:
    """How a row x (B, 1, 28, 28) was drawn, and the judge's verdict.  labels: the classes they should be."""
    dataset, judges = row.config.get("dataset", "mnist"), judging[1].get("dataset", "mnist")
    if dataset == judges:
        verdict = judge.report(judging, x, labels, seed)
    else:
        verdict = [f"not judged: the judge knows {judges}, these are of {dataset}"]
    trained = f", trained {row.config['trained']}" if "trained" in row.config else ""
    return "\n  ".join([f"{row}{trained}:", *verdict])


def draw_rows(args: argparse.Namespace, rows: list[Row], labels: Tensor, seeds: Sequence[int], judging: judge.Loaded,
              long: bool) -> tuple[list[Tensor], list[str]]:  # fmt: skip
    """Draw and print every row, and write --tensors. Returns tens of images, and the label of each ten."""
    shared = set.intersection(*(set(row.words()) for row in rows))  # these stand in the title
    seed, tens, texts = args.seed[0] if len(args.seed) == 1 else args.seed, [], []
    with stopped_between_steps() if long else contextlib.nullcontext(lambda: False) as stopped:
        for row in rows:
            try:
                x = row.draw(labels, seeds, stopped)
            except ValueError as error:  # Dormand-Prince is stuck
                if row is rows[0] if args.tensors else row is rows[-1] and not tens:
                    raise  # nothing is left to be written
                warnings.warn(f"no row for {row}: {error}", stacklevel=2)
                continue
            classes = {} if row.scale is None else {"labels": labels[: len(x)]}
            if args.tensors and row is rows[0]:
                kept = {"images": x, "seed": torch.tensor(seed)} | classes
                checkpoint.save(kept, args.tensors, {"dataset": row.config.get("dataset", "mnist")})
            print(described(row, x, classes.get("labels"), seed, judging))
            tens += (parts := x[:IN_FIGURE].split(10))
            texts += [""] * (len(parts) - 1) + [", ".join(word for word in row.words() if word not in shared)]
            if stopped():
                print(f"stopped after {len(x)} of {len(labels)} of this row")
                break
    return tens, texts


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=list(STEPS), help="default: what --model holds, or ddpm")
    p.add_argument("--model", type=file_path, nargs="+", help="folders of trained networks (default: the embedded one)")
    p.add_argument("--digits", help="like 0-9, 3,7 or 0-2,9 (default 0-9)")
    p.add_argument("--num-images", type=int, default=1, help="of each digit (default %(default)s)")
    p.add_argument("--guidance-scale", type=finite, nargs="+", help="default 5")
    p.add_argument("--steps", type=int, nargs="+", help="default: ddpm 300, flow 50")
    p.add_argument("--sampler", "--solver", choices=[*SAMPLERS["ddpm"], *SAMPLERS["flow"]], nargs="+",
                   help="default: ddpm, or euler of a flow")  # fmt: skip
    p.add_argument("--seed", type=int, nargs="+", default=[0], help="image i uses seed + i; several: see above")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digits.png"), help="image (default %(default)s)")
    p.add_argument("--tensors", type=file_path, help="also write the samples of the first row, for judge score")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="default: the embedded one")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    if args.num_images < 1 or (args.num_images > 1 and len(args.seed) > 1):
        raise ValueError(f"--num-images must be at least 1, and 1 with several seeds, got {args.num_images}")
    images.check_output(args.out)
    if args.tensors:
        images.check_output(args.tensors, (".safetensors",))
    judging, device = judge.load(args.judge), device_of(args.device)
    digits = parse_digits(args.digits or "0-9")
    labels = torch.tensor(digits).repeat(args.num_images * len(args.seed))
    first = args.seed[0]
    seeds = range(first, first + len(labels)) if len(args.seed) == 1 else [s for s in args.seed for _ in digits]
    seeded(seeds)  # raises on wrong ones
    rows = planned(args, device)
    tens, texts = draw_rows(args, rows, labels, seeds, judging, len(labels) > models.at_once(device))
    common = [word for word in rows[0].words() if all(word in row.words() for row in rows)]
    from_seeds = f"seeds {first} to {first + len(labels) - 1}" if len(args.seed) == 1 else f"seeds {args.seed}"
    models.save_strip(tens, texts, ", ".join([*common, from_seeds]), args.out, settings(args, "mnist.sample"))
    print(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
