"""The flags that the trainers share: a preset, what is changed of it, and where pictures come from and networks go.

Without --out a run goes to out/mnist/KIND, followed by what is not the default: out/mnist/flow-class.

With --figures FOLDER nothing is trained: the trainer draws the pictures of its end with the network in FOLDER, one that
was stopped, or an embedded one.

Read `mnist/training.py` first. Next: `mnist/judge.py`, the smallest trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from minidiff import images
from minidiff.cli import file_path
from minidiff.mnist import networks
from minidiff.mnist.data import DATASETS, Digits, load
from minidiff.mnist.training import Plan
from minidiff.mnist.unet import UNet, UNetConfig

OF_TRAINING = ("preset", "epochs", "batch_size", "lr", "lr_decay", "dataset", "compile", "pure_noise", "four",
               "sample_epochs", "pairs")  # do nothing beside --figures  # fmt: skip


def parser(doc: str, kind: str, presets: Mapping[str, object]) -> argparse.ArgumentParser:
    """The flags that every trainer of this kind of network has; the first preset is the default."""
    first, width = next(iter(presets)), max(map(len, presets))
    p = argparse.ArgumentParser(
        description=doc,
        epilog="\n".join(["presets:", *(f"  {name:{width}}  {preset}" for name, preset in presets.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--preset", choices=list(presets), default=first, help="see below (default %(default)s)")
    for f in fields(Plan):
        more = "; the factor by which the rate falls in the whole run" if f.name == "lr_decay" else ""
        p.add_argument(f"--{f.name.replace('_', '-')}", type={"int": int, "float": float}[f.type],
                       help=f"instead of the preset's{more}")  # fmt: skip
    p.add_argument("--data", type=file_path, default=Path("data"),
                   help="where the pictures are, or go, if any are needed (default data)")  # fmt: skip
    p.add_argument("--dataset", choices=list(DATASETS), default="mnist", help="default %(default)s")
    p.add_argument(
        "--out",
        type=file_path,
        help=f"folder of the run (default out/mnist/{kind}, and -PRESET, -DATASET and the like, if not the default)",
    )
    p.add_argument("--seed", type=int, default=0, help="default %(default)s")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network: a minute at the start; on some machines faster from then on",
    )
    if kind != "judge":  # which draws nothing
        p.add_argument("--figures", type=file_path, metavar="FOLDER", help="train nothing; draw the pictures of the "
                       "end with the network in FOLDER, into --out")  # fmt: skip
    tiny = "" if kind == "judge" else "a tiny network, "
    p.add_argument("--quick", action="store_true", help=f"{tiny}few pictures and steps: a smoke test")
    return p


def parsed(
    p: argparse.ArgumentParser, kind: str, presets: Mapping[str, object], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The flags; with --figures, preset, data set, --pure-noise and teacher are those of the network in its folder.

    Without --out the folder is named after preset, data set, and which of --pure-noise, --figures and --quick there
    are: out/mnist/flow-class-quick.
    Raises ValueError if flags of training stand beside --figures, as `networks.read`, or if --out cannot be written.
    """
    args = p.parse_args(argv)
    figures = getattr(args, "figures", None)
    if figures is not None:
        fixed = ("seed",) if kind == "denoiser" else ()  # its pictures always have the same noise
        idle = [name for name in OF_TRAINING + fixed if getattr(args, name, None) not in (None, p.get_default(name))]
        if idle:
            flags = ", ".join("--" + name.replace("_", "-") for name in idle)
            raise ValueError(f"--figures trains nothing, and draws what {figures} was trained on; leave out {flags}")
        config = networks.read(figures, kind)[0]
        args.preset = config["preset"] if config.get("preset") in presets else args.preset
        args.dataset = config.get("dataset", args.dataset)
        if kind == "denoiser":
            args.pure_noise = "sigma" in config and config["sigma"] is None
        if kind == "flow":
            args.teacher = args.teacher or (Path(config["teacher"]) if "teacher" in config else None)
    if args.out is None:
        others = [v for name in ("preset", "dataset") if (v := getattr(args, name)) != p.get_default(name)]
        others += [name.replace("_", "-") for name in ("pure_noise", "figures", "quick") if getattr(args, name, None)]
        args.out = Path("out", "mnist", "-".join([kind, *others]))
    if figures is not None:
        images.check_output(args.out / "figure.png")
    return args


def chosen(args: argparse.Namespace, plan: Plan) -> Plan:
    """The preset's plan with what the flags change; one epoch of small batches at a high rate if --quick.

    Raises ValueError as `Plan`, if the seed is not of 63 bits, or an epoch of --sample-epochs is not in the plan.
    """
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2^63 - 1, got {args.seed}")
    if args.quick:
        plan = Plan(epochs=1, batch_size=16, lr=1e-2)
    given = {f.name: getattr(args, f.name) for f in fields(Plan) if getattr(args, f.name) is not None}
    plan = replace(plan, **given)
    if not all(1 <= epoch <= plan.epochs for epoch in getattr(args, "sample_epochs", None) or []):
        raise ValueError(
            f"--sample-epochs must lie in 1..{plan.epochs}, the epochs there are, got {args.sample_epochs}"
        )
    return plan


def named(args: argparse.Namespace, kind: str, pictures: int) -> str:
    """What a run trains, in words: what kind of network, its preset, and on how many pictures of what."""
    unseen = ", from noise alone" if getattr(args, "pure_noise", False) else ""
    return f"{kind} {args.preset}{unseen}, {pictures} pictures of {args.dataset}"


def pictures(args: argparse.Namespace, device: torch.device) -> tuple[Digits, Digits]:
    """The training and the test pictures on the device; a few of each if --quick. Raises ValueError as `data.load`."""
    train, test = (load(args.data, args.dataset, part).to(device) for part in (True, False))
    return (train[:400], test[:400]) if args.quick else (train, test)


def new_network(args: argparse.Namespace, config: UNetConfig, device: torch.device) -> UNet:
    """A network to train, from the seed; tiny if --quick."""
    torch.manual_seed(args.seed)
    return UNet(replace(config, hidden=4) if args.quick else config).to(device)
