"""The experiments as commands: each writes its labelled picture, they combine, and bad input is told in one line."""

import math

import pytest
import torch
from PIL import Image

from minidiff import anagram, cli, denoise, generate, hybrid, images, inpaint, sdedit, upscale, views, weights
from minidiff import cascade as cascades
from minidiff.sampling import noised, seeded
from tests.reference.fill import normal
from tests.test_commands import fails
from tests.tiny import write_cascade

PROMPT = "a red castle"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def photo(tmp_path):
    """A picture of 90x70 pixels, half transparent on one side, with structure."""
    picture = Image.effect_mandelbrot((90, 70), (-2, -1.2, 1, 1.2), 30).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((90, 70)))
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def shown(monkeypatch):
    """Every strip that a command makes, as (rows, labels)."""
    strips, real = [], images.strip

    def strip(rows, labels, title=""):
        strips.append(([[x.clone() for x in row] for row in rows], labels))
        return real(rows, labels, title)

    monkeypatch.setattr(images, "strip", strip)
    return strips


def run(main, cascade, out, *argv, stage2=True):
    one, two = map(str, cascade)
    models = ["--model", one] + ([] if main is denoise.main else ["--stage2", two if stage2 else "none"])
    main([*map(str, argv), *models, "--dtype", "float32", "--out", str(out)])


# --- each command -----------------------------------------------------------------------------------------------------


def test_denoise_shows_every_way_and_their_errors(cascade, photo, tmp_path, shown):
    """The walk from i_start 10 is 690 down to 0, and every fifth picture of it is shown: 690, 540, 390, 240, 90."""
    run(denoise.main, cascade, tmp_path / "d.png", photo, "--t", 250, 750, stage2=False)
    rows, labels = shown[0]
    assert [row[1] for row in labels[:3]] == ["noised, t = 250", "noised, t = 750", "noised, t = 690"]
    assert labels[3] == [f"t = {t}" for t in (690, 540, 390, 240, 90)]
    assert [label.split("\n")[0] for label in labels[4]] == ["original", "iterative", "one step", "blur"]
    original = images.load(photo, 64)[0]
    for i in (1, 2, 3):
        error = denoise.mse(rows[4][i], original)
        assert f"MSE {error:.4f}\n{denoise.psnr(error):.1f} dB" in labels[4][i]


def test_psnr_by_hand():
    """A mean squared error of 0.04 in [-1, 1] is 10 log10(4 / 0.04) = 20 dB; values out of range are cut first."""
    x = torch.full((1, 3, 2, 2), 0.8)
    assert denoise.mse(x, torch.ones(1, 3, 2, 2)) == pytest.approx(0.04)
    assert denoise.psnr(0.04) == pytest.approx(20) and denoise.psnr(0.0) == float("inf")
    assert denoise.mse(x + 9, torch.ones(1, 3, 2, 2)) == 0


def test_generate_sweeps_guidance_and_shows_its_steps(cascade, tmp_path, shown):
    run(generate.main, cascade, tmp_path / "g.png", PROMPT, "--quick", "--guidance-scale", 1, 7, "--num-images", 3,
        stage2=False)  # fmt: skip
    rows, labels = shown[0]
    assert [len(row) for row in rows] == [3, 3] and labels[1][2] == "guidance 7, 4 steps, seed 2"
    run(generate.main, cascade, tmp_path / "s.png", PROMPT, "--steps", 3, "--show-steps", stage2=False)
    rows, labels = shown[2]
    assert [len(row) for row in rows] == [3, 3, 3] and labels[0][0].startswith("x_t, t = 999")
    assert labels[2][2] == "eps / 3, then sigma <= 0.00"
    assert (tmp_path / "s-steps.png").is_file() and (tmp_path / "s.png").is_file()


def test_sdedit_from_several_starts(cascade, photo, tmp_path, shown):
    run(sdedit.main, cascade, tmp_path / "s.png", photo, PROMPT, "--i-start", 30, 32, stage2=False)
    assert shown[0][1] == [["i_start = 30, t = 90", "i_start = 32, t = 30", "original"]]
    run(sdedit.main, cascade, tmp_path / "s.png", photo, PROMPT, "--steps", 9, stage2=False)
    assert [label.split(",")[0] for label in shown[1][1][0]] == [*(f"i_start = {i}" for i in (1, 3, 5, 7)), "original"]


def test_a_start_gives_the_same_picture_whatever_other_starts_are_asked_for(cascade, photo, tmp_path, shown):
    flags = [photo, PROMPT, "--box", 20, 0, 44, 30, "--steps", 4, "--stage2-steps", 2]
    run(sdedit.main, cascade, tmp_path / "s.png", *flags, "--i-start", 1, 2)
    run(sdedit.main, cascade, tmp_path / "s.png", *flags, "--i-start", 2)
    (both,), (alone,) = shown[0][0], shown[1][0]
    assert (both[1] - alone[0]).abs().mean() < 0.05 * (both[1] - both[0]).abs().mean()


def test_inpaint_keeps_what_is_not_masked_at_both_sizes(cascade, photo, tmp_path, shown):
    Image.new("L", (45, 35), 0).save(tmp_path / "mask.png")
    run(inpaint.main, cascade, tmp_path / "i.png", photo, tmp_path / "mask.png", PROMPT, "--quick")
    rows, labels = shown[0]
    assert labels == [["original", "mask", "hole", "renoise, seed 0"]]
    assert torch.equal(rows[0][3], images.load(photo, 256)[0])
    run(inpaint.main, cascade, tmp_path / "j.png", photo, PROMPT, "--box", 0, 0, 32, 64, "--steps", 3,
        "--method", "renoise", "clean", "repaint", "--jump-length", 1, "--jump-n-sample", 2, stage2=False)  # fmt: skip
    rows, labels = shown[1]
    assert labels[0][3:] == ["renoise, seed 0", "clean, seed 0", "repaint, seed 0"]
    for x in rows[0][3:]:
        assert torch.equal(x[..., 32:], images.load(photo, 64)[0][..., 32:])
        assert not torch.equal(x[..., :32], images.load(photo, 64)[0][..., :32])
    run(inpaint.main, cascade, tmp_path / "k.png", photo, PROMPT, "--box", 0, 0, 32, 64, "--quick", "--num-images", 3,
        stage2=False)  # fmt: skip
    assert shown[2][1][1] == ["seed 0", "seed 1", "seed 2"]


def test_anagram_shows_every_view_of_one_picture_and_an_animation(cascade, tmp_path, shown, capsys):
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, "a dog", "a photo", "--view", "identity", "rotate_cw",
        "negate", "--quick")  # fmt: skip
    (row,), (labels,) = shown[0]
    assert labels[1] == "rotate_cw: a dog, seed 0"
    assert torch.equal(row[1], row[0].rot90(-1, (-2, -1))) and torch.equal(row[2], -row[0])
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames > 20 and animation.size == (384, 384)
    printed = capsys.readouterr().out
    assert "64 px: 4 UNet calls, 6 pictures in each" in printed  # three views, two branches


@pytest.mark.parametrize("name", ["rotate_180", "flip", "jigsaw", "skew", "square_hinge", "negate"])
def test_travel_starts_at_the_picture_and_ends_at_the_view(name):
    x, view = normal("views.x", 3, 64, 64).tanh(), views.named(name)
    for part, wanted in ((0.0, x), (1.0, view.view(x))):
        page = anagram.travel(x, view, part)
        assert page.shape == (3, 96, 96)
        torch.testing.assert_close(page[:, 16:80, 16:80], wanted, rtol=0, atol=1e-6)
    middle = anagram.travel(x, view, 0.5)
    assert (middle - anagram.travel(x, view, 0.0)).abs().max() > 0.1


def test_a_turn_travels_on_a_circle():
    """A quarter of the way of 180 degrees, a picture of one dark pixel right of the centre has it 45 degrees round."""
    x = torch.ones(3, 64, 64)
    x[:, 31:33, 61:63] = -1
    page = anagram.travel(x, views.named("rotate_180"), 0.25)
    y, x_ = (page[0] < 0).nonzero().float().mean(0).sub(47.5).tolist()
    assert abs(math.hypot(x_, y) - 30) < 1 and abs(abs(math.atan2(y, x_)) - math.pi / 4) < 0.05


def test_taking_turns_asks_one_view_at_a_time(cascade, tmp_path, capsys):
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, "a dog", "--reduction", "alternate", "--quick", stage2=False)
    assert "64 px: 4 UNet calls, 2 pictures in each" in capsys.readouterr().out


def test_hybrids_of_every_kind(cascade, photo, tmp_path, shown):
    for kind, prompts, more in (
        ("frequency", 2, []),
        ("triple", 3, []),
        ("color", 2, []),
        ("motion", 2, []),
        ("scale", 2, ["--weights", "1.5", "-0.5"]),
        ("frequency", 1, ["--reference", str(photo)]),
    ):
        out = tmp_path / f"{kind}{prompts}.png"
        run(hybrid.main, cascade, out, *[PROMPT, "a dog", "a photo"][:prompts], "--kind", kind, *more, "--quick",
            stage2=False)  # fmt: skip
        assert out.is_file() and out.with_suffix(".gif").is_file()
    assert shown[0][1][0][-1] == "component 2: a dog" and len(shown[1][0][0]) == 1 + 2 + 3
    # With a reference its low frequencies are in the result, apart from what a second low pass adds.
    from minidiff.components import low_pass

    result, kept = shown[-1][0][0][0], low_pass()(images.load(photo, 64))[0]
    others = low_pass()(result[None])[0]
    assert (others - kept).square().mean() < 0.1 * (kept - kept.mean()).square().mean()


def test_upscale_with_views_starts_and_masks(cascade, photo, tmp_path, shown):
    one, two = map(str, cascade)
    base = ["--model", two, "--text-model", one, "--quick", "--dtype", "float32"]
    upscale.main([str(photo), *base, "--out", str(tmp_path / "u.png")])
    upscale.main([str(photo), PROMPT, "a dog", "--view", "identity", "flip", *base, "--out", str(tmp_path / "v.png")])
    upscale.main([str(photo), PROMPT, "--i-start", "3", *base, "--out", str(tmp_path / "w.png")])
    upscale.main([str(photo), PROMPT, "--box", "0", "0", "32", "64", *base, "--out", str(tmp_path / "x.png")])
    assert [label[2] for _, (label,) in shown] == ["stage 2, 4 steps", "stage 2, 4 steps, identity",
                                                   "stage 2, 1 steps", "stage 2, 4 steps"]  # fmt: skip
    ((viewed,), _), ((masked,), _) = shown[1], shown[3]
    assert torch.equal(viewed[3], viewed[2].flip(-2))
    assert torch.equal(masked[2][..., 128:], images.load(photo, 256)[0][..., 128:])


def same(a, b, other):
    """Equal up to rounding, which t = 999 magnifies by 20291 and a random network passes on: compared in the mean with
    the picture of another seed."""
    assert (a - b).abs().mean() < 0.05 * (a - other).abs().mean()


# --- together ---------------------------------------------------------------------------------------------------------


def test_an_anagram_inside_a_mask_of_a_picture_at_both_stages(cascade, photo, tmp_path, shown):
    """Views, two prompts, a mask and a start of one's own, at 64 and 256 pixels, from one command line."""
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, "a dog", "--view", "identity", "rotate_180", "--image",
        photo, "--box", 16, 16, 48, 48, "--i-start", 1, "--quick")  # fmt: skip
    ((row,), _) = shown[0]
    original = images.load(photo, 256)[0]
    inside = torch.zeros(256, 256, dtype=torch.bool)
    inside[64:192, 64:192] = True
    assert torch.equal(row[0][:, ~inside], original[:, ~inside])
    assert (row[0][:, inside] - original[:, inside]).abs().mean() > 0.01
    assert torch.equal(row[1], row[0].rot90(2, (-2, -1)))


def test_identity_views_are_plain_generation(cascade, tmp_path, shown):
    """Twice the same prompt through identity views: what generate draws, at both stages, up to rounding."""
    flags = ["--steps", "3", "--stage2-steps", "3", "--seed", "4"]
    run(generate.main, cascade, tmp_path / "g.png", PROMPT, *flags)
    run(anagram.main, cascade, tmp_path / "a.png", PROMPT, PROMPT, "--view", "identity", "identity", *flags)
    run(generate.main, cascade, tmp_path / "h.png", PROMPT, *flags[:-1], "5")
    ((plain,), _), ((twice,), _), ((other,), _) = shown
    same(twice[0], plain[1], other[1])


def test_a_mask_of_everything_is_plain_generation(cascade, photo, tmp_path, shown):
    """The known region is noised with random numbers of its own, so the new one is drawn with the same ones."""
    run(generate.main, cascade, tmp_path / "g.png", PROMPT, "--steps", 3, "--stage2-steps", 3)
    run(inpaint.main, cascade, tmp_path / "i.png", photo, PROMPT, "--box", 0, 0, 64, 64, "--steps", 3,
        "--stage2-steps", 3)  # fmt: skip
    run(generate.main, cascade, tmp_path / "h.png", PROMPT, "--steps", 3, "--stage2-steps", 3, "--seed", 5)
    same(shown[1][0][0][3], shown[0][0][0][1], shown[2][0][0][1])


def test_what_is_kept_has_noise_of_its_own(cascade, photo):
    """Stage 1 keeps the picture with the noises of stream 1 of each seed, stage 2 with those of stream 2."""
    args = cascades.fill_in(cli_args(cascade, photo))
    schedule = cascades.stages.load_stage(cascade[0], torch.float32, "cpu").schedule
    for size, stream in ((64, 1), (256, 2)):
        walk = cascades.edited(cascades.walk_of("4"), args, size, schedule)
        kept = walk.keep(torch.zeros(2, 3, size, size), 500)
        expected = noised(images.load(photo, size), 500, schedule, seeded(7, 2, stream))
        assert torch.equal(kept[:, :, : size // 4], expected[:, :, : size // 4])


def cli_args(cascade, photo):
    """What a command would parse from an image and a box, two pictures, seed 7."""
    p = cli.parser("", "out.png")
    cascades.add_edit_flags(p)
    cascades.add_cascade_flags(p, "")
    return p.parse_args(["--image", str(photo), "--box", "16", "16", "48", "48", "--seed", "7", "--num-images", "2",
                         "--model", str(cascade[0])])  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (anagram.main, [], "no prompts; pass one for each view"),
        (anagram.main, ["a", "b", "c"], "3 prompts need as many views, got 0: pass --view"),
        (anagram.main, ["a", "b", "--view", "identity"], "2 prompts need as many views, got 1"),
        (anagram.main, ["a", "--view", "turn"], "no view 'turn'; choose from identity"),
        (anagram.main, ["--check", "turn"], "no view 'turn'; choose from identity"),
        (anagram.main, ["a", "b", "--box", "0", "0", "9", "9"], "a mask or a start needs a picture: pass --image FILE"),
        (anagram.main, ["a", "b", "--image", "PHOTO"], "what is to happen to --image? pass --mask, --box or --i-start"),
        (anagram.main, ["a", "b", "--out", "OUT.gif"], "OUT.gif; pass another name for the picture: --out OUT.png"),
        (hybrid.main, ["a", "b", "--out", "OUT.GIF"], "the animation goes to OUT.GIF"),
        (hybrid.main, ["a", "b", "--weights", "1", "1"], "--weights go with --kind scale, not frequency"),
        (hybrid.main, ["a", "b", "--image", "PHOTO"], "what is to happen to --image? pass --mask, --box or --i-start"),
        (hybrid.main, ["a"], "frequency needs 2 prompts, got 1"),
        (hybrid.main, ["a", "b", "--reference", "PHOTO"], "frequency with --reference needs 1 prompts, got 2"),
        (hybrid.main, ["a", "b", "--kind", "scale"], "scale needs one weight per prompt"),
        (hybrid.main, ["a", "b", "--sigma", "-1"], "--sigma must be at least 0, got -1"),
        (inpaint.main, ["PHOTO"], "which region? pass a mask picture after the image, or --box X0 Y0 X1 Y1"),
        (inpaint.main, ["PHOTO", "nowhere.png", "a"], "nowhere.png does not exist; pass the path of a picture file"),
        (inpaint.main, ["PHOTO", "PHOTO", "a", "castle"], "too many words: ['a', 'castle']; put the prompt in quot"),
        (inpaint.main, ["PHOTO", "PHOTO", "--box", "0", "0", "9", "9"], "is a picture, but --mask or --box says where"),
        (inpaint.main, ["PHOTO", "--box", "9", "0", "9", "9"], "a box is x0 y0 x1 y1"),
        (inpaint.main, ["PHOTO", "PHOTO", "--feather", "-1"], "the feather's width must lie in 0..20 pixels, got -1"),
        (inpaint.main, ["PHOTO", "PHOTO", "a", "--method", "repaint", "--jump-length", "0"], "at least 1, got 0 and 3"),
        (inpaint.main, ["PHOTO", "PHOTO", "--method", "repaint", "--steps", "5", "--jump-length", "5"], "lie in 1..4"),
        (inpaint.main, ["PHOTO", "PHOTO", "--jump-length", "5"], "go with --method repaint"),
        (inpaint.main, ["PHOTO", "a castle"], "which region? pass a mask picture after the image"),
        (sdedit.main, ["PHOTO", "--feather", "2"], "--feather softens a mask; pass --mask or --box"),
        (generate.main, ["a", "--steps", "2", "3", "--stage2-steps", "4"], "leave out --stage2-steps"),
        (generate.main, ["a", "--stage2-steps", "4"], "--stage2-steps and --stage2-guidance-scale need a stage 2"),
        (hybrid.main, ["a", "b", "--kind", "color", "--sigma", "3"], "--sigma goes with --kind frequency and triple"),
        (sdedit.main, ["nowhere.png"], "nowhere.png does not exist"),
        (sdedit.main, ["PHOTO", "--i-start", "34"], "--i-start must lie in 0..32 for these steps, got 34"),
        (denoise.main, ["PHOTO", "--t", "1000"], "--t must lie in 0..999, got 1000"),
        (denoise.main, ["PHOTO", "--blur-kernel", "-3"], "a kernel of at least 1, got 2 and -3"),
        (denoise.main, ["PHOTO", "--i-start", "-1"], "--i-start must lie in 0..32 for these steps, got -1"),
        (sdedit.main, ["PHOTO", "--steps", "5", "9"], "this command takes one --steps and one --guidance-scale"),
        (generate.main, ["a", "--steps", "2", "3", "--show-steps"], "--show-steps looks at one run"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(cascade, photo, tmp_path, capsys, main, argv, message):
    argv = [str(photo) if a == "PHOTO" else a for a in argv]
    if "--check" not in argv:
        argv += ["--model", str(cascade[0])] + ([] if main is denoise.main else ["--stage2", "none"])
        argv += [] if "--out" in argv else ["--out", str(tmp_path / "o.png")]
    assert message in fails(capsys, main, *argv)
    assert not (tmp_path / "o.png").exists()


def test_pictures_are_looked_at_before_the_prompt_is_encoded(cascade, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cascades, "encode", lambda *_: pytest.fail("encoded"))
    model = ["--model", cascade[0], "--out", tmp_path / "o.png"]
    for main, argv in ((sdedit.main, [photo, "--i-start", "34"]), (denoise.main, [photo, "--i-start", "99"]),
                       (inpaint.main, [photo, "--box", "9", "0", "9", "9"]),
                       (anagram.main, ["a", "b", "--image", photo, "--mask", "nowhere.png"]),
                       (upscale.main, [photo, "--i-start", "20", "--steps", "20"])):  # fmt: skip
        assert "error: " in fails(capsys, main, *argv, *model)


@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_numbers_that_are_none_are_told_at_once(photo, capsys, value):
    for main, flags in ((generate.main, ["a", "--guidance-scale", value]), (sdedit.main, [photo, "--feather", value]),
                        (hybrid.main, ["a", "b", "--sigma", value]), (denoise.main, [photo, "--blur-sigma", value]),
                        (upscale.main, [photo, "--guidance-scale", value])):  # fmt: skip
        assert f"invalid finite value: '{value}'" in fails(capsys, main, *flags)


def test_a_picture_is_not_overwritten_by_its_result_and_masks_must_fit(cascade, photo, tmp_path, capsys):
    before = photo.read_bytes()
    model = ["--model", cascade[0], "--stage2", "none", "--quick"]
    said = fails(capsys, sdedit.main, photo, PROMPT, *model, "--out", photo)
    assert "the result would take the place of" in said and photo.read_bytes() == before
    moving = tmp_path / "moving.gif"  # where the animation would go
    Image.open(photo).save(moving)
    before = moving.read_bytes()
    for main, flags in ((anagram.main, ["--image", moving, "--box", 16, 16, 48, 48]),
                        (hybrid.main, ["--reference", moving])):  # fmt: skip
        texts = ["a"] if main is hybrid.main else ["a", "b"]
        said = fails(capsys, main, *texts, *flags, *model, "--out", moving.with_suffix(".png"))
        assert "the result would take the place of" in said and moving.read_bytes() == before
    Image.new("L", (128, 64), 255).save(tmp_path / "wide.png")
    said = fails(capsys, inpaint.main, photo, tmp_path / "wide.png", PROMPT, *model, "--out", tmp_path / "o.png")
    assert "must have the shape of its picture" in said and "is 90x70" in said and "is 128x64" in said


def test_a_long_prompt_is_no_file_name(cascade, photo):
    for prompt in ("a very " * 50 + "large castle", "~nobody's castle.png"):
        assert inpaint._parse([str(photo), prompt, "--box", "0", "0", "9", "9"]).prompt == prompt


def test_the_prompt_may_come_after_the_flags(cascade, photo, tmp_path, shown):
    run(sdedit.main, cascade, tmp_path / "a.png", photo, "--quick", "--i-start", 1, "--seed", 3, PROMPT, stage2=False)
    run(sdedit.main, cascade, tmp_path / "b.png", photo, PROMPT, "--quick", "--i-start", 1, "--seed", 3, stage2=False)
    assert torch.equal(shown[0][0][0][0], shown[1][0][0][0])


def test_a_picture_is_there_even_if_its_animation_cannot_be(cascade, tmp_path, capsys):
    (tmp_path / "a.gif").mkdir()
    said = fails(capsys, anagram.main, "a", "b", "--model", cascade[0], "--quick", "--out", tmp_path / "a.png")
    assert "a.gif is a folder" in said


def test_one_model_has_one_name():
    for name, stage, short in (("mini-IF-I", 1, "mini"), ("mini-IF-II", 2, "mini"), ("mini-IF-II", 1, "mini-IF-II"),
                               ("DeepFloyd/IF-I-M-v1.0", 1, "IF-I-M-v1.0"), ("here/mine", 1, "here/mine")):  # fmt: skip
        assert weights.short_name(name, stage) == short


def test_a_broken_picture_is_named(cascade, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    message = fails(capsys, sdedit.main, tmp_path / "broken.png", "--model", cascade[0], "--out", tmp_path / "o.png")
    assert "broken.png cannot be read as a picture" in message


def test_the_linter_as_a_command(capsys):
    for name, status in (("square_hinge", 0), ("white_balance_failure", 1)):
        with pytest.raises(SystemExit) as exit_info:
            anagram.main(["--check", name])
        assert exit_info.value.code == status
    printed = capsys.readouterr().out
    assert "good: linear, orthogonal" in printed and "bad: noise of strength 1 becomes 1.49" in printed


def test_progress_of_a_walk_without_steps(capsys):
    """i_start at the end of the course's list asks the network nothing, and the bar does not wait for it."""
    cascades.progress(cascades.walk_of("course").__class__(torch.tensor([0]), final_step=False), "none")
    assert capsys.readouterr().err == ""
