"""Flow matching on digits: no schedule, no random steps, one straight line per training example.

    python -m minidiff.mnist.train_flow                              not told the digit
    python -m minidiff.mnist.train_flow --preset class               told the digit
    python -m minidiff.mnist.train_flow --preset reflow --teacher out/mnist/flow-class

    x_t = (1 - t) x_0 + t x_1          L = mean |network(x_t, t) - (x_1 - x_0)|^2          x_0 noise, x_1 a digit

Presets: `time` and `class` are the course's. Their learning rate falls, because Adam's steps are about as long as it
is: at a constant 0.01 the weights would go on jumping about the place they have found. `no-scheduler` is `class`
without that: half the rate from the start, and half as many epochs again to make up for it. `better` is the course's
larger network, 50 epochs, not told the digit, at 0.01 in place of the course's 0.05, with which a small network learns
worse (walkthrough.md, chapter 12). `small` is for a machine without fast half precision. All draw from the same noise,
so that `sample --model` can lay any two side by side.

`reflow` trains a copy of --teacher again, on lines between noises and the digits that the teacher makes of them. Those
lines hardly cross, so the paths become straighter, and one or two steps suffice: reflow.png shows 1, 2, 4 and 50
before and after, and both straightnesses are printed.

Pictures in the folder: samples/ and training/loss.png; at the end solvers.png (Euler, midpoint, Heun and
Dormand-Prince, with what each cost), sampling.gif and, where the digit is told, guidance.png. Those of the end can be
had of any trained network: `--figures weights/mnist/flow`.

Read `flow.py` and `mnist/train_diffusion.py` first. Next: `mnist/sample.py`.    Source: FM Eq. 22, FM Eq. 23.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, flow
from minidiff.checkpoint import read_config
from minidiff.cli import Clock, command, device_of, file_path, finite, settings
from minidiff.flow import Velocity
from minidiff.mnist import flags, floors, training
from minidiff.mnist.data import CLASSES, Digits, generator
from minidiff.mnist.drawing import (
    DROPOUT,
    FLOW_STEPS,
    GUIDANCE_SCALE,
    asked_scale,
    at_once,
    dropped,
    load,
    save_animation,
    save_guidance,
    save_samples,
    save_strip,
    velocity,
)
from minidiff.mnist.training import Plan, Run, some
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
from minidiff.weights import WEIGHTS

PAIRS = 20000  # how many lines reflow learns
IN_FILE = 500  # pairs
NOISES = 10  # purpose of a generator, beside those of training.py


@dataclass(frozen=True)
class Preset:
    """unet: what is trained; None for a copy of the teacher.  sampled: after these epochs, and the last, it draws."""

    plan: Plan
    unet: UNetConfig | None
    sampled: tuple[int, ...] = (1, 5, 10, 15, 20, 30, 40, 50)

    def __str__(self) -> str:
        return f"{self.plan}; " + (f"{self.unet.hidden} channels" if self.unet else "the teacher's network")


COURSE = Plan(epochs=10, batch_size=64, lr=1e-2, lr_decay=0.1)
TOLD = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True, modulate="mul")),
    "class": Preset(COURSE, TOLD),
    "no-scheduler": Preset(Plan(epochs=15, batch_size=64, lr=5e-3), TOLD),
    "better": Preset(replace(COURSE, epochs=50), UNetConfig(128, time=True, modulate="mul")),
    "small": Preset(Plan(epochs=8, batch_size=128, lr=2e-3, lr_decay=0.01), replace(TOLD, hidden=32), (1, 4)),
    "reflow": Preset(Plan(epochs=10, batch_size=64, lr=1e-3, lr_decay=0.01), None),
}


class FlowMatching:
    """The loss. Pictures of one channel are joined to new noise each time, those of two to the noise in the second."""

    def __call__(self, model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
        x_1 = batch.images[:, :1]
        time = torch.rand(len(x_1), generator=generator, device=x_1.device)
        if batch.images.shape[1] == 2:
            x_0 = batch.images[:, 1:]
        else:
            x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device)
        c = dropped(batch.labels, generator) if model.config.num_classes else None
        return flow.loss(x_0, x_1, model(flow.path(x_0, x_1, time), time, c).float()).mean()


def make_pairs(teacher: UNet, labels: Tensor, x_0: Tensor, steps: int) -> Digits:
    """Digits of the teacher in channel 0, the noises x_0 they came from in channel 1, and the class they were told.

    labels: (B,).  x_0: (B, 1, 28, 28). Paths of one velocity field never cross, so neither, nearly, do the lines from
    start to end.
    Source: Rectified Flow Sec. 2.1 (reflow).
    """
    parts = zip(labels.split(n := at_once(x_0.device)), x_0.split(n))
    x_1 = torch.cat([flow.solve(velocity(teacher, told), noise, flow.grid(steps)) for told, noise in parts])
    return Digits(torch.cat([x_1, x_0], dim=1), labels)


def kept_pairs(folder: Path, teacher: UNet, count: int, seed: int, steps: int) -> Digits:
    """`make_pairs` of new noises, written down IN_FILE at a time, so that a run that was stopped goes on with the rest.

    Raises ValueError if pairs in the folder are damaged, of another teacher or other settings, or it cannot be written.
    """
    device, parts = next(teacher.parameters()).device, []
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()
    made_from = {"teacher": digest, "count": str(count), "seed": str(seed), "steps": str(steps)}
    x_0 = torch.randn(count, 1, 28, 28, generator=generator(device, seed, NOISES), device=device)
    labels = torch.arange(count, device=device) % CLASSES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); pass another --out") from error
    for i in tqdm(range(0, count, IN_FILE), desc=f"{count} digits of the teacher", unit="part"):
        path, part = folder / f"pairs-{i:06d}.safetensors", slice(i, i + IN_FILE)
        if not path.is_file():
            made = make_pairs(teacher, labels[part], x_0[part], steps)
            checkpoint.save({"images": made.images, "labels": made.labels}, path, made_from)
        try:
            with safe_open(path, "pt", device=str(device)) as f:
                if f.metadata() != made_from:
                    raise ValueError(f"{path} holds pairs of another teacher or other settings; pass another --out")
                parts.append(Digits(f.get_tensor("images"), f.get_tensor("labels")))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it") from error
    return Digits(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def by_solver(v: Velocity, x_0: Tensor, steps: int) -> tuple[list[Tensor], list[str]]:
    """The same noises by every solver, a row each, named with its number of evaluations.

    Warns, and leaves the row out, if Dormand-Prince is stuck.
    """
    few = max(1, steps // 5)
    rows = [flow.solve(v, x_0, flow.grid(n)) for n in (few, steps)]
    rows += [flow.solve(v, x_0, flow.grid(few), name) for name in ("midpoint", "heun")]
    names = [f"Euler, {few}", f"Euler, {steps}", f"midpoint, {2 * few}", f"Heun, {2 * few}"]
    try:
        x, evaluations = flow.dormand_prince(v, x_0)
    except ValueError as error:  # a network that has hardly learned, or has exploded
        warnings.warn(f"no row for Dormand-Prince: {error}", stacklevel=2)
        return rows, names
    return [*rows, x], [*names, f"Dormand-Prince, {evaluations}"]


def few_steps(models: dict[str, Velocity], x_0: Tensor, many: int) -> tuple[list[Tensor], list[str]]:
    """1, 2, 4 and many Euler steps of each model from the same noises, a row each."""
    runs = [(name, n) for name in models for n in (1, 2, 4, many)]
    return [flow.solve(models[name], x_0, flow.grid(n)) for name, n in runs], [f"{name}, {n}" for name, n in runs]


def save_comparisons(
    models: dict[str, UNet], labels: Tensor | None, x_0: Tensor, guidance_scale: float | None, steps: int, out: Path,
    about: dict,
) -> None:  # fmt: skip
    """solvers.png of the last of the models; reflow.png if there are two; the straightness of each is printed.

    labels, x_0: (B,) and (B, 1, 28, 28); the first ten are drawn, the straightness is that of all, without guidance.
    """
    model = list(models.values())[-1]
    ten, first = None if labels is None else labels[:CLASSES], x_0[:CLASSES]
    strong = velocity(model, ten, guidance_scale)
    save_strip(*by_solver(strong, first, steps), "Solvers and their evaluations", out / "solvers.png", about)
    if len(models) > 1:
        plain = {name: velocity(unet, ten) for name, unet in models.items()}
        title = "Euler steps before and after reflow"
        save_strip(*few_steps(plain, first, steps), title, out / "reflow.png", about)
    straight = {name: flow.straightness(velocity(u, labels), x_0, steps).mean().item() for name, u in models.items()}
    print("straightness (0 is straight): " + ", ".join(f"{name} {value:.4f}" for name, value in straight.items()))


def lines(args: argparse.Namespace, teacher: UNet, plan: Plan, steps: int) -> tuple[Digits, Digits]:
    """What reflow learns: `kept_pairs` for training, and a tenth for the test.

    Raises ValueError as `training.checkpoint_of` (before the pairs are drawn, which takes long) and `kept_pairs`, and
    if the pairs would not fill a batch.
    """
    folder = args.out / "training"
    pairs = args.pairs if args.pairs is not None else 200 if args.quick else PAIRS
    tenth = pairs // 10
    if not tenth or pairs - tenth < plan.batch_size:
        raise ValueError(f"--pairs {pairs} is too few: a tenth is kept for the test, the rest must fill a batch "
                         f"of {plan.batch_size}")  # fmt: skip
    training.checkpoint_of(folder, flags.named(args, "flow", pairs - tenth), plan, args.seed)
    joined = kept_pairs(folder, teacher, pairs, args.seed, steps)
    return joined[tenth:], joined[:tenth]


def teacher_of(args: argparse.Namespace, device: torch.device) -> UNet | None:
    """The teacher of reflow, by default the embedded flow model. Sets args.teacher, and args.dataset to the teacher's.

    Raises ValueError if there is none, as `drawing.load`, if another data set was asked for, and on flags of reflow
    without it.
    """
    if args.preset != "reflow":
        if args.teacher is not None or args.pairs is not None:
            raise ValueError("--teacher and --pairs are for --preset reflow")
        return None
    args.teacher = args.teacher or WEIGHTS / "mnist" / "flow"
    if not args.teacher.is_dir():
        raise ValueError(f"there is no folder {args.teacher}, the teacher of reflow; pass the right one as --teacher")
    teacher, drawn = load(args.teacher, "flow", device), read_config(args.teacher).get("dataset", "mnist")
    if args.dataset not in (drawn, "mnist"):
        raise ValueError(f"--teacher {args.teacher} draws {drawn}, which is what reflow learns; leave out --dataset")
    args.dataset = drawn
    return teacher


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = flags.parser(__doc__, "flow", PRESETS)
    p.add_argument("--guidance-scale", type=finite, help=f"of samples (default {GUIDANCE_SCALE:g})")
    p.add_argument("--sample-epochs", type=int, nargs="+", metavar="N", help="draw after these and the last, "
                   "instead of the preset's")  # fmt: skip
    p.add_argument("--teacher", type=file_path, help="of reflow (default: the embedded flow model)")
    p.add_argument("--pairs", type=int, help=f"how many lines reflow learns (default {PAIRS})")
    args = flags.parsed(p, "flow", PRESETS, argv)
    preset, out, clock, device = PRESETS[args.preset], args.out, Clock(), device_of(args.device)
    plan, teacher = flags.chosen(args, preset.plan), teacher_of(args, device)
    trained = None if args.figures is None else load(args.figures, "flow", device)
    model = trained or copy.deepcopy(teacher) or flags.new_network(args, preset.unet, device)
    told = bool(model.config.num_classes)
    args.guidance_scale = asked_scale(args.guidance_scale, told)
    about = settings(args, "mnist.train_flow")
    steps, count = (3, 1) if args.quick else (FLOW_STEPS, 4)  # of the samples; count: of each class
    labels = torch.arange(CLASSES).repeat(count) if told else None
    x_0 = draw_noise((count * CLASSES, 1, 28, 28), seeded(args.seed, count * CLASSES)).to(device)

    def draw(guidance_scale: float | None, n: int = CLASSES, on_step: Callable | None = None) -> Tensor:
        v = velocity(model, labels[:n] if told else None, guidance_scale)
        return flow.solve(v, x_0[:n], flow.grid(steps), on_step=on_step)

    def after_epoch(epoch: int) -> None:
        if epoch in (args.sample_epochs or preset.sampled) or epoch == plan.epochs:
            save_samples(draw(args.guidance_scale, count * CLASSES), "Flow", args.guidance_scale, epoch, out, about)

    if args.figures is None:
        train, test = flags.pictures(args, device) if teacher is None else lines(args, teacher, plan, steps)

        def levels() -> dict[str, float]:
            if teacher is not None:
                return {"the teacher": training.loss_on(some(test, len(test)), teacher, FlowMatching(), args.seed)}
            return {"linear optimum": floors.linear_flow_loss(floors.spectrum(train.images)),
                    "memorisation": floors.memorised_flow_loss(train, DROPOUT if told else 1.0)}  # fmt: skip

        run = Run(model, FlowMatching(), train, test, plan, out / "training",
                  what=flags.named(args, "flow", len(train)), seed=args.seed, floors=levels,
                  compiled=args.compile)  # fmt: skip
        config = {"kind": "flow", "preset": args.preset, "dataset": args.dataset}
        if teacher is not None:
            config["teacher"] = str(args.teacher)
        if not run.complete(out, config, after_epoch):
            return
    save_animation(lambda note: draw(args.guidance_scale, on_step=note), steps, out / "sampling.gif")
    if told:
        save_guidance(draw, out, about)
    both = {"this model": model} if teacher is None else {"the teacher": teacher, "this model": model}
    save_comparisons(both, labels, x_0, args.guidance_scale, steps, out, about)
    print(f"wrote {out}   ({clock})")


if __name__ == "__main__":
    main()
