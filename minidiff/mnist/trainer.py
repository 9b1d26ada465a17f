"""What the trainers of digits share: their flags, their plans, and the epochs of a run.

Without --out a run goes to out/mnist/KIND, followed by what is not the default: out/mnist/flow-class. There lie

    config.json, model.fp16.safetensors     the network, after every epoch and on Ctrl-C (of the judge only at the end)
    training/                               the state of the run and its curves (`training.py`)
    samples/                                after the first, every fifth and the last epoch
    epochs/05/                              with --keep-epochs 5 the network of that epoch, to draw with later

The same command again goes on from there. With --start-from FOLDER a new run begins with the network in FOLDER. With
--figures FOLDER nothing is trained: the trainer draws its last figures with the network in FOLDER, even one whose
training has not ended.

Read `training.py` and `mnist/models.py` first.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import images, training
from minidiff.checks import chosen
from minidiff.cli import file_path
from minidiff.mnist import data, models
from minidiff.mnist.data import DATASETS, Digits, generator
from minidiff.mnist.unet import UNet, UNetConfig

Loss = Callable[[nn.Module, Digits, torch.Generator], Tensor]
TEST_DIGITS = 2000  # on which the loss is measured after each epoch


@dataclass(frozen=True)
class Plan:
    """How long and how fast. lr_decay: the factor by which lr has fallen after all epochs; it falls once per epoch.

    The last digits of an epoch that would not fill a batch are left out: all batches have the same size.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_decay: float = 1.0

    def lr_at(self, epoch: int) -> float:
        """lr * lr_decay^(epoch / epochs): with lr_decay 0.1 the course's ExponentialLR of gamma 0.1^(1 / epochs)."""
        return self.lr * self.lr_decay ** (epoch / self.epochs)

    def __str__(self) -> str:
        falling = f", falling to {self.lr_at(self.epochs - 1):.3g}" if self.lr_decay < 1 else ""
        return f"epochs: {self.epochs}, batch size {self.batch_size}, learning rate {self.lr:g}{falling}"


class Preset(NamedTuple):
    """unet: None for a copy of the teacher, and for the judge."""

    plan: Plan
    unet: UNetConfig | None


Presets = dict[str, Preset]  # the first is the default
QUICK = Plan(epochs=1, batch_size=16, lr=1e-3)

# ---------------------------------------------------------------------------------------------- flags


def add_flags(p: argparse.ArgumentParser, presets: Presets) -> None:
    """The flags that every trainer has, and its presets below them."""
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.set_defaults(figures=None, start_from=None, keep_epochs=[])  # of the judge, which has none of them
    lines = [f"  {name:12}  {plan}" + (f"; {unet.hidden} channels" if unet else "") for name, (plan, unet) in
             presets.items()]  # fmt: skip
    p.epilog = "\n".join(["presets:", *lines])
    p.add_argument("--preset", choices=list(presets), help=f"below (default {next(iter(presets))})")
    for f in fields(Plan):
        more = ": the factor by which the rate falls in the whole run" if f.name == "lr_decay" else ""
        p.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f"instead of the preset's{more}")
    p.add_argument("--ema", type=float, default=0.0, metavar="DECAY",
                   help="draw and write an average of the weights, 0.999 for example (default: none)")  # fmt: skip
    p.add_argument("--data", type=file_path, default=Path("data"), help="where the digits are, or go (default data)")
    p.add_argument("--dataset", choices=list(DATASETS), help=f"default {next(iter(DATASETS))}")
    p.add_argument("--out", type=file_path, help="folder (default: out/mnist/, kind, what is not the default)")
    if next(iter(presets.values())).unet:
        more = "keep the network of these epochs as OUT/epochs/NN, for example 1 5 10"
        p.add_argument("--keep-epochs", type=int, nargs="+", metavar="N", help=more)
        given = p.add_mutually_exclusive_group()
        more = "train nothing; draw the figures of the end with the network in FOLDER, into --out"
        given.add_argument("--figures", type=file_path, metavar="FOLDER", help=more)
        more = "train the network in FOLDER on, by the plan of its preset; keep FOLDER until the run has ended"
        given.add_argument("--start-from", type=file_path, metavar="FOLDER", help=more)
    p.add_argument("--seed", type=int, default=0, help="default %(default)s")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--dtype", choices=training.DTYPES, default="auto", help="auto: bfloat16 where it is fast")
    p.add_argument("--quick", action="store_true", help="a tiny network, few digits and steps: a smoke test")


def complete(args: argparse.Namespace, kind: str, presets: Presets) -> dict:
    """Choose --out, and the plan: that of the preset where no flag changes it; of --quick, few and small steps.

    With --figures and --start-from, preset and data set are those of the network in the folder, and its config is
    returned.
    Raises ValueError as `models.read`, on flags that do not fit that network, on --keep-epochs beyond the run, on rates
    and seeds out of range, or if --out cannot be written.
    """
    folder = args.figures or args.start_from
    config = models.read(folder, kind)[0] if folder else {}
    for name, table in (("preset", presets), ("dataset", DATASETS)):
        asked, own = getattr(args, name), config.get(name)
        if own is not None and asked not in (None, own):
            raise ValueError(f"{folder} holds a network of {name} {own}, not {asked}; leave out --{name}")
        setattr(args, name, asked or own or next(iter(table)))
        chosen(name, getattr(args, name), table)
    if args.out is None:
        names = [v for v in (args.preset, args.dataset) if v not in (next(iter(presets)), "mnist")]
        flags = [name for name in ("pure_noise", "figures", "start_from", "quick") if getattr(args, name, None)]
        args.out = Path("out", "mnist", "-".join([kind, *names, *flags]).replace("_", "-"))
    images.check_output(args.out / "figure.png")
    changes = {f.name: value for f in fields(Plan) if (value := getattr(args, f.name)) is not None}
    args.plan = replace(QUICK if args.quick else presets[args.preset].plan, **changes)
    if not (0 <= args.plan.lr < math.inf and 0 < args.plan.lr_decay <= 1 and 0 <= args.ema < 1):
        raise ValueError("need a --lr of 0 or more, a --lr-decay above 0 and up to 1, and an --ema from 0 to below 1, "
                         f"got {args.plan.lr}, {args.plan.lr_decay} and {args.ema}")  # fmt: skip
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must lie in 0..2^32 - 1, got {args.seed}")
    if wrong := ", ".join(str(epoch) for epoch in args.keep_epochs if not 1 <= epoch <= args.plan.epochs):
        raise ValueError(f"--keep-epochs takes epochs from 1 to {args.plan.epochs}, the last one; got {wrong}")
    return config


def digits(args: argparse.Namespace, device: torch.device) -> tuple[Digits, Digits]:
    """The training and the test digits on the device; a few of each if --quick. Raises ValueError as `data.load`."""
    if training.rank():
        training.barrier()  # the first process may have to download them
    train, test = (data.load(args.data, args.dataset, part, device) for part in (True, False))
    if not training.rank():
        training.barrier()
    return (train[:400], test[:400]) if args.quick else (train, test)


def network(args: argparse.Namespace, kind: str, presets: Presets, device: torch.device) -> UNet:
    """That of --figures or --start-from, or a new one from the seed; tiny if --quick."""
    if folder := args.figures or args.start_from:
        return models.load(folder, device, kind)[0]
    torch.manual_seed(args.seed)
    config = presets[args.preset].unet
    return UNet(replace(config, hidden=4) if args.quick else config).to(device)


# ---------------------------------------------------------------------------------------------- the run


def fit(
    args: argparse.Namespace, model: nn.Module, loss: Loss, train: Digits, test: Digits, config: dict[str, object],
    levels: Callable[[], dict[str, float]] = dict, draw: Callable[[int], object] = lambda epoch: None,
) -> bool:  # fmt: skip
    """Train; `write` the network after every epoch; draw(epoch) after the first, every fifth and the last.

    config: for the network, its "kind" first; a run goes on only with the same.
    levels() -> reference levels, which take a while.
    Returns whether to draw the figures of the end: in the first process, with --figures or when all epochs are done.
    Raises ValueError as `check` and `training.run`, and FloatingPointError as `training.run`.
    """
    if args.figures:
        return training.rank() == 0
    plan, (settings, begin) = args.plan, check(args, config, len(train))
    device, n = train.images.device, len(train) // plan.batch_size
    dtype = training.fast_dtype(device) if args.dtype == "auto" else args.dtype
    model.to(memory_format=torch.channels_last if dtype == "bfloat16" else torch.contiguous_format)  # the faster one
    reference, record = levels() if training.rank() == 0 else {}, None
    what = "pairs of the teacher" if "teacher" in config else "test digits"
    say(f"{plan}; {n} batches in an epoch; {sum(p.numel() for p in model.parameters()):,} weights; {dtype}; held-out "
        f"images: {min(TEST_DIGITS, len(test))} {what}")  # fmt: skip
    if late := [e for e in args.keep_epochs if e * n < begin and not (kept(args, e) / "config.json").is_file()]:
        say(f"--keep-epochs comes too late for {', '.join(map(str, late))}: the run is past that")
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr, fused=device.type in ("cpu", "cuda"))
    for record in training.run(
        model, lambda net, batch: loss(net, *batch), batches(train, plan, args.seed), optimizer,
        training.Plan(plan.epochs * n, n, lambda step: plan.lr_at(step // n), ema_decay=args.ema),
        args.out / "training", settings, dtype=args.dtype, levels=reference,
        held_out=lambda: loss_on(data.some(test, TEST_DIGITS), model, loss, args.seed),
    ):  # fmt: skip
        say(record)
        if config["kind"] != "judge":
            write(args, model, config, record.step / n)
        if not record.stopped and ((epoch := record.step // n) in (1, plan.epochs) or epoch % 5 == 0):
            draw(epoch)
    if record is None or record.stopped:
        return False
    say(f"loss on {len(test)} {what}: {loss_on(data.some(test, len(test)), model, loss, args.seed):.5f}"
        + "".join(f"; {name} {level:.4f}" for name, level in reference.items()))  # fmt: skip
    return True


def write(args: argparse.Namespace, model: UNet, config: dict[str, object], epochs: float) -> None:
    """The network after so many epochs, into args.out; one of --keep-epochs also into a folder of its own."""
    about = {"preset": args.preset, "dataset": args.dataset, "plan": asdict(args.plan), "seed": args.seed}
    about |= {"start_from": str(args.start_from)} if args.start_from else {}
    about |= {"trained": f"{epochs:.3g} of {args.plan.epochs} epochs", "unet": asdict(model.config)}
    for folder in (args.out, *(kept(args, epoch) for epoch in args.keep_epochs if epoch == epochs)):
        models.write(folder, model, config | about)


def kept(args: argparse.Namespace, epoch: int) -> Path:
    """Where the network of an epoch of --keep-epochs lies."""
    return args.out / "epochs" / f"{epoch:02d}"


def say(text: object) -> None:
    """Print, past the progress bar, in the first process only."""
    if training.rank() == 0:
        tqdm.write(str(text))


def check(args: argparse.Namespace, config: dict[str, object], count: int) -> tuple[dict[str, object], int]:
    """What must be the same when the run goes on (the teacher may lie elsewhere), and the step from which it goes on.

    Raises ValueError if it is not the same, on batches that `count` digits do not fill, or if a trained network would
    be replaced.
    """
    if args.plan.epochs < 1 or not 1 <= args.plan.batch_size <= count:
        raise ValueError(f"need 1 epoch or more, and batches of 1 to {count} digits, got {args.plan.epochs} and "
                         f"{args.plan.batch_size}")  # fmt: skip
    settings = {"preset": args.preset, "dataset": args.dataset, **config, "images": count, **asdict(args.plan)}
    settings |= {"ema": args.ema, "seed": args.seed, "start_from": args.start_from and str(args.start_from)}
    settings.pop("teacher", None)
    before = training.previous(args.out / "training", settings)
    return settings, before["step"] if before else 0


def batches(train: Digits, plan: Plan, seed: int) -> Callable[[int], tuple[Digits, torch.Generator]]:
    """batch_at(step) -> this process's share of the batch, and the generator for its noise.

    The order of an epoch comes from (seed, epoch), the noise of a step from (seed, step).
    """
    n, device, rank, world = len(train) // plan.batch_size, train.images.device, training.rank(), training.world()

    @functools.lru_cache(1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(len(train), generator=generator(device, seed, data.ORDER, epoch), device=device)

    def batch_at(step: int) -> tuple[Digits, torch.Generator]:
        rows = order(step // n).split(plan.batch_size)[step % n]
        return train[rows[rank::world]], generator(device, seed, data.STEP, step * world + rank)

    return batch_at


@torch.no_grad()
def loss_on(test: Digits, model: nn.Module, loss: Loss, seed: int) -> float:
    """The loss on these digits, with the same noise every time; for a model in eval mode."""
    random = generator(test.images.device, seed, data.TEST)
    parts = [test[i : i + 500] for i in range(0, len(test), 500)]
    return sum(loss(model, part, random).item() * len(part) for part in parts) / len(test)
