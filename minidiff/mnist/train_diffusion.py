"""DDPM on digits: the same step, loop and guidance that draw DeepFloyd's images, with a network one trains oneself.

    python -m minidiff.mnist.train_diffusion                         without the digit
    python -m minidiff.mnist.train_diffusion --preset class          with the digit as a second input

    x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise          L = mean |network(x_t, t) - noise|^2

T = 300 times with betas from 1e-4 to 0.02. The course counts them 1 to T; here they are 0 to T - 1 as everywhere in
minidiff, and its t = 0 (clean) is our -1. The network gets (t + 1) / T.

The schedule was made for T = 1000. Cut to 300 it ends at alpha_bar = 0.048: 22 % of the image's amplitude are still
there at the noisiest time, yet sampling starts from pure noise, which the network has never met. The difference is
small beside the noise, and digits come out; the price is a little of the right overall brightness.

`better` is larger and trains longer; `small` is for a machine without fast half precision.

Figures in the folder: samples/ and training/loss.png; at the end sampling.gif, cleaned.png (noisy test digits made
clean by the last part of the same walk) and, for `class`, guidance.png (0, 1, 5, 10) and unconditional.gif (without
a class). `--figures weights/mnist/ddpm` draws the figures of the end with a trained network.

Read `ddpm.py`, `sampling.py`, `guidance.py` and `mnist/trainer.py` first. Next: `mnist/train_flow.py`.
Source: DDPM Alg. 1 and 2; classifier-free guidance as in Imagen Eq. 2, classes dropped with probability 0.1.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

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
from minidiff.solvers import STEPS

COURSE, EPOCHS = Plan(epochs=20, batch_size=128, lr=1e-3, lr_decay=0.1), (1, 5, 10, 15)
CLASS = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True), EPOCHS),
    "class": Preset(COURSE, CLASS, EPOCHS),
    "small": Preset(replace(COURSE, epochs=8), replace(CLASS, hidden=32), (1, 4)),  # a quarter of the arithmetic
    "better": Preset(replace(COURSE, epochs=40, lr_decay=0.01), replace(CLASS, hidden=128), (1, 5, 10, 20)),
}


class Diffusion:
    """The loss, for a network that takes the time, and the class if there is one."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

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
    preset, schedule = PRESETS[args.preset], course_schedule()
    plan, model = trainer.plan_of(args, preset.plan), trainer.network(args, "ddpm", preset.unet, device)
    has_classes, scale = bool(model.config.num_classes), models.scale_of(args.guidance_scale, model)
    train, test = trainer.digits(args, device)
    about, left = settings(args, "mnist.train_diffusion"), schedule.alphas_cumprod[-1].item()
    say(f"alpha_bar at the last of {T} times: {left:.4f}; {left**0.5:.1%} of the image's amplitude are left there")
    steps, count = (6, 1) if args.quick else (T, 4)  # of the samples; count: of each class
    labels = torch.arange(CLASSES).repeat(count) if has_classes else None

    def walk(labels: Tensor | None, scale: float | None, n: int = CLASSES) -> Iterator[Tensor]:
        answer = models.guided_unet(model, None if labels is None else labels[:n], scale)
        return models.walk(answer, seeded(range(args.seed, args.seed + n)), device, steps, args.sampler)

    def reference() -> dict[str, float]:
        return levels.of_task(levels.ddpm(schedule), train, DROPOUT if has_classes else 1.0)

    def draw(epoch: int) -> None:
        x = models.last(walk(labels, scale, count * CLASSES))
        models.save_samples(x, "DDPM", scale, epoch, args.out, about)

    config = {"kind": "ddpm", "preset": args.preset, "dataset": args.dataset}
    if not args.figures and not trainer.fit(args, model, Diffusion(schedule), train, test, plan, config, reference,
                                            args.sample_epochs or preset.sampled, draw):  # fmt: skip
        return
    say("drawing the figures of the end")  # a few minutes
    models.save_animation(walk(labels, scale), args.out / "sampling.gif")
    if has_classes:
        models.save_animation(walk(None, 1.0), args.out / "unconditional.gif")
        models.save_guidance(lambda scale: models.last(walk(labels, scale)), args.out, about)
    rows = cleaned(lambda c: models.prediction(models.guided_unet(model, c if has_classes else None)),
                   test.of_each_class(1), (4, 8) if args.quick else (60, 120, 200))  # fmt: skip
    title = "Noisy test digits, cleaned by the rest of the walk"
    models.save_strip(*rows, title, args.out / "cleaned.png", about)
    say(f"wrote {args.out}   ({cost()})")


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = trainer.parser(__doc__, "ddpm", PRESETS)
    p.add_argument("--sampler", choices=list(STEPS), default="ddpm", help="of samples (default %(default)s)")
    trainer.add_sample_flags(p)
    args = trainer.parsed(p, "ddpm", argv)
    with training.processes(args.device) as device:
        train(args, device)


if __name__ == "__main__":
    main()
