"""From a trained network to digits: the network as a prediction or a velocity, and what is seen as a figure.

`sampling.denoise` wants to be told eps at a time t = 0 to T - 1, the solvers of `flow.py` want a velocity at a time
from 0 to 1. The same UNet answers both, and the same `guidance.guided` asks it with and without the class: a class is
a prompt of one token, (B, 1, 10), and "no class" is a row of zeros, as in training. What the trainers and the drawing
must agree about stands here, too: `course_schedule`, and `dropped`, which keeps the class from a network in training.

Read `mnist/judge.py` first. Next: `mnist/train_denoiser.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff import flow, images
from minidiff.flow import Velocity
from minidiff.guidance import Model, guided
from minidiff.mnist import networks
from minidiff.mnist.data import CLASSES, one_hot
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import Prediction, denoise, draw_noise
from minidiff.schedule import Schedule, linear, respaced

T = 300  # times of the course's schedule
FLOW_STEPS = 50
DROPOUT = 0.1  # how often the class is kept from the network in training, so that it can draw without one
GUIDANCE_SCALE = 5.0


def course_schedule() -> Schedule:
    """Betas from 1e-4 to 0.02 in T = 300 steps; the course's t = 0 (clean), 1, ..., T are -1, 0, ..., T - 1 here."""
    return linear(T, 1e-4, 0.02)


def dropped(labels: Tensor, generator: torch.Generator, probability: float = DROPOUT) -> Tensor:
    """Classes (B,) as the network is told them in training: one-hot (B, 10), some rows zero, which is no class."""
    keep = torch.rand(len(labels), 1, generator=generator, device=labels.device) >= probability
    return one_hot(labels) * keep


def as_model(unet: UNet) -> Model:
    """A network told the class as a model of `guidance.py`, whose prompts are classes: (B, 1, 10)."""
    return lambda x, time, prompt_embeds: (unet(x, time, prompt_embeds[:, 0]), None)


def guided_unet(
    unet: UNet, labels: Tensor | None, guidance_scale: float | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
    """The network, waiting only for x and its time in [0, 1].  labels: (B,), guided towards; None for no class."""
    if not unet.config.num_classes:
        return lambda x, time: (unet(x, time), None)
    nothing = torch.zeros(1, 1, CLASSES)
    if labels is None:
        return guided(as_model(unet), nothing, nothing, 1.0)
    return guided(as_model(unet), one_hot(labels)[:, None], nothing, guidance_scale)


def with_course_clock(predict: Prediction) -> Prediction:
    """What waits for a time in [0, 1], for `sampling.denoise`: it is told (t + 1) / T, the course's t / T."""
    return lambda x_t, t: predict(x_t, (t + 1) / T)


def prediction(unet: UNet, labels: Tensor | None = None, guidance_scale: float | None = 1.0) -> Prediction:
    """A DDPM network for `sampling.denoise`.  labels: (B,), or None for no class.  guidance_scale: as `asked_scale`."""
    return with_course_clock(guided_unet(unet, labels, guidance_scale))


def velocity(unet: UNet, labels: Tensor | None = None, guidance_scale: float | None = 1.0) -> Velocity:
    """A flow network for `flow.solve`.  labels: (B,), or None for no class.  guidance_scale: as `asked_scale`."""
    predict = guided_unet(unet, labels, guidance_scale)
    return lambda x, time: predict(x, time)[0]


def draw_ddpm(
    predict: Prediction, seeds: Sequence[torch.Generator], device: torch.device, steps: int | str = T,
    on_step: Callable | None = None,
) -> Tensor:  # fmt: skip
    """A digit from noise for each generator: (B, 1, 28, 28), on the CPU. Estimates are not clipped."""
    x_t = draw_noise((len(seeds), 1, 28, 28), seeds).to(device)
    return denoise(predict, x_t, respaced(steps, T), course_schedule(), generators=seeds, on_step=on_step).cpu()


def draw_flow(
    v: Velocity, seeds: Sequence[torch.Generator], device: torch.device, steps: int = FLOW_STEPS,
    solver: str = "euler", on_step: Callable | None = None,
) -> Tensor:  # fmt: skip
    """The same along a velocity.  solver: one of `flow.METHODS`, or "dormand-prince", which chooses its own steps and
    tells nobody."""
    x_0 = draw_noise((len(seeds), 1, 28, 28), seeds).to(device)
    if solver == "dormand-prince":
        return flow.dormand_prince(v, x_0)[0].cpu()
    return flow.solve(v, x_0, flow.grid(steps), solver, on_step).cpu()


def asked_scale(guidance_scale: float | None, told: bool) -> float | None:
    """The guidance scale of a trainer's samples: GUIDANCE_SCALE if none was asked for, None if the digit is not told.

    Raises ValueError if there is nothing to guide.
    """
    if told:
        return GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    if guidance_scale is not None:
        raise ValueError("this network is not told the digit, so there is nothing to guide; leave out --guidance-scale")
    return None


def load(folder: Path, kind: str, device: torch.device) -> UNet:
    """A trained network, ready to draw. Raises ValueError as `networks.read`, or if its config describes none."""
    config, tensors = networks.read(folder, kind)
    try:
        unet = UNet(UNetConfig(**config["unet"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no network of digits ({error!r})") from error
    networks.fill(unet, tensors, folder)
    if device.type == "cpu":
        unet.to(memory_format=torch.channels_last)  # there about a fifth faster
    return unet.to(device).eval()


def at_once(device: torch.device) -> int:
    """How many digits are best drawn together: few on a CPU, where the activations of many fit no cache."""
    return 50 if device.type == "cpu" else 250


# ---------------------------------------------------------------------------------------------- figures


def save_strip(
    rows: Sequence[Tensor], labels: Sequence[str | list[str]], title: str, path: Path, metadata: dict
) -> None:
    """A labelled strip of rows of digits, each (n, 1, 28, 28) in [0, 1].  labels: of each row, or of each digit.

    What is not a number is drawn grey, and a warning given: no training shall end over a picture.
    """
    bad = sum(int((~row.isfinite()).flatten(1).any(1).sum()) for row in rows)
    if bad:
        warnings.warn(f"{bad} of the digits in {path} hold values that are not finite", stacklevel=2)
    texts = [[text] * len(row) if isinstance(text, str) else text for row, text in zip(rows, labels)]
    images.save(images.strip([_pictures(row) for row in rows], texts, title), path, metadata)


def save_samples(x: Tensor, kind: str, guidance_scale: float | None, epoch: int, out: Path, metadata: dict) -> None:
    """Samples (B, 1, 28, 28) of an epoch, ten in a row, as OUT/samples/epoch-NN.png.  None: not told the digit."""
    rows, path = x.split(CLASSES), out / "samples" / f"epoch-{epoch:02d}.png"
    told = "not told the digit" if guidance_scale is None else f"guidance {guidance_scale:g}"
    save_strip(rows, [""] * len(rows), f"{kind} after epoch {epoch}, {told}", path, metadata)


def save_guidance(draw: Callable[[float], Tensor], out: Path, metadata: dict) -> None:
    """The digits 0 to 9 at several scales, the same noise in each, as OUT/guidance.png.  draw(scale) makes them."""
    scales = (0.0, 1.0, 5.0, 10.0)
    save_strip([draw(s) for s in scales], [f"scale {s:g}" for s in scales],
               "Guidance: 0 ignores the class, 1 is none", out / "guidance.png", metadata)  # fmt: skip


def save_animation(draw: Callable[[Callable], Tensor], steps: int, path: Path) -> None:
    """A walk as a GIF of at most 31 pictures, five digits in a row, from the noise to the result, on which it rests.

    draw(on_step) makes it, (B, 1, 28, 28), in so many steps, and shows on_step(i, t, x) each state.
    """
    frames: list[Tensor] = []
    every = -(-steps // 30)
    end = draw(lambda i, t, x, *_: i % every or frames.append(x))
    rows = [[_pictures(row) for row in x.split(5)] for x in (*frames, end)]
    pages = [images.strip(page, [[""] * len(row) for row in page]) for page in rows]
    images.save_gif(pages + [pages[-1]] * 10, path)


def _pictures(row: Tensor) -> list[Tensor]:
    """[0, 1] to the [-1, 1] of images.py; what is not a number becomes grey."""
    return list((2 * row.cpu() - 1).nan_to_num(nan=0.0))
