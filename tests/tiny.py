"""A random cascade of a few thousand weights in the released layout, for tests of everything around the networks."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from minidiff.deepfloyd import train
from minidiff.deepfloyd.t5 import T5Encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import UNet
from minidiff.schedule import squaredcos_cap_v2

SPIECE = Path(__file__).parent / "reference" / "spiece.model"
SMALL = dict(block_out_channels=(8, 8, 8, 16), layers_per_block=(1, 1, 1, 1),
             down_block_types=(train.R, train.R, train.R, train.S), attention_head_dim=8, cross_attention_dim=32,
             encoder_hid_dim=32, time_embedding_dim=32, norm_num_groups=4)  # fmt: skip
CONFIGS = {1: replace(train.MINI_1, **SMALL), 2: replace(train.MINI_2, **SMALL)}
T5 = replace(train.MINI_T5, d_model=32, d_kv=8, d_ff=32, num_layers=1)


def write_cascade(folder: Path) -> tuple[Path, Path]:
    """folder/one and folder/two."""
    torch.manual_seed(0)
    t5 = replace(T5, vocab_size=Tokenizer(SPIECE).pieces.vocab_size())
    for stage, name in ((1, "one"), (2, "two")):
        model = train.Trainee(stage, UNet(CONFIGS[stage]), T5Encoder(t5), squaredcos_cap_v2())
        train.write_folder(folder / name, stage, model.state_dict(), CONFIGS[stage], t5)
    (folder / "one" / "tokenizer").mkdir()
    shutil.copy(SPIECE, folder / "one" / "tokenizer")
    return folder / "one", folder / "two"
