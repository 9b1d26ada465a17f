"""Checks of arguments: what students pass by mistake gets one line that names the argument."""

import math

import numpy as np
import pytest
import torch

from minidiff import charts, checks, ddpm, denoise, editing, flow, images, notation
from minidiff.cascade import Settings
from minidiff.factorized import Part, averaged, through_views
from minidiff.guidance import dynamic_threshold, guided
from minidiff.schedule import leading, squaredcos_cap_v2
from minidiff.solvers import invert, times_for
from minidiff.views import named


@pytest.mark.parametrize("value", ["2", None, [2], math.nan, True, torch.zeros(2), np.zeros(2), 2.5, 11, 1j, b"2"])
def test_a_whole_number_is_one(value):
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 10, got [^\n]{1,60}$"):
        checks.number("steps", value, 1, 10, whole=True)


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2)])
def test_numbers_of_every_library_are_numbers(value):
    checks.number("steps", value, 1, 10, whole=True)
    checks.number("scale", value + 0.5)


def test_how_far_a_number_may_reach_is_said():
    with pytest.raises(ValueError, match="^sigma must be a finite number of 0 or more, got -1$"):
        checks.number("sigma", -1, 0)
    with pytest.raises(ValueError, match="^scale must be a finite number, got inf$"):
        checks.number("scale", math.inf)


def test_a_message_shows_a_tensor_on_one_line():
    assert checks.short(torch.zeros(9, 9)) == "tensor([[0., 0., 0., 0., 0., 0., 0., 0., 0.], [0., 0., 0., 0"
    with pytest.raises(ValueError, match=r"^a prompt is a text, or its states, got \[tensor\([^\n]*$"):
        Part([torch.zeros(9, 9)])


@pytest.mark.parametrize(("changes", "message"), [
    ({"guidance_scale": "7"}, "guidance_scale must be a finite number, got '7'"),
    ({"guidance_scale": torch.tensor([7.0, 3.0])}, "guidance_scale must be a finite number, got tensor"),
    ({"steps": 0}, "cannot take 0 steps"), ({"steps": [1, 2]}, "steps must be a count, a list like"),
    ({"sampler": "ddpmm"}, "no sampler 'ddpmm'; choose from ddpm, ddim, dpm"),
    ({"sampler": ["ddpm"]}, "no sampler .'ddpm'.; choose from"), ({"negative_prompt": 3}, "a prompt is a text"),
    ({"guidance": 7.0}, "no setting 'guidance'; choose from steps, guidance_scale, sampler, negative_prompt"),
])  # fmt: skip
def test_settings_that_no_stage_could_use_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(27, 3.0).but(**changes)


def test_other_slips():
    predict = guided(lambda x, t, text: (x, None), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 1.0)
    image, schedule = torch.zeros(1, 3, 8, 8), squaredcos_cap_v2()
    with pytest.raises(ValueError, match="at t = 999 nothing is left of an image that could be led back"):
        invert(predict, image, times_for("ddim", 10), schedule)
    assert invert(predict, image, leading(10), schedule).isfinite().all()
    with pytest.raises(ValueError, match=r"estimates must be \(B, C, H, W\), got \(3, 8, 8\)"):
        dynamic_threshold()(image[0])
    with pytest.raises(ValueError, match="parts are a list of Part"):
        averaged([Part("a"), Part("b")])
    flip = named("flip")
    assert named(flip) is flip
    with pytest.raises(ValueError, match="no view '3'; choose from identity"):
        named(3)


X, FLAT, THIRD = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), torch.full((2, 1, 1, 1), 1 / 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: flow.dormand_prince(lambda x, t: FLAT, X), "shapes must agree"),
    (lambda: flow.divergence(lambda x, t: x, X, THIRD, FLAT), "shapes must agree"),
    (lambda: flow.path(X, X, torch.tensor([500, 0])), "times are a tensor .B,. in .0, 1.,"),
    (lambda: flow.path(X, X, 0.5), "times are a tensor .B,. in .0, 1.,"),
    (lambda: flow.grid("50"), "steps must be a whole number of 1 or more, got '50'"),
    (lambda: flow.log_likelihood(lambda x, t: x, X, flow.grid(4)[:3]), "times rise from 0, noise, to 1, data"),
    (lambda: notation.from_v(X, FLAT, THIRD), "shapes must agree"),
    (lambda: notation.from_x_start(X, FLAT, THIRD), "shapes must agree"),
    (lambda: notation.from_score(X, FLAT, THIRD), "shapes must agree"),
    (lambda: notation.from_velocity(X, FLAT, THIRD), "shapes must agree"),
    (lambda: notation.v_of(X, FLAT, THIRD), "shapes must agree"),
    (lambda: notation.velocity_of(X, FLAT), "shapes must agree"),
    (lambda: denoise.mse(X, FLAT), "shapes must agree"),
    (lambda: images.to_pil(torch.zeros(3, 4, 4, dtype=torch.int64)), "floats in .-1, 1., got torch.int64"),
    (lambda: images.to_pil(torch.full((3, 4, 4), 200.0)), "values from 200 to 200; of 0..255 pass"),
    (lambda: images.load(torch.zeros(3, 4, 4), 0), "size must be a whole number of 1 or more, got 0"),
    (lambda: images.save_images([X[0]] * 2, None, "x.png", {}, [{}]), "2 images, but metadata of 1"),
    (lambda: charts.compared([]), "no runs; pass folders"), (lambda: through_views(None, "flip"), "pass a text, or a"),
    (lambda: editing.mask_at(torch.zeros(1, 1, 0, 0), 64), "a mask's tensor must be"),
])  # fmt: skip
def test_more_slips(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_time_in_place_of_alpha_bar_is_refused():
    """sqrt(1 - 500) is NaN, and so would be every image after it."""
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([500, 20])
    for alpha_bar in (t.view(-1, 1, 1, 1), torch.full((2, 1, 1, 1), 1.5)):
        with pytest.raises(ValueError, match=r"alpha-bars and times lie in \[0, 1\]"):
            ddpm.add_noise(x, x, alpha_bar)
    with pytest.raises(ValueError, match=r"a reverse step leads to an earlier time, got t \[500, 20\] and t_prev"):
        ddpm.step(squaredcos_cap_v2(), x, t, torch.tensor([500, 10]), x, None, x)
