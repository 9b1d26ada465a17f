"""The T5 v1.1 encoder: prompt tokens in, one vector per token out. These vectors are all the UNets know of a prompt.

Read `tokenizer.py` first. Each block is self-attention and a gated feed-forward, both added to a running stream:

    h = embedding[ids]
    h = h + W_o attention(norm(h))             scores are q k^T + bias, without the usual 1 / sqrt(d)
    h = h + W_o (gelu(W_0 norm(h)) * (W_1 norm(h)))
    states = norm(h)

The bias depends only on how far apart two tokens are; block 0 owns its table and every block uses it.
In half precision the stream stays float32, and so does the last product of the feed-forward: real activations pass
float16's 65504, and a pure float16 T5 returns garbage.
Attributes carry the names of the released checkpoint.    Source: T5 Sec. 2.1; the gated GELU of T5 v1.1 is GEGLU's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 2**18  # of any number in a config: above every width and vocabulary, below what fills the memory


@dataclass(frozen=True)
class T5Config:
    """The part of `text_encoder/config.json` that decides the shapes, under its own names (defaults: T5-XXL)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, config: dict) -> "T5Config":
        """Read a `config.json`. Raises ValueError if it is not a T5 v1.1 (gated GELU) or lacks a key."""
        where, optional = "text_encoder/config.json", "relative_attention_max_distance"
        if (gate := config.get("feed_forward_proj")) != "gated-gelu":
            raise ValueError(f"{where}: feed_forward_proj is {gate!r}, but IF has T5 v1.1, 'gated-gelu'")
        made = cls(**config_fields(cls, config, where, [f.name for f in fields(cls) if f.name != optional]))
        if 4 * made.relative_attention_max_distance <= made.relative_attention_num_buckets:
            raise ValueError(f"{where}: {optional} must be above a quarter of relative_attention_num_buckets")
        return made


def config_fields(kind: type, config: dict, where: str, required: Sequence[str]) -> dict:
    """The fields of a dataclass that a config names, lists as tuples.    Raises ValueError naming the key if one is
    missing, a value has another type than its field, or a number is not in (0, LARGEST]."""
    if missing := [name for name in required if name not in config]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: is this the config of an IF model?")
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in config}
    for name, hint in hints.items():
        if not _has_type(config[name], hint):
            expected = f"{hint if get_args(hint) else hint.__name__}, numbers above 0 and at most {LARGEST}"
            raise ValueError(f"{where}: {name} is {config[name]!r:.60}, but must be {expected}")
    return {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in hints}


def _has_type(value: object, hint: type) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and value and all(_has_type(v, get_args(hint)[0]) for v in value)
    if get_args(hint):  # X | None
        return value is None or _has_type(value, get_args(hint)[0])
    if hint in (int, float):
        return type(value) in (int, hint) and 0 < value <= LARGEST
    return isinstance(value, hint)


class RMSNorm(nn.Module):
    """Bring the values of each token to a mean square of 1, in float32.

        y = x / sqrt(mean(x^2) + norm_eps) * weight

    No mean is subtracted and there is no bias.    Source: T5 Sec. 2.1.
    """

    def __init__(self, dim: int, norm_eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.norm_eps = norm_eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.norm_eps)
        return x.to(self.weight.dtype) * self.weight


class Linear(nn.Linear):
    """x W^T, computed in x's precision whatever the weights are stored in: they are cast one matrix at a time."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class SelfAttention(nn.Module):
    """Each token gathers from the tokens of its prompt what fits its question.

        y = W_o softmax(q k^T + bias) v,    q = W_q x,  k = W_k x,  v = W_v x,    without 1 / sqrt(d)

    Source: T5 Sec. 2.1.
    """

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        inner, self.heads = config.num_heads * config.d_kv, config.num_heads
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))  # (B, L, D)


class GatedFeedForward(nn.Module):
    """Two products, one of which opens and closes the other.

        y = W_o (gelu(W_0 x) * (W_1 x)),    gelu(a) = a / 2 (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3)))

    Source: GEGLU (arXiv 2002.05202).
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (Linear(config.d_model, config.d_ff) for _ in range(2))
        self.wo = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = F.gelu(self.wi_0(x), approximate="tanh"), self.wi_1(x)
        if x.dtype == torch.float16:  # the product and the sum below leave float16's range
            gate, value = gate.float(), value.float()
        return self.wo(gate * value)


class Sublayer(nn.Module):
    """h + f(norm(h)): the shape of both halves of a block. `name` is what the checkpoint calls f."""

    def __init__(self, config: T5Config, name: str, f: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, f)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, h: Tensor, *args: Tensor) -> Tensor:
        return h + getattr(self, self.name)(self.layer_norm(h), *args).to(h.dtype)


class Block(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        attention = Sublayer(config, "SelfAttention", SelfAttention(config, owns_bias))
        self.layer = nn.ModuleList([attention, Sublayer(config, "DenseReluDense", GatedFeedForward(config))])

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](h, bias))


class T5Encoder(nn.Module):
    """The whole encoder. `checkpoint.built` makes it, `checkpoint.fill` fills it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList([Block(config, owns_bias=i == 0) for i in range(config.num_layers)])
        norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, L) int64, mask 1 for real tokens. Returns (B, L, D).
        Padding is hidden from every token but is itself computed: the UNet reads all L rows."""
        h = self.shared(input_ids).float()  # (B, L, D)
        bias = self.attention_bias(attention_mask)
        for block in self.encoder.block:
            h = block(h, bias)
        return self.encoder.final_layer_norm(h)

    def attention_bias(self, attention_mask: Tensor) -> Tensor:
        """What every block adds to its scores: the distance table of the first block, and -inf on padded keys.
        attention_mask: (B, L). Returns (B, heads, L, L) float32."""
        position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        distance = position[None, :] - position[:, None]  # (L, L): key minus query
        sizes = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(relative_bucket(distance, *sizes)).float().permute(2, 0, 1)[None]  # (1, heads, L, L)
        return bias.masked_fill(attention_mask[:, None, None, :] == 0, -math.inf)  # (B, heads, L, L)


def relative_bucket(distance: Tensor, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Sort signed distances (key minus query) into buckets: one each when near, logarithmic when far, the last for all
    beyond max_distance; half the buckets for each direction.

        bucket = b + (a if a < m else min(n - 1, m + floor(log(a / m) / log(max_distance / m) * (n - m))))
        a = |distance|,  b = n if distance > 0 else 0,  n = num_buckets / 2,  m = n / 2

    distance: int64, any shape. Returns int64 of that shape.    Source: T5 Sec. 2.1.
    """
    n = num_buckets // 2
    m = n // 2
    a = distance.abs()
    far = m + (torch.log(a.clamp(min=1).float() / m) / math.log(max_distance / m) * (n - m)).long()
    return n * (distance > 0) + torch.where(a < m, a, far.clamp(max=n - 1))


@torch.inference_mode()
def encode_streamed(
    encoder: T5Encoder, fetch: Callable[[str], dict[str, Tensor]], dtype: torch.dtype, input_ids: Tensor,
    attention_mask: Tensor,
) -> Tensor:  # fmt: skip
    """The same forward with one matrix in memory at a time, so that T5-XXL needs less than 1 GiB instead of 11.

    encoder: on the meta device, and there again afterwards.
    fetch(prefix) returns the tensors below a prefix, mapped from the file: of the embedding only some rows are read.
    dtype: what to compute in; matrices stored otherwise are cast as they are used.
    input_ids, attention_mask and the result: as in T5Encoder.forward.
    """
    layers = {name: m for name, m in encoder.named_modules() if isinstance(m, RMSNorm | Linear | nn.Embedding)}

    def read(layer: nn.Module, name: str) -> None:
        layer.load_state_dict(fetch(f"{name}."), assign=True)
        if isinstance(layer, RMSNorm):
            layer.to(dtype)  # what leaves a norm decides the precision of what follows

    def drop(layer: nn.Module, *_: object) -> None:
        layer.to("meta")  # the last reference to the mapping goes: its pages leave memory

    hooks = [m.register_forward_pre_hook(lambda m, _, name=name: read(m, name)) for name, m in layers.items()]
    hooks += [m.register_forward_hook(drop) for m in layers.values()]
    try:
        return encoder(input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
