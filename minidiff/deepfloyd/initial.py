"""The weights that training begins with, where it does not go on from others.

Read `deepfloyd/unet.py` and `deepfloyd/t5.py` first. Next: `deepfloyd/train.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from minidiff.deepfloyd.t5 import GatedFeedForward, RMSNorm, SelfAttention
from minidiff.deepfloyd.unet import Attention, ResnetBlock, UNet


def initialise(module: nn.Module) -> None:
    """T5's own scales, as its scores are not divided by sqrt(d); and every residual branch of the UNet starts at 0."""
    for m in module.modules():
        if isinstance(m, SelfAttention):
            inner, width = m.q.weight.shape
            nn.init.normal_(m.q.weight, std=(width * inner // m.heads) ** -0.5)
            for f in (m.k, m.v):
                nn.init.normal_(f.weight, std=width**-0.5)
            nn.init.normal_(m.o.weight, std=inner**-0.5)
        elif isinstance(m, GatedFeedForward):
            for f in (m.wi_0, m.wi_1, m.wo):
                nn.init.normal_(f.weight, std=f.in_features**-0.5)
        elif isinstance(m, ResnetBlock):
            nn.init.zeros_(m.conv2.weight)
        elif isinstance(m, Attention):
            nn.init.zeros_(m.to_out[0].weight)
        elif isinstance(m, RMSNorm):
            nn.init.ones_(m.weight)


@torch.no_grad()
def pass_through(unet: UNet) -> None:
    """Let eps begin as x_t itself at unit variance, which is right where all is noise.

    There, an error in eps is many times as large in the picture, and the mean colour of x_t (a 64th of its deviation)
    must come out unharmed, which random layers take very long to learn. A pair of channels +x and -x does it: the
    outermost skip connection carries it past all layers, the last norm only divides it by a known factor, since the
    mean of a pair is 0, and the last activation leaves it whole, since gelu(x) - gelu(-x) = x.
    """
    last = unet.up_blocks[-1].resnets[-1]
    size = len(unet.conv_in.weight) // unet.config.norm_num_groups  # channels that one norm shares: +x, -x and zeros
    from_skip = last.conv_shortcut.in_channels - len(unet.conv_in.weight)
    for module in (unet.conv_out, last.conv_shortcut, unet.conv_in, last.conv2):
        module.bias[: 3 * size] = 0
    unet.conv_out.weight[:3] = 0
    for colour in range(3):
        plus, minus, group = colour * size, colour * size + 1, slice(colour * size, (colour + 1) * size)
        for layer in (unet.conv_in, last.conv2, last.conv_shortcut):
            layer.weight[group] = 0
        unet.conv_in.weight[plus, colour, 1, 1], unet.conv_in.weight[minus, colour, 1, 1] = 1, -1
        last.conv_shortcut.weight[plus, from_skip + plus] = last.conv_shortcut.weight[minus, from_skip + minus] = 1
        unet.conv_norm_out.weight[group], unet.conv_norm_out.bias[group] = 1, 0
        unet.conv_out.weight[colour, plus, 1, 1] = (2 / size) ** 0.5
        unet.conv_out.weight[colour, minus, 1, 1] = -((2 / size) ** 0.5)
