"""What the commands share: flags, prompts from the command line, progress, and the last line with seconds and memory.

Plumbing: skim it. A command is `main(argv=None)` wrapped in `command`, which turns a ValueError into one line that
says what to do instead of a traceback.
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import hub, images, weights
from minidiff.deepfloyd import prompts as prompt_files
from minidiff.schedule import respaced

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUICK_STEPS = "4"


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """The flags that every picture-making command has; doc is the module's docstring, out the default file."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                   help="precision of the networks; auto: float16 where this machine is fast at it")  # fmt: skip
    p.add_argument("--out", type=Path, default=Path(out), help="picture to write (default %(default)s)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: a smoke test, not a picture")
    return p


def add_text_flags(p: argparse.ArgumentParser) -> None:
    """The flags of commands that read a prompt."""
    p.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: the empty prompt)")
    p.add_argument("--prompt-embeds", type=Path, metavar="FILE",
                   help="read the prompts' states from a file of minidiff.encode, or the course's .pth")  # fmt: skip
    p.add_argument("--text-encoder", choices=["auto", "whole", "streamed"], default="auto",
                   help="streamed: half a block in memory at a time; auto: if free memory is short")  # fmt: skip
    p.add_argument("--split-batch", action="store_true", help="two network calls per step with half the memory")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """A main whose ValueErrors become one line on stderr and exit status 2, and whose warnings are one line each."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            main(argv)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def choose(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and precision asked for, or the best of this machine. Raises ValueError if the device is not there."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]}); pass --device cpu") from None
    return device, weights.default_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype]


def encode(args: argparse.Namespace, model: str, texts: Sequence[str]) -> Tensor:
    """The states of these prompts, (N, L, D): from --prompt-embeds, or by the model's text encoder, then freed."""
    local = hub.resolve(model, 1, ("text_encoder",)) if model == "mini" else Path(model)
    if args.prompt_embeds:
        known = prompt_files.fingerprint(local) if (local / "text_encoder").is_dir() else None
        return prompt_files.read_embeds(args.prompt_embeds, texts, known)
    folder = hub.resolve(model, 1, ("text_encoder",), print)
    device, dtype = choose(args)
    streamed = args.text_encoder == "streamed"
    if args.text_encoder == "auto":
        streamed = prompt_files.should_stream(folder, dtype, device)
    if streamed and args.dtype == "auto":  # a streamed encoder computes on the CPU
        dtype = weights.default_dtype("cpu")
    return prompt_files.load_text_encoder(folder, dtype, device, streamed)(texts).cpu()


def timesteps(steps: str) -> Tensor:
    """--steps: a count, a name like smart50, or sections like 10,10,3,2,2. Raises ValueError as `respaced` does."""
    return respaced(steps)


def progress(total: int, what: str) -> Callable[..., None]:
    """An `on_step` that moves a progress bar."""
    bar = tqdm(total=total, desc=what, unit="step")

    def on_step(i: int, *_: object) -> None:
        bar.update()
        if i + 1 == total:
            bar.close()

    return on_step


@torch.inference_mode()
def announce(what: str, unet: nn.Module, batch: int, size: tuple[int, int], prompt_embeds: Tensor, calls: int) -> None:
    """Before a run: how many network calls it will make, and about how long.

    One call is timed to find out, and a second if the first was short, when warming up is most of it.

    batch: pictures per call, both branches of guidance counted.
    """
    device, config = unet.conv_in.weight.device, unet.config
    x = torch.zeros(batch, config.in_channels, *size, device=device)
    t = torch.zeros(batch, dtype=torch.long, device=device)
    labels = t if config.class_embed_type else None
    for _ in range(2):
        start = time.perf_counter()
        unet(x, t, prompt_embeds.to(device).expand(batch, -1, -1), labels).sum().item()
        seconds = time.perf_counter() - start
        if seconds > 2:
            break
    print(f"{what}: {calls} UNet calls, {batch} pictures in each, about {seconds * calls:.0f} s")


class Clock:
    """Seconds since it was made, and the most memory that the process has had."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __str__(self) -> str:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        text = f"{time.perf_counter() - self.start:.1f} s, peak memory {peak / 2**30:.2f} GiB"
        if torch.cuda.is_available():
            text += f" and {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
        return text


def settings(args: argparse.Namespace, name: str) -> dict[str, object]:
    """What goes into the picture's metadata: the command, its version and every flag."""
    flags = {key: value for key, value in vars(args).items() if value is not None}
    return {"Software": f"minidiff {version('minidiff')}", "command": f"python -m minidiff.{name}", **flags}


def finish(args: argparse.Namespace, name: str, rows: list[list[Tensor]], labels: list[list[str]], title: str,
           clock: Clock) -> None:  # fmt: skip
    """Write the labelled strip with its settings, and say where it is and what it took."""
    images.save(images.strip(rows, labels, title), args.out, settings(args, name))
    print(f"wrote {args.out}   ({clock})")
