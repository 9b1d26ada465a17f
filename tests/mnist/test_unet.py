"""The course's network: its parameter counts, its shapes on the way, and what time and class do to it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidiff.mnist.unet import UNet, UNetConfig

PLAIN, TIME, CLASS = {}, {"time": True}, {"time": True, "num_classes": 10}


def small(**kind):
    torch.manual_seed(0)
    return UNet(UNetConfig(4, **kind)).eval()


def inputs(n=2):
    torch.manual_seed(1)
    return torch.randn(n, 1, 28, 28), torch.tensor([0.2, 0.9][:n]), torch.eye(10)[[3, 7][:n]]


@pytest.mark.parametrize(
    ("hidden", "kind", "count"),
    [(64, PLAIN, 1_975_361), (64, TIME, 1_996_417), (64, CLASS, 2_019_201),
     (128, PLAIN, 7_891_073), (128, TIME, 7_974_145), (128, CLASS, 8_060_673)],
)  # fmt: skip
def test_parameter_counts_are_the_courses(hidden, kind, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(UNetConfig(hidden, **kind)).parameters()) == count


def test_sizes_go_from_28_to_1_and_back():
    seen = []
    unet = small()
    for name in ("in_block", "down1", "down2", "flatten", "unflatten", "up1", "up2", "out_block", "out"):
        getattr(unet, name).register_forward_hook(
            lambda m, i, o, name=name: seen.append((name, *i[0].shape[1:3], *o.shape[1:3]))
        )
    unet(inputs()[0])
    assert seen == [
        ("in_block", 1, 28, 4, 28), ("down1", 4, 28, 4, 14), ("down2", 4, 14, 8, 7), ("flatten", 8, 7, 8, 1),
        ("unflatten", 8, 1, 8, 7), ("up1", 16, 7, 4, 14), ("up2", 8, 14, 4, 28), ("out_block", 8, 28, 4, 28),
        ("out", 4, 28, 1, 28),
    ]  # fmt: skip


def test_blocks_are_convolution_norm_and_exact_gelu():
    unet = small()
    assert [type(m) for m in unet.in_block[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.GELU]
    assert all(m.approximate == "none" for m in unet.modules() if isinstance(m, nn.GELU))
    assert unet.down1[0][0].stride == (2, 2) and unet.up1[0][0].kernel_size == (4, 4)


def last_layers(unet, value):
    """Every FCBlock answers `value` to anything."""
    for name, block in unet.named_children():
        if name.startswith("fc"):
            nn.init.zeros_(block[2].weight)
            nn.init.constant_(block[2].bias, value[name[-1]])


@pytest.mark.parametrize(
    ("kind", "value"),
    [(TIME, {"t": 0.0}), (TIME | {"modulate": "mul"}, {"t": 1.0}), (CLASS, {"t": 0.0, "c": 1.0})],
)
def test_a_network_whose_time_and_class_say_nothing_is_the_plain_one(kind, value):
    plain, told = small(), small(**kind)
    told.load_state_dict(plain.state_dict(), strict=False)
    last_layers(told, value)
    x, time, c = inputs()
    torch.testing.assert_close(told(x, time, c if "c" in value else None), plain(x), rtol=0, atol=0)


def test_the_forward_pass_written_out():
    unet, (x, t, c) = small(**CLASS).double(), (v.double() for v in inputs())
    p = unet.state_dict()

    def wb(name):
        return p[f"{name}.weight"], p[f"{name}.bias"]

    def norm_gelu(h, name):
        return F.gelu(F.batch_norm(h, p[f"{name}.running_mean"], p[f"{name}.running_var"], *wb(name)))

    def conv(h, name, stride=1):
        return norm_gelu(F.conv2d(h, *wb(f"{name}.0"), stride, 1), f"{name}.1")

    def transposed(h, name, stride, padding):
        return norm_gelu(F.conv_transpose2d(h, *wb(f"{name}.0"), stride, padding), f"{name}.1")

    def block(h, name):
        return conv(conv(h, f"{name}.0"), f"{name}.1")

    def fc(v, name):
        return F.linear(F.gelu(F.linear(v, *wb(f"{name}.0"))), *wb(f"{name}.2"))[:, :, None, None]

    at_28 = block(x, "in_block")
    at_14 = block(conv(at_28, "down1.0", 2), "down1.1")
    at_7 = block(conv(at_14, "down2.0", 2), "down2.1")
    u = fc(c, "fc1_c") * transposed(F.gelu(F.avg_pool2d(at_7, 7)), "unflatten", 7, 0) + fc(t[:, None], "fc1_t")
    u = block(transposed(torch.cat([u, at_7], 1), "up1.0", 2, 1), "up1.1")
    u = fc(c, "fc2_c") * u + fc(t[:, None], "fc2_t")
    u = block(transposed(torch.cat([u, at_14], 1), "up2.0", 2, 1), "up2.1")
    found = F.conv2d(block(torch.cat([u, at_28], 1), "out_block"), *wb("out"), 1, 1)
    torch.testing.assert_close(unet(x, t, c), found, rtol=0, atol=1e-12)


def test_modulation_by_hand():
    """u = 2, t = 3, c = 5: add 2 + 3, mul 2 * 3, with class 5 * 2 + 3."""
    u, t, c = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1), 3.0), torch.full((1, 1), 5.0)
    assert small(**TIME).modulated(u, t, None).item() == 5
    assert small(**TIME, modulate="mul").modulated(u, t, None).item() == 6
    assert small(**CLASS).modulated(u, t, c).item() == 13


def test_both_places_listen_to_time_and_class():
    """Each FCBlock alone changes the answer: in float64, since a random network passes little of it on."""
    x, time, c = (v.double() for v in inputs(1))
    for kind, names in ((TIME, ["fc1_t", "fc2_t"]), (CLASS, ["fc1_t", "fc2_t", "fc1_c", "fc2_c"])):
        unet = small(**kind).double()
        args = (x, time, c if kind is CLASS else None)
        for name in names:
            before = unet(*args)
            getattr(unet, name)[2].bias.data += 1
            assert (unet(*args) - before).abs().max() > 1e-9, name
    for kind, alone in (
        (TIME, "fc1_t"),
        (TIME, "fc2_t"),
        (CLASS, "fc1_t"),
        (CLASS, "fc2_t"),
        (CLASS, "fc1_c"),
        (CLASS, "fc2_c"),
    ):
        unet = small(**kind).double()
        last_layers(unet, {"t": 0.0, "c": 1.0})
        nn.init.ones_(getattr(unet, alone)[2].weight)
        told = c if kind is CLASS else None
        other = (x, time, c.roll(1, 1)) if alone.endswith("c") else (x, time / 2, told)
        assert (unet(*other) - unet(x, time, told)).abs().max() > 1e-9, alone


def test_inputs_that_the_config_has_not_are_refused():
    """A network with classes that gets none would add the time alone, which it never did in training."""
    x, time, c = torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.zeros(2, 10)
    for config, inputs in (({}, (x, time)), (TIME, (x,)), (TIME, (x, time, c)), (CLASS, (x, time)), (CLASS, (x,))):
        with pytest.raises(ValueError, match="give a time and a class c where the config has them, and only there"):
            small(**config)(*inputs)
    for config in ({"modulate": "plus"}, {"num_classes": 10}):
        with pytest.raises(ValueError, match='modulate must be "add" or "mul", and a network with classes needs time'):
            UNetConfig(4, **config)
