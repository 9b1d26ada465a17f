"""The DeepFloyd IF UNet: noisy image, time and text in; noise and variance out. Both stages, every released size.

Read `t5.py` first for where the text states come from. The image passes down through levels of shrinking resolution,
through the middle, and up again, each level up joined to its twin on the way down:

    x_t  -> conv_in -> [resnets (+ attention) -> half size] x levels -> middle -> [double size <- twin] -> conv_out
    t    -> sinusoid -> MLP ------------------\
    text -> pooled to one vector --------------+-> temb: scales and shifts every resnet
    text -> projected tokens ------------------> every attention reads them, beside the image's own tokens

Stage 2 also takes the low-resolution image, stacked on x_t as channels 3 to 5, and how much noise was put on it.
Attributes carry the names of the released checkpoint, so loading needs no map of names.
Source of the architecture: Imagen Sec. 2, and deep-floyd/IF deepfloyd_if/model/unet.py@ffc8163.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.deepfloyd.t5 import config_fields

# What this file builds in one way only, and what every released config.json says of it. Another value is refused. A
# wrong width or kind of layer shows when the weights are loaded, which is strict. Settings of a config that neither
# this table nor UNetConfig names are not read.
FIXED = {
    "act_fn": "gelu", "addition_embed_type": "text", "center_input_sample": False, "cross_attention_norm": "group_norm",
    "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_attention_heads": None, "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "timestep_post_act": None,
}  # fmt: skip
# The kinds of level, on the way down and, in the same place, on the way up: with and without attention.
MIRROR = {"SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D", "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}


@dataclass(frozen=True)
class UNetConfig:
    """The part of `unet/config.json` in which the released UNets differ, under its own names."""

    block_out_channels: tuple[int, ...]  # channels of each level, highest resolution first
    layers_per_block: tuple[int, ...]  # resnets of each level on the way down; one more on the way up
    down_block_types: tuple[str, ...]  # which levels have attention
    cross_attention_dim: int  # width of the projected text tokens
    in_channels: int = 3  # 6 in stage 2: x_t and the low-resolution image
    sample_size: int = 64
    attention_head_dim: int = 64  # channels per head (not the number of heads)
    encoder_hid_dim: int = 4096  # width of the T5 states
    addition_embed_type_num_heads: int = 64
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    only_cross_attention: bool = False  # attention reads the text alone, not the image
    mid_block_only_cross_attention: bool | None = None  # None: as only_cross_attention
    class_embed_type: str | None = None  # "timestep" in stage 2: the noise level gets a sinusoid and an MLP too
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    time_embedding_act_fn: str | None = None  # "gelu" in stage 2: temb is activated once ...
    resnet_skip_time_act: bool = False  # ... and then not in each resnet
    resnet_out_scale_factor: float = 1.0  # 1/0.7071 in stage 2 (not sqrt(2))
    mid_block_scale_factor: float = 1.0

    @classmethod
    def from_dict(cls, config: dict) -> "UNetConfig":
        """Read a `config.json`. What construction and strict loading refuse as well is left to them.
        Raises ValueError naming the key that is missing, has another type or is of another architecture."""
        where = "unet/config.json"
        fixed = FIXED | ({"time_embedding_act_fn": "gelu"} if config.get("time_embedding_act_fn") else {})
        for key, expected in fixed.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"{where}: {key} is {config[key]!r}, but an IF UNet has {expected!r}")
        levels, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
        if isinstance(layers, int) and isinstance(levels, list):
            config = config | {"layers_per_block": [layers] * len(levels)}
        required = ("block_out_channels", "down_block_types", "cross_attention_dim")
        made = cls(**config_fields(cls, config, where, required))
        if unknown := sorted(set(made.down_block_types) - set(MIRROR)):
            raise ValueError(f"{where}: unknown down_block_types {unknown}; known: {', '.join(MIRROR)}")
        if not len(made.block_out_channels) == len(made.layers_per_block) == len(made.down_block_types):
            raise ValueError(f"{where}: block_out_channels, layers_per_block, down_block_types differ in length")
        return made

    @property
    def time_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Times as waves of falling frequency, cosines first: (B,) -> (B, dim) float32.

        [cos(t f_0) ... cos(t f_{n-1}), sin(t f_0) ... sin(t f_{n-1})],   f_k = 10000^(-k / n),   n = dim / 2

    Always float32: in bfloat16 the waves of t = 999 would be off by up to 1.9.
    Source: Attention Is All You Need Sec. 3.5, with halves where the paper alternates.
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angles = t[:, None].float() * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class TimeMLP(nn.Module):
    """Sinusoid to embedding: Linear, GELU, Linear. Used for the time and, in stage 2, for the noise level."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoid(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.gelu(self.linear_1(waves)))


class AttentionPool(nn.Module):
    """One query, the mean token, asks all text tokens and itself: (B, L, E) -> (B, E)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"encoder_hid_dim {dim} does not split into {heads} heads (addition_embed_type_num_heads)")
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1, dim).normal_(std=dim**-0.5))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(1, keepdim=True) + self.positional_embedding  # (B, 1, E), padding included
        tokens = torch.cat([mean, tokens], dim=1)  # (B, L + 1, E)
        q, k, v = (split_heads(x, self.heads) for x in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens)))
        return F.scaled_dot_product_attention(q, k, v).flatten(1)  # (B, heads, 1, E / heads) -> (B, E)


class TextPooling(nn.Module):
    """The whole prompt as one vector, added to the time embedding: norm, AttentionPool, Linear, norm."""

    def __init__(self, text_dim: int, time_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPool(text_dim, heads)
        self.proj = nn.Linear(text_dim, time_dim)
        self.norm2 = nn.LayerNorm(time_dim)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(prompt_embeds))))


class ResnetBlock(nn.Module):
    """Two convolutions around a skip; `temb` scales and shifts in between. `resample` halves or doubles the size.

        h = norm2(conv1(resample(gelu(norm1(x))))) * (1 + scale) + shift
        out = (shortcut(resample(x)) + conv2(gelu(h))) / out_scale

    scale and shift are one linear layer of temb.  shortcut: a 1x1 convolution where the widths differ.
    Source: FiLM (arXiv 1709.07871) for the scale and shift.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, out_scale: float, resample: str = ""):
        super().__init__()
        self.resample, self.out_scale, self.skip_time_act = resample, out_scale, config.resnet_skip_time_act
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        skip, h = x, F.gelu(self.norm1(x))
        if self.resample == "down":  # (B, C, H, W) -> (B, C, H/2, W/2)
            skip, h = F.avg_pool2d(skip, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":  # (B, C, H, W) -> (B, C, 2H, 2W)
            skip, h = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (skip, h))
        temb = temb if self.skip_time_act else F.gelu(temb)
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(h)) * (1 + scale) + shift
        out = self.conv_shortcut(skip) + self.conv2(F.gelu(h))
        return out / self.out_scale if self.out_scale != 1 else out


class Attention(nn.Module):
    """Every pixel asks the text, and (unless only_cross) every other pixel, in one softmax; added to the image.

        out = x + W_o softmax(q [k_text, k_image]^T / sqrt(head size)) [v_text, v_image]

    The text is group-normalised over channels and all L tokens together, padding included, and nothing is masked: a
    prompt's padding is part of it.    Source: GLIDE (arXiv 2112.10741), text and image in one attention.
    """

    def __init__(self, config: UNetConfig, channels: int, only_cross: bool):
        super().__init__()
        text_dim = config.cross_attention_dim
        if channels % config.attention_head_dim:
            raise ValueError(f"{channels} channels do not split into heads of attention_head_dim")
        self.heads = channels // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, 1e-5)
        self.norm_cross = nn.GroupNorm(32, text_dim, 1e-5)
        self.to_q = nn.Linear(channels, channels)
        if not only_cross:
            self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(2))
        self.add_k_proj, self.add_v_proj = (nn.Linear(text_dim, channels) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.only_cross = only_cross

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        text = self.norm_cross(text.transpose(1, 2)).transpose(1, 2)  # (B, L, X)
        q, k, v = self.to_q(pixels), self.add_k_proj(text), self.add_v_proj(text)
        if not self.only_cross:
            k = torch.cat([k, self.to_k(pixels)], dim=1)  # (B, L + HW, C)
            v = torch.cat([v, self.to_v(pixels)], dim=1)
        out = F.scaled_dot_product_attention(*(split_heads(y, self.heads) for y in (q, k, v)))  # (B, h, HW, C / h)
        out = self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, HW, C)
        return x + out.transpose(1, 2).view(x.shape)  # (B, C, H, W)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Level(nn.Module):
    """The layers of one resolution: resnets, an attention after each where the level has them, then `downsamplers` on
    the way down and `upsamplers` on the way up; the last level of either way has none."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], resample: str):
        """inputs: how many channels each resnet reads.  resample: "down", "up" or, at the last level, ""."""
        super().__init__()
        channels, scale = config.block_out_channels[level], config.resnet_out_scale_factor
        attends = config.down_block_types[level] == "SimpleCrossAttnDownBlock2D"
        attentions = [Attention(config, channels, config.only_cross_attention) for _ in inputs if attends]
        self.resnets = nn.ModuleList([ResnetBlock(config, c, channels, scale) for c in inputs])
        self.attentions = nn.ModuleList(attentions) if attends else [None] * len(inputs)
        if resample:
            sampler = nn.ModuleList([ResnetBlock(config, channels, channels, scale, resample)])
            self.add_module(f"{resample}samplers", sampler)

    def down(self, h: Tensor, temb: Tensor, text: Tensor) -> list[Tensor]:
        """What each layer makes of h: the twin on the way up reads them all, the next level the last of them."""
        outputs = []
        for resnet, attention in zip(self.resnets, self.attentions):
            h = resnet(h, temb)
            h = attention(h, text) if attention is not None else h
            outputs.append(h)
        return outputs + ([self.downsamplers[0](h, temb)] if hasattr(self, "downsamplers") else [])

    def up(self, h: Tensor, temb: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        """What the level makes of h and of the skips of its twin, which it takes from the end of the list."""
        for resnet, attention in zip(self.resnets, self.attentions):
            h = resnet(torch.cat([h, skips.pop()], dim=1), temb)
            h = attention(h, text) if attention is not None else h
        return self.upsamplers[0](h, temb) if hasattr(self, "upsamplers") else h


class Middle(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        only_cross = config.mid_block_only_cross_attention
        only_cross = config.only_cross_attention if only_cross is None else only_cross
        self.attentions = nn.ModuleList([Attention(config, channels, only_cross)])
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels, scale) for _ in range(2)])

    def forward(self, h: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, temb), text)
        return self.resnets[1](h, temb)


class UNet(nn.Module):
    """The network of either stage. `checkpoint.built` makes it, `checkpoint.fill` fills it."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels, time_dim = config.block_out_channels, config.time_dim
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeMLP(channels[0], time_dim)
        self.class_embedding = TimeMLP(channels[0], time_dim) if config.class_embed_type == "timestep" else None
        self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.add_embedding = TextPooling(config.encoder_hid_dim, time_dim, config.addition_embed_type_num_heads)
        self.down_blocks = nn.ModuleList([self._down(level) for level in range(len(channels))])
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList([self._up(level) for level in reversed(range(len(channels)))])
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], FIXED["out_channels"], 3, padding=1)  # eps and variance

    def _down(self, level: int) -> Level:
        channels, layers = self.config.block_out_channels, self.config.layers_per_block[level]
        inputs = [channels[max(level - 1, 0)]] + [channels[level]] * (layers - 1)
        return Level(self.config, level, inputs, "down" if level < len(channels) - 1 else "")

    def _up(self, level: int) -> Level:
        channels, layers = self.config.block_out_channels, self.config.layers_per_block[level] + 1
        below = channels[min(level + 1, len(channels) - 1)]
        hidden = [below] + [channels[level]] * (layers - 1)  # what each resnet gets from the one before it
        skips = [channels[level]] * (layers - 1) + [channels[max(level - 1, 0)]]  # and from the twin
        return Level(self.config, level, [h + s for h, s in zip(hidden, skips)], "up" if level > 0 else "")

    def forward(self, x: Tensor, t: Tensor, prompt_embeds: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict noise and variance for a batch.

        x: (B, 3 or 6, H, W), H and W multiples of 2^(levels-1).  t: (B,) timesteps 0..T-1.
        prompt_embeds: (B, L, encoder_hid_dim), all L tokens including padding.
        class_labels: (B,) noise level of the low-resolution image, stage 2 only.
        Returns (B, 6, H, W) in the weights' dtype: eps, then pred_var (about -1 to 1).    Raises ValueError.
        """
        self._check(x, prompt_embeds, class_labels)
        dtype = self.conv_in.weight.dtype
        x, prompt_embeds = x.to(dtype), prompt_embeds.to(dtype)
        if not (torch.is_grad_enabled() and x.device.type == "cpu" and dtype == torch.float32):
            # Plain layout would spend up to half its time on copies; only CPU training in float32 is faster with it.
            x = x.contiguous(memory_format=torch.channels_last)
        temb = self.time_embedding(t)
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        temb = temb + self.add_embedding(prompt_embeds)
        temb = F.gelu(temb) if self.config.time_embedding_act_fn == "gelu" else temb  # (B, time_dim)
        text = self.encoder_hid_proj(prompt_embeds)  # (B, L, X)
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += block.down(skips[-1], temb, text)
        h = self.mid_block(skips[-1], temb, text)
        for block in self.up_blocks:
            h = block.up(h, temb, text, skips)
        return self.conv_out(F.gelu(self.conv_norm_out(h)))

    def _check(self, x: Tensor, prompt_embeds: Tensor, class_labels: Tensor | None) -> None:
        config, unit = self.config, 2 ** (len(self.config.block_out_channels) - 1)
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must be (B, {config.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % unit or x.shape[3] % unit:
            raise ValueError(f"height and width must be multiples of {unit}, got {x.shape[2]} x {x.shape[3]}")
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != config.encoder_hid_dim:
            shape = f"(B, L, {config.encoder_hid_dim}), got {tuple(prompt_embeds.shape)}"
            raise ValueError(f"prompt_embeds must be {shape}; were they made by another model's text encoder?")
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError("class_labels (the noise level) belong to stage 2, and stage 2 needs them")
