"""Digits from the trained networks, in as few lines as it takes.

    python -m minidiff.mnist.sample                                        ten digits from the embedded DDPM
    python -m minidiff.mnist.sample --kind flow                            from the embedded flow model
    python -m minidiff.mnist.sample --digits 3,7 --num-images 8 --guidance-scale 0 1 5 10
    python -m minidiff.mnist.sample --sampler ddpm ddim dpm++ --steps 10 20
    python -m minidiff.mnist.sample --sampler ddpm ddpm-lower ddpm-clip     less noise in a step; estimates in [0, 1]
    python -m minidiff.mnist.sample --sampler ddpm-lower ddpm-twice         from noise, and from a digit in it
    python -m minidiff.mnist.sample --kind flow --sampler euler midpoint heun --steps 5 10
    python -m minidiff.mnist.sample --model out/mnist/flow-class out/mnist/flow-reflow   two models, the same noise
    python -m minidiff.mnist.sample --out out/digits.gif                    the walk of the first row, as an animation
    python -m minidiff.mnist.sample --num-images 100 --tensors out/digits.safetensors  a file for `judge score`

Rows of ten for each model, guidance scale, sampler and number of steps, from the same noise in all of them: image i
comes from seed + i. A scale of 0 ignores the digit, 1 is no guidance. Samples are clamped to [0, 1] before they are
drawn, written and judged. The trainers of DDPM and flow draw their samples by this command.

Read `mnist/judge.py` first.
"""

import argparse
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import checkpoint, images
from minidiff.checks import number
from minidiff.cli import command, cost, device_of, file_path, finite, settings
from minidiff.mnist import judge, models
from minidiff.mnist.data import CLASSES
from minidiff.mnist.models import FLOW_STEPS, GUIDANCE_SCALE, SAMPLERS, T
from minidiff.mnist.unet import UNet
from minidiff.sampling import seeded
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


def count(text: str) -> int:
    """The type of --steps."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"takes whole numbers, such as 10 20, got {text!r}; names are for the cascade")
    return int(text)


class Row(NamedTuple):
    """How a row of the figure is drawn.  scale: of guidance, which a network without classes ignores."""

    unet: UNet
    config: dict
    scale: float
    sampler: str
    steps: int
    words: list[str]  # the network, its guidance, its sampler


def rows_of(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The rows that the flags ask for. Raises ValueError on what cannot be drawn, before anything is."""
    if args.model and args.kind:
        raise ValueError("--kind names an embedded network, --model another; leave out one of them")
    rows, folders = [], args.model or [WEIGHTS / "mnist" / (args.kind or "ddpm")]
    for folder in folders:
        unet, config = models.load(folder, device, *STEPS)
        name = folder.name if [other.name for other in folders].count(folder.name) == 1 else str(folder)
        scales = args.guidance_scale if unet.config.num_classes else args.guidance_scale[:1]
        samplers = args.sampler or SAMPLERS[config["kind"]][:1]
        counts = [4] if args.quick else args.steps or [STEPS[config["kind"]]]
        for steps in counts:
            number("--steps", steps, 1, T if config["kind"] == "ddpm" else math.inf, whole=True)
        for scale, sampler in itertools.product(scales, samplers):
            models.check_sampler(sampler, config["kind"])
            words = [name, f"scale {scale:g}" if unet.config.num_classes else "no class", f"by {sampler}"]
            if sampler == "dormand-prince":  # which chooses its own steps
                rows.append(Row(unet, config, scale, sampler, counts[0], words))
            else:
                rows += [Row(unet, config, scale, sampler, steps, [*words, f"{steps} steps"]) for steps in counts]
    return rows


def save_figure(
    args: argparse.Namespace, rows: Sequence[Row], labels: Tensor, seeds: range, device: torch.device, judged: bool
) -> None:
    """Draw a digit for each seed, of its label, by every row, print what the judge says of them, and write the figure.

    Words of all rows stand in the title, the others below a row. --tensors gets the first row.
    """
    judging, tens, texts = judge.load(args.judge) if judged else None, [], []
    common = [word for word in rows[0].words if all(word in row.words for row in rows)]
    for row in rows:
        calls: list[int] = []
        hook = row.unet.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = models.draw(lambda part, row=row: models.guided_unet(row.unet, labels[part], row.scale),
                        seeds, device, row.steps, row.sampler)  # fmt: skip
        hook.remove()
        dataset, classes = row.config["dataset"], {"labels": labels} if row.unet.config.num_classes else {}
        if judging is not None:  # raises if a sample is not finite
            report = judge.report(judging, x, classes.get("labels"), args.seed, dataset)
            print(f"{', '.join(row.words)}, trained {row.config['trained']}:", *report, sep="\n  ")
        if args.tensors and row is rows[0]:
            tensors = {"images": x, "seed": torch.tensor(args.seed)} | classes
            checkpoint.save(tensors, args.tensors, {"dataset": dataset})
        text = [word for word in row.words if word not in common]
        if row.sampler in SAMPLERS["flow"][1:]:  # the others have one in each step; ddpm-twice has five more
            text.append(f"{len(calls) // -(-len(seeds) // models.at_once(device))} evaluations")
        tens += (parts := x[:IN_FIGURE].split(CLASSES))
        texts += [""] * (len(parts) - 1) + [", ".join(text)]
    title = ", ".join([*common, f"seeds {seeds[0]} to {seeds[-1]}"])
    images.save(models.strip(tens, texts, title), args.out, settings(args, "mnist.sample"))


def run(argv: Sequence[str] | None = None, judged: bool = True) -> None:
    """The command, also for trainers.  judged: whether to print what the judge says."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=list(STEPS), help="of the embedded network (default ddpm)")
    p.add_argument("--model", type=file_path, nargs="+", help="folders of trained networks instead of the embedded one")
    p.add_argument("--digits", type=parse_digits, default="0-9", help="like 0-9, 3,7 or 0-2,9 (default %(default)s)")
    p.add_argument("--num-images", type=int, default=1, help="of each digit (default %(default)s)")
    p.add_argument("--guidance-scale", type=finite, nargs="+", default=[GUIDANCE_SCALE], help="default 5")
    p.add_argument("--steps", type=count, nargs="+", help="default: ddpm 300, flow 50")
    p.add_argument("--sampler", "--solver", choices=[*SAMPLERS["ddpm"], *SAMPLERS["flow"]], nargs="+",
                   help=f"default: {SAMPLERS['ddpm'][0]}, or euler of a flow")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digits.png"), help="image (default %(default)s)")
    p.add_argument("--tensors", type=file_path, help="also write the samples of the first row, for judge score")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="default: the embedded one")
    p.add_argument("--quick", action="store_true", help="4 steps: a smoke test")
    args = p.parse_args(argv)
    number("--num-images", args.num_images, 1, whole=True)
    images.check_output(args.out)
    is_gif, device = args.out.suffix.lower() == ".gif", device_of(args.device)
    if args.tensors:
        images.check_output(args.tensors, known=(".safetensors",))
        if args.tensors.with_name("config.json").is_file():
            raise ValueError(f"{args.tensors.parent} holds a network; pass --tensors in another folder")
        if is_gif:
            raise ValueError("a GIF shows a walk and writes no samples; pass --out digits.png to go with --tensors")
    rows, labels = rows_of(args, device), torch.tensor(args.digits).repeat(args.num_images)
    seeds = range(args.seed, args.seed + len(labels))
    if is_gif:
        answer = models.guided_unet(rows[0].unet, labels, rows[0].scale)
        states = models.walk(answer, seeded(seeds), device, rows[0].steps, rows[0].sampler)
        models.save_animation(states, args.out)
    else:
        save_figure(args, rows, labels, seeds, device, judged)
    tqdm.write(f"wrote {args.out}   ({cost()})")  # past the progress bar of a training


def of_trainer(args: argparse.Namespace, name: str, flags: str = "", others: Sequence[Path] = ()) -> None:
    """OUT/NAME of a trainer's figures: what this command draws with the network in OUT, or in that of --figures.

    others: folders of networks whose rows stand above.
    """
    folders = [str(folder) for folder in (*others, args.figures or args.out)]
    shared = ["--seed", str(args.seed), "--device", args.device, "--out", str(args.out / name), *flags.split()]
    run(["--model", *folders, *shared, *["--quick"] * args.quick], judged=False)


def of_epoch(args: argparse.Namespace, epoch: int) -> None:
    """Forty samples after an epoch of a training."""
    of_trainer(args, f"samples/epoch-{epoch:02d}.png", "--num-images 4")


@command
def main(argv: Sequence[str] | None = None) -> None:
    run(argv)


if __name__ == "__main__":
    main()
