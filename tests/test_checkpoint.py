"""checkpoint.py: files of every kind into networks, and clear words where that fails."""

import gc
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minidiff import checkpoint as source
from minidiff.checkpoint import Checkpoint, WeightsError, choose_files, fill
from minidiff.deepfloyd.t5 import encode_streamed
from tests.folders import FULL, HALF, UNET, as_type, empty, make_t5, make_unet, write_part


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
    module = fill(empty(make_unet), checkpoint)
    loaded = module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) and loaded[key].dtype == dtype for key in state)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert checkpoint.config == UNET
    assert sorted(checkpoint.shapes) == sorted(state)
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
    loaded = fill(empty(make_t5), checkpoint).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_variant_follows_the_wanted_dtype():
    both = [FULL, HALF]
    assert choose_files(both, None, "x") == [HALF]
    assert choose_files(both, torch.float16, "x") == [HALF]
    assert choose_files(both, torch.float32, "x") == [FULL]
    assert choose_files([FULL], torch.float16, "x") == [FULL]
    assert choose_files([*both, "model.bf16.safetensors"], torch.bfloat16, "x") == ["model.bf16.safetensors"]
    # half a download of one variant does not hide the other; files of other kinds are no weights
    partly = ["model.fp16-00001-of-00002.safetensors", "model.safetensors", "model.8bit.safetensors"]
    assert choose_files(partly, None, "x") == ["model.safetensors"]
    # one file under a name of its own is taken
    assert choose_files(["t5xxl_fp16.safetensors", "config.json"], None, "x") == ["t5xxl_fp16.safetensors"]


def test_missing_shards_and_pickles_are_named():
    with pytest.raises(
        WeightsError, match=r"x: of 3 shards like model-00003-of-00003.safetensors, number 2 is missing"
    ):
        choose_files(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], None, "x")
    with pytest.raises(WeightsError, match=r"found only pytorch_model.bin; pickles are not read"):
        choose_files(["pytorch_model.bin"], None, "x")
    with pytest.raises(WeightsError, match=r"found nothing"):
        choose_files(["config.json"], None, "x")


def test_two_saves_in_one_folder_are_not_guessed_between():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for names in ([*shards, "model.safetensors"], [shards[0], "model.safetensors"]):
        with pytest.raises(WeightsError, match=f"x: {shards[0]} and model.safetensors are of two saves; delete"):
            choose_files(names, None, "x")
    assert choose_files([*shards, "model.fp16.safetensors"], torch.float32, "x") == shards  # of another variant


@pytest.mark.parametrize("padding", range(8))
def test_headers_need_no_alignment(tmp_path, padding):
    state = as_type(make_unet().state_dict(), torch.float16)
    state["conv_in.bias"] = state["conv_in.bias"].float()
    write_part(tmp_path, "unet", {})
    write_by_hand(tmp_path / "unet" / FULL, state, padding)
    loaded = fill(empty(make_unet), Checkpoint(tmp_path, "unet")).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    module = fill(empty(make_unet), Checkpoint(tmp_path, "unet"), torch.float32)
    expected = make_unet()
    expected.load_state_dict(as_type(state, torch.float32))
    inputs = torch.ones(1, 3, 8, 8), torch.tensor([5]), torch.ones(1, 4, 16)
    assert torch.equal(module(*inputs), expected.requires_grad_(False)(*inputs))


def test_t5_keeps_float32_wo_in_half_precision(tmp_path):
    state = make_t5().state_dict()
    checkpoint = Checkpoint(write_part(tmp_path, "text_encoder", {"model.safetensors": state}), "text_encoder")
    module = fill(empty(make_t5), checkpoint, torch.float16)
    for key, tensor in module.state_dict().items():
        assert tensor.dtype == (torch.float32 if key.endswith("wo.weight") else torch.float16), key
        assert torch.equal(tensor, state[key].to(tensor.dtype))
    files = {"model.fp16.safetensors": as_type(state, torch.float16)}
    half = Checkpoint(write_part(tmp_path / "half", "text_encoder", files), "text_encoder")
    module = fill(empty(make_t5), half, torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}  # float16 would overflow: only float32 is kept


EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")


@pytest.mark.parametrize("names", [EMBEDDING[:1], EMBEDDING[1:], EMBEDDING])
def test_the_embedding_may_have_either_name_and_the_decoder_is_ignored(tmp_path, names):
    state = make_t5().state_dict()
    stored = {key: tensor for key, tensor in state.items() if key != "shared.weight"}
    stored |= {name: state["shared.weight"].clone() for name in names}
    stored |= {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(3), "lm_head.weight": torch.ones(2, 2)}
    checkpoint = Checkpoint(write_part(tmp_path, "text_encoder", {"model.safetensors": stored}), "text_encoder")
    assert sorted(checkpoint.shapes) == sorted(state)
    loaded = fill(empty(make_t5), checkpoint).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert torch.equal(checkpoint.tensors("shared.")["weight"], state["shared.weight"])


def test_streaming_reads_what_the_whole_encoder_reads(tmp_path):
    module = make_t5()
    write_part(tmp_path, "text_encoder", {"model.safetensors": module.state_dict()})
    checkpoint = Checkpoint(tmp_path, "text_encoder")
    ids, mask = torch.tensor([[4, 7, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    streamed = encode_streamed(empty(make_t5), checkpoint.tensors, torch.float32, ids, mask)
    torch.testing.assert_close(streamed, module(ids, mask), rtol=1e-6, atol=1e-6)


def test_prefix_is_removed_and_block_1_is_not_block_10(tmp_path):
    stored = {f"block.{i}.w": torch.full((2,), float(i)) for i in (1, 10)}
    checkpoint = Checkpoint(write_part(tmp_path, "unet", {FULL: stored}), "unet")
    found = checkpoint.tensors("block.1.")
    assert found.keys() == {"w"}
    assert found["w"].tolist() == [1, 1]
    assert checkpoint.tensors().keys() == stored.keys()


def test_one_report_of_all_that_does_not_fit(tmp_path):
    state = make_unet().state_dict()
    del state["conv_out.bias"], state["conv_in.bias"]
    state |= {f"extra.{i:02}": torch.ones(1) for i in range(13)}
    state["conv_in.weight"] = torch.ones(64, 3, 3, 3)
    checkpoint = Checkpoint(write_part(tmp_path, "unet", {FULL: state}), "unet")
    with pytest.raises(WeightsError) as error:
        source.built(lambda config: make_unet(), checkpoint)
    text = str(error.value)
    folder = tmp_path / "unet"
    assert text.startswith(f"{folder / FULL} does not fit UNet:\n  2 missing:\n    conv_in.bias\n    conv_out.bias\n")
    assert "  13 unexpected:\n    extra.00\n" in text
    assert "    extra.09\n    ... and 3 more\n" in text
    assert "extra.10" not in text
    assert "  1 misshapen:\n    conv_in.weight: (64, 3, 3, 3) in the file, (32, 3, 3, 3) expected\n" in text
    assert text.endswith(f"Do {folder / 'config.json'} and the weights belong to the same model?")


def test_on_meta_networks_have_shapes_and_no_numbers_are_drawn():
    with source.on_meta():
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
    module = fill(empty(make_large), checkpoint, torch.float32)
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
    module = fill(empty(make_large), checkpoint, wanted)
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
    for change, size in (
        (lambda data: data[:-1000], whole - 1000),
        (lambda data: data + b"\0" * 7, whole + 7),
        (lambda data: data[:30], 30),
        (lambda data: b"", 0),
        (lambda data: data[:8] + b"x" + data[9:], whole),
        (lambda data: b"\x80\x02}q\x00." * 100, 600),  # a pickle
    ):
        assert f"cut short or damaged ({size} bytes); delete it and fetch it again" in break_file(tmp_path, change)
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
    with pytest.raises(WeightsError, match=r"config.json is not valid JSON.*; fetch it again"):
        Checkpoint(tmp_path, "unet")
    config.write_text("[]")
    with pytest.raises(WeightsError, match=r"config.json must hold a JSON object, got list"):
        Checkpoint(tmp_path, "unet")


# ---------------------------------------------------------------------------------------------- saving


def test_save_writes_values_and_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    source.save(tensors, tmp_path / "x.safetensors", {"step": "7"})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert found["b"].dtype == torch.bfloat16
    with source._open(tmp_path / "x.safetensors") as f:
        assert f.metadata() == {"step": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_others_may_read_what_is_saved(tmp_path):
    (tmp_path / "plain").touch()
    source.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "x.safetensors"
    source.save({"a": torch.ones(1)}, path, {})

    def fail(first, second, *rest):
        if failing == "save_file":
            Path(second).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(*((source, "save_file") if failing == "save_file" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        source.save({"a": torch.zeros(1)}, path, {})
    assert load_file(path)["a"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_default_dtype_is_half_only_where_that_is_fast(monkeypatch):
    assert source.default_dtype("cuda") == source.default_dtype(torch.device("cuda:1")) == torch.float16
    assert source.default_dtype("mps") == torch.float32
    for built_in, fast in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda built_in=built_in: built_in)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fast=fast: fast, raising=False)
        expected = torch.float16 if built_in and fast else torch.float32
        assert source.default_dtype("cpu") == source.default_dtype(torch.device("cpu")) == expected
