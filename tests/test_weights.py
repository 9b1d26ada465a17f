"""weights.py: files of every kind into networks, and clear words where that fails. No network beyond this machine."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff import hub, weights
from minidiff.deepfloyd.t5 import T5Config, T5Encoder, encode_streamed
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.weights import Checkpoint, WeightsError

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
FULL, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


def make_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig.from_dict(UNET))


def make_t5() -> T5Encoder:
    torch.manual_seed(0)
    return T5Encoder(T5Config.from_dict(T5))


def empty(make, *args):
    with weights.on_meta():
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


def write_by_hand(path: Path, tensors: dict[str, torch.Tensor], padding: int) -> None:
    """A safetensors file whose header has `padding` spaces: published ones are not padded to 8 bytes."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, body = {}, b""
    for key, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# ---------------------------------------------------------------------------------------------- reading and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_of_every_precision_arrive_unchanged(tmp_path, dtype):
    state = as_type(make_unet().state_dict(), dtype)
    checkpoint = Checkpoint(write_part(tmp_path, "unet", {FULL: state}), "unet")
    module = weights.load(empty(make_unet), checkpoint)
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) and loaded[key].dtype == dtype for key in state)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert checkpoint.config == UNET
    assert sorted(checkpoint.keys()) == sorted(state)
    assert checkpoint.shapes["conv_in.weight"] == (32, 3, 3, 3)
    assert set(checkpoint.dtypes.values()) == {dtype}


SHARDS = {
    "variant before": ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
    "variant after": ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
    "no variant": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "of a unet": [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ],
}


@pytest.mark.parametrize("style", SHARDS)
def test_both_styles_of_naming_shards(tmp_path, style):
    state = make_t5().state_dict()
    keys = sorted(state)
    halves = [{key: state[key] for key in part} for part in (keys[:7], keys[7:])]
    write_part(tmp_path, "text_encoder", dict(zip(SHARDS[style], halves)))
    index = "model.safetensors.index.fp16.json" if "fp16" in SHARDS[style][0] else "model.safetensors.index.json"
    (tmp_path / "text_encoder" / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {}}))
    checkpoint = Checkpoint(tmp_path, "text_encoder")
    assert [path.name for path in checkpoint.files] == SHARDS[style]
    loaded = weights.load(empty(make_t5), checkpoint).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_variant_follows_the_wanted_dtype():
    both = [FULL, HALF]
    assert hub.choose_files(both, None, "x") == [HALF]
    assert hub.choose_files(both, torch.float16, "x") == [HALF]
    assert hub.choose_files(both, torch.float32, "x") == [FULL]
    assert hub.choose_files([FULL], torch.float16, "x") == [FULL]
    assert hub.choose_files([*both, "model.bf16.safetensors"], torch.bfloat16, "x") == ["model.bf16.safetensors"]
    # half a download of one variant does not hide the other; files of other kinds are no weights
    partly = ["model.fp16-00001-of-00002.safetensors", "model.safetensors", "model.8bit.safetensors"]
    assert hub.choose_files(partly, None, "x") == ["model.safetensors"]
    # one file under a name of its own is taken
    assert hub.choose_files(["t5xxl_fp16.safetensors", "config.json"], None, "x") == ["t5xxl_fp16.safetensors"]


def test_missing_shards_and_pickles_are_named():
    with pytest.raises(
        WeightsError, match=r"x: of 3 shards like model-00003-of-00003.safetensors, number 2 is missing"
    ):
        hub.choose_files(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None, "x")
    with pytest.raises(WeightsError, match=r"found only pytorch_model.bin; pickles are not read"):
        hub.choose_files(["pytorch_model.bin"], None, "x")
    with pytest.raises(WeightsError, match=r"found nothing"):
        hub.choose_files(["config.json"], None, "x")


@pytest.mark.parametrize("padding", range(8))
def test_headers_need_no_alignment(tmp_path, padding):
    state = as_type(make_unet().state_dict(), torch.float16)
    state["conv_in.bias"] = state["conv_in.bias"].float()
    write_part(tmp_path, "unet", {})
    write_by_hand(tmp_path / "unet" / FULL, state, padding)
    loaded = weights.load(empty(make_unet), Checkpoint(tmp_path, "unet")).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    module = weights.load(empty(make_unet), Checkpoint(tmp_path, "unet"), torch.float32)
    expected = make_unet()
    expected.load_state_dict(as_type(state, torch.float32))
    inputs = torch.ones(1, 3, 8, 8), torch.tensor([5]), torch.ones(1, 4, 16)
    assert torch.equal(module(*inputs), expected.requires_grad_(False)(*inputs))


def test_t5_keeps_float32_wo_in_half_precision(tmp_path):
    state = make_t5().state_dict()
    checkpoint = Checkpoint(write_part(tmp_path, "text_encoder", {"model.safetensors": state}), "text_encoder")
    module = weights.load(empty(make_t5), checkpoint, torch.float16, keep_float32=("wo",))
    for key, tensor in module.state_dict().items():
        assert tensor.dtype == (torch.float32 if key.endswith("wo.weight") else torch.float16), key
        assert torch.equal(tensor, state[key].to(tensor.dtype))
    files = {"model.fp16.safetensors": as_type(state, torch.float16)}
    half = Checkpoint(write_part(tmp_path / "half", "text_encoder", files), "text_encoder")
    module = weights.load(empty(make_t5), half, torch.bfloat16, keep_float32=("wo",))
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}  # float16 would overflow: only float32 is kept


EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")


@pytest.mark.parametrize("names", [EMBEDDING[:1], EMBEDDING[1:], EMBEDDING])
def test_the_embedding_may_have_either_name_and_the_decoder_is_ignored(tmp_path, names):
    state = make_t5().state_dict()
    stored = {key: tensor for key, tensor in state.items() if key != "shared.weight"}
    stored |= {name: state["shared.weight"].clone() for name in names}
    stored |= {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2, 2)}
    checkpoint = Checkpoint(write_part(tmp_path, "text_encoder", {"model.safetensors": stored}), "text_encoder")
    assert sorted(checkpoint.keys()) == sorted(state)
    loaded = weights.load(empty(make_t5), checkpoint).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert torch.equal(checkpoint.rows("shared.weight", torch.tensor([3, 49, 3])), state["shared.weight"][[3, 49, 3]])


def test_streaming_reads_what_the_whole_encoder_reads(tmp_path):
    module = make_t5()
    write_part(tmp_path, "text_encoder", {"model.safetensors": module.state_dict()})
    checkpoint = Checkpoint(tmp_path, "text_encoder")
    ids, mask = torch.tensor([[4, 7, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    streamed = encode_streamed(module.config, checkpoint.tensors, checkpoint.rows, torch.float32, ids, mask)
    torch.testing.assert_close(streamed, module(ids, mask), rtol=1e-6, atol=1e-6)


def test_prefix_is_removed_and_block_1_is_not_block_10(tmp_path):
    stored = {f"block.{i}.w": torch.full((2,), float(i)) for i in (1, 10)}
    checkpoint = Checkpoint(write_part(tmp_path, "unet", {FULL: stored}), "unet")
    found = checkpoint.tensors("block.1.")
    assert found.keys() == {"w"}
    assert found["w"].tolist() == [1, 1]
    assert checkpoint.tensors().keys() == stored.keys()
    with pytest.raises(WeightsError, match=r"unet has no tensor whose name begins with 'block.2.'"):
        checkpoint.tensors("block.2.")
    with pytest.raises(WeightsError, match=r"unet has no tensor named 'shared.weight'"):
        checkpoint.rows("shared.weight", torch.tensor([0]))
    with pytest.raises(WeightsError, match=r"block.1.w has rows 0..1, got \[0, 2\]; is the tokenizer of another model"):
        checkpoint.rows("block.1.w", torch.tensor([0, 2]))


def test_one_report_of_all_that_does_not_fit(tmp_path):
    state = make_unet().state_dict()
    del state["conv_out.bias"], state["conv_in.bias"]
    state |= {f"extra.{i:02}": torch.ones(1) for i in range(13)}
    state["conv_in.weight"] = torch.ones(64, 3, 3, 3)
    checkpoint = Checkpoint(write_part(tmp_path, "unet", {FULL: state}), "unet")
    with pytest.raises(WeightsError) as error:
        weights.load(empty(make_unet), checkpoint)
    text = str(error.value)
    folder = tmp_path / "unet"
    assert text.startswith(f"{folder / FULL} does not fit UNet:\n  2 missing:\n    conv_in.bias\n    conv_out.bias\n")
    assert "  13 unexpected:\n    extra.00\n" in text
    assert "    extra.09\n    ... and 3 more\n" in text
    assert "extra.10" not in text
    assert "  1 misshapen:\n    conv_in.weight: (64, 3, 3, 3) in the file, (32, 3, 3, 3) expected\n" in text
    assert text.endswith(f"Do {folder / 'config.json'} and the weights belong to the same model?")


def test_on_meta_networks_have_shapes_and_no_numbers_are_drawn():
    with weights.on_meta():
        assert nn.Embedding(3, 4).weight.is_meta
        assert nn.Linear(3, 4).weight.is_meta
        ones = torch.ones(3, device="cpu")
        assert nn.init.normal_(ones) is ones
        assert ones.normal_().tolist() == [1, 1, 1]
    assert ones.normal_().tolist() != [1, 1, 1]
    assert not nn.Linear(3, 4).weight.is_meta


# ---------------------------------------------------------------------------------------------- memory


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory figures from /proc")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """50 layers of 1000 x 1000: 200 MB in float32."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}.weight": torch.empty(1000, 1000).uniform_(generator=generator) for i in range(50)}
    write_part(folder / "full", "unet", {FULL: state})
    write_part(folder / "half", "unet", {FULL: as_type(state, torch.float16)})
    return folder


def make_large() -> nn.Module:
    return nn.ModuleList([nn.Linear(1000, 1000, bias=False) for _ in range(50)])


@on_linux
def test_a_tensor_is_mapped_and_unmapped(large):
    checkpoint = Checkpoint(large / "full", "unet")
    path = checkpoint.files[0]
    checkpoint.read(["0.weight"])["0.weight"].sum()  # whatever the first read costs
    gc.collect()
    before = memory("VmRSS")
    tensors = checkpoint.tensors("7.")
    assert mappings(path) == 1
    tensors["weight"].sum()
    assert 2 < memory("VmRSS") - before < 10  # its own 4 MB of 200
    del tensors
    assert mappings(path) == 0
    assert memory("VmRSS") - before < 2


@on_linux
def test_the_files_own_dtype_is_loaded_without_a_copy(large):
    checkpoint = Checkpoint(large / "full", "unet")
    before = memory("VmRSS")
    module = weights.load(empty(make_large), checkpoint, torch.float32)
    assert memory("VmRSS") - before < 10
    start, end = next(
        (int(a, 16), int(b, 16))
        for a, b in re.findall(
            r"(\w+)-(\w+) .*" + re.escape(str(checkpoint.files[0])), Path("/proc/self/maps").read_text()
        )
    )
    assert all(start <= p.data_ptr() < end for p in module.parameters())


@on_linux
@pytest.mark.parametrize(("stored", "wanted", "result"), [("half", torch.float32, 200), ("full", torch.bfloat16, 100)])
def test_conversion_peaks_just_above_the_result(large, stored, wanted, result):
    checkpoint = Checkpoint(large / stored, "unet")
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak here
    except OSError:
        pytest.skip("this system does not let a process restart its peak memory")
    before = memory("VmRSS")
    module = weights.load(empty(make_large), checkpoint, wanted)
    assert memory("VmHWM") - before < 1.15 * result
    assert {p.dtype for p in module.parameters()} == {wanted}
    assert torch.equal(module[49].weight, checkpoint.read(["49.weight"])["49.weight"].to(wanted))


# ---------------------------------------------------------------------------------------------- broken files


def break_file(tmp_path: Path, change) -> str:
    """The error of a UNet file whose bytes went through `change`."""
    path = write_part(tmp_path, "unet", {FULL: {"a": torch.ones(1000)}}) / "unet" / FULL
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError) as error:
        Checkpoint(tmp_path, "unet")
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_broken_files_are_named_with_what_to_do(tmp_path):
    whole = 8 + 64 + 4000  # the header's length, the header padded to 64, 1000 numbers
    cut = break_file(tmp_path, lambda data: data[:-1000])
    assert f"cut short: {whole - 1000} of {whole} bytes; delete it and fetch it again" in cut
    assert f"damaged ({whole + 7} bytes, {whole} expected)" in break_file(tmp_path, lambda data: data + b"\0" * 7)
    header = "no safetensors file, or its header is cut short or damaged"
    assert f"{header} (30 bytes)" in break_file(tmp_path, lambda data: data[:30])
    assert f"{header} (0 bytes)" in break_file(tmp_path, lambda data: b"")
    assert f"{header} ({whole} bytes)" in break_file(tmp_path, lambda data: data[:8] + b"x" + data[9:])
    assert header in break_file(tmp_path, lambda data: b"\x80\x02}q\x00." * 100)  # a pickle
    assert header in break_file(tmp_path, lambda data: struct.pack("<Q", 4) + b"[1] " + data)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 7\n"
    told = break_file(tmp_path, lambda data: pointer)
    assert f"a git-lfs pointer ({len(pointer)} bytes), not the weights; run `git lfs pull`" in told
    page = b"\n<!DOCTYPE html><html></html> "
    told = break_file(tmp_path, lambda data: page)
    assert f"a web page ({len(page)} bytes) saved in place of the weights; delete it, log in" in told


def test_types_of_numbers_that_no_released_model_has_are_refused(tmp_path):
    folder = write_part(tmp_path, "unet", {FULL: {"a": torch.ones(3, dtype=torch.int8)}})
    with pytest.raises(WeightsError, match=r"a is I8; known types: F64, F32, F16, BF16"):
        Checkpoint(folder, "unet")


def test_broken_configs_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no .*unet/config.json; the folder must have the layout"):
        Checkpoint(tmp_path, "unet")
    config = write_part(tmp_path, "unet", {FULL: {}}) / "unet" / "config.json"
    config.write_text("{")
    with pytest.raises(WeightsError, match=r"config.json is not valid JSON .*; delete it and fetch it again"):
        Checkpoint(tmp_path, "unet")
    config.write_text("[]")
    with pytest.raises(WeightsError, match=r"config.json must hold a JSON object, got list"):
        Checkpoint(tmp_path, "unet")


# ---------------------------------------------------------------------------------------------- saving


def test_save_writes_values_and_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    weights.save(tensors, tmp_path / "x.safetensors", {"step": "7"})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert found["b"].dtype == torch.bfloat16
    with weights._open(tmp_path / "x.safetensors") as f:
        assert f.metadata() == {"step": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_others_may_read_what_is_saved(tmp_path):
    (tmp_path / "plain").touch()
    weights.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "x.safetensors"
    weights.save({"a": torch.ones(1)}, path, {})

    def fail(first, second, *rest):
        if failing == "save_file":
            Path(second).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(*((weights, "save_file") if failing == "save_file" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save({"a": torch.zeros(1)}, path, {})
    assert load_file(path)["a"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# ---------------------------------------------------------------------------------------------- finding


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A `weights/` folder with the two embedded models, and an empty Hugging Face cache."""
    for stage, channels in ((1, 3), (2, 6)):
        parts = {"unet": {**UNET, "in_channels": channels}}
        write_part(tmp_path / "weights" / hub.MINI[stage], "unet", {HALF: {"a": torch.ones(1)}}, parts["unet"])
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(hub, "cached", lambda repo, parts: None)
    monkeypatch.setattr(hub, "_download", lambda repo, parts, say: pytest.fail("must not download"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def test_resolve_finds_mini_paths_and_names(here):
    assert hub.resolve("mini", 1) == here / "mini-IF-I"
    assert hub.resolve("mini", 2) == here / "mini-IF-II"
    assert hub.resolve("mini-IF-I", 1) == here / "mini-IF-I"
    assert hub.resolve("weights/mini-IF-II", 2) == Path("weights/mini-IF-II")
    assert hub.embedded() == ["mini-IF-I", "mini-IF-II"]
    (here / "mini-IF-I").rename(here / "IF-I-M-v1.0")
    assert hub.resolve("IF-I-M-v1.0", 1) == hub.resolve("DeepFloyd/IF-I-M-v1.0", 1) == here / "IF-I-M-v1.0"


def test_one_model_has_one_name_but_a_folder_keeps_its_own(here):
    assert hub.short_name("mini-IF-I", 1) == hub.short_name("mini", 1) == "mini"
    assert hub.short_name("DeepFloyd/IF-I-M-v1.0", 1) == "IF-I-M-v1.0"
    for name in ("mini-IF-I", "DeepFloyd/IF-I-M-v1.0"):  # as `hf download --local-dir`, or a training, leaves it
        Path(name).mkdir(parents=True)
        assert hub.short_name(name, 1) == name


def test_resolve_takes_the_shared_text_encoder_of_another_model(here):
    write_part(here / "IF-I-XL-v1.0", "text_encoder", {"model.safetensors": {"a": torch.ones(1)}})
    (here / "IF-I-XL-v1.0" / "tokenizer").mkdir()
    (here / "IF-I-XL-v1.0" / "tokenizer" / "spiece.model").write_bytes(b"x")
    assert hub.resolve("IF-II-M-v1.0", 2, ("text_encoder",)) == here / "IF-I-XL-v1.0"


def test_resolve_says_what_is_wrong(here):
    known = r"embedded \(mini, mini-IF-I, mini-IF-II\), nor released \(IF-I-M-v1.0, .*, IF-II-L-v1.0\)"
    with pytest.raises(WeightsError, match="no model 'IF-9': neither a folder, nor " + known):
        hub.resolve("IF-9", 1)
    first = r"stage 1 model \(text to 64x64, 3 input channels\)"
    second = r"stage 2 model \(64x64 to 256x256, 6 input channels\)"
    choices = "is needed: mini, IF-I-M-v1.0, IF-I-L-v1.0, IF-I-XL-v1.0$"
    with pytest.raises(WeightsError, match=f"^IF-II-M-v1.0 is a {second}, but a {first} {choices}"):
        hub.resolve("IF-II-M-v1.0", 1)
    with pytest.raises(WeightsError, match=f"mini-IF-I is a {first}, but a {second} is needed: mini, IF-II-M-v1.0"):
        hub.resolve("mini-IF-I", 2)
    with pytest.raises(WeightsError, match=r"config.json is a file; pass the folder that holds unet/config.json"):
        hub.resolve("weights/mini-IF-I/unet/config.json", 1)
    with pytest.raises(WeightsError, match=r"weights has no unet/config.json; it must have the layout"):
        hub.resolve("weights", 1)
    with pytest.raises(WeightsError, match=r"mini-IF-I has no text_encoder/config.json"):
        hub.resolve("mini", 1, ("unet", "text_encoder"))
    write_part(here / "mini-IF-I", "text_encoder", {"model.safetensors": {}})
    with pytest.raises(WeightsError, match=r"mini-IF-I has no tokenizer/spiece.model, which the text encoder needs"):
        hub.resolve("mini-IF-I", 1, ("text_encoder",))
    with pytest.raises(WeightsError, match=r"stage must be 1 or 2 and parts some of unet, text_encoder, got 3 and"):
        hub.resolve("mini", 3)
    (here / "mini-IF-I").rename(here / "elsewhere")
    with pytest.raises(WeightsError, match=r"weights are missing: .*mini-IF-I is part of the repository, clone it"):
        hub.resolve("mini", 1)


def test_full_disk_is_noticed_before_the_download(tmp_path):
    with pytest.raises(
        WeightsError, match=r"1000000000.00 GB needed, .* GB free in .*; set HF_HOME to a folder on a larger disk"
    ):
        hub._check_space(tmp_path / "not" / "yet" / "there", 1e18)


def test_sizes_in_words():
    assert [hub.in_words(n) for n in (134, 790_000, 743e6, 11.5e9)] == ["134 B", "0.79 MB", "0.74 GB", "11.50 GB"]


# ---------------------------------------------------------------------------------------------- downloading

FILES = {
    "unet/config.json": json.dumps({**UNET, "in_channels": 6}).encode(),
    "unet/" + FULL: b"full",
    "unet/" + HALF: b"half",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "scheduler/scheduler_config.json": b"{}",
    "image_noising_scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": json.dumps(T5).encode(),
    "text_encoder/model.fp16-00001-of-00002.safetensors": b"shard 1",
    "text_encoder/model.fp16-00002-of-00002.safetensors": b"shard 2",
    "text_encoder/model.safetensors.index.fp16.json": b"{}",
    "text_encoder/pytorch_model-00001-of-00002.bin": b"pickle",
    "tokenizer/spiece.model": b"pieces",
    "model_index.json": b"{}",
}
COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download meets: I-M is gated, II-M open, I-L has no safetensors."""

    def do_GET(self):
        name = self.path.split("DeepFloyd/")[-1].split("/")[0].split("?")[0]
        token = self.headers.get("Authorization", "")
        if token == "Bearer hf_expired":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b'{"error":"Invalid"}')
        elif self.path.startswith("/api/models/"):
            files = ["unet/config.json", "unet/diffusion_pytorch_model.bin"] if name == "IF-I-L-v1.0" else FILES
            siblings = [{"rfilename": f, "size": len(FILES[f]), "blobId": "0"} for f in files]
            info = {"_id": "0", "id": f"DeepFloyd/{name}", "sha": COMMIT, "siblings": siblings, "gated": "auto"}
            info |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, {}, json.dumps(info).encode())
        elif name == "IF-II-M-v1.0":
            content = FILES[self.path.split("/resolve/")[1].split("/", 1)[1].split("?")[0]]
            self.answer(200, {"ETag": f'"{content.hex():0<40.40}{len(content)}"', "X-Repo-Commit": COMMIT}, content)
        elif token:
            self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"")
        else:
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"")

    do_HEAD = do_GET

    def answer(self, status, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body)

    def log_message(self, *args):
        pass


SCRIPT = """
import json, os, sys
from pathlib import Path
from minidiff import hub
hub.WEIGHTS = Path(os.environ["HF_HOME"]) / "none"
answers = []
for question in json.loads(sys.argv[1]):
    if question is None:
        print("STOP", flush=True)  # the server goes away here
        sys.stdin.readline()
        continue
    model, stage, parts, token = question
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    said = []
    try:
        found = str(hub.resolve(model, stage, parts, said.append))
    except hub.WeightsError as error:
        found = "WeightsError: " + str(error)
    answers.append([found, said])
print(json.dumps(answers))
"""
BOTH = ["unet", "text_encoder"]
QUESTIONS = {
    "401": ["IF-I-M-v1.0", 1, ["unet"], None],
    "403": ["IF-I-M-v1.0", 1, ["unet"], "hf_good"],
    "bad token": ["IF-I-M-v1.0", 1, ["unet"], "hf_expired"],
    "no safetensors": ["IF-I-L-v1.0", 1, ["unet"], "hf_good"],
    "unet": ["IF-II-M-v1.0", 2, ["unet"], None],
    "both": ["IF-II-M-v1.0", 2, BOTH, None],
    "": None,
    "offline, cached": ["IF-II-M-v1.0", 2, BOTH, None],
    "offline, other text encoder": ["IF-I-XL-v1.0", 1, ["text_encoder"], None],
    "offline": ["IF-I-M-v1.0", 1, ["unet"], None],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What resolve answers, and what it said, with a hub and then without; in a process of its own, because the hub's
    library reads its settings when imported."""
    home = tmp_path_factory.mktemp("home")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    env = {key: value for key, value in env.items() if "proxy" not in key.lower()}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    env["PYTHONPATH"] = os.pathsep.join([str(Path(weights.__file__).parent.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(QUESTIONS.values()))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "STOP\n"
        server.shutdown()
        server.server_close()
        output = process.communicate("\n", timeout=120)[0]
    return {"home": home, **dict(zip((name for name in QUESTIONS if name), json.loads(output)))}


LICENCE = "log in at https://huggingface.co and accept the licence at https://huggingface.co/DeepFloyd/IF-I-XL-v1.0"
MINI = "\nOr use --model mini, which is embedded and needs none of this."


def test_401_says_log_in(answers):
    text = answers["401"][0]
    assert text.startswith("WeightsError: DeepFloyd/IF-I-M-v1.0 is licensed, and you are not logged in (401).\n")
    assert f"\n  1. {LICENCE}, once for all models\n" in text
    assert "\n  2. run `hf auth login` with a token of that account, or set HF_TOKEN\n" in text
    assert "\n  3. run the same command again\n" in text
    assert text.endswith(MINI)


def test_403_says_accept_the_licence(answers):
    text = answers["403"][0]
    assert "IF-I-M-v1.0 is licensed: you are logged in, but this account has not accepted the licence (403).\n" in text
    assert f"\n  1. {LICENCE}" in text
    assert "\n  2. run `hf auth login` with a token of that account, or set HF_TOKEN; a fine-grained token must" in text
    assert "\n  3. run the same command again\n" in text
    assert text.endswith(MINI)


def test_401_with_a_token_says_it_is_not_valid(answers):
    text = answers["bad token"][0]
    assert "IF-I-M-v1.0 was refused: your token is not valid (401).\n" in text
    assert "\n  2. make a new token at https://huggingface.co/settings/tokens, then `hf auth login`" in text


def test_a_repository_without_safetensors_is_told(answers):
    text = answers["no safetensors"][0]
    assert "DeepFloyd/IF-I-L-v1.0/unet: expected a file like" in text
    assert "found only diffusion_pytorch_model.bin; pickles are not read" in text


def test_only_the_needed_files_are_downloaded_after_saying_how_much(answers):
    (unet, said), (both, said_later) = answers["unet"], answers["both"]
    folder = Path(unet)
    assert both == unet
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {
        name: FILES[name]
        for name in FILES
        if name != "model_index.json" and not name.endswith(".bin") and name != f"unet/{FULL}"
    }
    first = [f for f in found if f.startswith(("unet/", "scheduler/", "image_"))]
    size = hub.in_words(sum(len(FILES[f]) for f in first))
    where = answers["home"] / "hub"
    assert said == [f"downloading DeepFloyd/IF-II-M-v1.0 (unet): 4 files, {size}, to {where}"]
    rest = sum(len(FILES[f]) for f in found if f not in first)
    assert said_later == [
        f"downloading DeepFloyd/IF-II-M-v1.0 (unet, text_encoder): 5 files, {hub.in_words(rest)}, to {where}"
    ]


def test_the_cache_needs_no_network(answers):
    folder = answers["both"][0]
    assert answers["offline, cached"] == [folder, []]
    assert answers["offline, other text encoder"] == [folder, []]  # all models share one


def test_offline_says_how_to_bring_the_files(answers):
    text = answers["offline"][0]
    assert "DeepFloyd/IF-I-M-v1.0 cannot be downloaded: the hub is unreachable or this machine offline (" in text
    page = LICENCE.split()[-1]
    assert f"\n  1. with a connection: accept the licence at {page}, run `hf auth login` or set HF_TOKEN\n" in text
    assert "\n  2. run `python -m minidiff.weights download IF-I-M-v1.0`, here or on another machine\n" in text
    assert "\n  3. if on another: copy the folder it prints, and pass it here as --model PATH\n" in text
    assert text.endswith(MINI)


def test_other_answers_of_the_hub_are_told_by_number():
    class Response:
        status_code = 503

    inner = RuntimeError("inner")
    inner.response = Response()
    outer = OSError("outer")
    outer.__cause__ = inner
    text = hub.explain(outer, "DeepFloyd/IF-I-M-v1.0", has_token=True)
    assert text.startswith("DeepFloyd/IF-I-M-v1.0 cannot be downloaded: the hub answered 503.\n  1. ")


# ---------------------------------------------------------------------------------------------- precision and commands


def test_default_dtype_is_half_only_where_that_is_fast(monkeypatch):
    assert weights.default_dtype("cuda") == weights.default_dtype(torch.device("cuda:1")) == torch.float16
    assert weights.default_dtype("mps") == torch.float32
    for built_in, fast in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda built_in=built_in: built_in)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fast=fast: fast, raising=False)
        expected = torch.float16 if built_in and fast else torch.float32
        assert weights.default_dtype("cpu") == weights.default_dtype(torch.device("cpu")) == expected


def test_check_describes_and_compares_each_part(tmp_path, capsys):
    unet, t5 = make_unet(), make_t5()
    write_part(tmp_path, "unet", {HALF: as_type(unet.state_dict(), torch.float16)})
    write_part(tmp_path, "text_encoder", {"model.safetensors": t5.state_dict()})
    assert weights.main(["check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    count, n = sum(p.numel() for p in unet.parameters()), len(unet.state_dict())
    assert f"  unet: {count:,} parameters in {n} tensors, float16\n  unet: every key and shape fits\n" in text
    assert f"  unet/{HALF}: {hub.in_words((tmp_path / 'unet' / HALF).stat().st_size)}\n" in text
    assert "  text_encoder: every key and shape fits\n" in text
    write_part(tmp_path, "unet", {HALF: {"conv_in.bias": torch.ones(32)}})
    assert weights.main(["check", str(tmp_path)]) == 1
    assert "does not fit UNet:" in capsys.readouterr().out
    write_part(tmp_path, "unet", {}, {"in_channels": 3})
    assert weights.main(["check", str(tmp_path)]) == 1
    assert "unet/config.json lacks block_out_channels" in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    assert weights.main(["check", str(tmp_path / "nothing")]) == 1
    assert "has none of unet, text_encoder" in capsys.readouterr().out


def test_list_and_download_and_unknown_models(here, monkeypatch, capsys):
    assert weights.main(["list"]) == 0
    text = capsys.readouterr().out
    assert f"mini-IF-I      embedded        {here / 'mini-IF-I'}\n" in text
    assert "IF-I-XL-v1.0   stage 1   8.61 GB not on this machine\n" in text
    assert weights.main(["check", "mini-IF-I"]) == 1  # its one tensor is no UNet
    assert weights.main(["check", "nowhere"]) == 1
    assert "nowhere is neither a folder, nor in" in capsys.readouterr().err
    write_part(here / "IF-II-M-v1.0", "unet", {HALF: {}}, {**UNET, "in_channels": 6})
    assert weights.main(["download", "IF-II-M-v1.0"]) == 0
    assert capsys.readouterr().out == f"{here / 'IF-II-M-v1.0'}\n"
