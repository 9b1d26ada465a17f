"""The door: a cascade of two UNets and their text encoder, used from Python.

    from minidiff.cascade import Cascade

    cascade = Cascade.load("mini")                        # or a released name, or a folder
    image = cascade("a snowy mountain village", seed=0)    # (1, 3, 256, 256) in [-1, 1]

What a prompt goes through on its way:

    ids, states    lower case, pieces of words, T5: (1, 77, D)                  deepfloyd/tokenizer.py, t5.py, text.py
    model          a UNet with its process, waiting for text                    deepfloyd/unet.py, stages.py
    prediction     guidance; several prompts, views and components              guidance.py, factorized.py
    walk           from noise, step by step, each estimate thresholded          sampling.py, ddpm.py or solvers.py
    64 to 256 px   enlarged, noised, put beside x_t: the same walk in stage 2    `Cascade.enlarge`

One thing at a time:

    from minidiff import views
    from minidiff.factorized import Part, averaged
    from minidiff.sampling import seeded

    parts = averaged(Part("a snowy mountain village"), Part("a volcano", view=views.named("rotate_180")))
    generators = seeded([2])
    small = cascade.draw(parts, generators)                # stage 1: (1, 3, 64, 64)
    large = cascade.enlarge(small, parts, generators)      # stage 2: (1, 3, 256, 256)

Pass the same generators to both calls: stage 2 then goes on with the random numbers where stage 1 stopped, and the
image is the one of `cascade.make(parts, [2])`. For an image that `draw` did not make, pass numbers: seeds=[2].

`load` finds and checks everything and reads nothing large. The text encoder is read by `encode`, or when a prompt is
first drawn, and is freed before the first step. A stage is read when it first draws.

Read `deepfloyd/stages.py` and `factorized.py` first; `editing.py` is about images to start from and to keep.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import checks, cli, editing, images, sampling, weights
from minidiff.deepfloyd import stages, text, vocabulary
from minidiff.deepfloyd.stages import NOISE_LEVEL, Stage, plan_stage
from minidiff.deepfloyd.unet import UNetConfig
from minidiff.editing import KeepRule
from minidiff.factorized import InTurns, Part, alternating, check_parts, factorized
from minidiff.guidance import Model, Scale, check_scale
from minidiff.sampling import Prediction, Step, noised, other_stream, seeded
from minidiff.solvers import COURSE, STEPS, times_for

TEXT_ENCODERS = {"auto": None, "whole": False, "streamed": True}  # None: streamed if free memory is short
# A walk that edits an image must not reuse the noise that made it, or it would draw the same image again. It draws from
# another stream of its seed (`sampling.seeded`), at each stage its own. The kept part takes the stream after that.
EDIT_SMALL, EDIT_LARGE, KEPT = 3, 5, 1
Seeds = Sequence[int | torch.Generator]
Through = Callable[[Iterable[Step]], Iterable[Step]]  # passes the steps of a walk on, and may watch them
Mask = str | Path | Tensor | Sequence[float]  # an image file, (1, 1, H, H), or the corners of a box in pixels of 64


@dataclass(frozen=True)
class Settings:
    """How a stage is sampled unless a call says otherwise. Raises ValueError on what no stage could do.

    steps, sampler: as for `solvers.times_for`.  guidance_scale: a number, or a rule, as for `guidance.guided`.
    negative_prompt: what guidance leads away from.
    """

    steps: int | str | Tensor
    guidance_scale: Scale
    sampler: str = "ddpm"
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        checks.chosen("sampler", self.sampler, STEPS)
        times_for(self.sampler, self.steps)
        check_scale(self.guidance_scale)
        Part(self.negative_prompt)

    def but(self, **changes: object) -> "Settings":
        """The same with these changes. None changes nothing. Raises ValueError also if there is no such setting."""
        for name in changes:
            checks.chosen("setting", name, vars(self))
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


DEFAULTS = {"mini": (Settings(27, 3.0), Settings(20, 1.0)), "released": (Settings(100, 7.0), Settings(50, 4.0))}


class Cascade:
    """Two stages and a text encoder, made by `Cascade.load`.

    settings: of stage 1 and stage 2; assign to them to change what every later call does:
    cascade.settings[0] = cascade.settings[0].but(steps=50, sampler="dpm++").
    progress: whether draw and enlarge show a bar.  split_batch: a network call for each prompt and
    branch of guidance, with less memory.
    """

    __slots__ = ("_readers", "_stages", "_encode", "_states", "settings", "vocabulary", "progress", "split_batch")

    def __init__(
        self, base: Callable[[], Stage] | None, upper: Callable[[], Stage] | None,
        encode: Callable[[Sequence[str]], Tensor], settings: Sequence[Settings], known: dict | None = None,
    ):  # fmt: skip
        """base, upper: read the stages when they are first needed; None if there is no such stage.

        encode: texts to states (N, L, D).  known: the model's vocabulary, for warnings of words it never saw.
        """
        self._readers, self._stages = (base, upper), [None, None]
        self._encode, self._states = encode, {}
        self.settings, self.vocabulary, self.progress, self.split_batch = list(settings), known, False, False

    @classmethod
    def load(
        cls, model: str | Path = "mini", stage2: str | Path = "auto", *, text_model: str | Path | None = None,
        device: torch.device | str = "auto", dtype: torch.dtype | str | None = None, text_encoder: str = "auto",
        prompt_embeds: str | Path | None = None,
    ) -> "Cascade":  # fmt: skip
        """Find and check a cascade; a released model that is nowhere on this machine is downloaded.

        model: "mini" (embedded), a released name such as "IF-I-M-v1.0", a folder of the released layout, or "none".
        stage2: likewise; "auto" is what fits the model (a folder: none).  text_model: whose text encoder (model's).
        device: "auto" is the best of this machine.
        dtype: of the networks, a torch.dtype or a name such as "float32"; None or "auto": what the device is fast at.
        text_encoder: "whole", "streamed" (one matrix in memory at a time), or "auto": streamed if free memory is
        short.  prompt_embeds: a file of encoded prompts, which are then read and not computed.
        Raises ValueError (WeightsError among them) if anything is missing, broken or does not fit together.
        """
        dtype = dtype if dtype in cli.DTYPES.values() else checks.chosen("dtype", dtype, cli.DTYPES)
        streamed = checks.chosen("text_encoder", text_encoder, TEXT_ENCODERS)
        names, device = weights.names_of(model, stage2), cli.device_of(str(device))
        folders = {number: weights.resolve(name, number, ("unet",), print) for number, name in names.items()}
        plans = {number: plan_stage(folder, dtype, device) for number, folder in folders.items()}
        widths = [stage.unet.config.encoder_hid_dim for stage, _ in plans.values()]
        if len(set(widths)) != 1:
            differ = ", ".join(f"{f.name} of width {width}" for f, width in zip(folders.values(), widths))
            raise ValueError(f"the stages read text states {differ}; choose a stage 2 of the same family")
        if text_model is None:
            text_model = names.get(1, "IF-I-XL-v1.0" if widths[0] == UNetConfig.encoder_hid_dim else "mini")
        if prompt_embeds is None:
            folder = weights.resolve(str(text_model), 1, ("text_encoder",), print)
        else:
            folder = weights.encoder_here(str(text_model))
        encode = text.reader(folder, widths[0], dtype, device, streamed, prompt_embeds)
        defaults = [DEFAULTS["mini" if names.get(i + 1) == "mini" else "released"][i] for i in range(2)]
        base, upper = (plans[number][1] if number in plans else None for number in (1, 2))
        return cls(base, upper, encode, defaults, vocabulary.read(folder) if folder else None)

    @property
    def has_upper(self) -> bool:
        """Whether there is a stage 2."""
        return self._readers[1] is not None

    def stage(self, number: int) -> Stage:
        """Stage 1 or 2, read when first needed. Raises ValueError if there is none."""
        if number not in (1, 2) or self._readers[number - 1] is None:
            raise ValueError(f"this cascade has no stage {number}; load it with one")
        if self._stages[number - 1] is None:
            self._stages[number - 1] = self._readers[number - 1]()
        return self._stages[number - 1]

    def _setting(self, number: int) -> Settings:
        """Of stage 1 or 2. Raises ValueError if somebody assigned something else."""
        if len(self.settings) != 2 or not isinstance(self.settings[number - 1], Settings):
            raise ValueError(f"cascade.settings are two Settings, one a stage, got {checks.short(self.settings)}")
        return self.settings[number - 1]

    def encode(self, *prompts: str) -> list[Tensor]:
        """Text states of each prompt, (1, 77, D). They are remembered: a prompt is encoded once.

        Raises ValueError if a prompt is no text.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt is a text, got {prompt!r:.60}; pass several one by one: encode(*prompts)")
        wanted = [p for p in dict.fromkeys((*prompts, "")) if p not in self._states]
        for prompt in wanted if self.vocabulary else ():
            if unknown := vocabulary.unknown_words(prompt, self.vocabulary):
                warnings.warn(f"{prompt!r}: no caption of this model had the words {', '.join(unknown)}; "
                              "python -m minidiff.generate --prompts lists what it knows", stacklevel=2)  # fmt: skip
        if wanted:
            self._states.update(zip(wanted, self._encode(wanted).cpu().split(1)))
        return [self._states[p] for p in prompts]

    def __call__(self, prompt: str, seed: int = 0, **changes: object) -> Tensor:
        """An image of the prompt, (1, 3, 256, 256) in [-1, 1]; (1, 3, 64, 64) if there is no stage 2.

        changes: to the `Settings` of stage 1, for this call: cascade("a castle", steps=50, guidance_scale=7.0).
        """
        small, large = self.make([Part(prompt)], [seed], **changes)
        return small if large is None else large

    def make(
        self, parts: Sequence[Part], seeds: Sequence[int], *, image: object = None, mask: Mask | None = None,
        i_start: int | None = None, method: str = "renoise", jumps: tuple[int, int] | None = None,
        feather: float = 0.0, through: Through = iter, **changes: object,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`draw` and, if there is a stage 2, `enlarge`: from noise, from an image, or only where a mask is.

        image: a file, a Pillow image or a tensor: to start from (with i_start) and to keep outside the mask.
        mask: 1 or white where new content goes; softened by `feather` pixels of 64.
        method: how the rest is kept, one of `editing.METHODS`; jumps: of "repaint", at stage 1 only (`jumps_for`).
        changes: to the `Settings` of stage 1, for this call.
        Returns (small, large or None).    Raises ValueError also if an image comes without anything to do with it, or
        a mask, i_start or feather alone.
        """
        setting, *_ = [self._setting(number) for number in range(1, 2 + self.has_upper)]
        setting = setting.but(**changes)
        if image is None and i_start is not None:
            raise ValueError("i_start needs an image to start from")
        if image is not None and mask is None and i_start is None:
            raise ValueError("what is to happen to the image? pass a mask, a box or i_start")
        if jumps is not None and (method != "repaint" or not isinstance(jumps, Sequence) or len(jumps) != 2):
            raise ValueError(f"jumps are (jump_length, jump_n_sample) of method repaint, got {jumps} with {method}")
        generators, size = seeded(seeds), self.stage(1).unet.config.sample_size
        if method == "repaint":
            jumps = editing.jumps_for(len(times_for(setting.sampler, setting.steps)), *(jumps or ()))
        small = self.draw(
            parts, generators, image=None if i_start is None else images.load(image, size), i_start=i_start or 0,
            keep=editing.kept(image, mask, size, method, feather), jumps=jumps, through=through, **changes,
        )  # fmt: skip
        if not self.has_upper:
            return small, None
        keep = editing.kept(image, mask, 4 * size, method, feather)
        return small, self.enlarge(small, parts, generators, keep=keep)

    def draw(
        self, parts: Sequence[Part], seeds: Seeds, *, image: Tensor | None = None, i_start: int = 0,
        keep: KeepRule | None = None, jumps: tuple[int, int] | None = None, through: Through = iter, **changes: object,
    ) -> Tensor:  # fmt: skip
        """Stage 1: one image for each seed, (B, 3, H, H) float32. H is the UNet's sample_size, 64 in IF.

        Values lie in [-1, 1]. With steps "course", which do not threshold, or `editing.reference`, some go beyond.

        parts: what is drawn; one `Part` is plain guidance (`factorized.py`).  seeds: numbers, or generators that go on
        where they stand. With image or keep, only a generator's seed counts: the walk begins another stream of it.
        image: (1 or B, 3, H, H), the image to start from, noised to the i_start-th of the times (SDEdit).
        keep: what of an image is kept (`editing.py`).  jumps: RePaint's, as for `sampling.denoise`.
        through: passes the steps on, and may watch them.  changes: to the `Settings` of stage 1, for this call.
        Raises ValueError if the sizes, the times or the seeds do not fit.
        """
        setting = self._setting(1).but(**changes)
        generators, size = _generators(seeds, image, keep, EDIT_SMALL), (self.stage(1).unet.config.sample_size,) * 2
        return self._walk(1, setting, parts, generators, size, image, i_start, keep, jumps, through)

    def enlarge(
        self, small: Tensor, parts: Sequence[Part], seeds: Seeds, *, noise_level: int = NOISE_LEVEL,
        image: Tensor | None = None, i_start: int = 0, keep: KeepRule | None = None, through: Through = iter,
        **changes: object,
    ) -> Tensor:  # fmt: skip
        """Stage 2: images (B, 3, h, w) in [-1, 1] at four times their size, (B, 3, 4h, 4w), values as those of `draw`.

        small is upsampled and noised to noise_level once (0: hardly at all), before the loop. Other arguments as for
        `draw`, image and keep at the large size, changes to the `Settings` of stage 2.
        seeds: the generators that `draw` used, to go on as `cascade(...)` does; numbers begin them anew.
        Raises ValueError also if noise_level is out of range.    Source: Imagen Sec. 2.4.
        """
        setting = self._setting(2).but(**changes)
        stage, generators = self.stage(2), _generators(seeds, image, keep, EDIT_LARGE)
        got = tuple(small.shape) if isinstance(small, Tensor) else checks.short(small)
        if not isinstance(small, Tensor) or small.ndim != 4 or small.shape[:2] != (len(generators), 3):
            raise ValueError(f"small must be (B, 3, h, w) with B = {len(generators)} seeds, got {got}")
        checks.number("noise_level", noise_level, 0, stage.noising.num_train_timesteps - 1, whole=True)
        size = (4 * small.shape[2], 4 * small.shape[3])
        enlarged = stages.upsample(images.in_range(small).float(), size), noise_level
        return self._walk(2, setting, parts, generators, size, image, i_start, keep, None, through, enlarged)

    def _walk(
        self, number: int, setting: Settings, parts: Sequence[Part], generators: Sequence[torch.Generator],
        size: tuple[int, int], image: Tensor | None, i_start: int, keep: KeepRule | None,
        jumps: tuple[int, int] | None, through: Through, enlarged: tuple[Tensor, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """From pure noise, or from an image noised to the i_start-th of the times, to an image of this size.

        enlarged: for stage 2, the small image at this size, and its noise level.
        """
        stage, timesteps = self.stage(number), times_for(setting.sampler, setting.steps)
        is_course = str(setting.steps) == COURSE
        if image is None and i_start:
            raise ValueError("i_start needs an image to start from")
        checks.number("i_start on these steps", i_start, 0, last_start(setting.steps), whole=True)
        timesteps = timesteps[i_start:]
        _check_parts(parts, len(generators), size)
        unet, schedule = stage.unet, stage.schedule
        if image is None:
            x_t = sampling.draw_noise((len(generators), 3, *size), generators)
        elif isinstance(image, Tensor) and image.shape[1:] == (3, *size) and len(image) in (1, len(generators)):
            x_t = noised(images.in_range(image).float(), int(timesteps[0]), schedule, generators)
        else:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"the image to start from must be (B, 3, {size[0]}, {size[1]}), got {got}; B is 1 or the "
                             "number of seeds, and images.load reads a file")  # fmt: skip
        x_t = x_t.to(stage.device)
        model = stages.super_resolution_model(unet, enlarged[1]) if enlarged else stages.base_model(unet)
        predict = self._predict(model, parts, setting, timesteps)
        if enlarged:  # noised after x_t is drawn, as in diffusers
            predict = stages.beside(noised(*enlarged, stage.noising, generators).to(stage.device), predict)
        kept = None if keep is None else keep(schedule, other_stream(generators, KEPT))
        x_t = x_t if kept is None else kept(x_t, int(timesteps[0]))
        steps = sampling.denoise(
            predict, x_t, timesteps, schedule, generators, step=STEPS[setting.sampler], keep=kept, jumps=jumps,
            fix_x_start=None if is_course else stage.fix_x_start, final_step=not is_course,
        )  # fmt: skip
        total = sampling.network_calls(sampling.visits(timesteps, not is_course, jumps))
        bar = tqdm(steps, f"{size[1]} px", total, unit="step", disable=not self.progress)
        return sampling.final(through(bar)).cpu()

    def _predict(self, model: Model, parts: Sequence[Part], setting: Settings, timesteps: Tensor) -> Prediction:
        texts = [part.prompt for part in parts if isinstance(part.prompt, str)]
        *states, negative = self.encode(*texts, setting.negative_prompt)  # together: the text encoder is read once
        known = dict(zip(texts, states))
        ready = [replace(part, prompt=known[part.prompt]) if isinstance(part.prompt, str) else part for part in parts]

        def together(some: Sequence[Part]) -> Prediction:
            return factorized(model, some, negative, setting.guidance_scale, self.split_batch)

        in_turns = isinstance(parts, InTurns)
        return alternating([together([part]) for part in ready], timesteps) if in_turns else together(ready)


def _check_parts(parts: Sequence[Part], images: int, size: tuple[int, int]) -> None:
    """Raises ValueError unless these are parts whose states, views and components fit so many images of this size."""
    check_parts(parts)
    for part in parts:
        if isinstance(part.prompt, Tensor) and not (part.prompt.ndim == 3 and len(part.prompt) in (1, images)):
            shape = tuple(part.prompt.shape)
            raise ValueError(f"a part's states must be (B, L, D), got {shape}; B is 1 or the number of seeds, {images}")
        if isinstance(part.prompt, Tensor) and not part.prompt.isfinite().all():
            raise ValueError("a part's states hold NaN or infinity; encode its prompt again")
        if not isinstance(part.component(part.view.view(torch.zeros(1, 3, *size))), Tensor):  # either may raise, too
            raise ValueError("a component makes an image of an image; components.low_pass() is one, low_pass is not")


def last_start(steps: int | str | Tensor) -> int:
    """The last i_start: the last place on these steps from which the network is asked at all."""
    return len(times_for("ddpm", steps)) - (2 if str(steps) == COURSE else 1)


def _generators(seeds: Seeds, image: Tensor | None, keep: KeepRule | None, edit: int) -> list[torch.Generator]:
    """The generators of a walk. An edit has a stream of its own: the noise that made an image leads back to it."""
    generators = seeded(seeds)
    if not generators:
        raise ValueError("no seeds; pass one for each image, such as [0, 1]")
    return generators if image is None and keep is None else other_stream(generators, edit)
