"""The T5 encoder against transformers' on a tiny network, and T5-XXL's size. Its formulas: tests/test_equations.py."""

import math

import pytest
import torch
from torch import Tensor

from minidiff.checkpoint import on_meta
from minidiff.deepfloyd.t5 import T5Config, T5Encoder, encode_streamed, relative_bucket
from tests.reference.fill import fill, read, read_json, relative_l2

REFERENCE, ABOUT = read("t5"), read_json("t5")
CONFIG = T5Config.from_dict(ABOUT["config"])
IDS, MASK = REFERENCE["input_ids"], REFERENCE["attention_mask"]


def build() -> T5Encoder:
    return fill(T5Encoder(CONFIG))


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(4), ids=["empty", "short", "longer", "full"])
@torch.inference_mode()
def test_whole_network_against_transformers(row):
    """Every row of 77 states, padding included. 5e-6: a norm's epsilon of 1e-5 for 1e-6 makes more."""
    states = build()(IDS[row : row + 1], MASK[row : row + 1])
    assert states.shape == (1, 77, 32)
    assert relative_l2(states, REFERENCE["masked"][row : row + 1]) <= 5e-6


@torch.inference_mode()
def test_batch_and_mask_against_transformers():
    """Rows of a batch do not touch each other, and the mask matters: without it padding would be read."""
    model = build()
    assert relative_l2(model(IDS, MASK), REFERENCE["masked"]) <= 5e-6
    unmasked = model(IDS[1:2], torch.ones_like(MASK[1:2]))
    assert relative_l2(unmasked, REFERENCE["unmasked"]) <= 5e-6
    assert relative_l2(unmasked, REFERENCE["masked"][1:2]) > 0.1


def test_names_and_shapes_are_transformers():
    assert {key: list(x.shape) for key, x in T5Encoder(CONFIG).state_dict().items()} == ABOUT["shapes"]


def test_relative_buckets_against_transformers():
    assert REFERENCE["distances"].tolist() == list(range(-200, 201))
    assert torch.equal(relative_bucket(REFERENCE["distances"]), REFERENCE["buckets"])


@torch.inference_mode()
def test_attention_bias_against_transformers():
    bias = build().attention_bias(torch.ones(1, 13))
    assert torch.equal(bias, REFERENCE["bias_13"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision(dtype):
    """Within 2 % of float32."""
    states = build().to(dtype)(IDS, MASK)
    assert states.dtype == dtype
    assert relative_l2(states, REFERENCE["masked"]) <= 0.02


# --- structure --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_padding_of_the_empty_prompt_is_one_state_repeated():
    """With the mask every padded position sees the end mark alone, so it cannot tell where it is: rows 1 to 76 agree.
    The end mark's own row differs, for it starts from another embedding."""
    states = build()(IDS[:1], MASK[:1])[0]
    torch.testing.assert_close(states[1:], states[1:2].expand(76, -1), rtol=1e-5, atol=1e-6)
    assert relative_l2(states[0], states[1]) > 1e-2


@torch.inference_mode()
def test_padding_does_not_reach_the_words():
    """The states of the words are the same with and without padding behind them."""
    model, n = build(), int(MASK[1].sum())
    alone = model(IDS[1:2, :n], MASK[1:2, :n])
    assert relative_l2(model(IDS[1:2], MASK[1:2])[:, :n], alone) <= 2e-6


def empty() -> T5Encoder:
    with on_meta():
        return T5Encoder(CONFIG)


def fetch_from(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def streamed(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return encode_streamed(empty(), lambda prefix: fetch_from(state, prefix), dtype, IDS, MASK)


@torch.inference_mode()
def test_streamed_is_whole():
    model = build()
    assert torch.equal(streamed(model.state_dict()), model(IDS, MASK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_streamed_casts_float32_files(dtype):
    """Computed in half precision from a float32 file: within 2 % of float32, and what comes out is half precision."""
    states = streamed(build().state_dict(), dtype)
    assert states.dtype == dtype
    assert relative_l2(states, REFERENCE["masked"]) <= 0.02


def test_streamed_fetches_one_matrix_at_a_time():
    """Each in the order of the forward pass, and all of them once. No hook stays behind."""
    state, fetched = build().state_dict(), []

    def fetch(prefix: str) -> dict[str, Tensor]:
        fetched.append(prefix)
        return fetch_from(state, prefix)

    encoder = empty()
    encode_streamed(encoder, fetch, torch.float32, IDS, MASK)
    assert all(p.is_meta for p in encoder.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."
    layers = ["0.layer_norm.", *(f"0.SelfAttention.{name}." for name in "qkvo"), "1.layer_norm.",
              *(f"1.DenseReluDense.{name}." for name in ("wi_0", "wi_1", "wo"))]  # fmt: skip
    blocks = [f"encoder.block.{i}.layer.{layer}" for i in range(3) for layer in layers]
    assert fetched == ["shared.", bias, *blocks, "encoder.final_layer_norm."]


def loud(dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights whose feed-forward passes float16's largest number, 65504, as T5-XXL's does."""
    state = {key: x.clone() for key, x in build().state_dict().items()}
    for key in state:
        if key.endswith("wo.weight"):
            state[key] *= 300
        if ".wi_" in key:
            state[key] *= 30
    return {key: x.to(dtype) for key, x in state.items()}


@torch.inference_mode()
def test_float16_survives_activations_beyond_its_range():
    """The stream and the feed-forward's last product stay float32, whichever type the file stores `wo` in, and
    whether the encoder is whole or streamed."""
    expected = streamed(loud(torch.float32))
    model = T5Encoder(CONFIG)
    model.load_state_dict(loud(torch.float32))
    largest = []
    model.encoder.block[0].layer[1].DenseReluDense.register_forward_hook(lambda m, x, y: largest.append(y.abs().max()))
    model(IDS, MASK)
    assert largest[0] > 65504
    halves = loud(torch.float16)
    mixed = {key: loud(torch.float32)[key] if key.endswith("wo.weight") else x for key, x in halves.items()}
    for state in (halves, mixed):
        assert relative_l2(streamed(state, torch.float16), expected) <= 0.02
        model.load_state_dict(state, assign=True)
        assert relative_l2(model(IDS, MASK), expected) <= 0.02


# --- size -------------------------------------------------------------------------------------------------------------


def test_t5_xxl_size():
    """The default config is T5-XXL, which all released IF models use."""
    made = T5Config()
    assert (made.relative_attention_num_buckets, made.relative_attention_max_distance) == (32, 128)
    assert (made.layer_norm_epsilon, made.d_kv * made.num_heads, made.vocab_size) == (1e-6, 4096, 32128)
    with torch.device("meta"):
        shapes = {key: tuple(x.shape) for key, x in T5Encoder(T5Config()).state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 4_762_310_656
    assert len(shapes) == 219
    expected = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    expected["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(24):
        block = f"encoder.block.{i}.layer"
        expected |= {f"{block}.{j}.layer_norm.weight": (4096,) for j in (0, 1)}
        expected |= {f"{block}.0.SelfAttention.{part}.weight": (4096, 4096) for part in "qkvo"}
        expected |= {f"{block}.1.DenseReluDense.{part}.weight": (10240, 4096) for part in ("wi_0", "wi_1")}
        expected[f"{block}.1.DenseReluDense.wo.weight"] = (4096, 10240)
    assert shapes == expected


# --- errors -----------------------------------------------------------------------------------------------------------


def test_config_errors():
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu', but IF has T5 v1.1, 'gated-gelu'"):
        T5Config.from_dict({**ABOUT["config"], "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="text_encoder/config.json lacks d_model, num_heads"):
        T5Config.from_dict({k: v for k, v in ABOUT["config"].items() if k not in ("d_model", "num_heads")})
