"""Trained networks of digits on disk: a folder with config.json and model.fp16.safetensors.

What the trainers `write`, and what everything that draws or judges can `read`: a fraction of a checkpoint's size, since
matrices are kept in half precision and the optimizer is left out.

Read `mnist/unet.py` first. Next: `mnist/floors.py`, what such a network can and cannot reach.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff import checkpoint


def write(
    folder: Path, model: nn.Module, config: Mapping[str, object], more: Mapping[str, Tensor] | None = None
) -> None:
    """config.json and model.fp16.safetensors. Matrices become float16; vectors (norms, biases) and `more` do not.

    config: what `read` needs to build the network again, its "kind" first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() if v.ndim > 1 else v for k, v in model.state_dict().items()}
    checkpoint.save(tensors | dict(more or {}), folder / "model.fp16.safetensors", {"format": "pt"})
    (folder / "config.tmp").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "config.tmp", folder / "config.json")


def read(folder: Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """What `write` wrote: the config, and tensors as float32.

    Raises ValueError naming the command that trains one if there is none, or what is wrong with it.
    """
    maker = {"judge": "judge train", "denoiser": "train_denoiser", "ddpm": "train_diffusion --preset class",
             "flow": "train_flow --preset class"}  # fmt: skip
    how = f"train one with `python -m minidiff.mnist.{maker[kind]}"
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "training" / "checkpoint.pt").is_file():
            raise ValueError(
                f"there is no network in {folder} yet, only a run that has begun: it is written after the first epoch "
                "and on Ctrl-C, a judge at the end; the command that began it goes on with it"
            )
        raise ValueError(f"no trained {kind} in {folder}; {how} --out {folder}`")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.fp16.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); {how}` into another folder") from error
    found = config.get("kind") if isinstance(config, dict) else None
    if found != kind:
        raise ValueError(f"{folder} holds a {found}, not a {kind}; pass another folder, or {how}`")
    return config, {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """What `read` gave, into the network. Raises ValueError if it does not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder}: config.json and model.fp16.safetensors do not fit each other ({error})") from error
