"""Model folders with networks of a few thousand weights, for the tests of files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from minidiff.checkpoint import on_meta
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.unet import UNet, UNetConfig

UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "cross_attention_dim": 32,
    "encoder_hid_dim": 16,
    "addition_embed_type_num_heads": 4,
    "in_channels": 3,
}
T5 = {
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
}
VOCABULARY = 1000  # at least the pieces of reference/spiece.model
SHARDS = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
FULL, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


def make_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig.from_dict(UNET))


def make_t5() -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(T5Config.from_dict(T5))


def empty(make, *args):
    with on_meta():
        return make(*args)


def write_part(folder: Path, part: str, files: dict[str, dict], config: dict | None = None) -> Path:
    """A model folder with one part: {file name: tensors}."""
    inside = folder / part
    inside.mkdir(parents=True, exist_ok=True)
    inside.joinpath("config.json").write_text(json.dumps(config or {"unet": UNET, "text_encoder": T5}[part]))
    for name, tensors in files.items():
        save_file(tensors, inside / name)
    return folder


def as_type(state: dict, dtype: torch.dtype) -> dict:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


def write_scheduler(folder: Path) -> None:
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "thresholding": True}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def write_model(folder: Path) -> Path:
    """A whole stage 1: UNet in one half-precision file, text encoder in two shards with their index."""
    write_part(folder, "unet", {HALF: as_type(make_unet().state_dict(), torch.float16)})
    write_scheduler(folder)
    t5 = {**T5, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    state = as_type(T5Encoder(T5Config.from_dict(t5)).state_dict(), torch.float16)
    halves = dict(zip(SHARDS, (dict(list(state.items())[:7]), dict(list(state.items())[7:]))))
    write_part(folder, "text_encoder", halves, t5)
    places = {key: name for name, tensors in halves.items() for key in tensors}
    index = folder / "text_encoder" / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "tokenizer").mkdir()
    shutil.copy(Path(__file__).parent / "reference" / "spiece.model", folder / "tokenizer")
    return folder
