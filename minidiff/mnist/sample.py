"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --kind flow                            from the embedded flow model
    python -m minidiff.mnist.sample --digits 3,7 --num-images 8 --guidance-scale 0 1 5 10
    python -m minidiff.mnist.sample --sampler ddpm ddim dpm++ --steps 10 20
    python -m minidiff.mnist.sample --sampler ddpm ddpm-lower ddpm-clip     less noise in a step; estimates in [0, 1]
    python -m minidiff.mnist.sample --kind flow --sampler euler midpoint heun --steps 5 10
    python -m minidiff.mnist.sample --model out/mnist/flow-class out/mnist/flow-reflow   two models, the same noise
    python -m minidiff.mnist.sample --num-images 100 --tensors out/digits.safetensors  a file for `judge score`

One row for each model, guidance scale, sampler and number of steps, from the same noise in all of them: image i of a
row comes from seed + i. A scale of 0 ignores the digit, 1 is no guidance. Samples are clamped to [0, 1] before they
are drawn, written and judged.

Read `mnist/train_diffusion.py` and `mnist/train_flow.py` first. Next: `mnist/anagram.py`, the last file.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minidiff import checkpoint, images
from minidiff.cli import command, cost, device_of, file_path, finite, settings
from minidiff.mnist import judge, models
from minidiff.mnist.models import FLOW_STEPS, GUIDANCE_SCALE, SAMPLERS, T
from minidiff.mnist.unet import UNet
from minidiff.weights import WEIGHTS

STEPS = {"ddpm": T, "flow": FLOW_STEPS}
IN_FIGURE = 100  # images of one row of the figure, at most


def parse_digits(text: str) -> list[int]:
    """The type of --digits: "0-9", "3,7" or "0-2,9" to digits. Raises ArgumentTypeError on anything else."""
    if re.fullmatch(r"\d(-\d)?(,\d(-\d)?)*", text):
        ends = [part.split("-") for part in text.split(",")]
        if digits := [digit for end in ends for digit in range(int(end[0]), int(end[-1]) + 1)]:
            return digits
    raise argparse.ArgumentTypeError(f"digits must be like 0-9, 3,7 or 0-2,9, got {text!r}")


class Row(NamedTuple):
    """How a row of the figure is drawn.  scale: None if the network takes no class."""

    unet: UNet
    config: dict
    name: str
    scale: float | None
    sampler: str
    steps: int

    def words(self) -> list[str]:
        """The network, its guidance, and the sampler."""
        scale = "no class" if self.scale is None else f"scale {self.scale:g}"
        sampler = [] if self.sampler == "ddpm" else [self.sampler]
        return [self.name, scale, *sampler, *([] if self.sampler == "dormand-prince" else [f"{self.steps} steps"])]


def rows_of(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows that the flags ask for. Raises ValueError on what cannot be drawn, before anything is."""
    rows, folders = [], args.model or [WEIGHTS / "mnist" / args.kind]
    for folder in folders:
        unet, config = models.load(folder, device, *STEPS)
        kind, alike = config["kind"], [other for other in folders if other.name == folder.name]
        scales = (args.guidance_scale or [GUIDANCE_SCALE]) if unet.config.num_classes else [None]
        counts = [4] if args.quick else args.steps or [STEPS[kind]]
        for scale, sampler in itertools.product(scales, args.sampler or SAMPLERS[kind][:1]):
            if sampler not in SAMPLERS[kind]:
                raise ValueError(f"--sampler {sampler} is for another kind of network; of {kind}: "
                                 f"{', '.join(SAMPLERS[kind])}")  # fmt: skip
            for steps in counts[:1] if sampler == "dormand-prince" else counts:  # which chooses its own
                name = folder.name if len(alike) == 1 else str(folder)
                rows.append(Row(unet, config, name, scale, sampler, steps))
    return rows


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=list(STEPS), default="ddpm", help="of the embedded network (default %(default)s)")
    p.add_argument("--model", type=file_path, nargs="+", help="folders of trained networks instead of the embedded one")
    p.add_argument("--digits", type=parse_digits, default="0-9", help="like 0-9, 3,7 or 0-2,9 (default %(default)s)")
    p.add_argument("--num-images", type=int, default=1, help="of each digit (default %(default)s)")
    p.add_argument("--guidance-scale", type=finite, nargs="+", help="default 5")
    p.add_argument("--steps", type=int, nargs="+", help="default: ddpm 300, flow 50")
    p.add_argument("--sampler", "--solver", choices=[*SAMPLERS["ddpm"], *SAMPLERS["flow"]], nargs="+",
                   help="default: ddpm, or euler of a flow")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digits.png"), help="image (default %(default)s)")
    p.add_argument("--tensors", type=file_path, help="also write the samples of the first row, for judge score")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="default: the embedded one")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    images.check_output(args.out)
    judging, device = judge.load(args.judge), device_of(args.device)
    rows = rows_of(args, device)
    labels = torch.tensor(args.digits).repeat(args.num_images)
    seeds = range(args.seed, args.seed + len(labels))
    common = [word for word in rows[0].words() if all(word in row.words() for row in rows)]  # these go to the title
    tens, texts = [], []
    for row in rows:
        answer_of = lambda part, row=row: models.guided_unet(row.unet, labels[part], row.scale)  # noqa: E731
        x = models.draw(answer_of, seeds, device, row.steps, row.sampler)
        dataset, classes = row.config["dataset"], {} if row.scale is None else {"labels": labels}
        if args.tensors and row is rows[0]:
            tensors = {"images": x, "seed": torch.tensor(args.seed)} | classes
            checkpoint.save(tensors, args.tensors, {"dataset": dataset})
        print(f"{', '.join(row.words())}, trained {row.config['trained']}:",
              *judge.report(judging, x, classes.get("labels"), args.seed, dataset), sep="\n  ")  # fmt: skip
        tens += (parts := x[:IN_FIGURE].split(10))
        texts += [""] * (len(parts) - 1) + [", ".join(word for word in row.words() if word not in common)]
    title = ", ".join([*common, f"seeds {seeds[0]} to {seeds[-1]}"])
    models.save_strip(tens, texts, title, args.out, settings(args, "mnist.sample"))
    print(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
