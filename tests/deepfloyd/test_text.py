"""Whole and streamed encoding agree, and files of encoded prompts are read back or refused with a reason."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidiff import checkpoint
from minidiff.checkpoint import WeightsError
from minidiff.deepfloyd import text
from minidiff.deepfloyd.t5 import T5Config, T5Encoder

REFERENCE = Path(__file__).parents[1] / "reference"
CONFIG = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
          "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
TEXTS = ["a castle", "", "an old man with a beard"]


def write_encoder(folder: Path, seed: int = 0, half: bool = True, vocab_size: int | None = None) -> Path:
    """A tiny random encoder in the released layout: float16 with float32 wo, or all float32."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    shutil.copy(REFERENCE / "spiece.model", folder / "tokenizer")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(seed)
    vocab = vocab_size or text.Tokenizer(REFERENCE / "spiece.model").pieces.vocab_size()
    config = CONFIG | {"vocab_size": vocab}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    state = T5Encoder(T5Config.from_dict(config)).state_dict()
    if half:
        state = {k: v if k.endswith("wo.weight") else v.half() for k, v in state.items()}
    name = "model.fp16.safetensors" if half else "model.safetensors"
    checkpoint.save(state, folder / "text_encoder" / name, {})
    return folder


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_streamed_equals_whole(tmp_path, half, dtype):
    folder = write_encoder(tmp_path / "m", half=half)
    whole = text.load_text_encoder(folder, dtype)(TEXTS)
    streamed = text.load_text_encoder(folder, dtype, streamed=True)(TEXTS)
    assert whole.shape == (3, 77, 32) and whole.dtype == streamed.dtype == dtype
    error = (whole.float() - streamed.float()).norm() / whole.float().norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_padding_rows_of_the_empty_prompt_are_all_alike(tmp_path):
    """Each padded query sees the end mark alone, so where it stands cannot matter."""
    states = text.load_text_encoder(write_encoder(tmp_path / "m"), torch.float32)([""])[0]
    assert (states[1:] - states[1]).abs().max() < 1e-5 and (states[0] - states[1]).abs().max() > 1e-3


def test_streaming_refuses_an_encoder_that_does_not_fit(tmp_path):
    folder = write_encoder(tmp_path / "m")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"num_layers": 4}))
    with pytest.raises(WeightsError, match="missing"):
        text.load_text_encoder(folder, torch.float32, streamed=True)


def test_other_t5_versions_and_bare_configs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu', but IF has T5 v1.1"):
        T5Config.from_dict(CONFIG | {"feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="lacks d_kv, num_heads"):
        T5Config.from_dict({k: v for k, v in CONFIG.items() if k not in ("d_kv", "num_heads")})


def test_an_encoder_is_streamed_if_it_would_take_half_of_the_free_memory(tmp_path, monkeypatch):
    folder, cpu = write_encoder(tmp_path / "m"), torch.device("cpu")
    size = sum(4 * math.prod(shape) for shape in checkpoint.Checkpoint(folder, "text_encoder").shapes.values())
    encoder = text.plan_text_encoder(folder, torch.float32)[1]
    assert not text.should_stream(encoder, torch.float32, cpu)
    for free, streamed in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(text, "free_memory", lambda free=free: free)
        assert text.should_stream(encoder, torch.float32, cpu) is streamed
    monkeypatch.setattr(text, "free_memory", lambda: None)  # a system that does not tell
    assert not text.should_stream(encoder, torch.float32, cpu)
    monkeypatch.setattr(text, "UNKNOWN_MEMORY", size - 1)
    assert text.should_stream(encoder, torch.float32, cpu)


def test_free_memory_counts_the_page_cache_and_heeds_a_container(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 900 kB\nMemFree:  100 kB\nMemAvailable:     600 kB\n"}

    def read(path, *args, **more):
        if path.as_posix() not in files:
            raise FileNotFoundError
        return files[path.as_posix()]

    monkeypatch.setattr(Path, "read_text", read)
    assert text.free_memory() == 600 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert text.free_memory() == 600 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert text.free_memory() == 5000
    del files["/proc/meminfo"]
    assert text.free_memory() is None


def test_a_tokenizer_of_another_model_is_told_before_it_asks_for_rows_that_are_not_there(tmp_path):
    folder = write_encoder(tmp_path / "m", vocab_size=100)  # the tokenizer has more pieces
    for streamed in (False, True):
        with pytest.raises(WeightsError, match="the text encoder knows 100; are they of one model"):
            text.load_text_encoder(folder, torch.float32, streamed=streamed)


def test_embeds_come_back_bit_by_bit_whatever_the_order(tmp_path):
    embeds = torch.randn(3, 77, 8).half()
    text.write_embeds(tmp_path / "e.safetensors", TEXTS, embeds, "abc")
    back = text.read_embeds(tmp_path / "e.safetensors", ["An old man with a beard ", "a castle"], "abc")
    assert torch.equal(back, embeds[[2, 0]])


def test_the_courses_dictionary_is_read(tmp_path):
    table = {"a rocket ship": torch.randn(1, 77, 16).half(), "": torch.randn(1, 77, 16).half()}
    torch.save(table, tmp_path / "prompt_embeds_dict.pth")
    back = text.read_embeds(tmp_path / "prompt_embeds_dict.pth", ["", "a rocket ship"])
    assert torch.equal(back, torch.cat([table[""], table["a rocket ship"]]))


def test_files_that_cannot_serve_are_told(tmp_path):
    text.write_embeds(tmp_path / "e.safetensors", ["a castle", ""], torch.zeros(2, 77, 8), "abc")
    with pytest.raises(ValueError, match=r"lacks \['a volcano'\]; it holds \['', 'a castle'\]$"):
        text.read_embeds(tmp_path / "e.safetensors", ["a volcano"])
    text.write_embeds(tmp_path / "e.pth", ["a castle"], torch.zeros(1, 77, 8), "abc")
    with pytest.raises(ValueError, match=r"lacks \[''\]; it holds \['a castle'\]; '' is the empty prompt, which guid"):
        text.read_embeds(tmp_path / "e.pth", ["a castle", ""])
    with pytest.raises(ValueError, match="made by another text encoder"):
        text.read_embeds(tmp_path / "e.safetensors", ["a castle"], "xyz")
    with pytest.raises(ValueError, match="no file of encoded prompts at .*minidiff.encode"):
        text.read_embeds(tmp_path / "none.safetensors", ["a castle"])
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no file of encoded prompts"):
        text.read_embeds(tmp_path / "bad.safetensors", ["a castle"])
    for i, wrong in enumerate(([torch.zeros(1)], {}, {5: torch.zeros(1, 77, 8)}, {"a": torch.zeros(0, 77, 8)},
                               {"a": torch.zeros(2, 77, 8)}, {"a": torch.zeros(1, 77, 8), "b": torch.zeros(1, 5, 8)},
                               {"a": torch.zeros(77, 8)}, {"a": 3})):  # fmt: skip
        torch.save(wrong, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match="must hold a dictionary from prompts to tensors"):
            text.read_embeds(tmp_path / f"{i}.pth", ["a castle"])
    (tmp_path / "text.pth").write_text("a castle")
    with pytest.raises(ValueError, match="is broken or no .pth file, and was not opened"):
        text.read_embeds(tmp_path / "text.pth", ["a castle"])
    for metadata in ({"prompts": "5"}, {"prompts": "[]"}, {"prompts": "{"}, {}):
        checkpoint.save({"prompt_embeds": torch.zeros(1, 77, 8)}, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(ValueError, match="is no file of encoded prompts"):
            text.read_embeds(tmp_path / "odd.safetensors", ["a castle"])
    text.write_embeds(tmp_path / "nan.safetensors", ["a castle"], torch.full((1, 77, 8), torch.nan), "abc")
    with pytest.raises(ValueError, match="they are not all finite; encode them again"):
        text.read_embeds(tmp_path / "nan.safetensors", ["a castle"])


class Evil:
    """What unpickling would run, if it were allowed to."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a castle": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors, which could run anything, and was not opened"):
        text.read_embeds(tmp_path / "evil.pth", ["a castle"])
    assert not (tmp_path / "unpickled").exists()


def change(folder: Path, key: str, places: slice) -> None:
    """Add 1 to some numbers of one tensor."""
    path = folder / "text_encoder" / "model.fp16.safetensors"
    state = load_file(path)
    state[key].view(-1)[places] += 1
    checkpoint.save(state, path)


def test_the_fingerprint_tells_encoders_apart(tmp_path):
    a, b = write_encoder(tmp_path / "a", seed=0), write_encoder(tmp_path / "b", seed=1)
    before = text.fingerprint(a)
    assert before == text.fingerprint(a) != text.fingerprint(b)
    for key in ("shared.weight", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"):  # one number, in the middle
        change(a, key, slice(700, 701))
        assert text.fingerprint(a) != before
        change(a, key, slice(700, 701))
        before = text.fingerprint(a)


def test_of_a_large_tensor_pages_count_from_end_to_end(tmp_path, monkeypatch):
    """shared.weight has 124 x 32 numbers, 7,936 bytes; 4 pages of 256 bytes begin at 0, 2560, 5120 and 7680."""
    monkeypatch.setattr(text, "WHOLE", 7935)
    monkeypatch.setattr(text, "PAGES", 4)
    monkeypatch.setattr(text, "PAGE", 256)
    folder = write_encoder(tmp_path / "a")
    before = text.fingerprint(folder)
    for number, noticed in ((0, True), (127, True), (128, False), (1279, False), (1280, True), (3967, True)):
        change(folder, "shared.weight", slice(number, number + 1))
        assert (text.fingerprint(folder) != before) is noticed, number
        before = text.fingerprint(folder)


def test_states_that_no_encoder_makes_get_one_message(tmp_path):
    states = torch.randn(1, 77, 8)
    wrong = {
        "float8": states.to(torch.float8_e4m3fn), "integers": states.int(), "bools": states > 0,
        "complex": states.to(torch.complex64), "10 tokens": states[:, :10], "no tokens": states[:, :0],
        "no width": states[..., :0], "NaN": states / 0 * 0, "infinity": states / 0,
    }  # fmt: skip
    only_pth = {"sparse": states.to_sparse(), "quantized": torch.quantize_per_tensor(states, 0.1, 0, torch.qint8),
                "meta": states.to("meta")}  # fmt: skip
    for suffix, table in ((".safetensors", wrong), (".pth", wrong | only_pth)):
        for name, tensor in table.items():
            path = tmp_path / f"{name}{suffix}"
            if suffix == ".pth":
                torch.save({"a castle": tensor}, path)
            else:
                text.write_embeds(path, ["a castle"], tensor, "abc")
            with pytest.raises(ValueError) as error:
                text.read_embeds(path, ["a castle"], "abc")
            rule = f"{path}: the states of 'a castle' must be (1, 77, D) finite, dense floating-point numbers, but "
            assert str(error.value).startswith(rule) and str(error.value).endswith("; encode them again"), error.value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_of_every_floating_type_are_read(tmp_path, dtype):
    states = torch.randn(2, 77, 8).to(dtype)
    text.write_embeds(tmp_path / "e.safetensors", ["a", "b"], states, "abc")
    text.write_embeds(tmp_path / "e.pth", ["a", "b"], states, "abc")
    for name in ("e.safetensors", "e.pth"):
        back = text.read_embeds(tmp_path / name, ["b", "a"], "abc")
        assert back.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert torch.equal(back, states[[1, 0]].to(back.dtype))


def test_a_pth_is_written_as_the_courses_dictionary(tmp_path):
    states = torch.randn(2, 77, 8).half()
    text.write_embeds(tmp_path / "e.pth", ["A castle", ""], states, "abc")
    table = torch.load(tmp_path / "e.pth", weights_only=True)
    assert list(table) == ["A castle", ""] and torch.equal(table[""], states[1:])
    assert (tmp_path / "e.pth").stat().st_size < 2 * states.numel() * 2  # each prompt's own numbers, not all of them


def test_a_file_of_an_older_minidiff_is_read_with_a_warning(tmp_path):
    """Its fingerprint was made in another way, so that it cannot be compared."""
    metadata = {"prompts": '["a castle"]', "encoder": "abc", "format": "minidiff embeds 1"}
    checkpoint.save({"prompt_embeds": torch.ones(1, 77, 8)}, tmp_path / "e.safetensors", metadata)
    with pytest.warns(UserWarning, match="e.safetensors is of an older minidiff: whether this text encoder made it is"):
        assert text.read_embeds(tmp_path / "e.safetensors", ["a castle"], "xyz").sum() == 77 * 8
