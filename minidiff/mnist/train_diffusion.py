"""DDPM on digits: the same step, loop and guidance that draw DeepFloyd's pictures, with a network one trains oneself.

    python -m minidiff.mnist.train_diffusion                         not told the digit
    python -m minidiff.mnist.train_diffusion --preset class          told the digit

    x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise          L = mean |network(x_t, t) - noise|^2

T = 300 times with betas from 1e-4 to 0.02. The course counts them 1 to T; here they are 0 to T - 1 as everywhere in
minidiff, and its t = 0 (clean) is our -1. The network is told (t + 1) / T.

The schedule was made for T = 1000. Cut to 300 it ends at alpha_bar = 0.048: 22 % of the picture's amplitude are still
there at the noisiest time, yet sampling starts from pure noise, which the network has never seen. The difference is
small beside the noise, and digits come out; what it costs is a little of the right overall brightness.

`better` is larger and trains longer; `small` is for a machine without fast half precision.

Pictures in the folder: samples/ and training/loss.png; at the end sampling.gif, cleaned.png (noisy test digits made
clean by the last part of the same walk) and, for `class`, guidance.png (0, 1, 5, 10) and unconditional.gif (no class
given). Those of the end can be had of any trained network: `--figures weights/mnist/ddpm`.

Read `ddpm.py`, `sampling.py`, `guidance.py` and `mnist/drawing.py` first. Next: `mnist/train_flow.py`.
Source: DDPM Alg. 1 and 2; classifier-free guidance as in Imagen Eq. 2, classes dropped with probability 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minidiff import ddpm
from minidiff.cli import Clock, command, device_of, finite, settings
from minidiff.mnist import flags, floors
from minidiff.mnist.data import CLASSES, Digits
from minidiff.mnist.drawing import (
    DROPOUT,
    GUIDANCE_SCALE,
    T,
    asked_scale,
    course_schedule,
    draw_ddpm,
    dropped,
    load,
    prediction,
    save_animation,
    save_guidance,
    save_samples,
    save_strip,
)
from minidiff.mnist.training import Plan, Run
from minidiff.mnist.unet import UNetConfig
from minidiff.sampling import Prediction, denoise, noised, seeded
from minidiff.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """unet: what is trained.  sampled: epochs after which samples are drawn, beside the last."""

    plan: Plan
    unet: UNetConfig
    sampled: tuple[int, ...] = (1, 5, 10, 15)

    def __str__(self) -> str:
        return f"{self.plan}; {self.unet.hidden} channels"


COURSE = Plan(epochs=20, batch_size=128, lr=1e-3, lr_decay=0.1)
TOLD = UNetConfig(64, time=True, num_classes=CLASSES)
PRESETS = {
    "time": Preset(COURSE, UNetConfig(64, time=True)),
    "class": Preset(COURSE, TOLD),
    "small": Preset(replace(COURSE, epochs=8), replace(TOLD, hidden=32), (1, 4)),  # a quarter of the arithmetic
    "better": Preset(replace(COURSE, epochs=40, lr_decay=0.01), replace(TOLD, hidden=128), (1, 5, 10, 20)),
}


class Diffusion:
    """The loss, for a network told the time, and the class if it takes one."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
        x, total = batch.images, self.schedule.num_train_timesteps
        t = torch.randint(total, (len(x),), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x_t = ddpm.add_noise(x, noise, self.schedule.alpha_bar(t))
        c = dropped(batch.labels, generator) if model.config.num_classes else None
        eps = model(x_t, (t + 1) / total, c).float()
        return ddpm.loss(self.schedule, x, noise, t, eps, None).mean()


def cleaned(
    predict_for: Callable[[Tensor], Prediction], test: Digits, times: Sequence[int]
) -> tuple[list[Tensor], list[str]]:
    """Test digits noised to each time and led back from there: rows clean, then noised and cleaned for each time."""
    schedule, rows, names = course_schedule(), [test.images], ["test digit"]
    for t in times:
        seeds = seeded(0, len(test))
        x_t = noised(test.images, t, schedule, seeds)
        walk = torch.arange(t, -1, -1)
        rows += [x_t, denoise(predict_for(test.labels), x_t, walk, schedule, generators=seeds)]
        names += [f"noised to t = {t}", "cleaned"]
    return rows, names


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = flags.parser(__doc__, "ddpm", PRESETS)
    p.add_argument("--guidance-scale", type=finite, help=f"of samples (default {GUIDANCE_SCALE:g})")
    p.add_argument("--sample-epochs", type=int, nargs="+", metavar="N", help="draw after these and the last, "
                   "instead of the preset's")  # fmt: skip
    args = flags.parsed(p, "ddpm", PRESETS, argv)
    preset, quick, out, clock, device = PRESETS[args.preset], args.quick, args.out, Clock(), device_of(args.device)
    plan = flags.chosen(args, preset.plan)
    trained = None if args.figures is None else load(args.figures, "ddpm", device)
    model = trained or flags.new_network(args, preset.unet, device)
    told, schedule = bool(model.config.num_classes), course_schedule()
    args.guidance_scale = asked_scale(args.guidance_scale, told)
    steps, count = (6, 1) if quick else (T, 4)  # of the samples; count: of each class
    train, test = flags.pictures(args, device)
    about = settings(args, "mnist.train_diffusion")
    left = schedule.alphas_cumprod[-1].item()
    print(f"alpha_bar at the last of {T} times: {left:.4f}; {left**0.5:.1%} of the picture's amplitude are left there")
    labels = torch.arange(CLASSES).repeat(count) if told else None

    def draw(
        labels: Tensor | None, guidance_scale: float | None, n: int = CLASSES, on_step: Callable | None = None
    ) -> Tensor:
        predict = prediction(model, None if labels is None else labels[:n], guidance_scale)
        return draw_ddpm(predict, seeded(args.seed, n), device, steps, on_step)

    def after_epoch(epoch: int) -> None:
        if epoch in (args.sample_epochs or preset.sampled) or epoch == plan.epochs:
            x = draw(labels, args.guidance_scale, count * CLASSES)
            save_samples(x, "DDPM", args.guidance_scale, epoch, out, about)

    if args.figures is None:

        def levels() -> dict[str, float]:
            return {
                "linear optimum": floors.linear_eps_loss(floors.spectrum(train.images), schedule),
                "memorisation": floors.memorised_eps_loss(train, schedule, DROPOUT if told else 1.0),
            }

        run = Run(model, Diffusion(schedule), train, test, plan, out / "training",
                  what=flags.named(args, "ddpm", len(train)), seed=args.seed, floors=levels,
                  compiled=args.compile)  # fmt: skip
        if not run.complete(out, {"kind": "ddpm", "preset": args.preset, "dataset": args.dataset}, after_epoch):
            return
    print("drawing the pictures of the end")  # a few minutes
    save_animation(lambda note: draw(labels, args.guidance_scale, on_step=note), steps, out / "sampling.gif")
    if told:
        save_animation(lambda note: draw(None, 1.0, on_step=note), steps, out / "unconditional.gif")
        save_guidance(lambda scale: draw(labels, scale), out, about)
    rows = cleaned(lambda c: prediction(model, c if told else None), test.of_each_class(1),
                   (4, 8) if quick else (60, 120, 200))  # fmt: skip
    title = "Noisy test digits, cleaned by the rest of the walk" + (", told which digit they are" if told else "")
    save_strip(*rows, title, out / "cleaned.png", about)
    print(f"wrote {out}   ({clock})")


if __name__ == "__main__":
    main()
