"""`weights check` on damaged model folders: each gets its verdict in words; none is a traceback, none fits."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff import weights
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from tests.folders import FULL, HALF, SHARDS, T5, write_model, write_part

UNET, TEXT, PROCESS = "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"
Damage = Callable[[Path], object]


def config(name: str, **values: object) -> Damage:
    """Set keys of a JSON file."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return damage


def without(name: str, key: str) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        del values[key]
        (folder / name).write_text(json.dumps(values))

    return damage


def remove(name: str) -> Damage:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def number(name: str, key: str, value: float, place: int) -> Damage:
    """One number of one tensor."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        tensors[key].view(-1)[place] = value
        save_file(tensors, folder / name)

    return damage


def tensors(name: str, change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)

    return damage


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def stale(folder: Path) -> None:
    """A whole single file, of another training, beside the shards that the index names."""
    merged = {key: t + 1 for name in SHARDS for key, t in load_file(folder / "text_encoder" / name).items()}
    save_file(merged, folder / "text_encoder" / "model.fp16.safetensors")


def stale_and_incomplete(folder: Path) -> None:
    stale(folder)
    (folder / "text_encoder" / SHARDS[1]).unlink()


def other_variant(folder: Path) -> None:
    """The full-precision file, which a CPU takes, is broken; the half-precision one is whole."""
    wide = {key: t.float() for key, t in load_file(folder / "unet" / HALF).items()}
    wide["conv_in.bias"][3] = torch.nan
    save_file(wide, folder / "unet" / FULL)


def text_encoder(folder: Path, **values: int) -> None:
    """A whole text encoder of other sizes."""
    shutil.rmtree(folder / "text_encoder")
    t5 = {**T5, "vocab_size": 1000, **values}
    write_part(folder, "text_encoder", {"model.safetensors": T5Encoder(T5Config.from_dict(t5)).state_dict()}, t5)


def few_words(folder: Path) -> None:
    text_encoder(folder, vocab_size=100)


def noising(folder: Path) -> None:
    (folder / "image_noising_scheduler").mkdir()
    (folder / "image_noising_scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "cubic"}')


DAMAGES: dict[str, tuple[Damage, str]] = {
    # files that are not there
    "no scheduler": (remove("scheduler"), f"unet: there is no .*{PROCESS}"),
    "no scheduler file": (remove(PROCESS), f"unet: there is no .*{PROCESS}"),
    "no tokenizer": (remove("tokenizer"), "text_encoder: no tokenizer at .*spiece.model"),
    "no unet config": (remove(UNET), f"unet: there is no .*{UNET}"),
    "no unet weights": (remove(f"unet/{HALF}"), "unet: .*expected a file like .* found nothing"),
    "a shard missing": (remove(f"text_encoder/{SHARDS[0]}"), "of 2 shards like .*, number 1 is missing"),
    # files that are no such files
    "config is a folder": (in_place_of(UNET, Path.mkdir), f"{UNET} is not valid JSON, or is unreadable .*directory"),
    "config links to itself": (in_place_of(UNET, lambda p: p.symlink_to(p)), "is unreadable .*symbolic links"),
    "weights link nowhere": (in_place_of(f"unet/{HALF}", lambda p: p.symlink_to("gone")), f"{HALF}: unreadable"),
    "scheduler is a folder": (in_place_of(PROCESS, Path.mkdir), f"{PROCESS} is .* unreadable"),
    "config is empty": (content(UNET, b""), f"{UNET} is not valid JSON"),
    "config is no text": (content(TEXT, b"\xff\xfe{"), f"{TEXT} is not valid JSON"),
    "config is a list": (content(UNET, b"[]"), f"{UNET} must hold a JSON object, got list"),
    "config is deep": (content(UNET, b"[" * 200_000 + b"]" * 200_000), f"{UNET} is not valid JSON.*recursion"),
    "tokenizer is text": (content("tokenizer/spiece.model", b"pieces"), "spiece.model is not a SentencePiece model"),
    "weights cut short": (lambda f: os.truncate(f / "unet" / HALF, 100_000), f"{HALF}: cut short or damaged .100000"),
    "weights are a pointer": (content(f"unet/{HALF}", b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "weights are a page": (content(f"unet/{HALF}", b"<!doctype html>"), "a web page"),
    # numbers
    "NaN": (number(f"unet/{HALF}", "conv_in.weight", torch.nan, 5), "NaN or infinity in conv_in.weight"),
    "infinity": (number(f"unet/{HALF}", "conv_out.bias", torch.inf, 0), r"in conv_out.bias \(1 numbers"),
    "NaN in a shard": (number(f"text_encoder/{SHARDS[1]}", "encoder.final_layer_norm.weight", torch.nan, 15),
                       f"{SHARDS[1]}: NaN or infinity in encoder.final_layer_norm.weight"),
    "NaN in the other variant": (other_variant, f"{FULL}: NaN or infinity in conv_in.bias"),
    # tensors
    "a key missing": (tensors(f"unet/{HALF}", lambda t: t.pop("conv_in.bias")), "1 missing:\n    conv_in.bias"),
    "a key too many": (tensors(f"unet/{HALF}", lambda t: t.update(a=torch.ones(1))), "1 unexpected:\n    a"),
    "another shape": (tensors(f"unet/{HALF}", lambda t: t.update({"conv_in.bias": torch.ones(3)})), "1 misshapen"),
    "whole numbers": (tensors(f"unet/{HALF}", lambda t: t.update({"conv_in.bias": torch.ones(32).int()})), "is I32"),
    "an old file beside shards": (stale, "00001-of-.* and model.fp16.safetensors are of two saves; delete"),
    "an old file beside half the shards": (stale_and_incomplete, "are of two saves; delete"),
    # values of the UNet's config
    "sample_size null": (config(UNET, sample_size=None), "sample_size is None, but must be int"),
    "sample_size absurd": (config(UNET, sample_size=10**9), "sample_size is 1000000000"),
    "pool heads 5": (config(UNET, addition_embed_type_num_heads=5), "encoder_hid_dim 16 does not split into 5 heads"),
    "norm_eps null": (config(UNET, norm_eps=None), "norm_eps is None, but must be float"),
    "norm_eps negative": (config(UNET, norm_eps=-1e-5), "norm_eps is -1e-05"),
    "norm_eps NaN": (config(UNET, norm_eps=float("nan")), "norm_eps is nan"),
    "groups 0": (config(UNET, norm_num_groups=0), "norm_num_groups is 0"),
    "groups 7": (config(UNET, norm_num_groups=7), r"cannot be built: num_channels \(32\) must be divisible"),
    "layers a word": (config(UNET, layers_per_block="two"), "layers_per_block is 'two'"),
    "layers 0": (config(UNET, layers_per_block=0), r"layers_per_block is \[0, 0\]"),
    "widths a number": (config(UNET, block_out_channels=5), "block_out_channels is 5"),
    "widths a word": (config(UNET, block_out_channels=[32, "64"]), "block_out_channels is"),
    "types a number": (config(UNET, down_block_types=[1, 2]), "down_block_types is"),
    "scale true": (config(UNET, mid_block_scale_factor=True), "mid_block_scale_factor is True"),
    "in_channels 4": (config(UNET, in_channels=4), "does not fit UNet"),
    "no widths": (without(UNET, "block_out_channels"), "lacks block_out_channels"),
    # keys that change the network and are not built
    **{
        f"{key} {value}": (config(UNET, **{key: value}), f"{key} is {value!r}, but an IF UNet has")
        for key, value in (
            ("timestep_post_act", "silu"), ("mid_block_type", None), ("act_fn", "silu"), ("out_channels", 3),
            ("time_embedding_act_fn", "silu"), ("resnet_time_scale_shift", "default"),
        )
    },
    # values of the text encoder's config
    "max distance 0": (config(TEXT, relative_attention_max_distance=0), "relative_attention_max_distance is 0"),
    "max distance 8": (config(TEXT, relative_attention_max_distance=8), "max_distance must be above"),
    "buckets null": (config(TEXT, relative_attention_num_buckets=None), "relative_attention_num_buckets is None"),
    "epsilon negative": (config(TEXT, layer_norm_epsilon=-1e-6), "layer_norm_epsilon is -1e-06"),
    "epsilon a word": (config(TEXT, layer_norm_epsilon="small"), "layer_norm_epsilon is 'small'"),
    "T5 of version 1": (config(TEXT, feed_forward_proj="relu"), "feed_forward_proj is 'relu', but IF has T5 v1.1"),
    "a smaller vocabulary": (config(TEXT, vocab_size=100), "does not fit T5Encoder"),
    "a tokenizer of another model": (few_words, "the tokenizer has 124 pieces, the text encoder knows 100"),
    # values of the scheduler
    **{
        f"{key} {value}": (config(PROCESS, **{key: value}), f"describes no process of IF: .*{words}")
        for key, value, words in (
            ("trained_betas", [0.1, 0.2], "trained_betas must be None"),
            ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr must be False"),
            ("prediction_type", "v_prediction", "prediction_type must be 'epsilon'"),
            ("beta_schedule", "sigmoid", "beta_schedule must be"),
            ("num_train_timesteps", 10**12, "num_train_timesteps must be a whole number"),
            ("num_train_timesteps", None, "num_train_timesteps must be a whole number"),
            ("sample_max_value", None, ""),
            ("dynamic_thresholding_ratio", float("nan"), "need 0 < ratio"),
        )
    },
    "linear with odd betas": (config(PROCESS, beta_schedule="linear", beta_end=2), "numbers in .0, 1."),
    "noising of another kind": (noising, "image_noising_scheduler/.*describes no process of IF"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_gets_its_verdict(whole, tmp_path, name):
    damage, words = DAMAGES[name]
    folder = shutil.copytree(whole, tmp_path / "model", symlinks=True)
    damage(folder)
    lines = []
    assert not weights.check(folder, lines.append)
    assert re.search(words, "\n".join(lines)), "\n".join(lines)


def test_the_whole_folder_fits_and_there_are_many_damages(whole):
    lines = []
    assert weights.check(whole, lines.append), "\n".join(lines)
    assert len(DAMAGES) >= 40
