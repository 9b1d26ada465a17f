"""Flow matching on digits: no schedule, no random steps, one straight line per training example.

    python -m minidiff.mnist.train_flow                              without the digit
    python -m minidiff.mnist.train_flow --preset class               with the digit as a second input
    python -m minidiff.mnist.train_flow --preset reflow --teacher out/mnist/flow-class

    x_t = (1 - t) x_0 + t x_1          L = mean |network(x_t, t) - (x_1 - x_0)|^2          x_0 noise, x_1 a digit

The presets `time` and `class` are the course's. Their learning rate falls, because a step of Adam is about as long as
the rate: at a constant 0.01 the weights never come to rest. `better` is the course's larger network at 0.01 in place of
its 0.05, with which a small network learns worse.

`reflow` trains a copy of --teacher again, on lines between noises and the digits that the teacher makes of them. Those
lines hardly cross, so the paths become straighter, and one or two steps suffice.

At the end come sampling.gif and solvers.png. A network that takes the digit also gets guidance.png. A reflow also gets
reflow.png: 1, 2, 4 and 50 steps, before and after. The straightness of the paths is printed.

Read `flow.py` and `mnist/train_diffusion.py` first.
Source: FM Eq. 22, FM Eq. 23.
"""

import argparse
import copy
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, flow, training
from minidiff.checks import number
from minidiff.cli import command, cost, file_path
from minidiff.mnist import data, levels, models, sample, trainer
from minidiff.mnist.data import CLASSES, Digits, generator
from minidiff.mnist.models import DROPOUT, FLOW_STEPS, dropped, guided_unet, velocity
from minidiff.mnist.trainer import Plan, Preset, say
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
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
    x_1, x_0 = batch.images[:, :1], batch.images[:, 1:]
    time = torch.rand(len(x_1), generator=generator, device=x_1.device)
    if not x_0.numel():
        x_0 = torch.randn(x_1.shape, generator=generator, device=x_1.device)
    c = dropped(model, batch.labels, generator)
    return flow.loss(x_0, x_1, model(flow.path(x_0, x_1, time), time, c).float()).mean()


def make_pairs(teacher: UNet, labels: Tensor, x_0: Tensor, steps: int) -> Digits:
    """Digits of the teacher in channel 0, the noises x_0 they came from in channel 1, and their classes.

        (x_0, x_1),    x_1 = x_0 + integral from 0 to 1 of velocity(x_t, t) dt, by the teacher

    labels: (B,).  x_0: (B, 1, 28, 28). Paths of one velocity field never meet at the same time. So the lines from start
    to end cross less often than lines between noises and digits chosen at random.
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


def pairs_of(args: argparse.Namespace, teacher: UNet, steps: int) -> tuple[Digits, Digits, dict[str, object]]:
    """What reflow trains on, a tenth of it for the test, and the config of its network."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in teacher.state_dict().values())
    sha256 = hashlib.sha256(weights).hexdigest()
    config = {"kind": "flow", "teacher": str(args.teacher), "teacher_sha256": sha256}
    count = (40 if args.quick else PAIRS) if args.pairs is None else args.pairs
    tenth = max(1, count // 10)
    trainer.check(args, config, count - tenth)  # before the pairs, which take long
    folder = args.out / "training" / f"pairs-{sha256[:12]}-{count}-{args.seed}-{steps}"
    pairs = kept_pairs(folder, teacher, count, args.seed, steps)
    return pairs[tenth:], pairs[:tenth], config


def fit(args: argparse.Namespace, model: UNet, teacher: UNet | None, steps: int, device: torch.device) -> bool:
    """`trainer.fit` with digits, or with the pairs of a teacher."""
    if teacher is None:
        (train, test), config = trainer.digits(args, device), {"kind": "flow"}
    else:
        train, test, config = pairs_of(args, teacher, steps)

    def reference() -> dict[str, float]:
        if teacher is not None:
            return {"the teacher": trainer.loss_on(data.some(test, len(test)), teacher, matching, args.seed)}
        return levels.of_task(levels.flow, train, DROPOUT if model.config.num_classes else 1.0)

    draw = functools.partial(sample.of_epoch, args)
    return trainer.fit(args, model, matching, train, test, config, reference, draw)


def save_figures(args: argparse.Namespace, model: UNet, teacher: UNet | None, steps: int, device: torch.device) -> None:
    """Draw the figures of the end, and print how straight the paths of model and teacher are, without guidance."""
    sample.of_trainer(args, "sampling.gif")
    if model.config.num_classes:
        sample.of_trainer(args, "guidance.png", "--guidance-scale 0 1 5 10")
    sample.of_trainer(args, "solvers.png", "--solver euler midpoint heun dormand-prince --steps 10 50")
    if teacher is not None:
        sample.of_trainer(args, "reflow.png", "--guidance-scale 1 --steps 1 2 4 50", [args.teacher])
    n = CLASSES if args.quick else 4 * CLASSES
    x_0 = draw_noise((n, 1, 28, 28), seeded(range(args.seed, args.seed + n))).to(device)
    labels = torch.arange(n) % CLASSES
    straight = {name: flow.straightness(velocity(guided_unet(unet, labels)), x_0, steps).mean()
                for name, unet in (("the teacher", teacher), ("this model", model)) if unet is not None}  # fmt: skip
    say("straightness (0 is straight): " + ", ".join(f"{name} {value:.4f}" for name, value in straight.items()))


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    trainer.add_flags(p, PRESETS)
    p.add_argument("--teacher", type=file_path, help="of reflow (default: the embedded flow model)")
    p.add_argument("--pairs", type=int, help=f"how many lines reflow learns (default {PAIRS})")
    args = p.parse_args(argv)
    config = trainer.complete(args, "flow", PRESETS)
    if args.preset != "reflow" and (args.pairs is not None or args.teacher is not None):
        raise ValueError("--pairs and --teacher go with --preset reflow")
    number("--pairs", 2 if args.pairs is None else args.pairs, 2, whole=True)
    steps, teacher = 3 if args.quick else FLOW_STEPS, None
    with training.processes(args.device) as device:
        if args.preset == "reflow":
            args.teacher = args.teacher or Path(config.get("teacher", WEIGHTS / "mnist" / "flow"))
            if not (args.teacher / "config.json").is_file():
                raise ValueError(f"no teacher in {args.teacher}; pass the folder of a flow network: --teacher FOLDER")
            teacher, config = models.load(args.teacher, device, "flow")
            args.dataset = config["dataset"]
        begins = teacher is not None and not (args.figures or args.start_from)
        model = copy.deepcopy(teacher) if begins else trainer.network(args, "flow", PRESETS, device)
        if args.figures or fit(args, model, teacher, steps, device):
            save_figures(args, model, teacher, steps, device)
            say(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
