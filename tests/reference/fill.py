"""Weights and inputs that need no storing: every number follows from a name and a shape.

`make.py`, which runs the reference programs, and the tests, which run ours, both fill their networks and inputs from
here; the reference files then hold outputs alone. The random stream is numpy's RandomState, which numpy keeps frozen,
seeded by the CRC-32 of the name.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent


def normal(name: str, *shape: int) -> Tensor:
    """Standard normal float32 numbers that depend on the name and the shape only."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of that name: norms near 1, biases near 0, matrices with spread 1 / sqrt(inputs)."""
    if name == "encoder.embed_tokens.weight":
        name = "shared.weight"  # transformers lists T5's one embedding under both names
    values = normal(name, *shape)
    if name.endswith("relative_attention_bias.weight"):
        return values
    if name.endswith(("shared.weight", "positional_embedding")):
        return 0.2 * values  # small, so that the epsilon of a norm behind it shows
    if name.endswith(("SelfAttention.q.weight", "SelfAttention.k.weight")):
        return 0.15 * values  # T5 does not divide scores by sqrt(d): its softmax stays between uniform and one-hot
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    return values / float(np.prod(shape[1:])) ** 0.5


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor of the model's state dict its `weight`. Returns the model, ready for inference."""
    model.load_state_dict({name: weight(name, tuple(x.shape)) for name, x in model.state_dict().items()}, strict=True)
    return model.eval()


def calm(unet: torch.nn.Module) -> torch.nn.Module:
    """Make a filled UNet's answers smaller, for whole walks: a random network otherwise magnifies rounding from step
    to step a hundredfold, and one could no longer compare closely."""
    unet.conv_out.weight.data *= 0.3
    return unet


def bent(x: Tensor, time: Tensor) -> Tensor:
    """A velocity field whose paths bend, and differ from picture to picture. x: (B, C, H, W) float64; time: (B,)."""
    size = x[0].numel()
    turn = normal("flow.turn", size, size).to(x) / size**0.5
    push = normal("flow.push", size).to(x)
    return torch.tanh(3 * x.flatten(1) @ turn + 4 * time[:, None] * push).view(x.shape)


def digest(name: str, x: Tensor) -> list[float]:
    """Two numbers that tell whether a block's output is right: its root mean square, and a random projection."""
    x = x.detach().double()
    return [x.square().mean().sqrt().item(), (x * normal(name, *x.shape).double()).mean().item() * x.numel() ** 0.5]


def relative_l2(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected|."""
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def read(name: str) -> dict[str, Tensor]:
    """The tensors of a reference file `name.safetensors`."""
    with safe_open(HERE / f"{name}.safetensors", "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def read_json(name: str) -> dict:
    """A reference file `name.json`."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
