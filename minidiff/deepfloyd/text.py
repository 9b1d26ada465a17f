"""Prompts to text states: the tokenizer and T5 together, and files of encoded prompts.

Read `tokenizer.py` and `t5.py` first. T5-XXL is the largest part of DeepFloyd IF (11.5 GB in half precision) and is
used once per prompt, so there are three ways around holding it:

    streamed     one matrix at a time out of the mapped file: below 1 GiB, slower per prompt
    encoded      `python -m minidiff.encode` writes states to a file; commands read it with --prompt-embeds
    the course   its prompt_embeds_dict.pth, {prompt: (1, 77, 4096)}, is read and written in the same way
"""

import contextlib
import functools
import hashlib
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from minidiff.checkpoint import Checkpoint, WeightsError, built, default_dtype, fill, save, save_state
from minidiff.deepfloyd.t5 import T5Config, T5Encoder, encode_streamed
from minidiff.deepfloyd.tokenizer import MAX_TOKENS, Tokenizer, clean

UNKNOWN_MEMORY = 4 * 2**30  # bytes: the largest encoder held whole where free memory is not known
STATES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the types that a file of states may have
WHOLE = 2**22  # bytes of a tensor that `fingerprint` reads in full
PAGES, PAGE = 64, 4096  # of a larger tensor: how many places, and bytes at each


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and T5: prompts to (B, 77, D) states. `encode_ids` is the whole encoder or the streamed one."""

    tokenizer: Tokenizer
    encode_ids: Callable[[Tensor, Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, 77, D), on the encoder's device. The empty prompt is a prompt like any other, and never zeros."""
        return self.encode_ids(*self.tokenizer(list(prompts)))


def plan_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Tokenizer, T5Encoder, Checkpoint]:
    """The tokenizer, a T5 that has no numbers yet, and the checkpoint with its numbers, of this dtype if it is there.
    Raises ValueError (WeightsError among them) if files are missing, broken or of another architecture."""
    checkpoint = Checkpoint(folder, "text_encoder", dtype)
    tokenizer = Tokenizer(folder / "tokenizer" / "spiece.model")
    encoder = built(lambda config: T5Encoder(T5Config.from_dict(config)), checkpoint)
    if (pieces := tokenizer.pieces.get_piece_size()) > (rows := encoder.config.vocab_size):
        raise WeightsError(f"{folder}: the tokenizer has {pieces} pieces, the text encoder knows {rows}; "
                           "are they of one model?")  # fmt: skip
    return tokenizer, encoder, checkpoint


def load_text_encoder(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu", streamed: bool | None = False
) -> TextEncoder:
    """From a folder in the released layout.    Raises ValueError as `plan_text_encoder`.
    dtype: what to compute in; None: what the device is fast at.
    streamed: hold one matrix at a time, on the CPU; None: if memory is short, see `should_stream`."""
    precision = dtype or default_dtype(device)
    tokenizer, encoder, checkpoint = plan_text_encoder(folder, precision)
    if streamed or streamed is None and should_stream(encoder, precision, torch.device(device)):
        precision = dtype or default_dtype("cpu")
        return TextEncoder(tokenizer, functools.partial(encode_streamed, encoder, checkpoint.tensors, precision))
    fill(encoder, checkpoint, precision).to(device)
    return TextEncoder(tokenizer, lambda ids, mask: encoder(ids.to(device), mask.to(device)))


def reader(
    folder: Path | None, width: int, dtype: torch.dtype | None, device: torch.device, streamed: bool | None,
    embeds: str | Path | None,
) -> Callable[[Sequence[str]], Tensor]:  # fmt: skip
    """N texts to states (N, 77, width): by the text encoder, which is read at every call and then freed, or of a file.

    folder: the text encoder's; with embeds, the file, it may be None, and else must be the one that made the file.
    Raises ValueError, only when it reads, if the states have another width.
    """

    def read(texts: Sequence[str]) -> Tensor:
        if embeds is None:
            states = load_text_encoder(folder, dtype, device, streamed)(texts)
        else:
            states = read_embeds(Path(embeds), texts, fingerprint(folder) if folder else None)
        if states.shape[-1] != width:
            raise ValueError(f"the stages read text states of width {width}, these have width {states.shape[-1]}; "
                             "encode the prompts with a text encoder of their family")  # fmt: skip
        return states

    return read


def should_stream(encoder: T5Encoder, dtype: torch.dtype, device: torch.device) -> bool:
    """True if the whole encoder would take more than half of the free memory, or nine tenths of the GPU's.
    Where free memory cannot be asked for (macOS, Windows): if the encoder takes more than UNKNOWN_MEMORY."""
    size = sum(p.numel() * (4 if ".wo." in name else dtype.itemsize)  # wo: float32
               for name, p in encoder.named_parameters())  # fmt: skip
    if device.type == "cuda":
        return size > torch.cuda.mem_get_info(device)[0] * 0.9
    free = free_memory()
    return size > (UNKNOWN_MEMORY if free is None else free / 2)


def free_memory() -> int | None:
    """Bytes that could be had, the page cache included, within the limit of a container; None if not known here."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # not Linux
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or "max", no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def fingerprint(folder: Path) -> str:
    """Which text encoder this is: 16 digits of sha256 over names, types, shapes and numbers of all tensors.

    A tensor of up to 4 MiB counts with every byte, which is all of a small encoder. Of a larger one, 64 pages of 4 KiB
    count, evenly spread from its first to its last byte: T5-XXL then takes seconds, not a minute. Training moves every
    matrix in most places, so it shows; a change of a few rows of one large matrix may not.
    """
    digest, checkpoint = hashlib.sha256(), Checkpoint(folder, "text_encoder")
    for key in sorted(checkpoint.shapes):
        digest.update(f"{key} {checkpoint.dtypes[key]} {checkpoint.shapes[key]}".encode())
        raw = checkpoint.read([key])[key].flatten().view(torch.uint8).numpy()  # mapped: only what is hashed is read
        pages, length = (PAGES, PAGE) if len(raw) > WHOLE else (1, len(raw))
        for start in [(len(raw) - length) * i // max(pages - 1, 1) for i in range(pages)]:
            digest.update(raw[start : start + length])
    return digest.hexdigest()[:16]


def write_embeds(path: Path, prompts: Sequence[str], embeds: Tensor, encoder: str) -> None:
    """Prompts and their states (N, 77, D). encoder: its fingerprint.
    A .pth or .pt is the course's dictionary {prompt: (1, 77, D)}, which has no place for the fingerprint. Any other
    file is a safetensors file with prompts and fingerprint in the metadata."""
    if path.suffix in (".pth", ".pt"):
        save_state({prompt: states.clone() for prompt, states in zip(prompts, embeds.cpu().split(1))}, path)
        return
    metadata = {"prompts": json.dumps([clean(p) for p in prompts]), "encoder": encoder, "format": "minidiff embeds 2"}
    save({"prompt_embeds": embeds}, path, metadata)


def read_embeds(path: Path, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
    """The states of these prompts, (N, 77, D), from a file of `write_embeds` or the course's .pth dictionary.
    encoder: if given, the fingerprint the file must have been made with.  A .pth is read with weights_only, so it can
    hold tensors but run nothing.  Raises ValueError; if a prompt is not in the file, the message lists what is."""
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no file of encoded prompts at {path}; make one: python -m minidiff.encode PROMPT --out FILE")
    table = _read_course(path) if path.suffix in (".pth", ".pt") else _read_embeds(path, encoder)
    if missing := [p for p in prompts if clean(p) not in table]:
        empty = "; '' is the empty prompt, which guidance leads away from: encode it, too" if "" in missing else ""
        raise ValueError(f"{path} lacks {missing}; it holds {sorted(table)}{empty}")
    found = [table[clean(p)] for p in prompts]
    for prompt, states in zip(prompts, found):
        _check_states(path, prompt, states, found[0].shape[-1])
    states = torch.cat(found)
    return states.float() if states.dtype == torch.float64 else states


def _check_states(path: Path, prompt: str, states: Tensor, width: int) -> None:
    """Raises ValueError unless states are what a text encoder makes: (1, 77, width), dense, of finite floats."""
    dense = states.layout == torch.strided and not states.is_quantized and states.device.type == "cpu"
    good = dense and states.dtype in STATES and states.shape == (1, MAX_TOKENS, width) and width > 0
    if not good or not states.isfinite().all():
        kind = f"{tuple(states.shape)}, {states.dtype}, {states.layout}, on {states.device}"
        raise ValueError(f"{path}: the states of {prompt!r} must be (1, {MAX_TOKENS}, D) finite, dense floating-point "
                         f"numbers, but they are {'not all finite' if good else kind}; encode them again")  # fmt: skip


def _read_embeds(path: Path, encoder: str | None) -> dict[str, Tensor]:
    """A safetensors file of `write_embeds`: {cleaned prompt: (1, 77, D)}."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            metadata, embeds = f.metadata() or {}, f.get_tensor("prompt_embeds")
            texts = [str(text) for text in json.loads(metadata.get("prompts", "[]"))]
        if embeds.ndim != 3 or len(texts) != len(embeds):
            raise ValueError(f"{len(texts)} prompts, but states of shape {tuple(embeds.shape)}")
    except (safetensors.SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no file of encoded prompts ({error}); encode them again") from None
    if encoder is not None and metadata.get("format") == "minidiff embeds 1":
        warnings.warn(f"{path} is of an older minidiff: whether this text encoder made it is not known", stacklevel=1)
    elif encoder is not None and metadata.get("encoder") != encoder:
        raise ValueError(f"{path} was made by another text encoder ({metadata.get('encoder')}, not {encoder}); "
                         "encode the prompts again with this model")  # fmt: skip
    return {text: embeds[i : i + 1] for i, text in enumerate(texts)}


def _read_course(path: Path) -> dict[str, Tensor]:
    """The course's dictionary with cleaned prompts: {cleaned prompt: (1, L, D)}."""
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message says how to open it all the same
        raise ValueError(f"{path} holds more than tensors, which could run anything, and was not opened") from None
    except OSError as error:
        raise ValueError(f"{path} is unreadable ({error.strerror}); make it a file that you may read") from None
    except Exception as error:  # of many classes, on files that are no pickles
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is broken or no .pth file, and was not opened: {reason}") from None
    good = isinstance(table, dict) and all(isinstance(p, str) and isinstance(v, Tensor) for p, v in table.items())
    if not good or len({tuple(v.shape) for v in table.values()}) != 1 or next(iter(table.values())).shape[:-2] != (1,):
        raise ValueError(f"{path} must hold a dictionary from prompts to tensors (1, 77, D), all alike")
    return {clean(prompt): embeds.detach() for prompt, embeds in table.items()}
