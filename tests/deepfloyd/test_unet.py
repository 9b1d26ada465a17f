"""The UNet against diffusers' on tiny networks, its sizes against the released ones. Formulas: test_equations.py."""

import math

import pytest
import torch

from minidiff.deepfloyd import unet as module
from minidiff.deepfloyd.unet import UNet, UNetConfig
from tests.reference.fill import digest, fill, normal, read, read_json, relative_l2

REFERENCE, ABOUT = read("unet"), read_json("unet")
NETWORKS, CASES = ABOUT["networks"], ABOUT["cases"]

# --- against diffusers ------------------------------------------------------------------------------------------------


def build(name: str) -> UNet:
    return fill(UNet(UNetConfig.from_dict(NETWORKS[name]["config"])))


def inputs(name: str, case: str) -> tuple:
    """The formula of reference/make.py."""
    B, H, W, L, t, noise_level = CASES[case]
    stage_2 = NETWORKS[name]["config"]["class_embed_type"] == "timestep"
    x = normal(f"unet.{case}.x", B, 6 if stage_2 else 3, H, W)
    prompt_embeds = normal(f"unet.{case}.prompt_embeds", B, L, 32)
    return x, torch.tensor(t), prompt_embeds, torch.tensor(noise_level) if stage_2 else None


@torch.inference_mode()
def first_difference(name: str) -> str:
    """The first block, in order of evaluation, whose output is not diffusers'. For reading when parity fails."""
    unet, expected, found = build(name), NETWORKS[name]["digests_of_two"], {}
    for block in expected:
        unet.get_submodule(block).register_forward_hook(lambda m, a, y, b=block: found.update({b: digest(b, y)}))
    unet(*inputs(name, "two"))
    for block, numbers in expected.items():
        if max(abs(a - b) for a, b in zip(found[block], numbers)) > 1e-5 * numbers[0]:
            return f"{block}: {found[block]}, expected {numbers}"
    return "no block differs"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_whole_network_against_diffusers(name, case):
    """Batches of 1 to 3, square and not, 77 and 13 tokens. 5e-6 is five times the rounding of float32; a wrong epsilon
    or sqrt(2) for 1/0.7071 makes 2e-5."""
    expected = REFERENCE[f"{name}.{case}"]
    y = build(name)(*inputs(name, case))
    assert y.shape == expected.shape
    error = relative_l2(y, expected)
    assert error <= 5e-6, f"relative error {error}; first block that differs: {first_difference(name)}"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_against_diffusers(name):
    """A wrong block is named by itself, and the list of blocks is long enough to be worth having."""
    assert len(NETWORKS[name]["digests_of_two"]) > 12
    assert first_difference(name) == "no block differs"


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_diffusers(name):
    unet = UNet(UNetConfig.from_dict(NETWORKS[name]["config"]))
    assert {key: list(x.shape) for key, x in unet.state_dict().items()} == NETWORKS[name]["shapes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["stage_1", "stage_2"])
@torch.inference_mode()
def test_half_precision(name, dtype):
    """Within 2 % of float32, where the time's waves stay float32 (in bfloat16 those of t = 999 would be lost)."""
    y = build(name).to(dtype)(*inputs(name, "one"))
    assert y.dtype == dtype
    assert relative_l2(y, REFERENCE[f"{name}.one"]) <= 0.02


@torch.inference_mode()
def test_images_of_a_batch_do_not_touch_each_other():
    unet, (x, t, prompt_embeds, labels) = build("stage_2"), inputs("stage_2", "three")
    together = unet(x, t, prompt_embeds, labels)
    for i in range(3):
        one = slice(i, i + 1)
        assert relative_l2(together[one], unet(x[one], t[one], prompt_embeds[one], labels[one])) <= 2e-6


@torch.inference_mode()
def test_padding_is_part_of_the_prompt():
    """All tokens are pooled, normalised and attended to: cutting the last ones off changes the answer."""
    unet, (x, t, prompt_embeds, _) = build("stage_1"), inputs("stage_1", "one")
    assert relative_l2(unet(x, t, prompt_embeds[:, :50]), unet(x, t, prompt_embeds)) > 1e-2


# --- parts ------------------------------------------------------------------------------------------------------------


def config(**more: object) -> UNetConfig:
    return UNetConfig.from_dict({**NETWORKS["stage_1"]["config"], **more})


@torch.inference_mode()
def test_attention_pool_formula():
    """The mean token, plus its position, asks itself and all tokens; heads of 32 / 4 = 8, and no output projection."""
    pool = fill(module.AttentionPool(32, 4)).double()
    tokens = normal("pool.tokens", 2, 5, 32).double()
    mean = tokens.mean(1, keepdim=True) + pool.positional_embedding
    every = torch.cat([mean, tokens], 1)
    q, k, v = pool.q_proj(mean), pool.k_proj(every), pool.v_proj(every)
    parts = [slice(8 * h, 8 * h + 8) for h in range(4)]
    heads = [(q[..., p] @ k[..., p].mT / math.sqrt(8)).softmax(-1) @ v[..., p] for p in parts]
    torch.testing.assert_close(pool(tokens), torch.cat(heads, -1)[:, 0], rtol=1e-10, atol=1e-12)


# --- released sizes ---------------------------------------------------------------------------------------------------

R, S = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
STAGE_1 = {"in_channels": 3, "sample_size": 64, "down_block_types": [R, S, S, S], "layers_per_block": 3}
STAGE_2 = {
    "in_channels": 6,
    "sample_size": 256,
    "down_block_types": [R, R, R, S, S],
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}
RELEASED = {  # name: config, parameters, tensors
    "IF-I-M": (
        {**STAGE_1, "block_out_channels": [192, 384, 576, 768], "cross_attention_dim": 768}, 371_605_830, 775,
    ),
    "IF-I-L": (
        {**STAGE_1, "block_out_channels": [320, 640, 960, 1280], "cross_attention_dim": 1280}, 935_365_830, 775,
    ),
    "IF-I-XL": (
        {**STAGE_1, "block_out_channels": [704, 1408, 2112, 2816], "cross_attention_dim": 2816}, 4_304_695_110, 775,
    ),
    "IF-II-M": (
        {**STAGE_2, "block_out_channels": [128, 256, 512, 768, 768], "cross_attention_dim": 768,
         "layers_per_block": [2, 2, 3, 3, 3], "time_embedding_dim": 768}, 461_064_198, 721,
    ),
    "IF-II-L": (
        {**STAGE_2, "block_out_channels": [192, 384, 768, 1152, 1152], "cross_attention_dim": 1152,
         "layers_per_block": [2, 2, 3, 5, 5], "time_embedding_dim": 1152, "only_cross_attention": True},
        1_242_987_270, 845,
    ),
}  # fmt: skip


def on_meta(released: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(x.shape) for key, x in UNet(UNetConfig.from_dict(released)).state_dict().items()}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    released, parameters, tensors = RELEASED[name]
    shapes = on_meta(released)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == tensors


def grammar(released: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released UNet by the rules its names follow, written down apart from the network's code."""
    channels, X, E = released["block_out_channels"], released["cross_attention_dim"], 4096
    n = len(channels)
    T = released.get("time_embedding_dim") or 4 * channels[0]
    layers = released["layers_per_block"]
    layers = [layers] * n if isinstance(layers, int) else layers
    shapes: dict[str, tuple[int, ...]] = {}

    def vector(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def matrix(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0],)

    def resnet(p: str, ci: int, co: int) -> None:
        vector(f"{p}.norm1", ci), matrix(f"{p}.conv1", co, ci, 3, 3), matrix(f"{p}.time_emb_proj", 2 * co, T)
        vector(f"{p}.norm2", co), matrix(f"{p}.conv2", co, co, 3, 3)
        if ci != co:
            matrix(f"{p}.conv_shortcut", co, ci, 1, 1)

    def attention(p: str, c: int) -> None:
        vector(f"{p}.group_norm", c), vector(f"{p}.norm_cross", X)
        for part in ("to_q", "to_out.0", *(() if released.get("only_cross_attention") else ("to_k", "to_v"))):
            matrix(f"{p}.{part}", c, c)
        matrix(f"{p}.add_k_proj", c, X), matrix(f"{p}.add_v_proj", c, X)

    matrix("conv_in", channels[0], released["in_channels"], 3, 3)
    for name in ("time_embedding", *(["class_embedding"] if released["in_channels"] == 6 else [])):
        matrix(f"{name}.linear_1", T, channels[0]), matrix(f"{name}.linear_2", T, T)
    matrix("encoder_hid_proj", X, E)
    vector("add_embedding.norm1", E), vector("add_embedding.norm2", T), matrix("add_embedding.proj", T, E)
    shapes["add_embedding.pool.positional_embedding"] = (1, E)
    for part in "qkv":
        matrix(f"add_embedding.pool.{part}_proj", E, E)
    for i in range(n):
        for j in range(layers[i]):
            resnet(f"down_blocks.{i}.resnets.{j}", channels[max(i - 1, 0)] if j == 0 else channels[i], channels[i])
            if released["down_block_types"][i] == S:
                attention(f"down_blocks.{i}.attentions.{j}", channels[i])
        if i < n - 1:
            resnet(f"down_blocks.{i}.downsamplers.0", channels[i], channels[i])
    resnet("mid_block.resnets.0", channels[-1], channels[-1]), resnet("mid_block.resnets.1", channels[-1], channels[-1])
    attention("mid_block.attentions.0", channels[-1])
    for i in range(n):
        level = n - 1 - i
        c = channels[level]
        for j in range(layers[level] + 1):
            below = channels[min(level + 1, n - 1)] if j == 0 else c
            skip = channels[max(level - 1, 0)] if j == layers[level] else c
            resnet(f"up_blocks.{i}.resnets.{j}", below + skip, c)
            if released["down_block_types"][level] == S:
                attention(f"up_blocks.{i}.attentions.{j}", c)
        if i < n - 1:
            resnet(f"up_blocks.{i}.upsamplers.0", c, c)
    vector("conv_norm_out", channels[0]), matrix("conv_out", 6, channels[0], 3, 3)
    return shapes


@pytest.mark.parametrize("name", RELEASED)
def test_released_names_and_shapes(name):
    assert on_meta(RELEASED[name][0]) == grammar(RELEASED[name][0])


def test_defaults_are_the_released_values():
    """What a released config.json may leave out."""
    made = UNetConfig.from_dict(RELEASED["IF-I-M"][0])
    assert (made.attention_head_dim, made.encoder_hid_dim, made.norm_num_groups) == (64, 4096, 32)
    assert (made.norm_eps, made.time_dim) == (1e-5, 768)
    assert (made.resnet_out_scale_factor, made.resnet_skip_time_act, made.only_cross_attention) == (1.0, False, False)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", module.FIXED)
def test_config_of_another_architecture_is_refused(key):
    with pytest.raises(ValueError, match=rf"unet/config.json: {key} is 'other', but an IF UNet has "):
        config(**{key: "other"})


def test_config_errors():
    with pytest.raises(ValueError, match="unet/config.json lacks down_block_types, cross_attention_dim: is this"):
        UNetConfig.from_dict({"block_out_channels": [32]})
    with pytest.raises(ValueError, match=r"unknown down_block_types \['DownBlock2D'\]; known: SimpleCross"):
        config(down_block_types=["DownBlock2D", S, S])
    with pytest.raises(ValueError, match="time_embedding_act_fn is 'silu', but an IF UNet has 'gelu'"):
        config(time_embedding_act_fn="silu")
    with pytest.raises(ValueError, match="block_out_channels, layers_per_block, down_block_types differ in length"):
        config(layers_per_block=[2, 2])
    with pytest.raises(ValueError, match="64 channels do not split into heads of attention_head_dim"):
        UNet(config(attention_head_dim=48))
    with pytest.raises(ValueError, match=r"encoder_hid_dim 32 does not split into 5 heads"):
        UNet(config(addition_embed_type_num_heads=5))


def test_input_errors():
    """Each names what came and what was expected."""
    stage_1, stage_2 = build("stage_1"), build("stage_2")
    x, t, prompt_embeds, _ = inputs("stage_1", "one")
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(1, 6, 8, 8\)"):
        stage_1(torch.cat([x, x], 1), t, prompt_embeds)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\), got \(3, 8, 8\)"):
        stage_1(x[0], t, prompt_embeds)
    with pytest.raises(ValueError, match="height and width must be multiples of 4, got 8 x 6"):
        stage_1(x[..., :6], t, prompt_embeds)
    with pytest.raises(ValueError, match=r"prompt_embeds must be \(B, L, 32\), got \(1, 77, 31\); were they made by"):
        stage_1(x, t, prompt_embeds[..., 1:])
    for net, image, labels in ((stage_1, x, t), (stage_2, torch.cat([x, x], 1), None)):
        with pytest.raises(ValueError, match=r"class_labels \(the noise level\) belong to stage 2, and stage 2 needs"):
            net(image, t, prompt_embeds, labels)
