"""Plumbing: what every command shares: flags, errors in one line, Ctrl-C, the device, and the last line it prints.

A command is `main(argv=None)` wrapped in `command`, which turns errors of the user's making into one line that says
what to do. Skim it. Next: `deepfloyd/tokenizer.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None

from minidiff import images
from minidiff.checkpoint import default_dtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps")
QUICK_STEPS = "4"
NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")  # Linux, Windows, Apple's GPUs


def finite(text: str) -> float:
    """The type of flags that take any number but nan and inf."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def file_path(text: str) -> Path:
    """The type of flags that name a file or folder: ~ is the home folder, also where no shell saw it (--out=~/run)."""
    return Path(os.path.expanduser(text))


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
    """A main whose errors of the user's making become one line on stderr and exit status 2; warnings one line each.
    Ctrl-C ends it with 130, as a shell expects."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            main(argv)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                cause = getattr(error, "inner_exception", error)
                print(f"error: torch.compile failed here ({type(cause).__name__}: {str(cause).splitlines()[0]}); "
                      "leave out --compile", file=sys.stderr)  # fmt: skip
                sys.exit(2)
            if not isinstance(error, torch.OutOfMemoryError) and not NO_MEMORY.search(str(error)):
                raise
            print(f"error: {error}; ask for less at once: fewer --num-images, --split-batch, or in training a smaller "
                  "--batch-size", file=sys.stderr)  # fmt: skip
            sys.exit(2)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            sys.exit(130)
        except (ValueError, FloatingPointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


@contextlib.contextmanager
def stopped_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside only sets a flag, so that no step is torn apart; a second one interrupts at once."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        os.write(2, b"\nstopping at the end of this step or picture; Ctrl-C again stops at once\n")
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def device_of(name: str) -> torch.device:
    """The device of this name, or the best of this machine if auto. Raises ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in DEVICES:
        raise ValueError(f"no device {name!r}; choose from {', '.join(DEVICES)}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]}); pass --device cpu") from None
    return device


def choose(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and precision asked for, or the best of this machine. Raises ValueError as `device_of`."""
    device = device_of(args.device)
    return device, default_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype]


def inputs(args: argparse.Namespace) -> list[Path]:
    """The pictures that a command was given."""
    return [path for name in ("image", "mask", "reference") if (path := getattr(args, name, None)) is not None]


def keep_inputs(args: argparse.Namespace, out: Path) -> None:
    """Raises ValueError if what is written to out would take the place of a picture that was given."""
    for path in inputs(args):
        if path.expanduser().resolve() == out.expanduser().resolve():
            raise ValueError(f"the result would take the place of {path}; pass another --out")


def animation_beside(args: argparse.Namespace) -> Path:
    """Where the animation that goes with the picture is written. Raises ValueError if it cannot be there."""
    out, animation = args.out, args.out.with_suffix(".gif")
    if out.suffix.lower() == ".gif":
        raise ValueError(
            f"the animation goes to {out}; pass another name for the picture: --out {out.with_suffix('.png')}"
        )
    keep_inputs(args, animation)
    images.check_output(animation)
    return animation


class Clock:
    """Seconds since it was made, and the most memory that the process has had."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __str__(self) -> str:
        text = f"{time.perf_counter() - self.start:.1f} s"
        if resource is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            text += f", peak memory {peak / 2**30:.2f} GiB"
        if torch.cuda.is_available():
            text += f" and {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
        return text


def settings(args: argparse.Namespace, name: str) -> dict[str, object]:
    """What goes into the picture's metadata: the command, its version and every flag."""
    flags = {key: value for key, value in vars(args).items() if value is not None}
    try:
        own = version("minidiff")
    except PackageNotFoundError:  # run from the folder, not installed
        own = "(not installed)"
    return {"Software": f"minidiff {own}", "command": f"python -m minidiff.{name}", **flags}


def finish(args: argparse.Namespace, name: str, rows: list[list[Tensor]], labels: list[list[str]], title: str,
           clock: Clock) -> None:  # fmt: skip
    """Write the labelled strip with its settings, and say where it is and what it took."""
    written = images.save(images.strip(rows, labels, title), args.out, settings(args, name))
    print(f"wrote {written}   ({clock})")
