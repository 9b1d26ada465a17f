"""Components add up to the whole, and blurs are torchvision's and the course's."""

import math

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from minidiff import components
from tests.reference.fill import normal

X = normal("components.x", 2, 3, 64, 64).double()


@pytest.mark.parametrize("kind", ["frequency", "triple", "color", "motion"])
@pytest.mark.parametrize("size", [28, 64, 256])
def test_components_add_up_to_the_whole(kind, size):
    x = normal("components.x", 1, 3, size, size).double()
    parts = [component(x) for component in components.of_kind(kind)]
    torch.testing.assert_close(sum(parts), x, rtol=0, atol=1e-12)
    assert all(part.square().mean() > 1e-4 for part in parts)


def test_components_are_linear():
    y = normal("components.y", 2, 3, 64, 64).double()
    for kind in ("frequency", "triple", "color", "motion"):
        for c in components.of_kind(kind):
            torch.testing.assert_close(c(2 * X - y), 2 * c(X) - c(y), rtol=0, atol=1e-12)


def test_blur_is_torchvisions_and_grows_with_the_picture():
    """Kernel 33 and sigma 2 at 64 pixels; 133 and 8 at 256; kernel 13 for the denoising demo."""
    torch.testing.assert_close(components.blur(X), gaussian_blur(X, [33, 33], [2.0, 2.0]))
    torch.testing.assert_close(components.blur(X, 2.0, 13), gaussian_blur(X, [13, 13], [2.0, 2.0]))
    large = normal("components.large", 1, 3, 256, 256)
    torch.testing.assert_close(components.blur(large), gaussian_blur(large, [133, 133], [8.0, 8.0]))
    torch.testing.assert_close(components.blur(torch.ones(1, 3, 64, 64)), torch.ones(1, 3, 64, 64))  # weights sum to 1
    assert torch.equal(components.blur(X, 0), X)
    with pytest.raises(ValueError, match=r"\(64, 8\) pixels is too small for a blur with 33 taps"):
        components.blur(X[..., :8])
    for sigma, kernel in ((-1.0, 3), (math.nan, 3), (1.0, 0)):
        with pytest.raises(ValueError, match="a blur's (sigma|kernel) must be a (finite|whole) number of"):
            components.blur(torch.zeros(3, 64, 64), sigma, kernel)


def test_blur_commutes_with_turning():
    torch.testing.assert_close(components.blur(X.rot90(1, (-2, -1))), components.blur(X).rot90(1, (-2, -1)))


def test_the_triple_is_two_cuts():
    """Blur 1, then blur 2 of that: coarse is both, fine is what the first takes away."""
    coarse, middle, fine = (c(X) for c in components.triple())
    once = gaussian_blur(X, [33, 33], [1.0, 1.0])
    torch.testing.assert_close(coarse, gaussian_blur(once, [33, 33], [2.0, 2.0]))
    torch.testing.assert_close(fine, X - once)
    torch.testing.assert_close(middle, once - coarse)


def test_grey_and_colour_are_orthogonal_projections():
    grey, color = components.grey, components.color
    torch.testing.assert_close(grey(grey(X)), grey(X))
    torch.testing.assert_close(color(color(X)), color(X))
    torch.testing.assert_close(grey(color(X)), torch.zeros_like(X))
    torch.testing.assert_close(grey(X)[0, :, 3, 5], X[0, :, 3, 5].mean().expand(3))


def test_motion_is_a_diagonal_of_seven():
    """Pixel (20, 30) becomes the mean of the seven around it on its diagonal; at 256 pixels there are 29."""
    expected = sum(X[1, 2, 20 + k, 30 + k] for k in range(-3, 4)) / 7
    torch.testing.assert_close(components.motion(X)[1, 2, 20, 30], expected)
    large = normal("components.large", 1, 3, 256, 256)
    expected = sum(large[0, 1, 100 + k, 90 + k] for k in range(-14, 15)) / 29
    torch.testing.assert_close(components.motion(large)[0, 1, 100, 90], expected)


def test_scale_and_its_errors():
    a, b = components.of_kind("scale", weights=[0.25, -2.0])
    torch.testing.assert_close(a(X) + b(X), -1.75 * X)
    with pytest.raises(ValueError, match="scale needs one weight per prompt, such as --weights 0.5 0.5"):
        components.of_kind("scale")
    with pytest.raises(ValueError, match="no kind of components 'phase'; choose from frequency, triple, color, motion"):
        components.of_kind("phase")
