"""Flow matching on digits: no schedule, no random steps, one straight line per training example.

    python -m minidiff.mnist.train_flow --out out/mnist/flow-time                           not told the digit
    python -m minidiff.mnist.train_flow --preset class --out out/mnist/flow                 told the digit
    python -m minidiff.mnist.train_flow --preset reflow --teacher out/mnist/flow --out out/mnist/reflow

    x_t = (1 - t) x_0 + t x_1          L = mean |network(x_t, t) - (x_1 - x_0)|^2          x_0 noise, x_1 a digit

Presets: `time` and `class` are the course's; `no-scheduler` is `class` for 15 epochs at one learning rate of 0.005;
`wide` is the course's larger network, not told the digit, with its learning rate of 0.05; `better` sees twice as many
digits as `class` at a lower rate, and `small` is for a machine without fast half precision. All draw from the same
noise, so their pictures can be laid side by side.

`reflow` trains a copy of --teacher again, on lines between noises and the digits that the teacher makes of them. Those
lines hardly cross, so the paths become straighter, and one or two steps suffice: reflow.png shows 1, 2, 4 and 50
before and after, and both straightnesses are printed.

Pictures in the folder: samples/, training/loss.png, solvers.png (Euler, midpoint, Heun and Dormand-Prince, with what
each cost), sampling.gif and, where the digit is told, guidance.png.

Read `flow.py` and `mnist/train_diffusion.py` first. Next: `mnist/sample.py`.    Source: FM Eq. 22, FM Eq. 23.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import flow, weights
from minidiff.cli import Clock, command, device_of, settings
from minidiff.flow import Velocity
from minidiff.hub import WEIGHTS
from minidiff.mnist import floors, training
from minidiff.mnist.data import CLASSES, Digits, generator
from minidiff.mnist.drawing import (
    FLOW_STEPS,
    GUIDANCE_SCALE,
    dropped,
    load,
    save_animation,
    save_guidance,
    save_samples,
    save_strip,
    velocity,
)
from minidiff.mnist.training import Plan, Run
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded

PAIRS = 10  # purpose of a generator, beside those of training.py


@dataclass(frozen=True)
class Preset:
    """unet: what is trained; None for a copy of the teacher.  sampled: after these epochs, and the last, it draws."""

    plan: Plan
    unet: UNetConfig | None
    sampled: tuple[int, ...] = (1, 5, 10, 15, 20, 30, 40, 50)


COURSE = Plan(epochs=10, batch_size=64, lr=1e-2, lr_decay=0.1)
TOLD = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True, modulate="mul")),
    "class": Preset(COURSE, TOLD),
    "no-scheduler": Preset(Plan(epochs=15, batch_size=64, lr=5e-3), TOLD),
    "wide": Preset(replace(COURSE, epochs=50, lr=5e-2), UNetConfig(128, time=True, modulate="mul")),
    "better": Preset(Plan(epochs=20, batch_size=128, lr=2e-3, lr_decay=0.01), TOLD),
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


def make_pairs(teacher: UNet, count: int, seed: int, device: torch.device, steps: int, batch_size: int = 500) -> Digits:
    """Digits of the teacher in channel 0, the noises they came from in channel 1, and the class they were told.

    Paths of one velocity field never cross, so neither, nearly, do the lines from start to end.
    Source: Rectified Flow Sec. 2.1 (reflow).
    """
    x_0 = torch.randn(count, 1, 28, 28, generator=generator(device, seed, PAIRS), device=device)
    labels = torch.arange(count, device=device) % CLASSES
    ends = []
    for i in tqdm(range(0, count, batch_size), desc=f"{count} digits of the teacher", unit="batch"):
        part = slice(i, i + batch_size)
        ends.append(flow.solve(velocity(teacher, labels[part]), x_0[part], flow.grid(steps)))
    return Digits(torch.cat([torch.cat(ends), x_0], dim=1), labels)


def kept_pairs(path: Path, teacher: UNet, count: int, seed: int, steps: int) -> Digits:
    """`make_pairs`, or what it wrote to path in an earlier run.

    Raises ValueError if those are of another teacher or other settings, or path cannot be written.
    """
    device = next(teacher.parameters()).device
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()
    made_from = {"teacher": digest, "count": str(count), "seed": str(seed), "steps": str(steps)}
    if path.is_file():
        with safe_open(path, "pt") as f:
            if f.metadata() != made_from:
                raise ValueError(f"{path} holds pairs of another teacher or other settings; pass another --out")
        kept = load_file(path, device=str(device))
        return Digits(kept["images"], kept["labels"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent} ({error.strerror}); pass another --out") from error
    made = make_pairs(teacher, count, seed, device, steps)
    weights.save({"images": made.images, "labels": made.labels}, path, made_from)
    return made


def by_solver(v: Velocity, x_0: Tensor, steps: int) -> tuple[list[Tensor], list[str]]:
    """The same noises by every solver, a row each, named with its number of evaluations."""
    few = max(1, steps // 5)
    rows = [flow.solve(v, x_0, flow.grid(n)) for n in (few, steps)]
    rows += [flow.solve(v, x_0, flow.grid(few), name) for name in ("midpoint", "heun")]
    x, evaluations = flow.dormand_prince(v, x_0)
    names = [f"Euler, {few}", f"Euler, {steps}", f"midpoint, {2 * few}", f"Heun, {2 * few}"]
    return [*rows, x], [*names, f"Dormand-Prince, {evaluations}"]


def few_steps(models: dict[str, Velocity], x_0: Tensor, many: int) -> tuple[list[Tensor], list[str]]:
    """1, 2, 4 and many Euler steps of each model from the same noises, a row each."""
    runs = [(name, n) for name in models for n in (1, 2, 4, many)]
    return [flow.solve(models[name], x_0, flow.grid(n)) for name, n in runs], [f"{name}, {n}" for name, n in runs]


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = training.parser(__doc__, "out/mnist/flow", PRESETS)
    p.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE, help="of samples (default %(default)s)")
    p.add_argument("--teacher", type=Path, default=WEIGHTS / "mnist" / "flow", help="of reflow (default: embedded)")
    p.add_argument("--pairs", type=int, default=20000, help="how many lines reflow learns (default %(default)s)")
    args = p.parse_args(argv)
    preset, quick = PRESETS[args.preset], args.quick
    device, clock, plan, out = device_of(args.device), Clock(), training.chosen(args, preset.plan), args.out
    about = settings(args, "mnist.train_flow")
    steps, count = (3, 1) if quick else (FLOW_STEPS, 4)  # of the samples; count: of each class
    torch.manual_seed(args.seed)
    if preset.unet is None:
        teacher, model, levels = load(args.teacher, "flow", device), load(args.teacher, "flow", device), {}
        pairs = 200 if quick else args.pairs
        if pairs < 10 or pairs - pairs // 10 < plan.batch_size:
            raise ValueError(f"--pairs {pairs} is too few: a tenth is kept for the test, the rest must fill a batch "
                             f"of {plan.batch_size}")  # fmt: skip
        joined = kept_pairs(out / "training" / "pairs.safetensors", teacher, pairs, args.seed, steps)
        train, test = joined[pairs // 10 :], joined[: pairs // 10]
    else:
        teacher, model = None, UNet(replace(preset.unet, hidden=4) if quick else preset.unet).to(device)
        train, test = training.pictures(args, device)
        levels = {"linear optimum": floors.linear_flow_loss(floors.spectrum(train.images)),
                  "memorisation": floors.memorised_flow_loss(train.images)}  # fmt: skip
    run = Run(model, FlowMatching(), train, test, plan, out / "training", what=training.named(args, train),
              seed=args.seed, floors=levels, compiled=args.compile)  # fmt: skip
    labels = torch.arange(CLASSES).repeat(count) if model.config.num_classes else None
    x_0 = draw_noise((count * CLASSES, 1, 28, 28), seeded(args.seed, count * CLASSES)).to(device)

    def draw(guidance_scale: float, n: int = CLASSES) -> Tensor:
        told = None if labels is None else labels[:n]
        return flow.solve(velocity(model, told, guidance_scale), x_0[:n], flow.grid(steps))

    told = None if labels is None else args.guidance_scale

    def after_epoch(epoch: int) -> None:
        if epoch in preset.sampled or epoch == plan.epochs:
            save_samples(draw(args.guidance_scale, count * CLASSES), "Flow", told, epoch, out, about)

    finished = run.train(after_epoch)
    config = {"kind": "flow", "preset": args.preset, "dataset": args.dataset}
    training.write(out, model, config | {"trained": run.progress(), "unet": asdict(model.config)})
    if not finished:
        return
    run.report()
    if labels is not None:
        save_guidance(draw, out, about)
    labels, x_0 = None if labels is None else labels[:CLASSES], x_0[:CLASSES]
    plain = {"the teacher": velocity(teacher, labels)} if teacher is not None else {}
    plain["this model"] = velocity(model, labels)
    if teacher is not None:
        save_strip(*few_steps(plain, x_0, steps), "Euler steps before and after reflow", out / "reflow.png", about)
    straight = {name: flow.straightness(v, x_0, steps).mean().item() for name, v in plain.items()}
    print("straightness (0 is straight): " + ", ".join(f"{name} {value:.4f}" for name, value in straight.items()))
    strong, frames = velocity(model, labels, args.guidance_scale), []
    save_strip(*by_solver(strong, x_0, steps), "Solvers and their evaluations", out / "solvers.png", about)
    end = flow.solve(strong, x_0, flow.grid(steps), on_step=lambda i, time, x: frames.append(x))
    save_animation([*frames, end], out / "sampling.gif")
    print(f"wrote {out}   ({clock})")


if __name__ == "__main__":
    main()
