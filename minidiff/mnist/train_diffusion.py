"""DDPM on digits: the same step, loop and guidance that draw DeepFloyd's images, with a network one trains oneself.

    python -m minidiff.mnist.train_diffusion                         without the digit
    python -m minidiff.mnist.train_diffusion --preset class          with the digit as a second input

    x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise          L = mean |network(x_t, t) - noise|^2

T = 300 times with betas from 1e-4 to 0.02. The course counts them 1 to T; here they are 0 to T - 1, and the network
gets (t + 1) / T. With these betas 1,000 steps end at alpha_bar = 0.00004, and 300 end at 0.048: 22 % of the image's
amplitude are still there at the noisiest time, yet the course's sampling starts from pure noise, which the network has
never met. Here it starts with a digit in the noise (`models.noised_digit`; chapter 15 of the walkthrough compares).

At the end come sampling.gif, cleaned.png (noisy test digits made clean by the last part of the same walk) and, for a
network that takes the digit, guidance.png (scales 0, 1, 5, 10) and unconditional.gif (without a class).

Read `ddpm.py`, `sampling.py`, `guidance.py` and `mnist/sample.py` first.
Source: DDPM Alg. 1 and 2; classifier-free guidance as in Imagen Eq. 2, classes dropped with probability 0.1.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minidiff import ddpm, images, training
from minidiff.cli import command, cost, settings
from minidiff.mnist import levels, models, sample, trainer
from minidiff.mnist.data import CLASSES, Digits
from minidiff.mnist.models import DROPOUT, course_schedule, dropped
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
    "small": Preset(replace(COURSE, epochs=8), replace(CLASS, hidden=32)),  # for a machine without fast half precision
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


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    trainer.add_flags(p, PRESETS)
    args = p.parse_args(argv)
    trainer.complete(args, "ddpm", PRESETS)
    with training.processes(args.device) as device:
        model, (train, test) = trainer.network(args, "ddpm", PRESETS, device), trainer.digits(args, device)
        schedule, dropout = course_schedule(), DROPOUT if model.config.num_classes else 1.0
        reference = functools.partial(levels.of_task, levels.ddpm(schedule), train, dropout)
        draw = functools.partial(sample.of_epoch, args)
        if trainer.fit(args, model, Diffusion(schedule), train, test, {"kind": "ddpm"}, reference, draw):
            sample.of_trainer(args, "sampling.gif")
            if model.config.num_classes:
                sample.of_trainer(args, "guidance.png", "--guidance-scale 0 1 5 10")
                sample.of_trainer(args, "unconditional.gif", "--guidance-scale 0")
            rows = cleaned(lambda c: models.prediction(models.guided_unet(model, c), True), test.of_each_class(1),
                           (4, 8) if args.quick else (60, 120, 200))  # fmt: skip
            page = models.strip(*rows, "Noisy test digits, cleaned by the rest of the walk")
            images.save(page, args.out / "cleaned.png", settings(args, "mnist.train_diffusion"))
            say(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
