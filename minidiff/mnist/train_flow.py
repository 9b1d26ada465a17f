"""Flow matching on digits: no schedule, no random steps, one straight line per training example.

    python -m minidiff.mnist.train_flow                              without the digit
    python -m minidiff.mnist.train_flow --preset class               with the digit as a second input
    python -m minidiff.mnist.train_flow --preset reflow --teacher out/mnist/flow-class

    x_t = (1 - t) x_0 + t x_1          L = mean |network(x_t, t) - (x_1 - x_0)|^2          x_0 noise, x_1 a digit

Presets: `time` and `class` are the course's. Their learning rate falls, because Adam's steps are about as long as it
is: at a constant 0.01 the weights would go on jumping about the place they have found. `no-scheduler` is `class`
without that: half the rate from the start, and half as many epochs again to make up for it. `better` is the course's
larger network, 50 epochs, without the digit, at 0.01 in place of the course's 0.05, with which a small network learns
worse (walkthrough, chapter 16). `small` is for a machine without fast half precision. All draw from the same noise,
so that `sample --model` can lay any two side by side.

`reflow` trains a copy of --teacher again, on lines between noises and the digits that the teacher makes of them. Those
lines hardly cross, so the paths become straighter, and one or two steps suffice: reflow.png shows 1, 2, 4 and 50
before and after, and both straightnesses are printed.

Figures in the folder: samples/ and training/loss.png; at the end solvers.png (Euler, midpoint, Heun and
Dormand-Prince, with the evaluations of each), sampling.gif and, with the digit, guidance.png.
`--figures weights/mnist/flow` draws the figures of the end with a trained network.

Read `flow.py` and `mnist/train_diffusion.py` first. Next: `mnist/sample.py`.    Source: FM Eq. 22, FM Eq. 23.
"""

import argparse
import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, flow, training
from minidiff.cli import command, cost, file_path, settings
from minidiff.flow import Velocity
from minidiff.mnist import data, levels, models, trainer
from minidiff.mnist.data import CLASSES, Digits, generator
from minidiff.mnist.models import DROPOUT, FLOW_STEPS, at_once, dropped, guided_unet, save_strip, velocity
from minidiff.mnist.trainer import Plan, Preset, say
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
from minidiff.weights import WEIGHTS

PAIRS = 20000  # how many lines reflow learns
IN_FILE = 500  # pairs
COURSE, EPOCHS = Plan(epochs=10, batch_size=64, lr=1e-2, lr_decay=0.1), (1, 5, 10, 15, 20, 30, 40, 50)
CLASS = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True, modulate="mul"), EPOCHS),
    "class": Preset(COURSE, CLASS, EPOCHS),
    "no-scheduler": Preset(Plan(epochs=15, batch_size=64, lr=5e-3), CLASS, EPOCHS),
    "better": Preset(replace(COURSE, epochs=50), UNetConfig(128, time=True, modulate="mul"), EPOCHS),
    "small": Preset(Plan(epochs=8, batch_size=128, lr=2e-3, lr_decay=0.01), replace(CLASS, hidden=32), (1, 4)),
    "reflow": Preset(Plan(epochs=10, batch_size=64, lr=1e-3, lr_decay=0.01), None, EPOCHS),
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
    parts = zip(labels.split(n := at_once(x_0.device)), x_0.split(n))
    ends = [flow.solve(velocity(guided_unet(teacher, c)), noise, flow.grid(steps)) for c, noise in parts]
    return Digits(torch.cat([torch.cat(ends), x_0], dim=1), labels)


def kept_pairs(folder: Path, teacher: UNet, count: int, seed: int, steps: int) -> Digits:
    """`make_pairs` of new noises, written down IN_FILE at a time, so that a run that was stopped goes on with the rest.

    Several processes share the work. Raises ValueError if pairs in the folder are damaged, of another teacher or other
    settings.
    """
    device, parts = next(teacher.parameters()).device, []
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()
    made_from = {"teacher": digest, "count": str(count), "seed": str(seed), "steps": str(steps)}
    x_0 = torch.randn(count, 1, 28, 28, generator=generator(device, seed, data.NOISES), device=device)
    labels = torch.arange(count, device=device) % CLASSES
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"pairs-{i:06d}.safetensors", slice(i, i + IN_FILE)) for i in range(0, count, IN_FILE)]
    for path, part in tqdm(files[training.rank() :: training.world()], f"{count} digits of the teacher", unit="part"):
        if not path.is_file():
            made = make_pairs(teacher, labels[part], x_0[part], steps)
            checkpoint.save({"images": made.images, "labels": made.labels}, path, made_from)
    training.barrier()
    for path, _ in files:
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


def few_steps(fields: dict[str, Velocity], x_0: Tensor, many: int) -> tuple[list[Tensor], list[str]]:
    """1, 2, 4 and many Euler steps of each model from the same noises, a row each."""
    runs = [(name, n) for name in fields for n in (1, 2, 4, many)]
    return [flow.solve(fields[name], x_0, flow.grid(n)) for name, n in runs], [f"{name}, {n}" for name, n in runs]


def save_comparisons(
    networks: dict[str, UNet], labels: Tensor | None, x_0: Tensor, guidance_scale: float | None, steps: int, out: Path,
    about: dict,
) -> None:  # fmt: skip
    """solvers.png of the last of the networks; reflow.png if there are two; the straightness of each is printed.

    labels, x_0: (B,) and (B, 1, 28, 28); the first ten are drawn, the straightness is that of all, without guidance.
    """
    model = list(networks.values())[-1]
    ten, first = None if labels is None else labels[:CLASSES], x_0[:CLASSES]
    strong = velocity(guided_unet(model, ten, guidance_scale))
    save_strip(*by_solver(strong, first, steps), "Solvers and their evaluations", out / "solvers.png", about)
    if len(networks) > 1:
        plain = {name: velocity(guided_unet(unet, ten)) for name, unet in networks.items()}
        title = "Euler steps before and after reflow"
        save_strip(*few_steps(plain, first, steps), title, out / "reflow.png", about)
    fields = {name: velocity(guided_unet(unet, labels)) for name, unet in networks.items()}
    straight = {name: flow.straightness(v, x_0, steps).mean().item() for name, v in fields.items()}
    say("straightness (0 is straight): " + ", ".join(f"{name} {value:.4f}" for name, value in straight.items()))


def pairs_of(args: argparse.Namespace, teacher: UNet, plan: Plan, config: dict, steps: int) -> tuple[Digits, Digits]:
    """The lines that reflow learns: `kept_pairs` for training, and a tenth for the test.

    Raises ValueError as `trainer.check` (before the pairs are drawn, which takes long) and `kept_pairs`, and if the
    pairs would not fill a batch.
    """
    pairs = args.pairs if args.pairs is not None else 40 if args.quick else PAIRS
    tenth = pairs // 10
    if not tenth or pairs - tenth < plan.batch_size:
        raise ValueError(f"--pairs {pairs} is too few: a tenth is kept for the test, the rest must fill a batch "
                         f"of {plan.batch_size}")  # fmt: skip
    trainer.check(args, plan, config, pairs - tenth)
    joined = kept_pairs(args.out / "training", teacher, pairs, args.seed, steps)
    return joined[tenth:], joined[:tenth]


def teacher_of(args: argparse.Namespace, device: torch.device) -> UNet | None:
    """The teacher of reflow, by default the embedded flow model. Sets args.teacher, and args.dataset to the teacher's.

    Raises ValueError if there is none, as `models.load`, if another data set was named, and on flags of reflow without
    it.
    """
    if args.preset != "reflow":
        if args.teacher is not None or args.pairs is not None:
            raise ValueError("--teacher and --pairs are for --preset reflow")
        return None
    args.teacher = args.teacher or WEIGHTS / "mnist" / "flow"
    if not args.teacher.is_dir():
        raise ValueError(f"there is no folder {args.teacher}, the teacher of reflow; pass the right one as --teacher")
    teacher, config = models.load(args.teacher, "flow", device)
    drawn = config.get("dataset", "mnist")
    if args.dataset not in (drawn, "mnist"):
        raise ValueError(f"--teacher {args.teacher} draws {drawn}, which is what reflow learns; leave out --dataset")
    args.dataset = drawn
    return teacher


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, draw on the way, and draw the figures of the end."""
    preset, teacher = PRESETS[args.preset], teacher_of(args, device)
    plan, learner = trainer.plan_of(args, preset.plan), None if args.figures else copy.deepcopy(teacher)
    model = learner or trainer.network(args, "flow", preset.unet, device)
    scale, (steps, count) = models.scale_of(args.guidance_scale, model), (3, 1) if args.quick else (FLOW_STEPS, 4)
    labels = torch.arange(CLASSES).repeat(count) if model.config.num_classes else None
    seeds, about = range(args.seed, args.seed + count * CLASSES), settings(args, "mnist.train_flow")

    def walk(scale: float | None, n: int = CLASSES) -> Iterator[Tensor]:
        answer = guided_unet(model, None if labels is None else labels[:n], scale)
        return models.walk(answer, seeded(seeds[:n]), device, steps, "euler")

    def draw(epoch: int) -> None:
        models.save_samples(models.last(walk(scale, count * CLASSES)), "Flow", scale, epoch, args.out, about)

    if not args.figures and not fit(args, model, teacher, plan, steps, draw, device):
        return
    models.save_animation(walk(scale), args.out / "sampling.gif")
    if labels is not None:
        models.save_guidance(lambda scale: models.last(walk(scale)), args.out, about)
    both = {"this model": model} if teacher is None else {"the teacher": teacher, "this model": model}
    x_0 = draw_noise((count * CLASSES, 1, 28, 28), seeded(seeds)).to(device)
    save_comparisons(both, labels, x_0, scale, steps, args.out, about)
    say(f"wrote {args.out}   ({cost()})")


def fit(
    args: argparse.Namespace, model: UNet, teacher: UNet | None, plan: Plan, steps: int, draw: Callable[[int], object],
    device: torch.device,
) -> bool:  # fmt: skip
    """`trainer.fit` with digits, or with the pairs of a teacher."""
    config = {"kind": "flow", "preset": args.preset, "dataset": args.dataset}
    if teacher is None:
        train, test = trainer.digits(args, device)
        dropout = DROPOUT if model.config.num_classes else 1.0
        reference = lambda: levels.of_task(levels.flow, train, dropout)  # noqa: E731
    else:
        config["teacher"] = str(args.teacher)
        train, test = pairs_of(args, teacher, plan, config, steps)
        value = trainer.loss_on(data.some(test, len(test)), teacher, matching, args.seed)
        reference = lambda: {"the teacher": value}  # noqa: E731
    sampled = args.sample_epochs or PRESETS[args.preset].sampled
    return trainer.fit(args, model, matching, train, test, plan, config, reference, sampled, draw)


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = trainer.parser(__doc__, "flow", PRESETS)
    trainer.add_sample_flags(p)
    p.add_argument("--teacher", type=file_path, help="of reflow (default: the embedded flow model)")
    p.add_argument("--pairs", type=int, help=f"how many lines reflow learns (default {PAIRS})")
    args = trainer.parsed(p, "flow", argv)
    with training.processes(args.device) as device:
        train(args, device)


if __name__ == "__main__":
    main()
