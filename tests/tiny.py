"""Two random cascades of a few thousand weights, for tests of everything around the networks: one as folders in the
released layout, and one whose walks are recorded."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiff.cascade import Cascade, Settings
from minidiff.deepfloyd.stages import Stage
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import FIXED, UNet, UNetConfig
from minidiff.schedule import leading, squaredcos_cap_v2
from tests.reference.fill import calm, fill, normal, read_json

SPIECE = Path(__file__).parent / "reference" / "spiece.model"
STAGE_1 = UNetConfig(
    block_out_channels=(8, 8, 8, 16), layers_per_block=(1, 1, 1, 1),
    down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",), cross_attention_dim=32,
    encoder_hid_dim=32, attention_head_dim=8, norm_num_groups=4, addition_embed_type_num_heads=4, time_embedding_dim=32,
)  # fmt: skip
STAGE_2 = replace(
    STAGE_1, in_channels=6, sample_size=256, only_cross_attention=True, class_embed_type="timestep",
    time_embedding_act_fn="gelu", resnet_skip_time_act=True, resnet_out_scale_factor=1 / 0.7071,
    mid_block_scale_factor=1 / 0.7071,
)  # fmt: skip
CONFIGS = {1: STAGE_1, 2: STAGE_2}
T5 = T5Config(vocab_size=2048, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
PROCESS = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


def write_cascade(folder: Path) -> tuple[Path, Path]:
    """folder/one and folder/two: both stages, the first with a text encoder and its tokenizer."""
    torch.manual_seed(0)
    one, two, noising = folder / "one", folder / "two", "image_noising_scheduler"
    t5 = replace(T5, vocab_size=Tokenizer(SPIECE).pieces.vocab_size())
    _write(one / "unet" / "diffusion_pytorch_model.fp16.safetensors", UNet(STAGE_1), FIXED | asdict(STAGE_1))
    gated = {"feed_forward_proj": "gated-gelu"}
    _write(one / "text_encoder" / "model.fp16.safetensors", T5Encoder(t5), asdict(t5) | gated)
    _write(two / "unet" / "diffusion_pytorch_model.fp16.safetensors", UNet(STAGE_2), FIXED | asdict(STAGE_2))
    for path in (one / "scheduler", two / "scheduler", two / noising):
        path.mkdir()
        (path / "scheduler_config.json").write_text(json.dumps(PROCESS))
    (one / "tokenizer").mkdir()
    shutil.copy(SPIECE, one / "tokenizer")
    return one, two


def _write(path: Path, module: nn.Module, config: dict) -> None:
    path.parent.mkdir(parents=True)
    state = {key: x if key.endswith(".wo.weight") else x.half() for key, x in module.state_dict().items()}
    save_file(state, path, {"format": "pt"})
    (path.parent / "config.json").write_text(json.dumps(config))


def recorded_cascade() -> Cascade:
    """The networks and texts of tests/reference/make.py's pipelines: 8 and 16 pixels, and numbers for text states.

    It knows "prompt 0", "prompt 1" and "negative 0", "negative 1"; the empty prompt is "negative 0". The settings are
    those of the recorded walks.
    """
    networks = read_json("unet")["networks"]
    cosine = squaredcos_cap_v2()
    one, two = (calm(fill(UNet(UNetConfig.from_dict(networks[name]["config"])))) for name in ("stage_1", "stage_2"))
    stages = Stage(one, cosine, 0.95, 1.5, cosine), Stage(two, cosine, 0.95, 1.0, cosine)
    states = {f"{kind} {i}": normal(f"stages.{name}", 2, 77, 32)[i]
              for kind, name in (("prompt", "prompt_embeds"), ("negative", "negative_prompt_embeds"))
              for i in (0, 1)}  # fmt: skip
    states[""] = states["negative 0"]
    settings = Settings(leading(10), 7.0), Settings(leading(5), 4.0)

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.stack([states[text] for text in texts])

    return Cascade(lambda: stages[0], lambda: stages[1], encode, settings)
