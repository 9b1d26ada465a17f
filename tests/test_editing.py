"""Editing: where a walk starts, what it keeps, against closed forms, diffusers' pipelines and RePaint's walk."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from minidiff import components, ddpm, editing, images, toy
from minidiff.cascade import EDIT_SMALL, KEPT
from minidiff.factorized import Part
from minidiff.sampling import denoise, draw_noise, final, network_calls, noised, other_stream, seeded, visits
from minidiff.schedule import leading, respaced, squaredcos_cap_v2, strided
from tests.reference.fill import HERE, normal, read, relative_l2
from tests.tiny import recorded_cascade

SCHEDULE = squaredcos_cap_v2()
IMAGE = normal("edits.picture", 1, 3, 8, 8).tanh()
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 2:6, 3:8] = 1
ONES, ZEROS = torch.ones_like(MASK), torch.zeros_like(MASK)


@pytest.fixture(scope="module")
def cascade():
    return recorded_cascade()


def draw(cascade, **options):
    """Stage 1 with the random numbers of seed 5 itself, as recorded: an edit moves on to a stream, from one before."""
    is_edit = {"image", "keep"} & set(options)
    generators = other_stream(seeded([5]), -EDIT_SMALL if is_edit else 0)
    return cascade.draw([Part(*cascade.encode("prompt 0"))], generators, **options)


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "i_start"), [("inpaint", 0), ("inpaint_late", 4)])
def test_clean_is_diffusers_inpainting(cascade, name, i_start):
    """diffusers starts from the noised image also at strength 1; 0.6 leaves out 4 of 10 steps. Tolerances as for the
    pipelines without edits: tests/test_cascade.py."""
    x = draw(cascade, image=IMAGE, i_start=i_start, keep=editing.clean(IMAGE, MASK))
    reference = read("edits")
    assert relative_l2(x, reference[f"{name}.float64"]) <= 2e-5
    assert relative_l2(x, reference[f"{name}.released"]) <= 2e-4
    outside = (MASK == 0).expand_as(x)
    assert torch.equal(x[outside], IMAGE[outside])


def test_starting_from_an_image_is_diffusers_img2img(cascade):
    """SDEdit Alg. 1 with strength 0.7: the last 7 of 10 steps."""
    assert relative_l2(draw(cascade, image=IMAGE, i_start=3), read("edits")["img2img.float64"]) <= 2e-5


def test_the_walk_of_repaint_is_the_published_schedulers():
    """diffusers' RePaintScheduler lists indices from the end, without the last move to clean."""
    with safe_open(HERE / "edits.safetensors", "pt") as f:
        walks = json.loads(f.metadata()["provenance"])["repaint"]
    for key, expected in walks.items():
        steps, jump_length, jump_n_sample = map(int, key.split(","))
        times = visits(torch.arange(steps - 1, -1, -1), True, (jump_length, jump_n_sample))
        assert times == expected + [-1]


def test_a_masks_file_must_have_the_shape_of_any_kind_of_image(tmp_path):
    photo = Image.new("RGB", (90, 70))
    photo.save(tmp_path / "photo.png")
    for size in ((45, 35), (64, 64)):
        Image.linear_gradient("L").resize(size).save(tmp_path / f"{size[0]}.png")
    for image in (tmp_path / "photo.png", photo, images.load(photo)):
        assert editing.kept(image, tmp_path / "45.png", 8) is not None
        with pytest.raises(ValueError, match=r"is 90x70, .*64.png is 64x64; any size of the same shape will do"):
            editing.kept(image, str(tmp_path / "64.png"), 8)


def test_a_masks_tensor_may_be_of_any_type_and_is_square():
    mask = editing.box((16, 16, 48, 48), 64)
    for size in (64, 256):
        for other in (mask.bool(), mask.long(), mask.half(), mask.double()):
            assert torch.equal(editing.mask_at(other, size), editing.box((16, 16, 48, 48), size))
    assert editing.feather(editing.mask_at(mask.bool(), 64), 2.0).unique().numel() > 2
    for wrong in (mask[0, 0], mask[0], mask[..., :32], mask.expand(2, 1, -1, -1), torch.tensor([1, 2, 3, 4])):
        with pytest.raises(ValueError, match=r"a mask's tensor must be \(1, 1, H, H\), a square, got"):
            editing.mask_at(wrong, 256)
    with pytest.raises(ValueError, match=r"a mask lies in \[0, 1\], .* got nan to nan"):
        editing.check_mask(mask * math.nan, torch.zeros(1, 3, 64, 64))


def test_the_walk_of_repaint_by_hand():
    """Four entries, jumps of 2, twice: down to the first, up 2, down again. Each jump costs its length in calls."""
    times = visits(torch.tensor([900, 600, 300, 0]), True, (2, 2))
    assert times == [900, 600, 300, 0, 300, 600, 300, 0, -1]
    assert network_calls(times) == 4 + 2
    assert visits(torch.tensor([900, 600]), False) == [900, 600] and network_calls([900, 600]) == 1
    paper = visits(torch.arange(249, -1, -1), True, (10, 10))  # 24 places, 9 jumps of 10 at each
    assert network_calls(paper) == 250 + 24 * 9 * 10
    with pytest.raises(ValueError, match="jump_length must be a whole number of 1 or more, got 0"):
        visits(torch.tensor([5, 4]), True, (0, 3))


# --- what must hold at the ends ---------------------------------------------------------------------------------------


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_returns_the_image(cascade):
    """RePaint Eq. 8 with m = 0 (theirs is the opposite of ours) and 1."""
    few = leading(5)
    plain = draw(cascade, steps=few)
    for method in (editing.renoise, editing.clean):
        assert torch.equal(draw(cascade, steps=few, keep=method(IMAGE, ONES)), plain)
        assert torch.equal(draw(cascade, steps=few, keep=method(IMAGE, ZEROS)), IMAGE)


def test_one_sample_of_jumps_is_no_jumps(cascade):
    keep, few = editing.renoise(IMAGE, MASK), leading(5)
    assert torch.equal(draw(cascade, steps=few, keep=keep, jumps=(2, 1)), draw(cascade, steps=few, keep=keep))


def test_the_course_walk_leaves_its_known_noise_in_the_known_region(cascade):
    """990 to 0 without the last step: the known region is the image at t = 0, 0.0064 rms away.

    64 values a channel, 3 channels: 5 standard errors of an rms over n values are 5 / sqrt(2 n)."""
    x = draw(cascade, steps="course", image=IMAGE, i_start=31, keep=editing.renoise(IMAGE, ZEROS))
    alpha_bar = SCHEDULE.alphas_cumprod[0]
    rms = (x - alpha_bar.sqrt() * IMAGE).square().mean().sqrt().item()
    assert abs(rms / (1 - alpha_bar).sqrt().item() - 1) < 5 / math.sqrt(2 * 192)
    assert abs((1 - alpha_bar).sqrt().item() - 0.0064) < 1e-4


def test_the_known_region_has_random_numbers_of_its_stream(cascade):
    """What is kept is noised with stream KEPT, counted from that of the walk, so that its noise is not the walk's."""
    (generator,) = seeded([5], EDIT_SMALL + KEPT)
    known = noised(IMAGE, 900, SCHEDULE, [generator])  # the walk of one step: kept at its start, then after it
    inputs = []
    hook = cascade.stage(1).unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    parts, keep = [Part(*cascade.encode("prompt 0"))], editing.renoise(IMAGE, ZEROS)
    cascade.draw(parts, [5], steps=torch.tensor([900]), keep=keep)
    hook.remove()
    assert torch.equal(inputs[0][:1], known)


def test_the_known_region_is_noised_to_the_new_time():
    """RePaint Eq. 8: at t_prev, mean sqrt(alpha_bar) image and variance 1 - alpha_bar, for 10,000 values."""
    image = torch.full((1, 1, 100, 100), 0.5)
    keep = editing.renoise(image, torch.zeros(1, 1, 100, 100))(SCHEDULE, seeded([0]))
    for t in (700, 30, 0):
        known, a = keep(torch.zeros(1, 1, 100, 100), t), SCHEDULE.alphas_cumprod[t].item()
        assert abs(known.mean().item() - 0.5 * a**0.5) < 5 * ((1 - a) / 1e4) ** 0.5
        assert abs(known.var().item() / (1 - a) - 1) < 5 * (2 / 1e4) ** 0.5
    assert torch.equal(keep(torch.zeros(1, 1, 100, 100), -1), image)


def test_sdedit_comes_closer_to_the_image_the_later_it_starts():
    """Mean distance to the image over 50 seeds, of a Gaussian model."""
    predict, timesteps, distances = toy.gaussian(SCHEDULE, 0.0, 0.5), strided(), []
    for i in (1, 3, 5, 7, 10, 20, 32):
        x_t = noised(IMAGE, int(timesteps[i]), SCHEDULE, seeded(range(50)))
        x = final(denoise(predict, x_t, timesteps[i:], SCHEDULE, seeded(range(100, 150)), final_step=False))
        distances.append((x - IMAGE).square().mean().item())
    assert distances == sorted(distances, reverse=True)


def test_a_jump_up_has_the_variance_of_the_forward_process():
    """DDPM Eq. 2, over several steps at once: from x_t = 0.3 at t to later, for 10,000 values; and from clean."""
    x, z = torch.full((1, 1, 100, 100), 0.3), draw_noise((1, 1, 100, 100), seeded([0]))
    for t, later in ((100, 400), (-1, 250)):
        up = ddpm.add_more_noise(SCHEDULE, x, torch.tensor([t]), torch.tensor([later]), z)
        a = (SCHEDULE.alpha_bar(torch.tensor([later])) / SCHEDULE.alpha_bar(torch.tensor([t]))).item()
        torch.testing.assert_close(up, a**0.5 * x + (1 - a) ** 0.5 * z)
    one = ddpm.add_more_noise(SCHEDULE, x, torch.tensor([9]), torch.tensor([10]), z)
    beta = SCHEDULE.betas[10].item()
    torch.testing.assert_close(one, (1 - beta) ** 0.5 * x + beta**0.5 * z)


def test_jumps_bring_both_regions_together():
    """Two correlated pixels of a Gaussian, one known: the other should come out at rho times the known one. Without
    jumps it hardly listens; with each further sample it comes nearer (mean over 4000 pairs)."""
    rho, known = 0.9, 1.0
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]])

    def predict(x_t, t):
        a = SCHEDULE.alpha_bar(t)[0].item()
        values = x_t[0, 0]  # (N, 2)
        x_start = a**0.5 * values @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2)) @ covariance
        return ((values - a**0.5 * x_start) / (1 - a) ** 0.5)[None, None], torch.full_like(x_t, -1)

    mask = torch.zeros(1, 1, 4000, 2)
    mask[..., 1] = 1
    image = torch.full((1, 1, 4000, 2), known)
    errors = []
    for n in (1, 3, 10):
        keep = editing.renoise(image, mask)(SCHEDULE, seeded([7], 1))
        x_T = draw_noise((1, 1, 4000, 2), seeded([1]))
        x = final(denoise(predict, x_T, respaced(20), SCHEDULE, seeded([2]), keep=keep, jumps=(5, n)))
        errors.append(abs(x[..., 1].mean().item() - rho * known))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.5 * errors[0]


def test_a_reference_keeps_its_component():
    """Grey is a projection, so the result has exactly the photograph's grey, whatever the network says of it; a low
    pass is none, and the formula holds as it stands: the high part of one, the low part of the other."""
    photo = normal("edits.photo", 1, 3, 64, 64).tanh()
    keep = editing.reference(photo, components.grey)(SCHEDULE, seeded([1], 1))
    x_T, predict = draw_noise((1, 3, 64, 64), seeded([0])), toy.gaussian(SCHEDULE, 0.2, 0.3)
    x = final(denoise(predict, x_T, respaced(5), SCHEDULE, seeded([0]), keep=keep))
    torch.testing.assert_close(components.grey(x), components.grey(photo), rtol=0, atol=1e-6)
    assert (components.color(x) - components.color(photo)).abs().mean() > 0.1
    low, high = components.of_kind("frequency")
    kept = editing.reference(photo, low)(SCHEDULE, seeded([1], 1))(x, -1)
    torch.testing.assert_close(kept, high(x) + low(photo), rtol=0, atol=1e-6)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_boxes_and_feathers():
    """Corners in pixels of 64: 16..32 is 64..128 at 256. The course's mask: rows 2 to 19, columns 24 to 41, 7.9 %."""
    assert editing.box((24, 2, 42, 20), 64).mean().item() == pytest.approx(0.0791, abs=1e-4)
    large = editing.box((16, 0, 32, 64), 256)
    assert large[..., 64:128].min() == 1 and large.sum() == 64 * 256
    soft = editing.feather(editing.box((16, 16, 48, 48), 64), 2.0)
    assert soft.min() >= 0 and soft.max() <= 1 and 0.4 < soft[0, 0, 32, 16] < 0.6 and soft[0, 0, 32, 32] == 1
    for corners in ((10, 0, 10, 5), (5, 5, 4, 9), (0.2, 0.2, 0.8, 0.8)):  # the last ones are shares of the image
        with pytest.raises(ValueError, match="a box is x0 y0 x1 y1, x0 < x1 and y0 < y1, in pixels of 64"):
            editing.box(corners, 64)
    for corners in ((0, 0, 65, 5), (-1, 0, 5, 5), ("1", 0, 5, 5), (0, 0, math.nan, 5)):
        with pytest.raises(ValueError, match="a corner of a box must be a finite number from 0 to 64"):
            editing.box(corners, 64)
    for width in (-1, 21, "2", None):
        with pytest.raises(ValueError, match="feather must be a finite number from 0 to 20"):
            editing.feather(large, width)
    for other in (np.zeros((1, 1, 64, 64)), (1, 2, 3), 5):
        with pytest.raises(ValueError, match="a mask is an image file, a tensor .* or four numbers x0 y0 x1 y1, got"):
            editing.mask_at(other, 64)


def test_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the mask must be \(1, 1, 8, 8\) like its image, got \(1, 1, 4, 8\)"):
        editing.clean(IMAGE, MASK[..., :4, :])
    with pytest.raises(ValueError, match="a mask lies in .0, 1., 1 where new content goes, got -1 to 1"):
        editing.renoise(IMAGE, 2 * MASK - 1)


def test_an_image_of_another_size_cannot_be_the_start(cascade):
    with pytest.raises(ValueError, match=r"the image to start from must be \(B, 3, 8, 8\), got \(1, 3, 4, 4\)"):
        draw(cascade, image=IMAGE[..., :4, :4])


def test_a_feathered_seam_is_a_mixture():
    """Half way between, half of each."""
    half = torch.full_like(MASK, 0.5)
    x = editing.clean(IMAGE, half)(SCHEDULE, [])(torch.ones_like(IMAGE), 10)
    torch.testing.assert_close(x, 0.5 + 0.5 * IMAGE)


def test_masks_come_from_files_tensors_and_boxes(tmp_path):
    """One mask three ways, at 64 and 256 pixels: a white file, a tensor, the corners of a box."""
    file = tmp_path / "mask.png"
    marked = Image.new("L", (64, 64), 0)
    marked.paste(255, (16, 8, 32, 24))
    marked.save(file)
    tensor = editing.box((16, 8, 32, 24), 64)
    for size in (64, 256):
        expected = torch.zeros(1, 1, size, size)
        expected[..., 8 * size // 64 : 24 * size // 64, 16 * size // 64 : 32 * size // 64] = 1
        for mask in (file, str(file), tensor, (16, 8, 32, 24)):
            assert torch.equal(editing.mask_at(mask, size), expected)


def test_kept_names_the_method_and_needs_both_image_and_mask():
    """renoise and repaint noise what they keep, clean does not; all leave what is painted alone."""
    image, box = torch.full((1, 3, 64, 64), 0.5), (0, 0, 32, 64)
    x, exact = torch.zeros(1, 3, 64, 64), images.load(image)
    for method in editing.METHODS:
        keep = editing.kept(image, box, 64, method)(SCHEDULE, seeded([0]))
        assert torch.equal(keep(x, -1)[..., 32:], exact[..., 32:]) and not keep(x, 500)[..., :32].any()
        assert torch.equal(keep(x, 500)[..., 32:], exact[..., 32:]) == (method == "clean")
    assert editing.kept(image, None, 64) is None
    with pytest.raises(ValueError, match="a mask needs an image, of which the rest is kept"):
        editing.kept(None, box, 64)
    with pytest.raises(ValueError, match="no method 'paint'; choose from renoise, clean, repaint"):
        editing.kept(image, None, 64, "paint")


def test_kept_feathers_its_seam():
    keep = editing.kept(torch.full((1, 3, 64, 64), 1.0), (0, 0, 32, 64), 64, "clean", 2.0)(SCHEDULE, [])
    row = keep(-torch.ones(1, 3, 64, 64), -1)[0, 0, 32]
    assert -0.5 < row[31] < 0 < row[32] < 0.5 and row[0] == -1 and row[63] == 1
