"""What a command on pictures is made of: the cascade it draws with, and walks as its flags want them.

`Cascade` finds, checks and loads both stages and the prompts' states; `draw` and `enlarge` run them. `edited` turns
flags about a given picture (where to start, what to keep) into a `Walk`. A command asks for flags, builds a condition
and walks, and shows the result.    Read `deepfloyd/stages.py` first. Next: `encode.py`, then
`denoise.py`, the first command that draws.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import cli, editing, images, weights
from minidiff.checkpoint import default_dtype, read_config
from minidiff.cli import QUICK_STEPS, Clock, add_text_flags, choose, finite
from minidiff.deepfloyd import stages
from minidiff.deepfloyd import text as prompt_files
from minidiff.deepfloyd.stages import Walk
from minidiff.factorized import Part, factorized
from minidiff.guidance import Condition, prompted
from minidiff.sampling import network_calls, seeded, visits
from minidiff.schedule import Schedule, respaced, strided


def add_cascade_flags(
    p: argparse.ArgumentParser, steps: str, stage2: bool = True, *, only_stage1: bool = False,
    guidance: str = "mini 5, others 7",
) -> None:  # fmt: skip
    """The flags of commands that draw with the cascade. steps: of stage 1, if the model is not to decide.

    stage2: whether stage 2 is asked unless told otherwise.  only_stage1: one picture of stage 1 is all there is to it.
    guidance: the default of --guidance-scale in words.
    """
    p.add_argument("--model", default="mini", help="mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--steps", nargs="+", default=[steps] if steps else None,
                   help="of stage 1: a count, smart27, ..., or course: 990, 960, ..., 0 without thresholding (default: "
                   + f"{steps or 'mini 27, others 100'})")  # fmt: skip
    p.add_argument("--guidance-scale", type=finite, nargs="+", help=f"of stage 1; 1 is none (default: {guidance})")
    if only_stage1:
        p.set_defaults(stage2="none", stage2_steps=None, stage2_guidance_scale=None, num_images=1)
    else:
        p.add_argument("--stage2", default=None if stage2 else "none",
                       help="mini, a released name, a folder, or none (default: "
                       + ("what fits --model)" if stage2 else "none)"))  # fmt: skip
        p.add_argument("--stage2-steps", help="of stage 2 (default: mini 20, others 50)")
        p.add_argument("--stage2-guidance-scale", type=finite, help="of stage 2 (default: mini 1, others 4)")
        p.add_argument("--num-images", type=int, default=1, help="pictures, seeds counted up (default %(default)s)")
    add_text_flags(p)


def add_edit_flags(p: argparse.ArgumentParser, image: bool = True) -> None:
    """The flags of commands that can start from a picture and keep some of it. image: they take it by --image."""
    if image:
        p.add_argument("--image", type=Path, help="a picture to start from, or to keep some of")
    p.add_argument("--mask", type=Path, help="picture of the same shape, white where new content goes")
    p.add_argument("--box", type=finite, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
                   help="instead of --mask: a rectangle, in pixels of 64")  # fmt: skip
    p.add_argument("--feather", type=finite, default=0.0, help="soften the mask's seam, pixels of 64 (default 0)")


def fill_in(args: argparse.Namespace, sweeps: bool = False) -> argparse.Namespace:
    """Flags left open get what fits the model. Raises ValueError on numbers out of range.

    sweeps: whether the command compares several --steps or --guidance-scale.
    """
    args.model = weights.short_name(args.model, 1)
    mini = args.model == "mini"
    given = args.stage2_steps or args.stage2_guidance_scale is not None
    if args.stage2 is not None:
        args.stage2 = weights.short_name(args.stage2, 2)
    if args.stage2 is None:
        args.stage2 = "mini" if mini else "IF-II-M-v1.0" if args.model in weights.RELEASED else "none"
    args.steps = [QUICK_STEPS] if args.quick else args.steps or ["27" if mini else "100"]
    args.stage2_steps = QUICK_STEPS if args.quick else args.stage2_steps or ("20" if args.stage2 == "mini" else "50")
    args.guidance_scale = args.guidance_scale or [5.0 if mini else 7.0]
    if args.stage2_guidance_scale is None:
        args.stage2_guidance_scale = 1.0 if args.stage2 == "mini" else 4.0
    if args.stage2 == "none" and given:
        raise ValueError("--stage2-steps and --stage2-guidance-scale need a stage 2; pass --stage2 mini, say")
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    if not sweeps and len(args.steps) * len(args.guidance_scale) > 1:
        raise ValueError("this command takes one --steps and one --guidance-scale; minidiff.generate compares several")
    for steps in (*args.steps, args.stage2_steps):
        walk_of(steps)
    return args


def neutral_prompt(model: str) -> str:
    """What to say of any picture: the course's "a high quality photo", or nothing to the miniature, which has never
    seen a photo and takes the word for one that it knows."""
    return "" if model == "mini" else "a high quality photo"


def walk_of(steps: str) -> Walk:
    """--steps: a count, a name like smart50, sections like 10,10,3,2,2, or course. Raises ValueError as `respaced`.

    course: 990, 960, ..., 0, stopping there, slightly noisy, and without dynamic thresholding.
    """
    if steps == "course":
        return Walk(strided(), final_step=False, threshold=False)
    return Walk(respaced(steps))


def encode(args: argparse.Namespace, model: str, texts: Sequence[str]) -> Tensor:
    """The states of these prompts, (N, L, D): from --prompt-embeds, or by the model's text encoder, then freed."""
    if args.prompt_embeds:
        local = weights.encoder_here(model)
        known = prompt_files.fingerprint(local) if local else None
        return prompt_files.read_embeds(args.prompt_embeds, texts, known)
    folder = weights.resolve(model, 1, ("text_encoder",), print)
    device, dtype = choose(args)
    streamed = args.text_encoder == "streamed"
    if args.text_encoder == "auto":
        streamed = prompt_files.should_stream(folder, dtype, device)
    if streamed and args.dtype == "auto":  # a streamed encoder computes on the CPU
        dtype = default_dtype("cpu")
    return prompt_files.load_text_encoder(folder, dtype, device, streamed)(texts).cpu()


class Cascade:
    """What a command draws with: both stages and the prompts' states, found, checked and loaded."""

    def __init__(self, args: argparse.Namespace, texts: Sequence[str]):
        """Raises ValueError, WeightsError among them, before loading anything if something is wrong or missing."""
        self.args, self.clock = args, Clock()
        images.check_output(args.out)
        check_pictures(args, args.steps[0])
        check_negative(args, args.guidance_scale + ([args.stage2_guidance_scale] if args.stage2 != "none" else []))
        device, dtype = choose(args)
        folders = [weights.resolve(args.model, 1, ("unet",), print)]
        if args.stage2 != "none":
            folders.append(weights.resolve(args.stage2, 2, ("unet",), print))
        for folder in folders:
            stages.plan_stage(folder, dtype)  # tells what is wrong with it before the prompts are encoded
        check_widths(folders, None)
        embeds = encode(args, args.model, [args.negative_prompt, *texts])[:, None]  # (1 + N, 1, L, D)
        self.negative, self.prompts = embeds[0], list(embeds[1:])
        check_widths(folders, embeds)
        self.base = stages.load_stage(folders[0], dtype, device)
        self.upper = stages.load_stage(folders[1], dtype, device) if len(folders) > 1 else None
        self.size = self.base.unet.config.sample_size

    def prompted(self, i: int = 0) -> Condition:
        """The i-th text alone, with guidance."""
        return prompted(self.prompts[i], self.negative, self.args.split_batch)

    def factorized(self, parts: Sequence[Part]) -> Condition:
        return lambda model, scale: factorized(model, parts, self.negative, scale, self.args.split_batch)

    def draw(
        self, condition: Condition, walks: Sequence[Walk], scales: Sequence[float], watch: Callable | None = None
    ) -> list[tuple[Tensor, list[torch.Generator]]]:
        """Stage 1 once for each walk and scale: pictures (num_images, 3, 64, 64), and generators for stage 2.

        All start from the same seeds.  watch: a further `on_step`.
        """
        args, size, results = self.args, (self.size, self.size), []
        announce(f"{self.size} px", self.base, condition, scales, walks, args.num_images, size)
        for walk, scale in zip(walks, scales):
            generators = seeded(args.seed, args.num_images)
            walk = replace(walk, on_step=progress(walk, f"{self.size} px", watch))
            x = stages.sample_base(self.base, condition, walk, generators, guidance_scale=scale, size=size)
            results.append((x.cpu(), generators))
        return results

    def enlarge(
        self, condition: Condition, walks: Sequence[Walk], small: Sequence[tuple[Tensor, list[torch.Generator]]]
    ) -> list[Tensor]:
        """Stage 2 on each result of `draw`: pictures (num_images, 3, 256, 256); none if there is no stage 2."""
        if self.upper is None:
            return []
        scale, pictures, size = self.args.stage2_guidance_scale, [], 4 * small[0][0].shape[-1]
        announce(f"{size} px", self.upper, condition, [scale] * len(walks), walks, len(small[0][0]), (size, size))
        for walk, (low_res, generators) in zip(walks, small):
            walk = replace(walk, on_step=progress(walk, f"{size} px"))
            x = stages.sample_super_resolution(self.upper, low_res, condition, walk, generators, guidance_scale=scale)
            pictures.append(x.cpu())
        return pictures

    def finish(self, name: str, rows: list[list[Tensor]], labels: list[list[str]], title: str) -> None:
        """Write the labelled strip with its settings, and say where it is and what it took."""
        cli.finish(self.args, name, rows, labels, title, self.clock)


def check_pictures(args: argparse.Namespace, steps: str) -> None:
    """Before minutes of encoding: can the pictures be read, is there a mask as its flags say, are starts on the walk?

    Raises ValueError.
    """
    cli.keep_inputs(args, args.out)
    for path in cli.inputs(args):
        images.load(path, 64)
    if hasattr(args, "mask"):
        mask = load_mask(args, 64)
        if mask is None and args.feather:
            raise ValueError("--feather softens a mask; pass --mask or --box")
        if mask is not None and mask.max() == 0:
            warnings.warn("the mask is black all over: nothing will be painted", stacklevel=2)
        if args.mask and args.image:
            images.check_same_shape(args.image, args.mask)
    start, last = getattr(args, "i_start", None), last_start(walk_of(steps))
    for i in start if isinstance(start, list) else [] if start is None else [start]:
        if not 0 <= i <= last:
            raise ValueError(f"--i-start must lie in 0..{last} for these steps, got {i}")


def check_negative(args: argparse.Namespace, scales: Sequence[float]) -> None:
    """Warn of a --negative-prompt that no guidance leads away from."""
    if args.negative_prompt and all(scale == 1 for scale in scales):
        warnings.warn("--negative-prompt does nothing at --guidance-scale 1, which is no guidance", stacklevel=2)


def last_start(walk: Walk) -> int:
    """The last place on the steps from which the network is asked at all."""
    return len(walk.timesteps) - (1 if walk.final_step else 2)


def check_optional_image(args: argparse.Namespace) -> None:
    """Raises ValueError if flags need an --image and there is none, or there is one and nothing to do with it."""
    used = args.mask or args.box or args.i_start is not None
    if used and args.image is None:
        raise ValueError("a mask or a start needs a picture: pass --image FILE")
    if args.image and not used:
        raise ValueError("what is to happen to --image? pass --mask, --box or --i-start")


def check_widths(folders: Sequence[Path], prompt_embeds: Tensor | None) -> None:
    """Before hours of work: do all stages read states of the width that the text encoder (or file) gives?

    prompt_embeds: None if there are none yet; then the stages are compared with each other.
    """
    widths = [read_config(folder / "unet").get("encoder_hid_dim") for folder in folders]
    wanted = widths[0] if prompt_embeds is None else prompt_embeds.shape[-1]
    whose = f"{folders[0].name} reads" if prompt_embeds is None else "these have"
    for folder, width in zip(folders, widths):
        if width != wanted:
            raise ValueError(
                f"{folder.name} reads text states of width {width}, but {whose} {wanted}: stages "
                "and text encoder must be of one family; choose another --stage2 or --prompt-embeds"
            )


def load_mask(args: argparse.Namespace, size: int) -> Tensor | None:
    """What --mask or --box says, (1, 1, size, size), softened by --feather; None if neither is given."""
    if args.mask and args.box:
        raise ValueError("--mask and --box both say where to paint; pass one of them")
    if not (args.mask or args.box):
        return None
    return editing.feather(editing.box(args.box, size) if args.box else images.load_mask(args.mask, size), args.feather)


def edited(
    walk: Walk, args: argparse.Namespace, size: int, schedule: Schedule, *, i_start: int | None = None,
    method: str = "renoise", jumps: tuple[int, int] = editing.JUMPS,
) -> Walk:  # fmt: skip
    """The walk as the edit flags want it at this size: starting at its i_start-th time, keeping what is not masked.

    The known region is noised with random numbers of its own (stream 1 at stage 1, 2 at larger sizes). The flags have
    passed `check_pictures` and, where a picture is optional, `check_optional_image`.
    """
    mask = load_mask(args, size)
    if args.image is None:
        return walk
    picture = images.load(args.image, size)
    if i_start is not None:
        walk = replace(walk, timesteps=walk.timesteps[i_start:], x_start=picture)
    if mask is None:
        return walk
    if method == "clean":
        return replace(walk, keep=editing.clean(picture, mask))
    own = seeded(args.seed, args.num_images, stream=1 if size <= 64 else 2)
    keep = editing.renoise(picture, mask, schedule, own)
    return replace(walk, keep=keep, jumps=jumps if method == "repaint" else None)


def upper_walk(cascade: Cascade, method: str = "renoise") -> Walk:
    """Stage 2's walk, keeping at its size what --mask or --box keep at stage 1's."""
    walk = walk_of(cascade.args.stage2_steps)
    if cascade.upper is None:
        return walk
    return edited(walk, cascade.args, 4 * cascade.size, cascade.upper.schedule, method=method)


def progress(walk: Walk, what: str, watch: Callable | None = None) -> Callable[..., None]:
    """An `on_step` that moves a progress bar, and calls watch."""
    total = network_calls(visits(walk.timesteps, walk.final_step, walk.jumps))
    bar = tqdm(total=total, desc=what, unit="step", disable=total == 0)

    def on_step(i: int, *more: object) -> None:
        bar.update()
        if watch is not None:
            watch(i, *more)
        if i + 1 == total:
            bar.close()

    return on_step


@torch.inference_mode()
def announce(
    what: str, stage: stages.Stage, condition: Condition, scales: Sequence[float], walks: Sequence[Walk],
    num_images: int, size: tuple[int, int],
) -> None:  # fmt: skip
    """Before a run: how many network calls it will make, and about how long.

    The condition is tried on a model that only notes what it is asked; then one call of that kind is timed, and a
    second if the first was short, when warming up is most of it.
    """
    channels, asked = stage.unet.config.in_channels, []

    def note(x: Tensor, t: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((x, t, embeds))
        return torch.zeros_like(x[:, :3]), torch.zeros_like(x[:, :3])

    total, pictures, largest = 0, 0, None
    for scale, walk in zip(scales, walks):
        asked.clear()
        x = torch.zeros(num_images, channels, *size, device=stage.device)
        condition(note, scale)(x, torch.full((num_images,), int(walk.timesteps[0]), device=stage.device))
        calls = network_calls(visits(walk.timesteps, walk.final_step, walk.jumps))
        total, pictures = total + len(asked) * calls, pictures + calls * sum(len(x) for x, *_ in asked)
        largest = max([largest, *asked] if largest else asked, key=lambda call: len(call[0]))
    x, t, embeds = largest
    labels = t if stage.unet.config.class_embed_type else None
    for _ in range(2):
        start = time.perf_counter()
        stage.unet(x, t, embeds, labels).sum().item()
        seconds = time.perf_counter() - start
        if seconds > 2:
            break
    each = f"{len(x)} pictures in each" if pictures == total * len(x) else f"up to {len(x)} pictures in each"
    print(f"{what}: {total} UNet calls, {each}, about {seconds * pictures / len(x):.0f} s")
