"""How weights get from a file into a network without being copied.

    Checkpoint  one part of a model folder -> names, shapes, and tensors that are mapped from the file, not read
    load        a part into a module       -> strict: every key and shape must fit, or one report says what does not
    save        tensors to a file, which is never half-written

A safetensors file is a JSON header (names, types, shapes, offsets) and the raw numbers. Mapping means that the system
pages numbers in when they are used and may drop them again, so a 20 GB file opens at once and costs what is touched.

This is plumbing: skim it. `python -m minidiff.weights list`, `download NAME` and `check PATH` use it from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff import hub
from minidiff.hub import WeightsError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RENAMED = {"encoder.embed_tokens.weight": "shared.weight"}  # one matrix, stored under either name or both
IGNORED = ("decoder", "lm_head")  # the half of a full T5 that IF does not use


# ---------------------------------------------------------------------------------------------- reading


class Checkpoint:
    """One part of a model folder: `config`, and tensors that stay in the file until they are used.

    folder: in the released layout.  part: "unet" or "text_encoder".  dtype: which variant to prefer if there are
    several; float32 takes the full file, float16 (and None) the fp16 one, bfloat16 the bf16 one.
    config: the dict of config.json.  shapes, dtypes: dicts by key, from the headers alone.  files: list of Path.
    Raises WeightsError if config or weights are missing, cut short, or no safetensors at all.
    """

    def __init__(self, folder: str | Path, part: str, dtype: torch.dtype | None = None):
        self.folder = Path(folder) / part
        self.config = hub.read_config(self.folder)
        names = [p.name for p in self.folder.iterdir() if p.is_file()]
        self.files = [self.folder / name for name in hub.choose_files(names, dtype, str(self.folder))]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, tuple[Path, str]] = {}  # our key -> (file, the key in it)
        for path in self.files:
            with _open(path) as f:
                for stored in f.keys():
                    key = RENAMED.get(stored, stored) if part == "text_encoder" else stored
                    if part == "text_encoder" and key.startswith(IGNORED):
                        continue
                    entry = f.get_slice(stored)
                    if entry.get_dtype() not in DTYPES:
                        raise WeightsError(f"{path}: {stored} is {entry.get_dtype()}; known types: {', '.join(DTYPES)}")
                    self._stored[key] = path, stored
                    self.shapes[key], self.dtypes[key] = tuple(entry.get_shape()), DTYPES[entry.get_dtype()]

    def keys(self) -> list[str]:
        return list(self.shapes)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, mapped from the file. Each call maps afresh: dropping its tensors unmaps their pages."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._stored[key][0], []).append(key)
        tensors = {}
        for path, inside in by_file.items():
            with _open(path) as f:
                tensors.update({key: f.get_tensor(self._stored[key][1]) for key in inside})
        return tensors

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors below a prefix, which is removed from their names; mapped as in `read`.

        Raises WeightsError if there are none.
        """
        inside = [key for key in self.shapes if key.startswith(prefix)]
        if not inside:
            raise WeightsError(f"{self.folder} has no tensor whose name begins with {prefix!r}")
        return {key[len(prefix) :]: tensor for key, tensor in self.read(inside).items()}

    def rows(self, key: str, ids: Tensor) -> Tensor:
        """Some rows of one matrix, without reading the others. ids: (N,) int64. Returns (N, D) in the file's dtype.

        Raises WeightsError if there is no such matrix, or no such row.
        """
        if key not in self.shapes:
            raise WeightsError(f"{self.folder} has no tensor named {key!r}")
        n = self.shapes[key][0]
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < n):
            raise WeightsError(f"{key} has rows 0..{n - 1}, got {ids.tolist()}; is the tokenizer of another model?")
        return self.read([key])[key][ids]  # a copy: of the file, only what lies around these rows was paged in


def _open(path: Path):
    """`safe_open`, with an error that says what is wrong with the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: {_diagnose(path)} [{error}]") from error


def _diagnose(path: Path) -> str:
    """Why a file is no safetensors file, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(200)
        if start.startswith(b"version https://git-lfs"):
            return f"a git-lfs pointer ({size} bytes), not the weights; run `git lfs pull`, or download the file itself"
        if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return f"a web page ({size} bytes) saved in place of the weights; delete it, log in and download it again"
        length = int.from_bytes(start[:8], "little")
        try:
            f.seek(8)
            header = json.loads(f.read(min(length, size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"no safetensors file, or its header is cut short or damaged ({size} bytes); fetch it again"
    if size < expected:
        return f"cut short: {size} of {expected} bytes; delete it and fetch it again"
    return f"damaged ({size} bytes, {expected} expected); delete it and fetch it again"


# ---------------------------------------------------------------------------------------------- loading and saving


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Networks built inside have shapes but no numbers: no memory, no time for a random start that `load` replaces.

    The same as `torch.device("meta")`, except that `normal_` does nothing: on that device its first call imports a
    compiler's worth of modules, which takes seconds.
    """
    with torch.device("meta"), _NoNormals():
        yield


class _NoNormals(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def built(network: Callable[[dict], nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """network(config) `on_meta`, into which the checkpoint fits exactly.

    Raises WeightsError if the config cannot be built, or with all missing, unexpected and misshapen keys.
    """
    try:
        with on_meta():
            module = network(checkpoint.config)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:  # of values nobody foresaw
        raise WeightsError(f"{checkpoint.folder / 'config.json'} cannot be built: {error}") from error
    check_fit(module, checkpoint)
    return module


def load(
    module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None = None, keep_float32: Collection[str] = ()
) -> nn.Module:
    """Give a module built `on_meta` its weights, and return it ready for inference, on the CPU.

    dtype: of the result; None keeps each tensor as the file has it. Tensors that already have it are the file's own
    mapped pages, without a copy; others are converted a few at a time, so memory peaks just above the result.
    keep_float32: layers whose float32 weights stay float32, by their own name ("wo": T5's feed-forward output
    overflows half precision).
    Raises WeightsError as `check_fit`.
    """
    check_fit(module, checkpoint)
    as_stored, converted = [], []
    for key, stored in checkpoint.dtypes.items():
        kept = stored == torch.float32 and not set(keep_float32).isdisjoint(key.split("."))
        (as_stored if dtype in (None, stored) or kept else converted).append(key)
    state = checkpoint.read(as_stored)
    for keys in _in_portions(converted, checkpoint):
        state.update({key: tensor.to(dtype) for key, tensor in checkpoint.read(keys).items()})
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check_fit(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises WeightsError with all missing, unexpected and misshapen keys if the checkpoint does not fit exactly."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = checkpoint.shapes
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key}: {found[key]} in the file, {shape} expected"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if not any(problems.values()):
        return
    lines = [f"{', '.join(map(str, checkpoint.files))} does not fit {type(module).__name__}:"]
    for word, keys in problems.items():
        if keys:
            lines += [f"  {len(keys)} {word}:"] + [f"    {key}" for key in keys[:10]]
            lines += [f"    ... and {len(keys) - 10} more"] if len(keys) > 10 else []
    lines.append(f"Do {checkpoint.folder / 'config.json'} and the weights belong to the same model?")
    raise WeightsError("\n".join(lines))


def _in_portions(keys: list[str], checkpoint: Checkpoint) -> list[list[str]]:
    """Cut keys into portions of about 1/32 of their bytes, so that reading one maps little beside the result."""
    sizes = {key: math.prod(checkpoint.shapes[key]) * checkpoint.dtypes[key].itemsize for key in keys}
    portions, filled = [], math.inf
    for key in keys:
        if filled + sizes[key] > sum(sizes.values()) / 32:
            portions.append([])
            filled = 0
        portions[-1].append(key)
        filled += sizes[key]
    return portions


def save(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, or leave the old one: first under a temporary name in the same folder, then renamed."""
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would let nobody else read
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(state: dict, path: Path) -> None:
    """What a training needs to go on, complete or not there. Raises OSError, also where torch has a word of its own."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, keys: Iterable[str]) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises WeightsError if it is damaged or lacks one of the keys."""
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        return {key: state[key] for key in keys}
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of many classes, on files that are no checkpoints
        raise WeightsError(f"{path} is no checkpoint of a run; pass another --out") from error


# ---------------------------------------------------------------------------------------------- precision


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The precision to load a released model in: float16, as its files are, where that is fast; float32 elsewhere.

    CUDA: float16.  MPS: float32.  CPU: float16 if the processor has float16 arithmetic (AVX-512 FP16, AMX), where it is
    2 to 4 times as fast as float32; other processors emulate it at a tenth of the speed.
    """
    kind = torch.device(device).type
    fast = kind == "cuda"
    if kind == "cpu" and torch.backends.mkldnn.is_available():
        fast = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.float16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------- command


def check(folder: Path, say: Callable[[str], None]) -> bool:
    """Describe each part of a model folder and compare it with the architecture; False if anything does not fit."""
    from minidiff.deepfloyd.t5 import T5Config, T5Encoder  # only this command looks ahead
    from minidiff.deepfloyd.unet import UNet, UNetConfig

    build = {
        "unet": lambda c: UNet(UNetConfig.from_dict(c)),
        "text_encoder": lambda c: T5Encoder(T5Config.from_dict(c)),
    }
    parts = [part for part in hub.PARTS if (folder / part).is_dir()]
    good = bool(parts)
    say(str(folder) if parts else f"{folder} has none of {', '.join(hub.PARTS)}")
    for part in parts:
        try:
            checkpoint = Checkpoint(folder, part)
            for path in checkpoint.files:
                say(f"  {part}/{path.name}: {hub.in_words(path.stat().st_size)}")
            types = sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})
            parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
            say(f"  {part}: {parameters:,} parameters in {len(checkpoint.shapes)} tensors, {', '.join(types)}")
            built(build[part], checkpoint)
            say(f"  {part}: every key and shape fits")
        except ValueError as error:
            say(f"  {part}: {error}")
            good = False
    return good


def _list() -> None:
    for name in hub.embedded():
        print(f"{name:14} embedded        {hub.WEIGHTS / name}")
    for name, released in hub.RELEASED.items():
        folder = hub.WEIGHTS / name if (hub.WEIGHTS / name).is_dir() else hub.cached(released.repo, ("unet",))
        print(
            f"{name:14} stage {released.stage} {hub.in_words(released.fp16_bytes):>9} {folder or 'not on this machine'}"
        )
    print("The text encoder, which all released models share, is 11.5 GB more.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="which models there are, and which are on this machine")
    fetch = commands.add_parser("download", help="fetch a released model into the Hugging Face cache")
    fetch.add_argument("name", choices=list(hub.RELEASED))
    fetch.add_argument("--part", choices=[*hub.PARTS, "all"], default="unet", help="default: unet")
    look = commands.add_parser("check", help="does a model on this machine fit the architecture?")
    look.add_argument("model", help="a folder, a name in weights/, or a released name that is in the cache")
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            _list()
        elif args.command == "download":
            parts = hub.PARTS if args.part == "all" else (args.part,)
            print(hub.resolve(args.name, hub.RELEASED[args.name].stage, parts, print))
        else:
            return 0 if check(_folder_to_check(args.model), print) else 1
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _folder_to_check(model: str) -> Path:
    candidates = [Path(model).expanduser(), hub.WEIGHTS / model]
    candidates += [hub.cached(hub.RELEASED[model].repo, (part,)) for part in hub.PARTS if model in hub.RELEASED]
    for folder in candidates:
        if folder is not None and folder.is_dir():
            return folder
    raise WeightsError(
        f"{model} is neither a folder, nor in {hub.WEIGHTS}, nor a released model in the Hugging Face cache"
    )


if __name__ == "__main__":
    raise SystemExit(main())
