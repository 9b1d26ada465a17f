"""The small UNet that draws digits, built from the named blocks of the course's figures.

    28x28   in_block ------------------------------------------- cat  out_block  out
              |  down1                                   up2       |
    14x14     +---------- down1 ----------------- cat  ---+--------+
                            |  down2              up1
    7x7                     +------ down2 ---- cat -+
                                      | flatten  | unflatten
    1x1                               +----------+

Alone it removes noise. For diffusion and flow it must know how noisy its input is, and may know which digit is meant:
an FCBlock turns each of the two into a vector, a number for each channel, which acts on the outputs of `unflatten` and
`up1`.

    time only      u + t   ("add": the course of 2024)     or     u * t   ("mul": that of 2025)
    with class     c * u + t

Read `mnist/data.py` first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """hidden: channels at 28x28, D in the course.  time: whether the time is an input.

    num_classes: 0 if the class is no input; a network with classes needs the time, too.
    modulate: how time alone acts, "add" or "mul".
    """

    hidden: int = 128
    time: bool = False
    num_classes: int = 0
    modulate: str = "add"

    def __post_init__(self) -> None:
        if self.modulate not in ("add", "mul") or self.num_classes and not self.time:
            raise ValueError(f'modulate must be "add" or "mul", and a network with classes needs time=True, got {self}')


class Conv(nn.Sequential):
    """(B, C, H, W) -> (B, O, H, W)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, 1, 1), nn.BatchNorm2d(out_channels), nn.GELU())


class DownConv(nn.Sequential):
    """(B, C, H, W) -> (B, O, H / 2, W / 2)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, 2, 1), nn.BatchNorm2d(out_channels), nn.GELU())


class UpConv(nn.Sequential):
    """(B, C, H, W) -> (B, O, 2H, 2W)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1), nn.BatchNorm2d(out_channels), nn.GELU()
        )


class Flatten(nn.Sequential):
    """(B, C, 7, 7) -> (B, C, 1, 1)"""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(7), nn.GELU())


class Unflatten(nn.Sequential):
    """(B, C, 1, 1) -> (B, C, 7, 7)"""

    def __init__(self, channels: int):
        super().__init__(nn.ConvTranspose2d(channels, channels, 7, 7, 0), nn.BatchNorm2d(channels), nn.GELU())


class ConvBlock(nn.Sequential):
    """(B, C, H, W) -> (B, O, H, W), in two steps"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(Conv(in_channels, out_channels), Conv(out_channels, out_channels))


class DownBlock(nn.Sequential):
    """(B, C, H, W) -> (B, O, H / 2, W / 2)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(DownConv(in_channels, out_channels), ConvBlock(out_channels, out_channels))


class UpBlock(nn.Sequential):
    """(B, C, H, W) -> (B, O, 2H, 2W)"""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(UpConv(in_channels, out_channels), ConvBlock(out_channels, out_channels))


class FCBlock(nn.Sequential):
    """(B, F) -> (B, O): one number, or one class, to a vector that acts on channels."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class UNet(nn.Module):
    """Noisy digits, and what the config says, to whatever it is trained for: clean digits, noise or velocity."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, D = config, config.hidden
        self.in_block = ConvBlock(1, D)
        self.down1 = DownBlock(D, D)
        self.down2 = DownBlock(D, 2 * D)
        self.flatten = Flatten()
        self.unflatten = Unflatten(2 * D)
        self.up1 = UpBlock(4 * D, D)
        self.up2 = UpBlock(2 * D, D)
        self.out_block = ConvBlock(2 * D, D)
        self.out = nn.Conv2d(D, 1, 3, 1, 1)
        if config.time:
            self.fc1_t, self.fc2_t = FCBlock(1, 2 * D), FCBlock(1, D)
        if config.num_classes:
            self.fc1_c, self.fc2_c = FCBlock(config.num_classes, 2 * D), FCBlock(config.num_classes, D)

    def forward(self, x: Tensor, time: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """x: (B, 1, 28, 28).  time: (B,) float in [0, 1].  c: (B, num_classes), one-hot, or zeros for no class.

        Each where the config has it, and only there. Returns (B, 1, 28, 28).
        Raises ValueError on an input that the config has not, or without one that it has.
        """
        if (time is not None, c is not None) != (self.config.time, self.config.num_classes > 0):
            raise ValueError(f"give a time and a class c where the config has them, and only there: {self.config}")
        skip28 = self.in_block(x)  # (B, D, 28, 28)
        skip14 = self.down1(skip28)  # (B, D, 14, 14)
        skip7 = self.down2(skip14)  # (B, 2D, 7, 7)
        u = self.unflatten(self.flatten(skip7))  # (B, 2D, 7, 7)
        if self.config.time:
            u = self.modulated(u, self.fc1_t(time[:, None]), None if c is None else self.fc1_c(c))
        u = self.up1(torch.cat([u, skip7], dim=1))  # (B, D, 14, 14)
        if self.config.time:
            u = self.modulated(u, self.fc2_t(time[:, None]), None if c is None else self.fc2_c(c))
        u = self.up2(torch.cat([u, skip14], dim=1))  # (B, D, 28, 28)
        return self.out(self.out_block(torch.cat([u, skip28], dim=1)))  # (B, 1, 28, 28)

    def modulated(self, u: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """u: (B, C, H, W).  t, c: (B, C). The course's page of 2024 has t1 in place of t2 once: a slip of the pen."""
        t = t[:, :, None, None]
        if c is not None:
            return c[:, :, None, None] * u + t
        return u + t if self.config.modulate == "add" else u * t
