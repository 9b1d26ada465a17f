"""Flow matching on digits: no schedule, no random steps, one straight line per training example.

    python -m minidiff.mnist.train_flow                              without the digit
    python -m minidiff.mnist.train_flow --preset class               with the digit as a second input
    python -m minidiff.mnist.train_flow --preset reflow --teacher out/mnist/flow-class

    x_t = (1 - t) x_0 + t x_1          L = mean |network(x_t, t) - (x_1 - x_0)|^2          x_0 noise, x_1 a digit

The presets `time` and `class` are the course's. Their learning rate falls, because a step of Adam is about as long as
the rate: at a constant 0.01 the weights never come to rest. `no-scheduler` is `class` at a constant 0.005, for 15
epochs in place of 10. `better` is the course's larger network, without the digit, at 0.01 in place of the course's
0.05, with which a small network learns worse. `small` is for a machine without fast half precision.

`reflow` trains a copy of --teacher again, on lines between noises and the digits that the teacher makes of them. Those
lines hardly cross, so the paths become straighter, and one or two steps suffice: reflow.png shows 1, 2, 4 and 50 steps
before and after.

At the end come solvers.png (Euler, midpoint, Heun and Dormand-Prince, with the evaluations of each), sampling.gif and,
with the digit, guidance.png; the straightness of the paths is printed.

Read `flow.py` and `mnist/train_diffusion.py` first. Next: `mnist/sample.py`.    Source: FM Eq. 22, FM Eq. 23.
"""

import argparse
import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, flow, training
from minidiff.cli import command, cost, file_path, settings
from minidiff.flow import Velocity
from minidiff.mnist import data, levels, models, trainer
from minidiff.mnist.data import CLASSES, Digits, generator
from minidiff.mnist.models import DROPOUT, FLOW_STEPS, GUIDANCE_SCALE, dropped, guided_unet, save_strip, velocity
from minidiff.mnist.trainer import Plan, Preset, say
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.weights import WEIGHTS

PAIRS = 20000  # how many lines reflow learns
IN_FILE = 500  # pairs
COURSE = Plan(epochs=10, batch_size=64, lr=1e-2, lr_decay=0.1)
CLASS = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True, modulate="mul")),
    "class": Preset(COURSE, CLASS),
    "no-scheduler": Preset(Plan(epochs=15, batch_size=64, lr=5e-3), CLASS),
    "better": Preset(replace(COURSE, epochs=50), UNetConfig(128, time=True, modulate="mul")),
    "small": Preset(Plan(epochs=8, batch_size=128, lr=2e-3, lr_decay=0.01), replace(CLASS, hidden=32)),
    "reflow": Preset(Plan(epochs=10, batch_size=64, lr=1e-3, lr_decay=0.01), None),
}


def matching(model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
    """The loss. Images of one channel are joined to new noise each time, those of two to the noise in the second."""
    x_1 = batch.images[:, :1]
    time = torch.rand(len(x_1), generator=generator, device=x_1.device)
    if batch.images.shape[1] == 2:
        x_0 = batch.images[:, 1:]
    else:
        x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device)
    c = dropped(model, batch.labels, generator)
    return flow.loss(x_0, x_1, model(flow.path(x_0, x_1, time), time, c).float()).mean()


def make_pairs(teacher: UNet, labels: Tensor, x_0: Tensor, steps: int) -> Digits:
    """Digits of the teacher in channel 0, the noises x_0 they came from in channel 1, and their classes.

        (x_0, x_1),    x_1 = x_0 + integral from 0 to 1 of velocity(x_t, t) dt, by the teacher

    labels: (B,).  x_0: (B, 1, 28, 28). Paths of one velocity field never cross, so neither, nearly, do the lines from
    start to end.
    Source: Rectified Flow Sec. 2.1 (reflow).
    """
    parts = zip(labels.split(n := models.at_once(x_0.device)), x_0.split(n))
    ends = [flow.solve(velocity(guided_unet(teacher, c)), noise, flow.grid(steps)) for c, noise in parts]
    return Digits(torch.cat([torch.cat(ends), x_0], dim=1), labels)


def kept_pairs(folder: Path, teacher: UNet, count: int, seed: int, steps: int) -> Digits:
    """`make_pairs` of new noises, IN_FILE to a file, so that a run that was stopped goes on with the rest.

    Several processes share the work.
    """
    device = next(teacher.parameters()).device
    x_0 = torch.randn(count, 1, 28, 28, generator=generator(device, seed, data.NOISES), device=device)
    labels = torch.arange(count, device=device) % CLASSES
    files = [(folder / f"{i:06d}.safetensors", slice(i, i + IN_FILE)) for i in range(0, count, IN_FILE)]
    for path, part in tqdm(files[training.rank() :: training.world()], f"{count} digits of the teacher", unit="part"):
        if not path.is_file():
            pairs = make_pairs(teacher, labels[part], x_0[part], steps)
            checkpoint.save({"images": pairs.images, "labels": pairs.labels}, path)
    training.barrier()
    parts = [load_file(path, str(device)) for path, _ in files]
    return Digits(*(torch.cat([part[key] for part in parts]) for key in ("images", "labels")))


def by_solver(v: Velocity, x_0: Tensor, steps: int) -> tuple[list[Tensor], list[str]]:
    """The same noises by every solver, a row each, named with its number of evaluations."""
    few = max(1, steps // 5)
    rows = [flow.solve(v, x_0, flow.grid(n)) for n in (few, steps)]
    rows += [flow.solve(v, x_0, flow.grid(few), name) for name in ("midpoint", "heun")]
    names = [f"Euler, {few}", f"Euler, {steps}", f"midpoint, {2 * few}", f"Heun, {2 * few}"]
    x, evaluations = flow.dormand_prince(v, x_0)
    return [*rows, x], [*names, f"Dormand-Prince, {evaluations}"]


def few_steps(fields: dict[str, Velocity], x_0: Tensor, many: int) -> tuple[list[Tensor], list[str]]:
    """1, 2, 4 and many Euler steps of each model from the same noises, a row each."""
    runs = [(name, n) for name in fields for n in (1, 2, 4, many)]
    return [flow.solve(fields[name], x_0, flow.grid(n)) for name, n in runs], [f"{name}, {n}" for name, n in runs]


def save_comparisons(samples: models.Samples, teacher: UNet | None) -> None:
    """solvers.png; reflow.png if there is a teacher; the straightness of both is printed.

    Ten noises are drawn from; the straightness is that of all samples, without guidance.
    """
    networks = {"this model": samples.unet} if teacher is None else {"the teacher": teacher, "this model": samples.unet}
    x_0, steps, labels = next(samples.walk(count=samples.count)), samples.steps, torch.arange(samples.count * CLASSES)
    labels, ten, first = labels % CLASSES, labels[:CLASSES], x_0[:CLASSES]
    rows = by_solver(velocity(guided_unet(samples.unet, ten, GUIDANCE_SCALE)), first, steps)
    save_strip(*rows, "Solvers and their evaluations", samples.out / "solvers.png", samples.about)
    if teacher is not None:
        rows = few_steps({name: velocity(guided_unet(unet, ten)) for name, unet in networks.items()}, first, steps)
        save_strip(*rows, "Euler steps before and after reflow", samples.out / "reflow.png", samples.about)
    fields = {name: velocity(guided_unet(unet, labels)) for name, unet in networks.items()}
    straight = {name: flow.straightness(v, x_0, steps).mean().item() for name, v in fields.items()}
    say("straightness (0 is straight): " + ", ".join(f"{name} {value:.4f}" for name, value in straight.items()))


def fit(
    args: argparse.Namespace, model: UNet, teacher: UNet | None, samples: models.Samples, device: torch.device
) -> bool:  # fmt: skip
    """`trainer.fit` with digits, or with the pairs of a teacher, a tenth of them for the test."""
    config = {"kind": "flow"}
    if teacher is None:
        train, test = trainer.digits(args, device)
        dropout = DROPOUT if model.config.num_classes else 1.0
        reference = lambda: levels.of_task(levels.flow, train, dropout)  # noqa: E731
    else:
        weights = b"".join(value.cpu().numpy().tobytes() for value in teacher.state_dict().values())
        config |= {"teacher": str(args.teacher), "teacher_sha256": hashlib.sha256(weights).hexdigest()}
        count = args.pairs or (40 if args.quick else PAIRS)
        tenth = max(1, count // 10)
        trainer.check(args, config, count - tenth)  # before the pairs, which take long
        folder = f"pairs-{config['teacher_sha256'][:12]}-{count}-{args.seed}-{samples.steps}"
        pairs = kept_pairs(args.out / "training" / folder, teacher, count, args.seed, samples.steps)
        train, test = pairs[tenth:], pairs[:tenth]
        reference = lambda: {"the teacher": trainer.loss_on(data.some(test, tenth), teacher, matching, args.seed)}  # noqa: E731
    return trainer.fit(args, model, matching, train, test, config, reference, samples.save)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, draw on the way, and draw the figures of the end."""
    teacher = None
    if args.preset == "reflow":
        teacher, config = models.load(args.teacher, device, "flow")
        args.dataset = config["dataset"]
    begins = teacher is not None and not args.figures
    model = copy.deepcopy(teacher) if begins else trainer.network(args, "flow", PRESETS, device)
    about, (steps, count) = settings(args, "mnist.train_flow"), (3, 1) if args.quick else (FLOW_STEPS, 4)
    samples = models.Samples(model, "euler", steps, count, args.seed, args.out, about)
    if args.figures or fit(args, model, teacher, samples, device):
        samples.save_ends()
        save_comparisons(samples, teacher)
        say(f"wrote {args.out}   ({cost()})")


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    trainer.add_flags(p, PRESETS)
    p.add_argument("--teacher", type=file_path, help="of reflow (default: the embedded flow model)")
    p.add_argument("--pairs", type=int, help=f"how many lines reflow learns (default {PAIRS})")
    args = p.parse_args(argv)
    config = trainer.complete(args, "flow", PRESETS)
    if args.preset == "reflow":
        args.teacher = args.teacher or Path(config.get("teacher", WEIGHTS / "mnist" / "flow"))
    with training.processes(args.device) as device:
        train(args, device)


if __name__ == "__main__":
    main()
