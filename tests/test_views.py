"""Views are what they claim: permutations that come back bit for bit, the same pixels as elsewhere; and the linter."""

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import InterpolationMode, rotate

from minidiff import jigsaw, views
from tests.reference.fill import normal, read_json

FAILING = ["inner_circle_failure", "blur_failure", "white_balance_failure"]
GOOD = [name for name in views.VIEWS if name not in FAILING]
PERMUTATIONS = [name for name in GOOD if views.named(name).order is not None]
REFERENCE = read_json("views")["sha256"]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("size", [64, 256])
def test_good_views_come_back_bit_for_bit_and_are_linear_and_keep_the_norm(name, size):
    view = views.named(name)
    x, y = normal("views.x", 2, 6, size, size).double(), normal("views.y", 2, 6, size, size).double()
    assert torch.equal(view.inverse_view(view.view(x)), x)
    assert torch.equal(view.view(view.inverse_view(x)), x)
    torch.testing.assert_close(view.view(2 * x - 3 * y), 2 * view.view(x) - 3 * view.view(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((view.view(x) * view.view(y)).sum(), (x * y).sum(), rtol=1e-10, atol=1e-8)


def test_a_view_that_mixes_the_two_images_of_stage_2_is_found():
    """Red and blue exchanged by flip(-3) is right for 3 channels; of 6 it exchanges x_t and the small image, too."""

    def naive(x):
        return x.flip(-3)

    def sound(x):
        return x.unflatten(-3, (-1, 3)).flip(-3).flatten(-4, -3)

    (fault,) = (m.fault for m in views.check(views.View("naive", naive, naive, naive)) if m.fault)
    assert "the error with 6 channels is" in fault and "stage 2, which sees x_t beside" in fault
    assert not any(m.fault for m in views.check(views.View("sound", sound, sound, sound)))


@pytest.mark.parametrize("name", PERMUTATIONS)
@pytest.mark.parametrize("size", [64, 256])
def test_orders_are_bijections_and_say_what_view_does(name, size):
    view = views.named(name)
    order = view.order(size)
    assert torch.equal(order.sort().values, torch.arange(size * size))
    x = normal("views.x", 1, 3, size, size)
    assert torch.equal(view.view(x).flatten(2), x.flatten(2)[..., order])
    assert name == "identity" or not torch.equal(view.view(x), x)


@pytest.mark.parametrize("name", ["inner_circle", "square_hinge"])
@pytest.mark.parametrize("size", [64, 256])
def test_same_pixels_as_visual_anagrams(name, size):
    order = views.named(name).order(size).numpy().astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest() == REFERENCE[f"{name}.{size}"]


def test_turns_and_mirrors_against_torchvision():
    x = normal("views.x", 1, 3, 64, 64)
    for name, angle in (("rotate_180", 180), ("rotate_cw", -90), ("rotate_ccw", 90)):
        assert torch.equal(views.named(name).view(x), rotate(x, angle, InterpolationMode.NEAREST))
    assert torch.equal(views.named("flip").view(x)[..., 0, :], x[..., 63, :])
    assert torch.equal(views.named("flip").view(x)[..., 5], x[..., 5].flip(-1))


@pytest.mark.parametrize("size", [64, 256])
def test_skews_column_by_column(size):
    """skew: down by int(1.5 (i - H/2)). skew_by: by round(linspace(-d, d)), d = 50 at 64 pixels and 200 at 256."""
    x = normal("views.x", 3, size, size)
    a, b = views.named("skew").view(x), views.named("skew_by").view(x)
    d = 50 * size // 64
    for i in range(size):
        assert torch.equal(a[:, :, i], x[:, :, i].roll(int(1.5 * (i - size // 2)), -1))
        assert torch.equal(b[:, :, i], x[:, :, i].roll(int(np.linspace(-d, d, size).round()[i]), -1))
    assert torch.equal(views.named("skew:-1.5").view(a), x)  # int() cuts towards 0, so the opposite skew undoes it


def test_patches_move_whole():
    """Patch k of the view is patch places[k] of the image; 64 patches of 64 pixels are single pixels."""
    x = normal("views.x", 3, 64, 64)
    seen = views.named("patch_permute").view(x)
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    cut = [x[:, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] for r in range(8) for c in range(8)]
    for k, place in enumerate(places):
        r, c = divmod(k, 8)
        assert torch.equal(seen[:, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8], cut[place])
    assert views.named("pixel_permute").order(64).sub(torch.arange(4096)).ne(0).float().mean() > 0.99
    with pytest.raises(ValueError, match="7 patches do not fit 64 pixels evenly"):
        views.named("patch_permute:7").view(x)


def test_jigsaw_moves_whole_pieces_with_their_like():
    """At 64 and 256 pixels the same 16 pieces make the same moves: corners to corners, inner to inner, borders to
    borders, each as a whole."""
    moves = {}
    for size in (64, 256):
        pieces, order = torch.from_numpy(jigsaw.pieces(size)).flatten(), views.named("jigsaw").order(size)
        assert pieces.bincount().tolist() == [n for n in pieces.bincount()[[0, 4, 8, 12]].tolist() for _ in range(4)]
        came = {}  # where the pixels of each place come from
        for place in range(16):
            (piece,) = pieces[order[pieces == place]].unique().tolist()
            came[place] = piece
            kind = min(place // 4, 2)
            assert min(piece // 4, 2) == kind
        moves[size] = came
    assert moves[64] == moves[256] and sorted(moves[64].values()) == list(range(16))
    assert any(place != piece for place, piece in moves[64].items())


def test_jigsaw_draws_the_published_random_numbers():
    """Seed 4522: permutations of corners, inner, e and f pieces, then the four swaps, from numpy's legacy stream.
    A corner goes where its permutation says: the place of corner i shows corner perm[i]."""
    random = np.random.RandomState(4522)
    corner = random.permutation(4)
    pieces, order = torch.from_numpy(jigsaw.pieces(64)).flatten(), views.named("jigsaw").order(64)
    for i in range(4):
        assert pieces[order[pieces == i]].unique().tolist() == [corner[i]]


def test_negate_leaves_the_variance_alone_and_turns_move_it():
    x = normal("views.x", 1, 3, 8, 8)
    assert torch.equal(views.named("negate").inverse_view(x), -x)
    assert torch.equal(views.named("negate").inverse_variance(x), x)
    assert torch.equal(views.named("rotate_cw").inverse_variance(x), x.rot90(1, (-2, -1)))


def measured(view: views.View) -> tuple[dict[str, float], list[str]]:
    """The values of `check` by the last two words of their names, and the names that are wrong."""
    measures = views.check(view)
    values = {" ".join(m.name.split()[-2:]): m.value for m in measures}
    return values, [" ".join(m.name.split()[-2:]) for m in measures if m.fault]


@pytest.mark.parametrize("name", GOOD)
def test_good_views_pass_the_check(name):
    values, faults = measured(views.named(name))
    assert faults == [] and abs(values["of noise"] - 1) < 0.01


def test_the_failing_views_are_bad_each_for_its_own_reason():
    """With the value that the formula gives: 1.5 times as strong is a deviation of 1.5."""
    (_, turned), (blurred, lost), (brighter, strong) = (measured(views.named(name)) for name in FAILING)
    assert turned == ["inverse error", "scalar products", "of noise", "of neighbours"]
    assert blurred["of neighbours"] > 0.9 and lost == turned
    assert brighter["inverse error"] < 1e-12 and abs(brighter["of noise"] - 1.5) < 0.01
    assert strong == ["scalar products", "of noise"]
    (fault,) = (m.fault for m in views.check(views.named("white_balance_failure")) if m.ideal == 1)
    assert fault == "the deviation of noise is 1.5, not 1: the network reads a time that does not fit"


def test_the_check_finds_what_is_not_linear_or_not_the_same_at_both_sizes():
    nonlinear = views.View("cube", lambda x: x**3, lambda x: x.sign() * x.abs() ** (1 / 3), lambda x: x)
    assert "linearity error" in measured(nonlinear)[1]
    fixed = views.permutation("roll", lambda grid: grid.roll(16, 0))  # 16 pixels of 64, and also of 256
    assert measured(fixed)[1] == ["256 pixels"]
    half = views.View("half", lambda x: x * math.sqrt(0.5), lambda x: x / math.sqrt(0.5), lambda x: x)
    assert measured(half)[1] == ["scalar products", "of noise"]
    nothing = views.View("nan", lambda x: x * math.nan, lambda x: x, lambda x: x)
    assert len(measured(nothing)[1]) == 7


def test_names_that_are_none():
    with pytest.raises(ValueError, match="no view 'turn'; choose from identity, flip, rotate_180"):
        views.named("turn")
    with pytest.raises(ValueError, match="'flip:3': flip takes no number"):
        views.named("flip:3")
    for text, message in (("patch_permute:0", "a whole number from 1 to 64, such as patch_permute:8"),
                          ("patch_permute:2.5", "a whole number"), ("jigsaw:x", "a whole number from 0 to 4294967295"),
                          ("skew:inf", "a number from -64 to 64, such as skew:1.5"),
                          ("skew:nan", "a number from")):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{text}': {text.split(':')[0]} takes {message}"):
            views.named(text)
    with pytest.raises(ValueError, match="views need square images"):
        views.named("flip").view(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="a side divisible by 4, got 30"):
        views.named("jigsaw").view(torch.zeros(3, 30, 30))


def test_enlarging_commutes_with_patches():
    """The 64-pixel view of an image, each pixel made 4x4, is the 256-pixel view of the image made so."""
    x = normal("views.x", 1, 3, 64, 64)
    for name in ("patch_permute", "pixel_permute", "flip", "rotate_cw"):
        view = views.named(name)
        assert torch.equal(F.interpolate(view.view(x), scale_factor=4), view.view(F.interpolate(x, scale_factor=4)))
