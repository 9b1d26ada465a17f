"""What the trainers of digits share: their flags, their plans, and the epochs of a run.

Without --out a run goes to out/mnist/KIND, followed by what is not the default: out/mnist/flow-class. There lie

    config.json, model.fp16.safetensors     the network, after every epoch and on Ctrl-C (of the judge only at the end)
    training/                               the state of the run and its curves (`training.py`)

The same command again goes on from there. With --figures FOLDER nothing is trained: the trainer draws the figures of
its end with the network in FOLDER, one that was stopped, or an embedded one.

Read `training.py` and `mnist/models.py` first. Next: `mnist/judge.py`, the smallest trainer.
"""

import argparse
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import images, training
from minidiff.cli import file_path, finite
from minidiff.mnist import data, models
from minidiff.mnist.data import DATASETS, Digits, generator
from minidiff.mnist.unet import UNet, UNetConfig

Loss = Callable[[nn.Module, Digits, torch.Generator], Tensor]
TEST_DIGITS = 2000  # on which the loss is measured after each epoch


@dataclass(frozen=True)
class Plan:
    """How long and how fast. lr_decay: the factor by which lr has fallen after all epochs; it falls once per epoch.

    The last digits of an epoch that would not fill a batch wait for another epoch: all batches are alike.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_decay: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError on numbers that no run can have."""
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.lr < math.inf or not 0 < self.lr_decay <= 1:
            raise ValueError(
                "need epochs and batch_size of at least 1, lr of at least 0, and lr_decay in (0, 1], got "
                f"{self.epochs}, {self.batch_size}, {self.lr:g}, {self.lr_decay:g}"
            )

    def lr_at(self, epoch: int) -> float:
        """lr * lr_decay^(epoch / epochs): with lr_decay 0.1 the course's ExponentialLR of gamma 0.1^(1 / epochs)."""
        return self.lr * self.lr_decay ** (epoch / self.epochs)

    def __str__(self) -> str:
        end = self.lr_at(self.epochs - 1)
        falling = f", falling to {end:.3g}" if end < self.lr else ""
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{epochs}, batches of {self.batch_size}, learning rate {self.lr:g}{falling}"


@dataclass(frozen=True)
class Preset:
    """unet: None for a copy of the teacher, and for the judge.  sampled: after these epochs, and the last, it draws."""

    plan: Plan
    unet: UNetConfig | None
    sampled: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.plan}; {self.unet.hidden} channels" if self.unet else str(self.plan)


# ---------------------------------------------------------------------------------------------- flags


def parser(doc: str, kind: str, presets: Mapping[str, Preset]) -> argparse.ArgumentParser:
    """The flags that every trainer of this kind of network has; the first preset is the default."""
    width = max(map(len, presets))
    epilog = "\n".join(["presets:", *(f"  {name:{width}}  {preset}" for name, preset in presets.items())])
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, epilog=epilog, formatter_class=form)
    p.add_argument("--preset", choices=list(presets), default=list(presets)[0], help="see below (default %(default)s)")
    for f in fields(Plan):
        more = "; the factor by which the rate falls in the whole run" if f.name == "lr_decay" else ""
        p.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, help=f"instead of the preset's{more}")
    p.add_argument("--ema", type=float, default=0.0, metavar="DECAY",
                   help="draw and write an average of the weights, 0.999 for example (default: none)")  # fmt: skip
    p.add_argument("--data", type=file_path, default=Path("data"), help="where the digits are, or go (default data)")
    p.add_argument("--dataset", choices=list(DATASETS), default="mnist", help="default %(default)s")
    p.add_argument("--out", type=file_path, help=f"default out/mnist/{kind}, and -PRESET, -DATASET if not the default")
    p.add_argument("--seed", type=int, default=0, help="default %(default)s")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--dtype", choices=training.DTYPES, default="auto", help="auto: bfloat16 where it is fast")
    if kind != "judge":  # which draws nothing
        more = "train nothing; draw the figures of the end with the network in FOLDER, into --out"
        p.add_argument("--figures", type=file_path, metavar="FOLDER", help=more)
    p.add_argument("--quick", action="store_true", help="a tiny network, few digits and steps: a smoke test")
    return p


def add_sample_flags(p: argparse.ArgumentParser) -> None:
    """The flags of trainers that draw samples on the way."""
    p.add_argument("--guidance-scale", type=finite, help=f"of samples (default {models.GUIDANCE_SCALE:g})")
    p.add_argument("--sample-epochs", type=int, nargs="+", metavar="N",
                   help="draw after these and the last, instead of the preset's")  # fmt: skip


def parsed(p: argparse.ArgumentParser, kind: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, with an --out; with --figures, preset, data set and the like are those of the network in its folder.

    Raises ValueError if a flag is out of range, as `models.read`, or if --out cannot be written.
    """
    args = p.parse_args(argv)
    if not (0 <= args.seed < 2**32 and 0 <= args.ema < 1):
        raise ValueError(f"--seed must lie in 0..2^32 - 1 and --ema in [0, 1), got {args.seed} and {args.ema:g}")
    figures = getattr(args, "figures", None)
    if figures is not None:
        config = models.read(figures, kind)[0]
        args.preset, args.dataset = config.get("preset", args.preset), config.get("dataset", args.dataset)
        if kind == "denoiser":
            args.pure_noise = config.get("sigma", 0) is None
        if kind == "flow" and args.teacher is None and "teacher" in config:
            args.teacher = Path(config["teacher"])
    if args.out is None:
        others = [v for name in ("preset", "dataset") if (v := getattr(args, name)) != p.get_default(name)]
        others += [name.replace("_", "-") for name in ("pure_noise", "figures", "quick") if getattr(args, name, None)]
        args.out = Path("out", "mnist", "-".join([kind, *others]))
    images.check_output(args.out / "figure.png")
    return args


def plan_of(args: argparse.Namespace, plan: Plan) -> Plan:
    """The preset's plan with what the flags change; one epoch of small batches at a high rate if --quick.

    Raises ValueError as `Plan`, or if an epoch of --sample-epochs is not in the plan.
    """
    if args.quick:
        plan = Plan(epochs=1, batch_size=16, lr=1e-2)
    changes = {f.name: value for f in fields(Plan) if (value := getattr(args, f.name)) is not None}
    plan = replace(plan, **changes)
    if not all(1 <= epoch <= plan.epochs for epoch in getattr(args, "sample_epochs", None) or []):
        raise ValueError(
            f"--sample-epochs must lie in 1..{plan.epochs}, the epochs there are, got {args.sample_epochs}"
        )
    return plan


def digits(args: argparse.Namespace, device: torch.device) -> tuple[Digits, Digits]:
    """The training and the test digits on the device; a few of each if --quick. Raises ValueError as `data.load`."""
    if training.rank():
        training.barrier()  # the first process may have to download them
    train, test = (data.load(args.data, args.dataset, part).to(device) for part in (True, False))
    if not training.rank():
        training.barrier()
    return (train[:400], test[:400]) if args.quick else (train, test)


def network(args: argparse.Namespace, kind: str, config: UNetConfig, device: torch.device) -> UNet:
    """That of --figures, or a new one from the seed; tiny if --quick."""
    if args.figures is not None:
        return models.load(args.figures, kind, device)[0]
    torch.manual_seed(args.seed)
    return UNet(replace(config, hidden=4) if args.quick else config).to(device)


# ---------------------------------------------------------------------------------------------- the run


def fit(
    args: argparse.Namespace, model: nn.Module, loss: Loss, train: Digits, test: Digits, plan: Plan,
    config: Mapping[str, object], levels: Callable[[], Mapping[str, float]] = dict, sampled: Collection[int] = (),
    draw: Callable[[int], object] = lambda epoch: None,
) -> bool:  # fmt: skip
    """Train, write the network into args.out after every epoch, and draw(epoch) after the sampled ones and the last.

    config: for the network; a run goes on only with the same.  levels() -> reference levels, which take a while.
    Returns whether this is the first process and the plan's end is reached; on Ctrl-C it is not.
    Raises ValueError as `check` and `training.run`, and FloatingPointError as `training.run`.
    """
    device, n, before = train.images.device, len(train) // plan.batch_size, check(args, plan, config, len(train))
    dtype = args.dtype if args.dtype != "auto" else before["dtype"] if before else training.fast_dtype(device)
    model.to(memory_format=torch.channels_last if dtype == "bfloat16" else torch.contiguous_format)  # the faster one
    reference, record = levels() if training.rank() == 0 else {}, None
    going_on = f"; going on from step {before['step']}" if before else ""
    say(f"{plan}; {n} batches in an epoch; {sum(p.numel() for p in model.parameters()):,} weights; {dtype}{going_on}")
    optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr, fused=device.type in ("cpu", "cuda"))
    for record in training.run(
        model, lambda net, batch: loss(net, *batch), batches(train, plan, args.seed), optimizer,
        training.Plan(plan.epochs * n, n, lambda step: plan.lr_at(step // n), ema_decay=args.ema),
        args.out / "training", settings(args, plan, config, len(train)), dtype=dtype, levels=reference,
        held_out=lambda: loss_on(data.some(test, TEST_DIGITS), model, loss, args.seed),
    ):  # fmt: skip
        say(record)
        if config["kind"] != "judge":
            trained = f"{record.step / n:.3g} of {plan.epochs} epochs"
            more = {"plan": asdict(plan), "seed": args.seed, "trained": trained, "unet": asdict(model.config)}
            models.write(args.out, model, dict(config) | more)
        if not record.stopped and (record.step // n in sampled or record.step == record.steps):
            draw(record.step // n)
    if record is None or record.stopped:
        return False
    say(f"loss on {len(test)} test digits: {loss_on(data.some(test, len(test)), model, loss, args.seed):.5f}"
        + "".join(f"; {name} {level:.4f}" for name, level in reference.items()))  # fmt: skip
    return True


def say(text: object) -> None:
    """Print, past the progress bar, in the first process only."""
    if training.rank() == 0:
        tqdm.write(str(text))


def settings(args: argparse.Namespace, plan: Plan, config: Mapping[str, object], count: int) -> dict[str, object]:
    """What must be the same when a run goes on. The teacher may lie elsewhere."""
    kept = {key: value for key, value in config.items() if key != "teacher"}
    return kept | {"images": count} | asdict(plan) | {"ema": args.ema, "seed": args.seed}


def check(args: argparse.Namespace, plan: Plan, config: Mapping[str, object], count: int) -> dict | None:
    """The state of the run in args.out, or None if it is new.

    Raises ValueError as `training.previous`, if a batch is larger than the `count` digits, or if a trained network
    would be replaced.
    """
    if plan.batch_size > count:
        raise ValueError(f"batch_size must lie in 1..{count}, the digits there are, got {plan.batch_size}")
    state = training.previous(args.out / "training", settings(args, plan, config, count))
    if state is None and (args.out / "config.json").is_file():
        raise ValueError(f"{args.out} holds a trained network, which this would replace; pass another --out")
    return state


def batches(train: Digits, plan: Plan, seed: int) -> Callable[[int], tuple[Digits, torch.Generator]]:
    """batch_at(step) -> this process's share of the batch, and the generator for its noise.

    The order of an epoch comes from (seed, epoch), the noise of a step from (seed, step).
    """
    n, device, rank, world = len(train) // plan.batch_size, train.images.device, training.rank(), training.world()

    @functools.lru_cache(1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(len(train), generator=generator(device, seed, data.ORDER, epoch), device=device)

    def batch_at(step: int) -> tuple[Digits, torch.Generator]:
        epoch, i = divmod(step, n)
        rows = order(epoch)[i * plan.batch_size : (i + 1) * plan.batch_size]
        return train[rows[rank::world]], generator(device, seed, data.STEP, step * world + rank)

    return batch_at


@torch.no_grad()
def loss_on(test: Digits, model: nn.Module, loss: Loss, seed: int) -> float:
    """The loss on these digits, with the same noise every time; for a model in eval mode."""
    random = generator(test.images.device, seed, data.TEST)
    parts = [test[i : i + 500] for i in range(0, len(test), 500)]
    return sum(loss(model, part, random).item() * len(part) for part in parts) / len(test)
