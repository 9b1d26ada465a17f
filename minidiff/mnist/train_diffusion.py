"""DDPM on digits: the same step, loop and guidance that draw DeepFloyd's images, with a network one trains oneself.

    python -m minidiff.mnist.train_diffusion                         without the digit
    python -m minidiff.mnist.train_diffusion --preset class          with the digit as a second input

    x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise          L = mean |network(x_t, t) - noise|^2

T = 300 times with betas from 1e-4 to 0.02. The course counts them 1 to T; here they are 0 to T - 1 as everywhere in
minidiff, and its t = 0 (clean) is our -1. The network gets (t + 1) / T.

The schedule was made for T = 1000. Cut to 300 it ends at alpha_bar = 0.048: 22 % of the image's amplitude are still
there at the noisiest time, yet sampling starts from pure noise, which the network has never met. The difference is
small beside the noise, and digits come out; the price is a little of the right overall brightness.

`better` is larger and trains longer, and `better-time` does so without the digit. `small` is for a machine without
fast half precision.

At the end come sampling.gif, cleaned.png (noisy test digits made clean by the last part of the same walk) and, for
`class`, guidance.png (scales 0, 1, 5, 10) and unconditional.gif (without a class).

Read `ddpm.py`, `sampling.py`, `guidance.py` and `mnist/trainer.py` first. Next: `mnist/train_flow.py`.
Source: DDPM Alg. 1 and 2; classifier-free guidance as in Imagen Eq. 2, classes dropped with probability 0.1.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minidiff import ddpm, training
from minidiff.cli import command, cost, settings
from minidiff.mnist import levels, models, trainer
from minidiff.mnist.data import CLASSES, Digits
from minidiff.mnist.models import DROPOUT, T, course_schedule, dropped
from minidiff.mnist.trainer import Plan, Preset, say
from minidiff.mnist.unet import UNetConfig
from minidiff.sampling import Prediction, denoise, final, noised, seeded
from minidiff.schedule import Schedule

COURSE = Plan(epochs=20, batch_size=128, lr=1e-3, lr_decay=0.1)
LONG = replace(COURSE, epochs=40, lr_decay=0.01)
CLASS = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True)),
    "class": Preset(COURSE, CLASS),
    "small": Preset(replace(COURSE, epochs=8), replace(CLASS, hidden=32)),  # a quarter of the arithmetic
    "better": Preset(LONG, replace(CLASS, hidden=128)),
    "better-time": Preset(LONG, UNetConfig(128, time=True)),
}


@dataclass(frozen=True)
class Diffusion:
    """The loss, for a network that takes the time, and the class if there is one."""

    schedule: Schedule

    def __call__(self, model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
        x, total = batch.images, self.schedule.num_train_timesteps
        t = torch.randint(total, (len(x),), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x_t = ddpm.add_noise(x, noise, self.schedule.alpha_bar(t))
        eps = model(x_t, (t + 1) / total, dropped(model, batch.labels, generator)).float()
        return ddpm.loss(self.schedule, x, noise, t, eps, None).mean()


def cleaned(
    predict_for: Callable[[Tensor], Prediction], test: Digits, times: Sequence[int]
) -> tuple[list[Tensor], list[str]]:
    """Test digits noised to each time and led back from there: rows clean, then noised and cleaned for each time."""
    schedule, rows, names = course_schedule(), [test.images], ["test digit"]
    for t in times:
        seeds = seeded(range(len(test)))
        x_t = noised(test.images, t, schedule, seeds)
        rows += [x_t, final(denoise(predict_for(test.labels), x_t, torch.arange(t, -1, -1), schedule, seeds))]
        names += [f"noised to t = {t}", "cleaned"]
    return rows, names


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train, draw on the way, and draw the figures of the end."""
    model, (train, test) = trainer.network(args, "ddpm", PRESETS, device), trainer.digits(args, device)
    about, schedule, has_classes = settings(args, "mnist.train_diffusion"), course_schedule(), model.config.num_classes
    samples = models.Samples(model, "ddpm", *((6, 1) if args.quick else (T, 4)), args.seed, args.out, about)

    def reference() -> dict[str, float]:
        return levels.of_task(levels.ddpm(schedule), train, DROPOUT if has_classes else 1.0)

    loss, config = Diffusion(schedule), {"kind": "ddpm"}
    if args.figures or trainer.fit(args, model, loss, train, test, config, reference, samples.save):
        samples.save_ends()
        if has_classes:
            models.save_animation(samples.walk(0.0), args.out / "unconditional.gif")
        rows = cleaned(lambda c: models.prediction(models.guided_unet(model, c)), test.of_each_class(1),
                       (4, 8) if args.quick else (60, 120, 200))  # fmt: skip
        title = "Noisy test digits, cleaned by the rest of the walk"
        models.save_strip(*rows, title, args.out / "cleaned.png", about)
        say(f"wrote {args.out}   ({cost()})")


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    trainer.add_flags(p, PRESETS)
    args = p.parse_args(argv)
    trainer.complete(args, "ddpm", PRESETS)
    with training.processes(args.device) as device:
        train(args, device)


if __name__ == "__main__":
    main()
