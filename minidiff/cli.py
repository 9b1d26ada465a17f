"""What every command shares: errors in one line, Ctrl-C, the device, and what a run cost.

A command is `main(argv=None)` wrapped in `command`: it parses flags, calls a function that knows nothing of flags, and
shows the result. Skim this file.
"""

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

try:
    import resource
except ImportError:  # not on Windows
    resource = None

DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps")
NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")  # Linux, Windows, Apple's GPUs


def finite(text: str) -> float:
    """The type of flags that take any number but nan and inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, such as 1 or 7.5, got {text!r}")
    return value


def file_path(text: str) -> Path:
    """The type of flags that name a file or folder: ~ is the home folder, also where no shell saw it (--out=~/run)."""
    return Path(os.path.expanduser(text))


def add_machine_flags(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where and in which precision to compute."""
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="auto", help="of the networks; auto: float16 where that is fast")
    p.add_argument("--text-encoder", choices=["auto", "whole", "streamed"], default="auto",
                   help="streamed: one matrix in memory at a time; auto: if free memory is short")  # fmt: skip
    return p


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """A main whose errors of the user's making become one line on stderr and exit status 2; warnings one line each.
    Ctrl-C ends it with 130, as a shell expects; a pipe that closes ends it quietly."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)  # until now it was that of minidiff/__init__.py
        try:
            try:
                main(argv)
            finally:  # also on the way out by sys.exit, as of --help
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it fails no second time
            sys.exit(0)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            sys.exit(130)
        except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError):
                if not isinstance(error, torch.OutOfMemoryError) and not NO_MEMORY.search(str(error)):
                    raise
                error = f"{error}; ask for less at once: fewer images, --split-batch, or a smaller --batch-size"
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


@contextlib.contextmanager
def stopped_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside only sets a flag, so that no step is torn apart; a second one interrupts at once."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        os.write(2, b"\nstopping at the end of this step or image; Ctrl-C again stops at once\n")
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
    try:
        if name.partition(":")[0] not in DEVICES:
            raise RuntimeError("of no use here")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no device {name!r}; choose from {', '.join(DEVICES)} ({reason})") from None
    return torch.device(name)


def settings(args: argparse.Namespace, name: str) -> dict[str, object]:
    """What goes into the image's metadata: the command, its version and every flag that was given.

    A list of one is written as what is in it: seed 5, prompt "a castle".
    """
    try:
        number = version("minidiff")
    except PackageNotFoundError:  # run from the folder, not installed
        number = "(not installed)"
    flags = {key: value for key, value in vars(args).items() if value is not None and value is not False}
    flags = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in flags.items()}
    if isinstance(flags.get("prompts"), str):
        flags["prompt"] = flags.pop("prompts")
    return {"Software": f"minidiff {number}", "command": f"python -m minidiff.{name}", **flags}


def cost() -> str:
    """The seconds since the process began, the imports included, and the most memory that it has had."""
    text = f"{seconds_of_process():.1f} s"
    if resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        text += f", peak memory {peak / 2**30:.2f} GiB"
    if torch.cuda.is_available():
        text += f" and {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return text


def seconds_of_process() -> float:
    """Wall-clock seconds since this process was started; on systems that do not say, since this file was imported."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - IMPORTED


IMPORTED = time.time()
