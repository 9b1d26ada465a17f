"""How weights get from a file into a network without being copied, and how a file is written whole or not at all.

    Checkpoint   one part of a model folder -> names, shapes, and tensors that are mapped from the file, not read
    built, fill  a part into a module       -> strict: every key and shape must fit, or one report says what does not
    write_whole  any file                   -> first under a temporary name in the same folder, then renamed

A safetensors file is a JSON header (names, types, shapes, offsets) and the raw numbers. Mapping means that the system
pages numbers in when they are used and may drop them again, so a 20 GB file opens at once and costs what is touched.

This is plumbing: skim it. It knows neither networks nor where models lie; `weights.py` does.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VARIANT = {torch.float16: "fp16", torch.float32: "", torch.bfloat16: "bf16"}
# unet: diffusion_pytorch_model, text encoder: model; the variant stands before the shard number or, formerly, after it.
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(fp16|bf16))?(?:-(\d+)-of-(\d+))?(?:\.(fp16|bf16))?\.safetensors"
)
RENAMED = {"encoder.embed_tokens.weight": "shared.weight"}  # one matrix, stored under either name or both
IGNORED = ("decoder", "lm_head")  # the half of a full T5 that IF does not use


class WeightsError(ValueError):
    """Weights that are missing, unreachable, broken or of another model. The message says what to do."""


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises WeightsError if the file is missing, unreadable or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"there is no {path}; the folder must have the layout of the released models") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON, or is unreadable ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def read_config(folder: Path) -> dict:
    """The config.json of a folder. Raises WeightsError as `read_json`."""
    return read_json(folder / "config.json")


def choose_files(names: Iterable[str], dtype: torch.dtype | None, where: str) -> list[str]:
    """Of the files of one part, those that hold its weights, in one variant (full, fp16 or bf16) and all its shards.
    dtype: the variant of that type is preferred, fp16 if None, and else whatever is there.
    Raises WeightsError if a variant is there twice, or no variant is complete, naming the missing shards."""
    names = sorted(names)
    groups: dict[tuple[str, int], dict[int, str]] = {}  # (variant, how many shards) -> number of a shard -> file
    for name in names:
        if match := WEIGHT_FILE.fullmatch(name):
            groups.setdefault((match[1] or match[4] or "", int(match[3] or 1)), {})[int(match[2] or 1)] = name
    order = [VARIANT.get(dtype, "fp16"), *VARIANT.values()]
    for (variant, total), shards in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        twice = [min(group.values()) for (name, _), group in groups.items() if name == variant]
        if len(twice) > 1:
            raise WeightsError(f"{where}: {' and '.join(twice)} are of two saves; delete the files of the older one")
        if len(shards) == total:
            return [shards[i] for i in sorted(shards)]
    if groups:
        (_, total), shards = next(iter(groups.items()))
        missing, like = ", ".join(str(i) for i in range(1, total + 1) if i not in shards), shards[max(shards)]
        raise WeightsError(f"{where}: of {total} shards like {like}, number {missing} is missing; fetch it too")
    others = [n for n in names if n.endswith((".safetensors", ".bin", ".pth", ".pt"))]
    if len(others) == 1 and others[0].endswith(".safetensors"):
        return others
    found = f"only {', '.join(others)}" if others else "nothing"
    raise WeightsError(f"{where}: expected a file like model.fp16.safetensors, found {found}; pickles are not read")


class Checkpoint:
    """One part of a model folder: `config`, and tensors that stay in the file until they are used.

    folder: in the released layout.  part: "unet" or "text_encoder".  dtype: as for `choose_files`.
    config: the dict of config.json.  shapes, dtypes: dicts by key, from the headers alone.  files: list of Path.
    Raises WeightsError if config or weights are missing, unreadable or damaged.
    """

    def __init__(self, folder: str | Path, part: str, dtype: torch.dtype | None = None):
        self.folder = Path(folder) / part
        self.config = read_config(self.folder)
        names = [p.name for p in self.folder.iterdir() if not p.is_dir()]
        self.files = [self.folder / name for name in choose_files(names, dtype, str(self.folder))]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._stored: dict[str, tuple[Path, str]] = {}  # our key -> (file, the key in it)
        for path in self.files:
            with _open(path) as f:
                for stored in (name for name in f.keys() if not name.startswith(IGNORED)):
                    key, entry = RENAMED.get(stored, stored), f.get_slice(stored)
                    if (kind := entry.get_dtype()) not in DTYPES:
                        raise WeightsError(f"{path}: {stored} is {kind}; known types: {', '.join(DTYPES)}")
                    self._stored[key] = path, stored
                    self.shapes[key], self.dtypes[key] = tuple(entry.get_shape()), DTYPES[kind]

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, mapped from the file. Each call maps afresh: dropping its tensors unmaps their pages."""
        opened = functools.cache(_open)  # each file once
        places = {key: self._stored[key] for key in keys}
        return {key: opened(path).get_tensor(stored) for key, (path, stored) in places.items()}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors below a prefix, without it, mapped as in `read`."""
        inside = self.read(key for key in self.shapes if key.startswith(prefix))
        return {key.removeprefix(prefix): tensor for key, tensor in inside.items()}

    def check_finite(self) -> None:
        """Read each tensor once. Raises WeightsError naming the first that holds NaN or infinity."""
        for key in self.shapes:
            if bad := int((~self.read([key])[key].isfinite()).sum()):
                raise WeightsError(f"{self._stored[key][0]}: NaN or infinity in {key} ({bad} numbers); fetch it again")


def _open(path: Path):
    """`safe_open`, with an error that says what is wrong with the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: {_diagnose(path)} [{error}]") from error


def _diagnose(path: Path) -> str:
    """Why a file is no safetensors file, and what to do."""
    try:
        with path.open("rb") as f:
            start, size = f.read(200).lstrip().lower(), f"({path.stat().st_size} bytes)"
    except OSError as error:
        return f"unreadable ({error.strerror}); make it a file that you may read"
    if start.startswith(b"version https://git-lfs"):
        return f"a git-lfs pointer {size}, not the weights; run `git lfs pull`, or download the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"a web page {size} saved in place of the weights; delete it, log in and download it again"
    return f"cut short or damaged {size}; delete it and fetch it again"


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Networks built inside have shapes but no numbers: no memory, no time for a random start that `fill` replaces.
    As `torch.device("meta")`, but `normal_` does nothing: there its first call imports 900 modules, in 3 seconds."""
    with torch.device("meta"), _NoNormals():
        yield


class _NoNormals(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def blaming(path: Path, verdict: str = "cannot be built") -> Iterator[None]:
    """Whatever the values of a config raise inside becomes a WeightsError that names its file."""
    try:
        yield
    except WeightsError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{path} {verdict}: {error}") from error


def built(network: Callable[[dict], nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """network(config) `on_meta`. Raises WeightsError if the config cannot be built, and as `check_fit`."""
    with blaming(checkpoint.folder / "config.json"), on_meta():
        module = network(checkpoint.config)
    check_fit(module, checkpoint)
    return module


def fill(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a module of `built` its weights, and return it ready for inference, on the CPU.

    dtype: of the result; None keeps each tensor as the file has it. Tensors that already have it are the file's own
    mapped pages, without a copy; others are converted a few at a time, so memory peaks just above the result.
    The float32 weights of T5's layers "wo" stay float32: in half precision their products overflow."""
    as_stored, converted = [], []
    for key, stored in checkpoint.dtypes.items():
        kept = stored == torch.float32 and key.endswith(".wo.weight")
        (as_stored if dtype in (None, stored) or kept else converted).append(key)
    state = checkpoint.read(as_stored)
    portion = max(1, len(converted) // 64)  # what is mapped beside the result while it is converted
    for i in range(0, len(converted), portion):
        state |= {key: t.to(dtype) for key, t in checkpoint.read(converted[i : i + portion]).items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def check_fit(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises WeightsError with all missing, unexpected and misshapen keys if the checkpoint does not fit exactly."""
    expected, found = {key: tuple(t.shape) for key, t in module.state_dict().items()}, checkpoint.shapes
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "misshapen": [f"{key}: {found[key]} in the file, {shape} expected"
                      for key, shape in expected.items() if found.get(key, shape) != shape],
    }  # fmt: skip
    lines = [f"{', '.join(map(str, checkpoint.files))} does not fit {type(module).__name__}:"]
    for word, keys in problems.items():
        more = [f"... and {len(keys) - 10} more"] if len(keys) > 10 else []
        lines += [f"  {len(keys)} {word}:", *(f"    {line}" for line in keys[:10] + more)] if keys else []
    if any(problems.values()):
        lines.append(f"Do {checkpoint.folder / 'config.json'} and the weights belong to the same model?")
        raise WeightsError("\n".join(lines))


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The precision to compute in: float16, as the released files are, where that is fast; float32 elsewhere.
    CUDA: float16.  MPS: float32.  CPU: float16 if the processor has float16 arithmetic (AVX-512 FP16, AMX), where it is
    2 to 4 times as fast as float32; other processors emulate it at a tenth of the speed."""
    fast = (kind := torch.device(device).type) == "cuda"
    if kind == "cpu" and torch.backends.mkldnn.is_available():
        fast = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.float16 if fast else torch.float32


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it; an error leaves the old file.
    Raises OSError, also where safetensors or torch have an error of their own for a full disk."""
    path = Path(os.path.expanduser(path))
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")  # its ending tells Pillow the kind of image
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would let nobody else read
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(path, lambda file: save_file(tensors, file, metadata))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, indented and sorted, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_state(state: dict, path: Path) -> None:
    """Write what a training needs to go on, as torch does it, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))
