"""The one-step denoiser: noise a digit, train a network to take the noise away, see where that stops working.

    python -m minidiff.mnist.train_denoiser                          sigma 0.5, 5 epochs
    python -m minidiff.mnist.train_denoiser --pure-noise             from noise alone

    z = x + sigma * noise          L = mean |network(z) - x|^2

`better` trains longer and at a higher rate. `small` has a sixteenth of the arithmetic, for a machine without fast half
precision. On the test digits `course` reaches 0.0082, `small` 0.0079; the course's staff report 0.0084 on their last
training batch.

At the end come two figures. noising.png has a row for each of four test digits and a column for each sigma.
out-of-distribution.png has a row for each sigma: ten test digits with the same noise in all rows, the network's answers
below them, and its error on 2,000 test digits beside that of the best linear denoiser on the training digits.

`--pure-noise` asks for a digit from noise alone, z = noise. Nothing in z tells of x, so the least square error is made
by the same answer to every z: the mean E[x] of all training digits, a grey blur, with a loss of 0.0673. mean-image.png
shows both. It takes many small steps to make digits from noise.

Read `mnist/trainer.py` first.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import images, training
from minidiff.cli import command, cost, settings
from minidiff.mnist import data, levels, trainer
from minidiff.mnist.data import FIGURE, Digits, generator
from minidiff.mnist.models import strip
from minidiff.mnist.trainer import TEST_DIGITS, Plan, Preset, say
from minidiff.mnist.unet import UNetConfig

SIGMA = 0.5  # of training
SIGMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
PRESETS = {
    "course": Preset(Plan(epochs=5, batch_size=256, lr=1e-4), UNetConfig(128)),
    "better": Preset(Plan(epochs=10, batch_size=128, lr=1e-3, lr_decay=0.01), UNetConfig(128)),
    "small": Preset(Plan(epochs=5, batch_size=128, lr=1e-3, lr_decay=0.01), UNetConfig(32)),  # 1/16 of the arithmetic
}


def noised(x: Tensor, sigma: float | None, generator: torch.Generator) -> Tensor:
    """x + sigma * noise; or the noise alone if sigma is None. x: (B, 1, 28, 28)."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return noise if sigma is None else x + sigma * noise


@dataclass(frozen=True)
class Denoising:
    """The loss, for a strength of noise; None for noise alone, with no digit in it."""

    sigma: float | None

    def __call__(self, model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
        z = noised(batch.images, self.sigma, generator)
        return F.mse_loss(model(z).float(), batch.images)


def noising_figure(digits: Digits) -> tuple[list[Tensor], list[list[str]]]:
    """A row for each digit: the same noise at every sigma."""
    rows = [torch.cat([noised(x, s, generator(x.device, FIGURE, i)) for s in SIGMAS])
            for i, x in enumerate(digits.images.split(1))]  # fmt: skip
    return rows, [[f"sigma {s}" for s in SIGMAS]] * len(rows)


@torch.no_grad()
def sample_figure(model: nn.Module, digits: Digits, sigma: float | None) -> tuple[list[Tensor], list[str]]:
    """Rows clean, noisy, denoised."""
    z = noised(digits.images, sigma, generator(digits.images.device, FIGURE))
    return [digits.images, z, model(z)], ["clean", "noisy", "denoised"]


def errors_by_sigma(model: nn.Module, test: Digits, variances: Tensor) -> list[tuple[float, float, float]]:
    """(sigma, mean square error on test, linear optimum of these variances) for every sigma, the same noise at each."""
    return [(sigma, trainer.loss_on(test, model, Denoising(sigma), 0), levels.linear_mse(variances, 1, sigma).item())
            for sigma in SIGMAS]  # fmt: skip


def out_of_distribution(model: nn.Module, digits: Digits, table: list[tuple]) -> tuple[list[Tensor], list[str]]:
    """A row for each sigma: all n digits noised, and the model's answers below them, as one image (1, 1, 56, 28 n).

    table: of `errors_by_sigma`. The noise is the same at every sigma.
    """
    parts = [sample_figure(model, digits, sigma)[0][1:] for sigma, *_ in table]  # noisy, denoised
    rows = [torch.cat([torch.cat(list(x), dim=-1) for x in part], dim=-2)[None] for part in parts]
    return rows, [f"sigma {s}: error {error:.4f}, best linear {linear:.4f}" for s, error, linear in table]


@torch.no_grad()
def pure_noise_figure(model: nn.Module, train: Digits) -> tuple[list[Tensor], list[list[str]], float]:
    """The mean digit beside the answers to eight noises; the distance (rms) of 200 answers from the mean digit."""
    mean = train.images.mean(0, keepdim=True)
    z = torch.randn((200, *mean.shape[1:]), generator=generator(mean.device, FIGURE), device=mean.device)
    out = model(z)
    rows = [torch.cat([mean, z[:8]]), torch.cat([mean, out[:8]])]
    labels = [["mean digit"] + ["noise"] * 8, ["mean digit"] + ["output"] * 8]
    return rows, labels, (out - mean).square().mean().sqrt().item()


def save(args: argparse.Namespace, name: str, rows: list[Tensor], labels: list, title: str) -> None:
    """A figure as OUT/NAME, with the flags in its metadata."""
    images.save(strip(rows, labels, title), args.out / name, settings(args, "mnist.train_denoiser"))


def save_figures(args: argparse.Namespace, model: nn.Module, sigma: float | None, train: Digits, test: Digits) -> None:
    """noising.png, and of a trained network out-of-distribution.png, or mean-image.png if sigma is None."""
    save(args, "noising.png", *noising_figure(test[:4]), "z = x + sigma noise")
    if sigma is None:
        rows, labels, distance = pure_noise_figure(model, train)
        title = f"Noise alone: the best answer is the mean digit, and these differ from it by {distance:.3f} (rms)"
        save(args, "mean-image.png", rows, labels, title)
    else:
        judged = data.some(test, TEST_DIGITS)
        table = errors_by_sigma(model, judged, levels.spectrum(train.images))
        title = f"Trained at sigma {sigma}. Error: on {len(judged)} test digits; best linear: on the training digits"
        rows, labels = out_of_distribution(model, test.of_each_class(1), table)
        say("\n".join([title, *labels]))
        save(args, "out-of-distribution.png", rows, labels, title)
    say(f"wrote {args.out}   ({cost()})")


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    trainer.add_flags(p, PRESETS)
    p.add_argument("--pure-noise", action="store_true", help="ask for a digit from noise alone: see above")
    args = p.parse_args(argv)
    config = trainer.complete(args, "denoiser", PRESETS)
    sigma = config.get("sigma", None if args.pure_noise else SIGMA)
    if args.pure_noise and sigma is not None:
        raise ValueError(f"the network in {args.figures or args.start_from} is of sigma {sigma}; omit --pure-noise")
    with training.processes(args.device) as device:
        model, (train, test) = trainer.network(args, "denoiser", PRESETS, device), trainer.digits(args, device)

        def reference() -> dict[str, float]:
            mean = {"mean image (training digits)": levels.mean_image_mse(train.images)}
            return mean if sigma is None else mean | levels.of_task(levels.denoiser(sigma), train)

        def draw(epoch: int) -> None:
            title = f"epoch {epoch}, " + ("noise alone" if sigma is None else f"sigma {sigma}")
            save(args, f"samples/epoch-{epoch:02d}.png", *sample_figure(model, test.of_each_class(1), sigma), title)

        config = {"kind": "denoiser", "sigma": sigma}
        if trainer.fit(args, model, Denoising(sigma), train, test, config, reference, draw):
            save_figures(args, model, sigma, train, test)


if __name__ == "__main__":
    main()
