"""Prompts to text states: the tokenizer and T5 together, and files of encoded prompts.

Read `tokenizer.py` and `t5.py` first. T5-XXL is the largest part of DeepFloyd IF (11 GB in half precision) and is used
once per prompt, so there are three ways around holding it:

    streamed     half a block at a time out of the mapped file: about 1 GiB, slower per prompt
    encoded      `python -m minidiff.encode` writes states to a file; commands read it with --prompt-embeds
    the course's prompt_embeds_dict.pth, {prompt: (1, 77, 4096)}, is read in the same way

Next: `unet.py`, which reads the states.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from minidiff import hub, weights
from minidiff.deepfloyd.t5 import T5Config, T5Encoder, encode_streamed
from minidiff.deepfloyd.tokenizer import Tokenizer, clean

UNKNOWN_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class TextEncoder:
    """Tokenizer and T5: prompts to (B, 77, D) states. `encode_ids` is the whole encoder or the streamed one."""

    tokenizer: Tokenizer
    encode_ids: Callable[[Tensor, Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, 77, D), on the encoder's device. The empty prompt is a prompt like any other, and never zeros."""
        return self.encode_ids(*self.tokenizer(list(prompts)))


def load_text_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", streamed: bool = False
) -> TextEncoder:
    """From a folder in the released layout.

    dtype: what to compute in. streamed holds half a block at a time and stays on the CPU.
    Raises ValueError (hub.WeightsError among them) if files are missing, broken or of another architecture.
    """
    tokenizer = Tokenizer(folder / "tokenizer" / "spiece.model")
    checkpoint = weights.Checkpoint(folder, "text_encoder", dtype)
    encoder = weights.built(lambda config: T5Encoder(T5Config.from_dict(config)), checkpoint)
    config, pieces = encoder.config, tokenizer.pieces.get_piece_size()
    if pieces > config.vocab_size:
        raise hub.WeightsError(f"{folder}: the tokenizer has {pieces} pieces, the text encoder knows "
                               f"{config.vocab_size}; are they of one model?")  # fmt: skip
    if streamed:
        fetch, rows = checkpoint.tensors, checkpoint.rows
        return TextEncoder(tokenizer, lambda ids, mask: encode_streamed(config, fetch, rows, dtype, ids, mask))
    weights.load(encoder, checkpoint, dtype, keep_float32=("wo",)).to(device)
    return TextEncoder(tokenizer, lambda ids, mask: encoder(ids.to(device), mask.to(device)))


def should_stream(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """True if the whole encoder would take more than half of the free memory, or nine tenths of the GPU's.

    Where free memory cannot be asked for (macOS, Windows): if it is larger than UNKNOWN_MEMORY.
    """
    checkpoint = weights.Checkpoint(folder, "text_encoder", dtype)
    encoder = weights.built(lambda config: T5Encoder(T5Config.from_dict(config)), checkpoint)
    parameters = dict(encoder.named_parameters())
    size = sum(p.numel() * (4 if ".wo." in name else dtype.itemsize) for name, p in parameters.items())  # wo: float32
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
    """Which text encoder this is: sha256 over its shapes and, of each weight file, the length and both ends."""
    digest = hashlib.sha256()
    checkpoint = weights.Checkpoint(folder, "text_encoder")
    digest.update(json.dumps(sorted(map(str, checkpoint.shapes.items()))).encode())
    for path in checkpoint.files:
        with path.open("rb") as f:
            digest.update(str(path.stat().st_size).encode() + f.read(65536))
            f.seek(-min(65536, path.stat().st_size), os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()[:16]


def write_embeds(path: Path, prompts: Sequence[str], embeds: Tensor, encoder: str) -> None:
    """prompts and their states (N, L, D) as safetensors; encoder: its fingerprint. Prompt texts are in the metadata."""
    metadata = {"prompts": json.dumps([clean(p) for p in prompts]), "encoder": encoder, "format": "minidiff embeds 1"}
    weights.save({"prompt_embeds": embeds}, path, metadata)


def read_embeds(path: Path, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
    """The states of these prompts, (N, L, D), from a file of `write_embeds` or the course's .pth dictionary.

    encoder: if given, the fingerprint the file must have been made with.
    Raises ValueError if the file is missing, is neither of the two, lacks a prompt (and lists those it has), or was
    made by another encoder. A .pth is read with weights_only, so it can hold tensors but run nothing.
    """
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no file of encoded prompts at {path}; make one: python -m minidiff.encode PROMPT --out FILE")
    if path.suffix in (".pth", ".pt"):
        table = _read_course(path)
    else:
        try:
            with safetensors.safe_open(path, "pt") as f:
                metadata, embeds = f.metadata() or {}, f.get_tensor("prompt_embeds")
                texts = [str(text) for text in json.loads(metadata.get("prompts", "[]"))]
            if embeds.ndim != 3 or len(texts) != len(embeds):
                raise ValueError(f"{len(texts)} prompts, but states of shape {tuple(embeds.shape)}")
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no file of encoded prompts ({error}); encode them again") from None
        if encoder is not None and metadata.get("encoder") != encoder:
            raise ValueError(f"{path} was made by another text encoder ({metadata.get('encoder')}, not {encoder}); "
                             "encode the prompts again with this model")  # fmt: skip
        table = dict(zip(texts, embeds))
    missing = [p for p in prompts if clean(p) not in table]
    if missing:
        raise ValueError(f"{path} lacks {missing}; it holds {sorted(table)}")
    found = torch.stack([table[clean(p)] for p in prompts])
    if not found.isfinite().all():
        raise ValueError(f"{path}: the states of {list(prompts)} are not all finite; encode them again")
    return found


def _read_course(path: Path) -> dict[str, Tensor]:
    """{prompt: (1, L, D)} -> {cleaned prompt: (L, D)}."""
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message says how to open it all the same
        raise ValueError(f"{path} holds more than tensors, which could run anything, and was not opened") from None
    except Exception as error:  # of many classes, on files that are no pickles
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is broken or no .pth file, and was not opened: {reason}") from None
    good = isinstance(table, dict) and all(isinstance(p, str) and isinstance(v, Tensor) for p, v in table.items())
    if not good or len({tuple(v.shape) for v in table.values()}) != 1 or next(iter(table.values())).shape[:-2] != (1,):
        raise ValueError(f"{path} must hold a dictionary from prompts to tensors (1, 77, D), all alike")
    return {clean(prompt): embeds[0] for prompt, embeds in table.items()}
