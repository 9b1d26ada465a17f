"""The experiments, as functions of a cascade and as commands: each does what it promises, they combine, and bad input
has one line."""

import inspect
import math

import pytest
import torch
from PIL import Image

from minidiff import (
    anagram,
    components,
    denoise,
    editing,
    flags,
    generate,
    hybrid,
    images,
    inpaint,
    sdedit,
    upscale,
    views,
    weights,
)
from minidiff.cascade import Cascade, Settings
from minidiff.deepfloyd import stages, text
from minidiff.factorized import Part
from minidiff.schedule import squaredcos_cap_v2
from tests.reference.fill import normal
from tests.test_commands import cascade, fails, same, sheets  # noqa: F401 (fixtures)

PROMPT = "a red castle"
SCHEDULE = squaredcos_cap_v2()


@pytest.fixture
def photo(tmp_path):
    """An image of 90x70 pixels, half transparent on one side, with structure."""
    image = Image.effect_mandelbrot((90, 70), (-2, -1.2, 1, 1.2), 30).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((90, 70)))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def tiny(cascade):
    """The tiny cascade from Python, with few steps."""
    loaded = Cascade.load(*map(str, cascade), dtype=torch.float32)
    loaded.settings[:] = Settings(3, 5.0), Settings(1, 1.0)
    return loaded


@pytest.fixture(scope="module")
def small(cascade):
    """Its stage 1 alone."""
    loaded = Cascade.load(str(cascade[0]), dtype=torch.float32)
    loaded.settings[0] = Settings(3, 5.0)
    return loaded


def run(main, cascade, out, *argv, stage2=True):
    one, two = map(str, cascade)
    models = ["--model", one] + ([] if main is denoise.main else ["--stage2", two if stage2 else "none"])
    main([*map(str, argv), *models, "--dtype", "float32", "--out", str(out)])


# --- from Python ------------------------------------------------------------------------------------------------------


def test_sdedit_starts_from_the_image_and_draws_only_inside_the_mask(small, photo):
    image = images.load(photo, 64)
    late, large = sdedit.sdedit(small, photo, PROMPT, 2, [0, 1])
    assert large is None and late.shape == (2, 3, 64, 64)
    parts = [Part(*small.encode(PROMPT))]
    assert torch.equal(late, small.draw(parts, [0, 1], image=image, i_start=2))
    inside, _ = sdedit.sdedit(small, photo, PROMPT, 2, mask=(0, 0, 32, 64))
    assert torch.equal(inside[..., 32:], image[..., 32:]) and not torch.equal(inside[..., :32], image[..., :32])
    with pytest.raises(ValueError, match="i_start on these steps must be a whole number from 0 to 2, got 3"):
        sdedit.sdedit(small, photo, PROMPT, 3)


def test_inpaint_keeps_what_is_not_masked_by_every_method(small, photo):
    image, results = images.load(photo, 64), []
    for method in ("renoise", "clean", "repaint"):
        x, _ = inpaint.inpaint(small, photo, (0, 0, 32, 64), PROMPT, method=method)
        assert torch.equal(x[..., 32:], image[..., 32:])
        results.append(x[..., :32])
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(results, results[1:]))


def test_identity_views_and_equal_prompts_are_plain_generation(tiny):
    """Twice the same prompt through identity views, together and in turns: what make draws, at both stages."""
    parts = [Part(*tiny.encode(PROMPT))]
    plain, other = tiny.make(parts, [4]), tiny.make(parts, [5])
    for in_turns in (False, True):
        twice = anagram.anagram(tiny, [PROMPT, PROMPT], ["identity", "identity"], [4], in_turns=in_turns)
        for a, b, c in zip(twice, plain, other):
            same(a, b, c)


@pytest.mark.filterwarnings("ignore:at 64 pixels the mask marks everything")
def test_a_mask_of_everything_changes_nothing(small, photo):
    """The known region is noised with random numbers of its own, so the new one is drawn with the same ones."""
    x, _ = inpaint.inpaint(small, photo, (0, 0, 64, 64), PROMPT)
    y, _ = inpaint.inpaint(small, torch.zeros(1, 3, 64, 64), (0, 0, 64, 64), PROMPT)
    assert torch.equal(x, y)


def test_components_of_one_prompt_are_plain_generation(small):
    parts = [Part(*small.encode(PROMPT))]
    plain, other = small.draw(parts, [4]), small.draw(parts, [5])
    for kind, prompts, shares in (("frequency", 2, None), ("triple", 3, None), ("color", 2, None), ("motion", 2, None),
                                   ("scale", 2, [1.5, -0.5])):  # fmt: skip
        x, _ = hybrid.hybrid(small, [PROMPT] * prompts, kind, [4], weights=shares)
        same(x, plain, other)


def test_a_reference_is_kept_in_its_component(small, photo):
    """Grey is a projection: the result has exactly the photograph's grey, and colours of its own."""
    x, _ = hybrid.hybrid(small, [PROMPT], "color", reference=photo)
    image = images.load(photo, 64)
    torch.testing.assert_close(components.grey(x), components.grey(image), rtol=0, atol=1e-5)
    assert (components.color(x) - components.color(image)).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="color with a reference needs 1 prompts, got 2"):
        hybrid.hybrid(small, [PROMPT, "a dog"], "color", reference=photo)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reference": 1, "image": 1, "i_start": 1}, "a reference says what is kept already; leave out image"),
        ({"reference": 1, "image": 1, "mask": (0, 0, 9, 9)}, "a reference says what is kept already; leave out image"),
        ({"weights": [0.5, 0.5]}, "weights go with kind scale, not frequency"),
        ({"kind": "color", "sigma": 9.0}, "sigma goes with kind frequency and triple, not color"),
    ],
)
def test_a_hybrid_ignores_no_argument(small, photo, more, message):
    more = {key: photo if value == 1 and key != "i_start" else value for key, value in more.items()}
    with pytest.raises(ValueError, match=message):
        hybrid.hybrid(small, [PROMPT] * (1 if "reference" in more else 2), **more)


def test_upscale_draws_each_seed_beside_the_small_image(tiny, photo):
    x = upscale.upscale(tiny, photo, [PROMPT], [3, 4])
    low_res = images.load(photo, 64).expand(2, -1, -1, -1)
    assert torch.equal(x, tiny.enlarge(low_res, [Part(*tiny.encode(PROMPT))], [3, 4]))
    masked = upscale.upscale(tiny, photo, [PROMPT], mask=(0, 0, 32, 64))
    assert torch.equal(masked[..., 128:], images.load(photo, 256)[..., 128:])


def test_upscale_takes_seeds_as_draw_does(tiny, photo):
    assert torch.equal(upscale.upscale(tiny, photo, [PROMPT], (s for s in (3, 4))),
                       upscale.upscale(tiny, photo, [PROMPT], [3, 4]))  # fmt: skip
    with pytest.raises(ValueError, match=r"seeds must be a list of whole numbers, such as \[0, 1\], got 3"):
        upscale.upscale(tiny, photo, [PROMPT], 3)


def test_prompts_and_views_go_in_pairs(tiny, photo):
    """From Python, too: one line that says how many of each came."""
    with pytest.raises(ValueError, match="^3 prompts need as many views, got 2$"):
        anagram.anagram(tiny, ["a", "b", "c"])
    with pytest.raises(ValueError, match="^2 prompts need as many views, got 1$"):
        upscale.upscale(tiny, photo, ["a", "b"])


def test_one_prompt_may_come_alone_and_is_no_list_of_letters(tiny, photo):
    alone, listed = (upscale.upscale(tiny, photo, prompts, view_names=names)
                     for prompts, names in ((PROMPT, "flip"), ([PROMPT], ["flip"])))  # fmt: skip
    assert torch.equal(alone, listed)
    with pytest.raises(ValueError, match="^1 prompts need as many views, got 2$"):
        anagram.anagram(tiny, "ab")
    with pytest.raises(ValueError, match="^frequency needs 2 prompts, got 1$"):
        hybrid.hybrid(tiny, "ab")


def test_denoise_noises_blurs_and_estimates(small, photo):
    """DDPM Eq. 4 and DDPM Eq. 15: the estimate turns the noisy image back with the network's eps; noise of its own
    stream is the same for one seed, and scaled with the time."""
    image = images.load(photo, 64)
    each = denoise.denoise(small, photo, 300, PROMPT, 7)
    a = SCHEDULE.alphas_cumprod[300].float()
    noise = (each.noisy - a.sqrt() * image) / (1 - a).sqrt()
    other = denoise.denoise(small, photo, 700, PROMPT, 7)
    b = SCHEDULE.alphas_cumprod[700].float()
    torch.testing.assert_close((other.noisy - b.sqrt() * image) / (1 - b).sqrt(), noise, rtol=0, atol=1e-5)
    assert abs(noise.mean().item()) < 5 / 12288**0.5 and abs(noise.std().item() - 1) < 5 / (2 * 12288) ** 0.5
    torch.testing.assert_close(each.blurred, components.blur(each.noisy, 2.0, 13))
    from_noise = Part(*small.encode(PROMPT))
    record = []
    small.draw([from_noise], [7], steps=torch.tensor([300]), image=image, guidance_scale=5.0,
               through=lambda steps: flags.noted(steps, record))  # fmt: skip
    torch.testing.assert_close(record[0].x_t, each.noisy)
    estimate = (each.noisy - (1 - a).sqrt() * record[0].eps) / a.sqrt()
    torch.testing.assert_close(each.estimate, estimate, rtol=0, atol=1e-4)


# --- each command -----------------------------------------------------------------------------------------------------


def test_denoise_refuses_times_that_are_none(small, photo):
    for t in (-1, 1000, 500.0, "500", None):
        with pytest.raises(ValueError, match=f"t must be a whole number from 0 to 999, got {t!r}"):
            denoise.denoise(small, photo, t)


def test_denoise_shows_every_way_and_their_errors(cascade, photo, tmp_path, sheets):
    """The walk from i_start 10 is 690 down to 0, and every fifth image of it is shown: 690, 540, 390, 240, 90."""
    run(denoise.main, cascade, tmp_path / "d.png", photo, "--t", 250, 750)
    ((rows, labels),) = sheets
    assert [row[1] for row in labels[:3]] == ["noised, t = 250", "noised, t = 750", "noised, t = 690"]
    assert labels[3] == [f"t = {t}" for t in (690, 540, 390, 240, 90)]
    assert torch.equal(rows[3][0], rows[2][1])  # the walk starts from the noised image of the row above
    assert [label.split("\n")[0] for label in labels[4]] == ["original", "iterative", "one step", "blur"]
    original = images.load(photo, 64)[0]
    for i in (1, 2, 3):
        error = denoise.mse(rows[4][i], original)
        assert f"MSE {error:.4f}\n{denoise.psnr(error):.1f} dB" in labels[4][i]
    assert (images.load(tmp_path / "d.png")[0] - rows[4][1].clamp(-1, 1)).abs().max() < 1 / 255 + 1e-6


def test_psnr_by_hand():
    """A mean squared error of 0.04 in [-1, 1] is 10 log10(4 / 0.04) = 20 dB; values out of range are cut first."""
    x = torch.full((1, 3, 2, 2), 0.8)
    assert denoise.mse(x, torch.ones(1, 3, 2, 2)) == pytest.approx(0.04)
    assert denoise.psnr(0.04) == pytest.approx(20) and denoise.psnr(0.0) == float("inf")
    assert denoise.mse(x + 9, torch.ones(1, 3, 2, 2)) == 0


def test_generate_sweeps_guidance_and_shows_its_steps(cascade, tmp_path, sheets):
    run(generate.main, cascade, tmp_path / "g.png", PROMPT, "--quick", "--guidance-scale", 1, 7, "--num-images", 3,
        stage2=False)  # fmt: skip
    rows, labels = sheets[0]
    assert [len(row) for row in rows] == [3, 3] and labels[1][2] == "guidance 7, seed 2"
    assert [p.name for p in sorted(tmp_path.glob("g-?.png"))] == [f"g-{i}.png" for i in range(6)]
    run(generate.main, cascade, tmp_path / "s.png", PROMPT, "--steps", 5, "--show-every", 2, stage2=False)
    rows, labels = sheets[2]
    assert [len(row) for row in rows] == [3, 3, 3]
    assert [label.split(",")[0:2] for label in labels[0]][0] == ["x_t", " t = 999"]
    assert [label.split(",")[1] for label in labels[0]] == [" t = 999", " t = 500", " t = 0"]
    assert labels[2][2] == "eps / 3, then sigma <= 0.00"
    assert images.read_metadata(tmp_path / "s-steps.png")["minidiff"] == "sheet"
    assert (tmp_path / "s.png").is_file() and (tmp_path / "s-sheet.png").is_file()


@pytest.mark.parametrize(("prompts", "title"), [(["a castle"], "a castle"), ([""], "(empty prompt)"),
                                                (["a castle", ""], "")])  # fmt: skip
def test_the_title_of_a_sheet_is_the_only_prompt(cascade, tmp_path, monkeypatch, prompts, title):
    titles, sheet = [], images.sheet
    monkeypatch.setattr(images, "sheet", lambda *args: titles.append(args[2]) or sheet(*args))
    run(generate.main, cascade, tmp_path / "x.png", *prompts, "--quick", stage2=False)
    assert titles == [title]


def test_sigma_on_the_steps_sheet_is_the_largest_deviation_of_the_step(small):
    """sqrt(1 - alpha_bar_t / alpha_bar_prev), by hand from the table; 0 for the step to clean."""
    record = []
    small.draw([Part(*small.encode(PROMPT))], [0], steps=torch.tensor([600, 400]),
               through=lambda steps: flags.noted(steps, record))  # fmt: skip
    rows, labels = generate.steps_sheet(record, SCHEDULE)
    a, b = (SCHEDULE.alphas_cumprod[t].item() for t in (600, 400))
    assert labels[2] == [f"eps / 3, then sigma <= {(1 - a / b) ** 0.5:.2f}", "eps / 3, then sigma <= 0.00"]
    assert labels[0][0] == f"x_t, t = 600, signal / noise {a / (1 - a):.2g}"
    assert torch.equal(rows[0][1], record[0].x_prev[0]) and torch.equal(rows[2][0], record[0].eps[0] / 3)


def test_sdedit_from_several_starts(cascade, photo, tmp_path, sheets):
    run(sdedit.main, cascade, tmp_path / "s.png", photo, PROMPT, "--i-start", 30, 32, stage2=False)
    assert sheets[0][1] == [["i_start 30, seed 0", "i_start 32, seed 0", "original"]]
    run(sdedit.main, cascade, tmp_path / "s.png", photo, PROMPT, "--steps", 9, "--seed", 3, 1, stage2=False)
    assert sheets[1][1] == [[*(f"i_start {i}, seed {seed}" for i in (1, 3, 5, 7)), "original"] for seed in (3, 1)]
    run(sdedit.main, cascade, tmp_path / "s.png", photo, PROMPT, "--quick", "--box", 0, 0, 32, 64, stage2=False)
    assert sheets[2][1][0][-3:] == ["original", "mask", "hole"]


def test_a_mask_that_marks_nothing_is_noticed_at_every_size(tmp_path):
    """One pixel of 256 is nothing at 64 pixels, and something at 256; the warning names the size."""
    fine = Image.new("L", (256, 256), 0)
    fine.putpixel((100, 101), 255)
    fine.save(tmp_path / "fine.png")
    with pytest.warns(UserWarning, match="at 64 pixels the mask marks nothing: nothing is painted") as caught:
        for size in (64, 256):
            editing.kept(torch.zeros(1, 3, 8, 8), tmp_path / "fine.png", size)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="at 64 pixels the mask marks everything: nothing of the image is kept"):
        editing.kept(torch.zeros(1, 3, 8, 8), (0, 0, 64, 64), 64)


def test_a_start_gives_the_same_image_whatever_the_other_starts(small, photo):
    flags = {"mask": (20, 0, 44, 30)}
    early, _ = sdedit.sdedit(small, photo, PROMPT, 1, **flags)
    late, _ = sdedit.sdedit(small, photo, PROMPT, 2, **flags)
    again, _ = sdedit.sdedit(small, photo, PROMPT, 2, **flags)
    assert torch.equal(late, again) and (late - early).abs().mean() > 1e-3


def test_inpaint_shows_the_hole_and_every_method(cascade, photo, tmp_path, sheets):
    Image.new("L", (45, 35), 0).save(tmp_path / "mask.png")
    run(inpaint.main, cascade, tmp_path / "i.png", photo, tmp_path / "mask.png", PROMPT, "--quick")
    rows, labels = sheets[0]
    assert labels == [["original", "mask", "hole", "renoise, seed 0"]]
    assert torch.equal(rows[0][3], images.load(photo, 256)[0])  # the mask is black: everything is kept
    run(inpaint.main, cascade, tmp_path / "j.png", photo, PROMPT, "--box", 0, 0, 32, 64, "--steps", 3,
        "--method", "renoise", "clean", "repaint", "--jump-length", 1, "--jump-n-sample", 2, stage2=False)  # fmt: skip
    rows, labels = sheets[1]
    names = [name for row in labels for name in row]
    assert names == ["original", "mask", "hole", "renoise, seed 0", "clean, seed 0", "repaint, seed 0"]
    original, mask, hole, *results = [x for row in rows for x in row]
    assert (mask[:, :, :32] == 1).all() and (mask[:, :, 32:] == -1).all()
    assert torch.equal(hole[..., 32:], original[..., 32:]) and hole[..., :32].unique().numel() == 1
    for x in results:
        assert torch.equal(x[..., 32:], original[..., 32:]) and not torch.equal(x[..., :32], original[..., :32])
    assert len(list(tmp_path.glob("j-?.png"))) == 3


def test_anagram_shows_every_view_of_one_image_and_an_animation(cascade, tmp_path, sheets):
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, "a dog", "a photo", "--view", "identity", "rotate_cw",
        "negate", "--quick", stage2=False)  # fmt: skip
    (row,), (labels,) = sheets[0]
    assert labels[1] == "rotate_cw: a dog, seed 0"
    assert torch.equal(row[1], row[0].rot90(-1, (-2, -1))) and torch.equal(row[2], -row[0])
    assert (images.load(tmp_path / "a.png")[0] - row[0]).abs().max() < 1 / 255 + 1e-6
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames > 20 and animation.width == animation.height


@pytest.mark.parametrize("name", ["rotate_180", "flip", "jigsaw", "skew", "square_hinge", "negate"])
def test_travel_starts_at_the_image_and_ends_at_the_view(name):
    x, view = normal("views.x", 3, 64, 64).tanh(), views.named(name)
    for part, wanted in ((0.0, x), (1.0, view.view(x))):
        page = anagram.travel(x, view, part)
        assert page.shape == (3, 96, 96)
        torch.testing.assert_close(page[:, 16:80, 16:80], wanted, rtol=0, atol=1e-6)
    middle = anagram.travel(x, view, 0.5)
    assert (middle - anagram.travel(x, view, 0.0)).abs().max() > 0.1


def test_a_turn_travels_on_a_circle():
    """A quarter of the way of 180 degrees, an image of one dark pixel right of the centre has it 45 degrees round."""
    x = torch.ones(3, 64, 64)
    x[:, 31:33, 61:63] = -1
    page = anagram.travel(x, views.named("rotate_180"), 0.25)
    y, x_ = (page[0] < 0).nonzero().float().mean(0).sub(47.5).tolist()
    assert abs(math.hypot(x_, y) - 30) < 1 and abs(abs(math.atan2(y, x_)) - math.pi / 4) < 0.05


def test_taking_turns_is_one_view_at_a_time(cascade, tmp_path, monkeypatch):
    """Two images in each call of the network: with the prompt and without; together it would be four."""
    sizes, real = [], stages.fill

    def fill(module, *rest):
        module.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        return real(module, *rest)

    monkeypatch.setattr(stages, "fill", fill)
    flags = [PROMPT, "a dog", "--quick"]
    run(anagram.main, cascade, tmp_path / "a.png", *flags, "--reduction", "alternate", stage2=False)
    run(anagram.main, cascade, tmp_path / "a.png", *flags, stage2=False)
    assert sizes == [2] * 4 + [4] * 4


@pytest.mark.parametrize(
    ("kind", "prompts", "more"),
    [("frequency", 2, []), ("triple", 3, []), ("color", 2, []), ("scale", 2, ["--weights", "1.5", "-0.5"]),
     ("frequency", 1, ["--reference", "PHOTO"])],
)  # fmt: skip
def test_hybrids_of_every_kind(cascade, photo, tmp_path, sheets, kind, prompts, more):
    """The image, and on the sheet what it is from afar and its components."""
    more = [str(photo) if flag == "PHOTO" else flag for flag in more]
    run(hybrid.main, cascade, tmp_path / "h.png", *[PROMPT, "a dog", "a photo"][:prompts], "--kind", kind, *more,
        "--quick", stage2=False)  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("h*")) == ["h-sheet.png", "h.gif", "h.png"]
    rows, labels = ([x for row in part for x in row] for part in sheets[0])
    parts = [] if kind == "scale" else components.of_kind(kind)
    assert len(rows) == 1 + 2 * (kind in ("frequency", "triple")) + len(parts)
    for part, x in zip(parts, rows[-len(parts) :]):
        torch.testing.assert_close(x, part(rows[0][None])[0])
    if more == ["--reference", str(photo)]:  # its low frequencies are in the result, but for a second low pass
        assert labels[-2:] == ["component 1: photo.png", f"component 2: {PROMPT}"]
        kept, others = components.low_pass()(images.load(photo, 64))[0], components.low_pass()(rows[0][None])[0]
        assert (others - kept).square().mean() < 0.1 * (kept - kept.mean()).square().mean()


def test_upscale_with_views_starts_and_masks(cascade, photo, tmp_path, sheets):
    one, two = map(str, cascade)
    flags = ["--model", two, "--text-model", one, "--steps", "1", "--out", str(tmp_path / "u.png")]
    upscale.main([str(photo), PROMPT, "a dog", "--view", "identity", "flip", *flags])
    upscale.main([str(photo), PROMPT, "--i-start", "0", *flags])
    upscale.main([str(photo), PROMPT, "--box", "0", "0", "32", "64", *flags])
    names = ["64 px", "bilinear", "stage 2, seed 0"]
    assert [labels[0] for _, labels in sheets] == [[*names[:2], "stage 2, seed 0, identity", "stage 2, seed 0, flip"],
                                                   names, names]  # fmt: skip
    ((viewed,), _), _, ((masked,), _) = sheets
    assert torch.equal(viewed[3], viewed[2].flip(-2))
    assert torch.equal(masked[2][..., 128:], images.load(photo, 256)[0][..., 128:])


def test_an_anagram_inside_a_mask_of_an_image_at_both_stages(cascade, photo, tmp_path, sheets):
    """Views, two prompts, a mask and a start, at 64 and 256 pixels, from one command line."""
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, "a dog", "--view", "identity", "rotate_180", "--image",
        photo, "--box", 16, 16, 48, 48, "--i-start", 1, "--quick")  # fmt: skip
    ((row,), _) = sheets[0]
    original = images.load(photo, 256)[0]
    inside = torch.zeros(256, 256, dtype=torch.bool)
    inside[64:192, 64:192] = True
    assert torch.equal(row[0][:, ~inside], original[:, ~inside])
    assert (row[0][:, inside] - original[:, inside]).abs().mean() > 0.01
    assert torch.equal(row[1], row[0].rot90(2, (-2, -1)))


def test_an_image_goes_back_into_another_command(cascade, tmp_path, sheets):
    """What a command writes is what the next one reads: the bare image, not the sheet."""
    run(generate.main, cascade, tmp_path / "g.png", PROMPT, "--quick", stage2=False)
    run(sdedit.main, cascade, tmp_path / "s.png", tmp_path / "g.png", PROMPT, "--quick", "--i-start", 1, stage2=False)
    drawn, original = sheets[0][0][0][0], sheets[1][0][0][-1]
    assert (drawn - original).abs().max() < 1 / 255 + 1e-6


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (anagram.main, [], "no prompts; pass one for each view"),
        (anagram.main, ["a", "b", "c"], "3 prompts need as many views, got 0"),
        (anagram.main, ["a", "b", "--view", "identity"], "2 prompts need as many views, got 1"),
        (anagram.main, ["a", "--view", "turn"], "no view 'turn'; choose from identity"),
        (anagram.main, ["--check", "turn"], "no view 'turn'; choose from identity"),
        (anagram.main, ["a", "b", "--box", "0", "0", "9", "9"], "a mask needs an image, of which the rest is"),
        (anagram.main, ["a", "b", "--image", "PHOTO"], "what is to happen to the image? pass a mask, a box or i"),
        (anagram.main, ["a", "b", "--out", "OUT.gif"], "OUT.gif; pass another name for the image: --out OUT.png"),
        (hybrid.main, ["a", "b", "--out", "OUT.GIF"], "the animation goes to OUT.GIF"),
        (hybrid.main, ["a", "b", "--weights", "1", "1"], "weights go with kind scale, not frequency"),
        (hybrid.main, ["a", "b", "--image", "PHOTO"], "what is to happen to the image? pass a mask, a box or i"),
        (hybrid.main, ["a"], "frequency needs 2 prompts, got 1"),
        (hybrid.main, ["a", "b", "--reference", "PHOTO"], "frequency with a reference needs 1 prompts, got 2"),
        (hybrid.main, ["a", "b", "--kind", "scale"], "scale needs one weight per prompt"),
        (hybrid.main, ["a", "b", "--sigma", "-1"], "sigma must be a finite number of 0 or more, got -1"),
        (inpaint.main, ["PHOTO"], "which region? pass a mask image after the image, or --box X0 Y0 X1 Y1"),
        (inpaint.main, ["PHOTO", "nowhere.png", "a"], "nowhere.png does not exist; pass the path of"),
        (inpaint.main, ["PHOTO", "PHOTO", "a", "castle"], "too many words: ['a', 'castle']; put the prompt in quot"),
        (inpaint.main, ["PHOTO", "PHOTO", "--box", "0", "0", "9", "9"], "is an image, but --mask or --box says where"),
        (inpaint.main, ["PHOTO", "--box", "9", "0", "9", "9"], "a box is x0 y0 x1 y1"),
        (inpaint.main, ["PHOTO", "PHOTO", "--feather", "-1"], "feather must be a finite number from 0 to 20, got -1"),
        (inpaint.main, ["PHOTO", "PHOTO", "a", "--method", "repaint", "--jump-length", "0"], "from 1 to 99, got 0"),
        (inpaint.main, ["PHOTO", "PHOTO", "--method", "repaint", "--steps", "5", "--jump-length", "5"], "from 1 to 4"),
        (inpaint.main, ["PHOTO", "PHOTO", "--jump-length", "5"], "go with --method repaint"),
        (inpaint.main, ["PHOTO", "a castle"], "which region? pass a mask image after the image"),
        (sdedit.main, ["PHOTO", "--feather", "2"], "feather softens a mask; pass a mask or a box"),
        (generate.main, ["a", "--stage2-steps", "4"], "--stage2-steps and --stage2-guidance-scale need a stage 2"),
        (hybrid.main, ["a", "b", "--kind", "color", "--sigma", "3"], "sigma goes with kind frequency and triple"),
        (sdedit.main, ["nowhere.png"], "nowhere.png does not exist"),
        (sdedit.main, ["PHOTO", "--i-start", "34"], "--i-start on these steps must be a whole number from 0"),
        (sdedit.main, ["PHOTO", "--i-start", "-1", "5"], "--i-start on these steps must be a whole number from 0"),
        (denoise.main, ["PHOTO", "--t", "1000"], "--t must be a whole number from 0 to 999, got 1000"),
        (denoise.main, ["PHOTO", "--blur-kernel", "-3"], "kernel must be a whole number of 1 or more, got -3"),
        (denoise.main, ["PHOTO", "--i-start", "-1"], "i_start on these steps must be a whole number from"),
        (sdedit.main, ["PHOTO", "--steps", "5", "9"], "this command takes one --steps; minidiff.generate"),
        (sdedit.main, ["PHOTO", "--guidance-scale", "5", "9"], "this command takes one --guidance-scale"),
        (anagram.main, ["a", "b", "--i-start", "1"], "i_start needs an image to start from"),
        (generate.main, ["a", "--show-every", "0"], "--show-every must be at least 1, got 0"),
        (denoise.main, ["PHOTO", "--seed", "1", "2"], "looks at one image of stage 1"),
        (hybrid.main, ["a", "--reference", "PHOTO", "--box", "0", "0", "9", "9"], "says what is kept already"),
        (generate.main, ["a", "--steps", "2", "3", "--show-every", "1"], "looks at one run: pass one"),
        (generate.main, ["a", "--prompts"], "--prompts lists what the model knows and draws nothing"),
        (anagram.main, ["a", "b", "--check", "flip"], "--check measures a view and draws nothing"),
        (hybrid.main, ["a", "b", "--sigma", "0"], "sigma 0 leaves nothing to the prompts after the first"),
    ],
)  # fmt: skip
def test_bad_input_has_one_line(cascade, photo, tmp_path, capsys, main, argv, message):
    argv = [str(photo) if a == "PHOTO" else a for a in argv]
    if "--check" not in argv:
        argv += ["--model", str(cascade[0])] + ([] if main is denoise.main else ["--stage2", "none"])
        argv += [] if "--out" in argv else ["--out", str(tmp_path / "o.png")]
    assert message in fails(capsys, main, *argv)
    assert not (tmp_path / "o.png").exists()


def test_images_are_read_before_the_prompt_is_encoded(cascade, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "load_text_encoder", lambda *_: pytest.fail("encoded"))
    model = ["--model", cascade[0], "--out", tmp_path / "o.png"]
    for main, argv in ((sdedit.main, [photo, "--i-start", "34"]), (denoise.main, [photo, "--i-start", "99"]),
                       (inpaint.main, [photo, "--box", "9", "0", "9", "9"]),
                       (anagram.main, ["a", "b", "--image", photo, "--mask", "nowhere.png"]),
                       (upscale.main, [photo, "--i-start", "20", "--steps", "20"])):  # fmt: skip
        assert "error: " in fails(capsys, main, *argv, *model)


@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_numbers_that_are_none(photo, capsys, value):
    for main, extra in ((generate.main, ["a", "--guidance-scale", value]), (sdedit.main, [photo, "--feather", value]),
                        (hybrid.main, ["a", "b", "--sigma", value]), (denoise.main, [photo, "--blur-sigma", value]),
                        (upscale.main, [photo, "--guidance-scale", value])):  # fmt: skip
        message = fails(capsys, main, *extra)
        assert f"argument {extra[-2]}: must be a finite number, such as 1 or 7.5, got '{value}'" in message


def test_an_image_is_not_overwritten_by_its_result_and_masks_must_fit(cascade, photo, tmp_path, capsys):
    before = photo.read_bytes()
    model = ["--model", cascade[0], "--stage2", "none", "--quick"]
    message = fails(capsys, sdedit.main, photo, PROMPT, *model, "--out", photo)
    assert "a result could take the place of" in message and photo.read_bytes() == before
    Image.new("L", (90, 70)).save(tmp_path / "p-1.png")
    for name, extra in (("photo-0.png", []), ("p.png", ["--mask", tmp_path / "p-1.png"])):  # where an image would go
        photo.with_name("photo-0.png").write_bytes(before)
        argv = [photo.with_name("photo-0.png"), PROMPT, *extra, *model]
        message = fails(capsys, sdedit.main, *argv, "--out", tmp_path / name.replace("-0", ""))
        assert "a result could take the place of" in message
    moving = tmp_path / "moving.gif"  # where the animation would go
    Image.open(photo).save(moving)
    before = moving.read_bytes()
    for main, extra in ((anagram.main, ["--image", moving, "--box", 16, 16, 48, 48]),
                        (hybrid.main, ["--reference", moving])):  # fmt: skip
        texts = ["a"] if main is hybrid.main else ["a", "b"]
        message = fails(capsys, main, *texts, *extra, *model, "--out", moving.with_suffix(".png"))
        assert "a result could take the place of" in message and moving.read_bytes() == before
    Image.new("L", (128, 64), 255).save(tmp_path / "wide.png")
    message = fails(capsys, inpaint.main, photo, tmp_path / "wide.png", PROMPT, *model, "--out", tmp_path / "o.png")
    assert "must have the shape of its" in message and "is 90x70" in message and "is 128x64" in message


def test_a_long_prompt_is_no_file_name(cascade, photo):
    for prompt in ("a very " * 50 + "large castle", "~nobody's castle.png"):
        assert inpaint._parse([str(photo), prompt, "--box", "0", "0", "9", "9"]).prompt == prompt


def test_the_prompt_may_come_after_the_flags(cascade, photo, tmp_path, capsys):
    """But not after --seed and other lists, which take all that follows."""
    assert sdedit._parse([str(photo), "--i-start", "1", "--quick", PROMPT]).prompt == PROMPT
    message = fails(capsys, sdedit.main, photo, "--quick", "--seed", 3, PROMPT)
    assert "argument --seed: a seed is a whole number, got 'a red castle'; put a prompt before --seed" in message


def test_an_animation_that_cannot_be_fails_before_the_work(cascade, tmp_path, capsys):
    (tmp_path / "a.gif").mkdir()
    message = fails(capsys, anagram.main, "a", "b", "--model", cascade[0], "--quick", "--out", tmp_path / "a.png")
    assert "a.gif is a folder" in message


def test_one_model_has_one_name():
    for name, stage, short in (("mini-IF-I", 1, "mini"), ("mini-IF-II", 2, "mini"), ("mini-IF-II", 1, "mini-IF-II"),
                               ("DeepFloyd/IF-I-M-v1.0", 1, "IF-I-M-v1.0"), ("here/mine", 1, "here/mine")):  # fmt: skip
        assert weights.short_name(name, stage) == short


def test_a_broken_image_is_named(cascade, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    message = fails(capsys, sdedit.main, tmp_path / "broken.png", "--model", cascade[0], "--out", tmp_path / "o.png")
    assert "broken.png cannot be read as a" in message


def test_the_linter_as_a_command(capsys):
    for name, status in (("square_hinge", 0), ("white_balance_failure", 1)):
        with pytest.raises(SystemExit) as exit_info:
            anagram.main(["--check", name])
        assert exit_info.value.code == status
    printed = capsys.readouterr().out
    assert "good: linear, orthogonal" in printed and "bad: the deviation of noise is 1.5, not 1" in printed


def test_without_a_prompt_the_courses_neutral_one_is_taken(photo):
    for parse in (sdedit._parse, denoise._parse):
        assert parse([str(photo)]).prompt == "a high quality photo" and parse([str(photo), "a dog"]).prompt == "a dog"
    assert inpaint._parse([str(photo), "--box", "0", "0", "9", "9"]).prompt == "a high quality photo"


@pytest.mark.parametrize("edit", [sdedit.sdedit, inpaint.inpaint, denoise.denoise])
def test_an_edit_without_a_prompt_has_the_commands_prompt(edit):
    """Not the empty one, from which guidance leads nowhere."""
    assert inspect.signature(edit).parameters["prompt"].default == flags.NEUTRAL == "a high quality photo"
