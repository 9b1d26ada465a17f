"""Networks of digits: on disk, as predictions and velocities, and in figures.

`sampling.denoise` wants eps at a time t = 0 to T - 1, the solvers of `flow.py` a velocity at a time from 0 to 1. The
class `UNet`, trained for one or the other, answers. The same `guidance.guided` asks it with and without the digit: a
digit is a prompt of one token, (B, 1, 10), and "no digit" is a row of zeros, as in training. `walk` draws with either.

Read `mnist/levels.py` first.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, checks, flow, images
from minidiff.flow import Velocity
from minidiff.guidance import Model, guided
from minidiff.mnist.data import CLASSES, one_hot
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import Prediction, denoise, draw_noise, noised, seeded
from minidiff.schedule import Schedule, linear
from minidiff.solvers import STEPS, times_for

T = 300  # times of the course's schedule
FLOW_STEPS = 50
FIRST_STEPS = 5  # of `noised_digit`
SAMPLERS = {  # of each kind, the default first; with few steps, the smaller variance of ddpm-lower leaves less grain
    "ddpm": [name + clip for clip in ("", "-clip") for name in ("ddpm-twice", "ddpm-lower", *STEPS)],
    "flow": [*flow.METHODS, "dormand-prince"],
}
Answer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x, time in [0, 1]) -> (eps or velocity, None)
DROPOUT = 0.1  # how often the class is withheld in training, so that the network can draw without one
GUIDANCE_SCALE = 5.0
MAKERS = {"judge": "judge train", "denoiser": "train_denoiser", "ddpm": "train_diffusion --preset class",
          "flow": "train_flow --preset class"}  # fmt: skip

# ---------------------------------------------------------------------------------------------- on disk


def write(folder: Path, model: nn.Module, config: dict, more: dict[str, Tensor] | None = None) -> None:
    """config.json and model.fp16.safetensors. Matrices become float16; vectors (norms, biases) and `more` do not.

    config: what `load` needs to build the network again, and its "kind".
    """
    tensors = {k: v.half() if v.ndim > 1 else v for k, v in model.state_dict().items()}
    checkpoint.save(tensors | (more or {}), folder / "model.fp16.safetensors", {"format": "pt"})
    checkpoint.write_json(folder / "config.json", config)


def read(folder: str | Path, *kinds: str) -> tuple[dict, dict[str, Tensor]]:
    """The config, and the tensors as float32.

    Raises ValueError if there is no network of one of the kinds, or its files are broken.
    """
    folder, kinds = Path(folder), kinds or tuple(MAKERS)
    checks.chosen("kind of network", kinds[0], MAKERS)
    how = f"train one with `python -m minidiff.mnist.{MAKERS[kinds[0]]} --out FOLDER`, which writes it epoch by epoch"
    if not (folder / "config.json").is_file():
        raise ValueError(f"no trained {' or '.join(kinds)} in {folder}; {how}")
    config = checkpoint.read_config(folder)
    if config.get("kind") not in kinds:
        raise ValueError(f"{folder} holds a {config.get('kind')}, not a {' or '.join(kinds)}; {how}")
    try:
        tensors = load_file(folder / "model.fp16.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); copy it again, or {how}") from error
    if not all(v.isfinite().all() for v in tensors.values()):
        raise ValueError(f"the network in {folder} holds NaN or infinity; {how}")
    return config, {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}


def load(folder: str | Path, device: torch.device | str = "cpu", *kinds: str) -> tuple[UNet, dict]:
    """A trained network, ready to draw, and its config. Raises ValueError as `read`, or if config and file misfit."""
    (config, tensors), device = read(folder, *(kinds or ("ddpm", "flow", "denoiser"))), torch.device(device)
    config = {"dataset": "mnist", "trained": "for an unknown time"} | config
    with checkpoint.blaming(Path(folder)):
        unet = UNet(UNetConfig(**config["unet"]))
        unet.load_state_dict(tensors)
    unet.kind = config["kind"]
    if device.type == "cpu":
        unet.to(memory_format=torch.channels_last)  # there about a fifth faster
    return unet.to(device).eval(), config


# ---------------------------------------------------------------------------------------------- predictions


def course_schedule() -> Schedule:
    """Betas from 1e-4 to 0.02 in T = 300 steps; the course's t = 0 (clean), 1, ..., T are -1, 0, ..., T - 1 here."""
    return linear(T, 1e-4, 0.02)


def dropped(
    model: nn.Module, labels: Tensor, generator: torch.Generator, probability: float = DROPOUT
) -> Tensor | None:
    """Classes (B,) as a network gets them in training: one-hot (B, 10), some rows zero; None if it takes no class."""
    if not getattr(model, "module", model).config.num_classes:  # .module: within DistributedDataParallel
        return None
    keep = torch.rand(len(labels), 1, generator=generator, device=labels.device) >= probability
    return one_hot(labels) * keep


def as_model(unet: UNet) -> Model:
    """A network as a model of `guidance.py`, whose prompts are classes: (B, 1, 10). One without classes reads none."""
    return lambda x, time, classes: (unet(x, time, classes[:, 0] if unet.config.num_classes else None), None)


def guided_unet(unet: UNet, labels: Tensor | None = None, guidance_scale: float = 1.0) -> Answer:
    """The network, waiting only for x and its time.  labels: (B,), guided towards; None for no class.

    Raises ValueError if labels are no classes.
    """
    classes = nothing = torch.zeros(1, 1, CLASSES)
    if labels is None or not unet.config.num_classes:
        guidance_scale = 1.0
    else:
        try:
            labels = torch.as_tensor(labels)
            classes = one_hot(labels.long())[:, None]
            good = not labels.is_floating_point() and labels.dtype != torch.bool and 0 < len(labels) == labels.numel()
        except (TypeError, ValueError, RuntimeError):  # words, classes beyond 9, none at all
            good = False
        if not good:
            raise ValueError(f"labels are a row of classes 0 to 9, such as [3, 4], got {checks.short(labels)}")
    answer = guided(as_model(unet), classes, nothing, guidance_scale)
    answer.kind = getattr(unet, "kind", None)  # of a network that `load` read: `walk` looks whether the sampler fits
    return answer


def prediction(answer: Answer, lower: bool = False) -> Prediction:
    """For `sampling.denoise`: the network's time is (t + 1) / T, the course's t / T.

    lower: a pred_var of -1 comes with eps, so `ddpm.step` takes its smaller variance, beta_tilde in place of beta.
    """
    return lambda x_t, t: ((eps := answer(x_t, (t + 1) / T)[0]), -torch.ones_like(eps) if lower else None)


def velocity(answer: Answer) -> Velocity:
    """For `flow.solve`."""
    return lambda x, time: answer(x, time)[0]


# ---------------------------------------------------------------------------------------------- samples


def check_sampler(sampler: str, kind: str | None) -> None:
    """Raise ValueError if there is no such sampler, or it is not for this kind of network; None is any kind."""
    checks.chosen("sampler", sampler, dict.fromkeys(sum(SAMPLERS.values(), [])))
    if kind and sampler not in SAMPLERS[kind]:
        raise ValueError(f"sampler {sampler} is for another kind of network; of {kind}: {', '.join(SAMPLERS[kind])}")


def walk(
    answer: Answer, generators: Sequence[torch.Generator], device: torch.device, steps: int, sampler: str
) -> Iterator[Tensor]:
    """A digit from noise for each generator: the states (B, 1, 28, 28), the first and the last included.

    answer: of a DDPM or a flow network.  sampler: one of SAMPLERS for it. "-lower" takes the smaller variance, "-twice"
    does so and begins with `noised_digit`, "-clip" clips each estimate to [0, 1], dormand-prince chooses its own steps.
    Raises ValueError without generators, and as `check_sampler`.
    """
    check_sampler(sampler, getattr(answer, "kind", None))
    if not (generators := seeded(generators)):
        raise ValueError("there is no image to draw; pass --num-images 1 or more")
    x = draw_noise((len(generators), 1, 28, 28), generators).to(device)
    if sampler in SAMPLERS["ddpm"]:
        name, *options = sampler.split("-")
        yield (x := noised_digit(answer, x, generators) if "twice" in options else x)
        clip = (lambda x_start: x_start.clamp(0, 1)) if "clip" in options else None
        predict, times = prediction(answer, not {"lower", "twice"}.isdisjoint(options)), times_for(name, steps, T)
        for state in denoise(predict, x, times, course_schedule(), generators, step=STEPS[name], fix_x_start=clip):
            yield state.x_prev
    elif sampler == "dormand-prince":
        yield x
        yield flow.dormand_prince(velocity(answer), x)[0]
    else:
        yield from flow.walk(velocity(answer), x, flow.grid(steps), sampler)


@torch.inference_mode()
def noised_digit(answer: Answer, noise: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Where a DDPM's walk begins if x_T is what training saw at the last time: noise with a trace of a digit.

        x_T = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) noise,    alpha_bar = 0.048 at the last of 300 times

    noise: (B, 1, 28, 28).  x_start is a digit of the network's own, drawn from this noise in FIRST_STEPS and clamped to
    [0, 1]. The noise beside it is new.
    """
    predict, times = prediction(answer, lower=True), times_for("ddpm", FIRST_STEPS, T)
    *_, end = denoise(predict, noise, times, course_schedule(), generators)
    return noised(end.x_prev.clamp(0, 1), T - 1, course_schedule(), generators)


def draw(
    answer_of: Callable[[slice], Answer], seeds: Sequence[int], device: torch.device | str, steps: int, sampler: str
) -> Tensor:
    """The end of the walk from each seed, (B, 1, 28, 28) on the CPU, clamped to [0, 1] as an image holds it.

    answer_of(part) -> the answer for this part of the seeds, `at_once` of them.    Raises ValueError if there are none.
    """
    ends, n = [], at_once(device := torch.device(device))
    for part in (slice(i, i + n) for i in range(0, max(len(seeds), 1), n)):
        states = walk(answer_of(part), seeded(seeds[part]), device, steps, sampler)
        ends += deque(tqdm(states, f"digits from {part.start} on", leave=False), maxlen=1)
    return torch.cat(ends).cpu().clamp(0, 1)


def at_once(device: torch.device) -> int:
    """How many digits are best drawn together: few on a CPU, where the activations of many fit no cache."""
    return 50 if device.type == "cpu" else 250


# ---------------------------------------------------------------------------------------------- figures


def strip(rows: Sequence[Tensor], labels: Sequence[str | list[str]], title: str = "") -> Image.Image:
    """A labelled strip of rows of digits, each (n, 1, 28, 28) in [0, 1].  labels: of each row, or of each digit."""
    texts = [[text] * len(row) if isinstance(text, str) else text for row, text in zip(rows, labels)]
    scaled = [list((2 * row.cpu() - 1).nan_to_num(0.0).clamp(-1, 1)) for row in rows]  # no training ends over a NaN
    return images.sheet(scaled, texts, title)


def save_animation(states: Iterator[Tensor], path: Path) -> None:
    """A walk as a GIF of at most 31 images, five digits in a row, from the noise to the result, on which it rests."""
    *way, end = states
    frames = [x.split(5) for x in (*way[:: -(-len(way) // 30)], end)]
    pages = [strip(rows, [""] * len(rows)) for rows in frames]
    images.save_gif(pages + [pages[-1]] * 10, path)

