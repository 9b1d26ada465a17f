"""The flags of the commands that draw: which cascade, from which image, with which seeds; and what they write.

Read `cascade.py` first.
"""

import argparse
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff import cli, editing, images, solvers
from minidiff.cascade import Cascade
from minidiff.cli import file_path, finite
from minidiff.sampling import Step, seeded

QUICK_STEPS = 4
NEUTRAL = "a high quality photo"  # what the course says of any image; mini draws a landscape


def seed_number(text: str) -> int:
    """The type of --seed, which takes a list, and so all that follows it."""
    try:
        return int(text)
    except ValueError:
        message = f"a seed is a whole number, got {text!r}; put a prompt before --seed"
        raise argparse.ArgumentTypeError(message) from None


def out_path(text: str) -> Path:
    """The type of --out. Its name gives the sheet and the animation theirs, and a folder such as . has none."""
    if (path := file_path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; pass a file name, such as {path / 'image.png'}")
    return path


def parser(doc: str, out: str, steps: str | None = None, stage2: str | None = "auto") -> argparse.ArgumentParser:
    """The flags of every command that draws.

    doc: the module's docstring.  out, steps, stage2: the defaults; stage2 None: the command has no such flag.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=seed_number, nargs="+", default=[0], help="one image each (default 0)")
    p.add_argument("--num-images", type=int, default=1, help="images of one --seed, counted up (default %(default)s)")
    p.add_argument("--out", type=out_path, default=Path(out), help="image to write (default %(default)s)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: a smoke test, not an image")
    p.add_argument("--model", default="mini", help="mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--steps", nargs="+", default=[steps] if steps else None,
                   help="a count, smart27, ..., or course: 990, 960, ..., 0 without thresholding (default: "
                   + f"{steps or 'mini 27, others 100'})")  # fmt: skip
    if stage2 is not None:
        p.add_argument("--stage2", default=stage2, help="likewise, auto (fits --model) or none (default %(default)s)")
        p.add_argument("--stage2-steps", nargs="+", help="of stage 2 (default: mini 20, others 50)")
        p.add_argument("--stage2-guidance-scale", type=finite, help="of stage 2 (default: mini 1, others 4)")
    p.add_argument("--sampler", choices=solvers.STEPS, help="of both stages (default ddpm)")
    p.add_argument("--guidance-scale", type=finite, nargs="+", help="of stage 1; 1: none (default: mini 3, others 7)")
    p.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    p.add_argument("--prompt-embeds", type=file_path, metavar="FILE",
                   help="read the prompts' states from a file of minidiff.encode, or the course's .pth")  # fmt: skip
    p.add_argument("--split-batch", action="store_true",
                   help="a network call for each prompt and branch, with less memory")  # fmt: skip
    return cli.add_machine_flags(p)


def add_edit_flags(p: argparse.ArgumentParser, image: bool = True) -> None:
    """The flags of commands that can start from an image and keep some of it. image: they take it by --image."""
    if image:
        p.add_argument("--image", type=file_path, help="an image to start from, or to keep some of")
        p.add_argument("--i-start", type=int, help="start from --image, noised to this place on the steps")
    marked = p.add_mutually_exclusive_group()
    marked.add_argument("--mask", type=file_path, help="an image of the same shape, white where new content goes")
    marked.add_argument("--box", type=finite, nargs=4, metavar=("X0", "Y0", "X1", "Y1"),
                        help="instead of --mask: a rectangle, in pixels of 64")  # fmt: skip
    p.add_argument("--feather", type=finite, default=0.0, help="soften the mask's seam, pixels of 64 (default 0)")


def seeds_of(args: argparse.Namespace) -> list[int]:
    """--seed 0 1 5, or --seed 7 --num-images 3: 7, 8, 9. Raises ValueError if both give several, or on a wrong seed."""
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    if len(args.seed) > 1 and args.num_images > 1:
        raise ValueError("several --seed are one image each; leave out --num-images")
    seeds = args.seed if len(args.seed) > 1 else [args.seed[0] + i for i in range(args.num_images)]
    seeded(seeds)  # raises if one is none
    return seeds


def load_cascade(args: argparse.Namespace, *, compares: bool = False, beside: Sequence[Path] = ()) -> Cascade:
    """The cascade of the flags, checked but not yet read; every file can be read or written.

    compares: whether the command takes several --steps and scales; the first of each becomes the cascade's setting.
    beside: what the command writes besides --out and its sheet.    Raises ValueError naming the flag.
    """
    check_files(args, beside)
    for flag in () if compares else ("steps", "stage2_steps", "guidance_scale"):
        if len(getattr(args, flag) or []) > 1:
            raise ValueError(f"this command takes one --{flag.replace('_', '-')}; minidiff.generate compares several")
    for steps in [*(args.steps or []), *(args.stage2_steps or [])]:
        solvers.times_for("ddpm", steps)  # raises if it is neither a count nor a name
    cascade = Cascade.load(
        args.model, args.stage2, text_model=getattr(args, "text_model", None), device=args.device,
        dtype=cli.DTYPES[args.dtype], text_encoder=args.text_encoder, prompt_embeds=args.prompt_embeds,
    )  # fmt: skip
    if not cascade.has_upper and (args.stage2_steps or args.stage2_guidance_scale is not None):
        raise ValueError("--stage2-steps and --stage2-guidance-scale need a stage 2; pass --stage2 mini, say")
    if args.quick:
        args.steps = args.stage2_steps = None
    scales = [args.guidance_scale and args.guidance_scale[0], args.stage2_guidance_scale]
    for i, (steps, scale) in enumerate(zip((args.steps, args.stage2_steps), scales)):
        steps = QUICK_STEPS if args.quick else steps and steps[0]
        cascade.settings[i] = cascade.settings[i].but(
            steps=steps, guidance_scale=scale, sampler=args.sampler, negative_prompt=args.negative_prompt
        )
    used = cascade.settings[args.model == "none" : 1 + cascade.has_upper]
    scales = [setting.guidance_scale for setting in used] + (args.guidance_scale or [])
    if args.negative_prompt and all(scale == 1 for scale in scales):
        warnings.warn("--negative-prompt does nothing at --guidance-scale 1, which is no guidance", stacklevel=2)
    cascade.progress, cascade.split_batch = True, args.split_batch
    return cascade


def check_files(args: argparse.Namespace, beside: Sequence[Path]) -> None:
    """Read --image, --mask and --reference, and try whether results can be written.

    Raises ValueError if an input is broken, or lies where a result could go, or a result has no place.
    """
    stem, folder = re.escape(args.out.stem), args.out.resolve().parent
    results = rf"{stem}(-\d+)?{re.escape(args.out.suffix)}|{stem}-sheet\.png"
    inputs = [path for name in ("image", "mask", "reference") if (path := getattr(args, name, None)) is not None]
    for path in inputs:
        taken = path.resolve().parent == folder and re.fullmatch(results, path.resolve().name)
        if taken or path.resolve() in [file.resolve() for file in beside]:
            raise ValueError(f"a result could take the place of {path}; pass another --out")
        images.load(path, 64)
    images.check_output(args.out, *images.output_paths(args.out, 2), *beside)


def animation_beside(args: argparse.Namespace) -> Path:
    """Where the animation that goes with the image is written. Raises ValueError if that is the image's own name."""
    if args.out.suffix.lower() == ".gif":
        raise ValueError(f"the animation goes to {args.out}; pass another name for the image: --out "
                         f"{args.out.with_suffix('.png')}")  # fmt: skip
    return args.out.with_suffix(".gif")


def noted(steps: Iterable[Step], record: list[Step]) -> Iterator[Step]:
    """The steps of a walk, each also appended to record."""
    for step in steps:
        record.append(step)
        yield step


def inputs_shown(
    image: Path, mask: Path | Sequence[float] | None, feather: float, size: int
) -> tuple[list[Tensor], list[str]]:
    """What a sheet shows of the input, and the labels: the original and, with a mask, the mask and the hole."""
    original = images.load(image, size)[0]
    if mask is None:
        return [original], ["original"]
    region = editing.feather(editing.mask_at(mask, size), feather)[0]
    hole = torch.where(region > 0.5, original.mean(), original)
    return [original, (2 * region - 1).expand_as(original), hole], ["original", "mask", "hole"]


def settings(args: argparse.Namespace, name: str, cascade: Cascade) -> dict[str, object]:
    """What goes into the image's metadata: `cli.settings`, with the settings that the cascade really used.

    It lists all --steps and scales where several are compared, and none of a stage that the cascade lacks.
    """
    metadata = cli.settings(args, name) | {"sampler": cascade.settings[0].sampler}
    is_used = {"": args.model != "none", "stage2_": cascade.has_upper}
    for (prefix, used), setting in zip(is_used.items(), cascade.settings):
        values = {prefix + "steps": setting.steps, prefix + "guidance_scale": setting.guidance_scale} if used else {}
        metadata |= {key: value for key, value in values.items() if not isinstance(metadata.get(key), list)}
    return metadata | ({} if cascade.has_upper else {"stage2": "none"})


def finish(
    args: argparse.Namespace, name: str, results: Sequence[Tensor], seeds: Sequence[int], rows: list[list[Tensor]],
    labels: list[list[str]], title: str, cascade: Cascade, differences: Sequence[dict[str, object]] | None = None,
) -> dict[str, object]:  # fmt: skip
    """Write the images themselves, and beside them the labelled sheet; say where they are and what it took.

    results: each (3, H, W) in [-1, 1].  seeds: one for the metadata of each; the sheet's metadata list all.
    rows, labels: of the sheet; one row or one column of many becomes a grid.
    differences: for each, other metadata of its own, such as its prompt.    Returns the sheet's metadata.
    """
    metadata = settings(args, name, cascade)
    if len(rows) == 1 and len(rows[0]) > 5 or len(rows) > 1 and all(len(row) == 1 for row in rows):
        rows, labels = images.grid([x for row in rows for x in row], [text for row in labels for text in row])
    sheet, each = images.sheet(rows, labels, title), []
    for seed, own in zip(seeds, differences or [{}] * len(seeds)):
        gone = ("num_images", "prompts" if "prompt" in own else "")
        each.append({key: value for key, value in metadata.items() if key not in gone} | {"seed": seed} | own)
    for path in images.save_images(results, sheet, args.out, metadata, each):
        print(f"wrote {path}")
    print(cli.cost())
    return metadata
