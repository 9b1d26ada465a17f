"""images.py: files of every kind to the same tensors, and pictures that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from minidiff import images


def level(value: float) -> float:
    """Where an 8-bit value lies in [-1, 1]."""
    return value / 127.5 - 1


def rgb(x: torch.Tensor) -> list[int]:
    """The 8-bit colour of the first pixel."""
    return [round((v + 1) * 127.5) for v in x[0, :, 0, 0].tolist()]


@pytest.fixture
def gradient() -> np.ndarray:
    """(6, 8, 3) uint8, every pixel another colour."""
    return np.arange(144, dtype=np.uint8).reshape(6, 8, 3)


# ---------------------------------------------------------------------------------------------- reading


def test_values_0_and_255_become_minus_1_and_1(tmp_path, gradient):
    gradient[0, 0] = 0, 255, 51  # 51 / 127.5 - 1 = -0.6
    Image.fromarray(gradient).save(tmp_path / "a.png")
    x = images.load(tmp_path / "a.png")
    assert x.shape == (1, 3, 6, 8)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert x[0, 2, 5, 7].item() == pytest.approx(level(143))


def test_all_8_bit_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(np.array(images.to_pil(images.from_pil(Image.fromarray(values)))), values)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (200, 0, 100, 255), [200, 0, 100]),
        ("RGBA", (200, 0, 100, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 100, 51), [244, 204, 224]),  # a fifth of the colour, four fifths of white: 40 + 204, ...
        ("LA", (100, 0), [255, 255, 255]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("P", 1, [0, 200, 100]),
        ("I;16", 257 * 90 + 100, [90, 90, 90]),
        ("I", 257 * 91, [91, 91, 91]),
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    picture = Image.new(mode, (4, 4), colour)
    if mode == "P":
        picture.putpalette([1, 2, 3, 0, 200, 100])
    name = "a.tif" if mode == "I" else "a.png"
    picture.save(tmp_path / name)
    assert rgb(images.load(tmp_path / name)) == expected


def test_palettes_and_colours_marked_transparent_are_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([1, 2, 3, 0, 200, 100])
    palette.putpixel((3, 3), 0)
    palette.save(tmp_path / "p.png", transparency=1)
    x = images.load(tmp_path / "p.png")
    assert rgb(x) == [255, 255, 255]
    assert [round((v + 1) * 127.5) for v in x[0, :, 3, 3].tolist()] == [1, 2, 3]
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "c.png", transparency=(9, 8, 7))
    assert rgb(images.load(tmp_path / "c.png")) == [255, 255, 255]


def test_cmyk_and_float(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = rgb(images.load(tmp_path / "a.jpg"))
    assert red <= 3 and green >= 252 and blue >= 252  # cyan; JPEG is not exact
    Image.fromarray(np.full((4, 4), 0.4, dtype=np.float32)).save(tmp_path / "f.tif")
    assert rgb(images.load(tmp_path / "f.tif")) == [102, 102, 102]


def test_a_cameras_rotation_is_applied(tmp_path, gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(gradient).save(tmp_path / "a.png", exif=exif)
    x = images.load(tmp_path / "a.png")
    assert x.shape == (1, 3, 8, 6)
    assert torch.equal(x, images.from_pil(Image.fromarray(np.ascontiguousarray(np.rot90(gradient, -1)))))


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert rgb(images.load(tmp_path / "a.gif")) == [255, 0, 0]


def test_resizing_covers_and_crops_the_centre(tmp_path):
    wide = np.zeros((40, 120, 3), dtype=np.uint8)
    wide[:, 40:80] = (10, 120, 250)  # thirds: black, colour, black
    Image.fromarray(wide).save(tmp_path / "a.png")
    x = images.load(tmp_path / "a.png", 40)  # no scaling, only the crop
    assert x.shape == (1, 3, 40, 40)
    assert rgb(x) == [10, 120, 250]
    assert torch.equal(x, x[:, :, :1, :1].expand_as(x))
    x = images.load(tmp_path / "a.png", (20, 60))  # height, width: half the size, nothing cropped
    assert x.shape == (1, 3, 20, 60)
    assert rgb(x[:, :, :, 30:]) == [10, 120, 250]
    assert rgb(x) == [0, 0, 0]


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    x = images.load(tmp_path / "a.png", 16)
    assert x[..., 2:-2].abs().max() < 0.05  # the mean of black and white; without antialiasing it would be all of one


def test_bad_pictures_are_named_with_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere.jpg does not exist; pass the path of a picture file, such as nowhere.png"
    ):
        images.load(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder; pass the path of a picture file"):
        images.load(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, data in {"cut.png": whole[:1000], "text.png": b"hello", "empty.png": b"", "head.png": whole[:20]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read as a picture \(.*open it in an image viewer and save"
        ):
            images.load(tmp_path / name)


def test_mask_is_1_where_white(tmp_path):
    values = np.zeros((8, 8), dtype=np.uint8)
    values[:, 4:] = 255
    Image.fromarray(values).save(tmp_path / "hard.png")
    mask = images.load_mask(tmp_path / "hard.png", 64)
    assert mask.shape == (1, 1, 64, 64)
    assert mask.dtype == torch.float32
    assert torch.equal(mask[0, 0, 0], torch.tensor([0.0] * 32 + [1.0] * 32))  # no grey between
    assert images.load_mask(tmp_path / "hard.png", (4, 2)).shape == (1, 1, 4, 2)
    values[:, 3:5] = 51
    Image.fromarray(values).save(tmp_path / "soft.png")
    soft = images.load_mask(tmp_path / "soft.png", 8)
    torch.testing.assert_close(soft[0, 0, 0], torch.tensor([0.0, 0, 0, 0.2, 0.2, 1, 1, 1]))
    larger = images.load_mask(tmp_path / "soft.png", 64)
    assert larger.min() >= 0 and larger.max() <= 1 and larger.unique().numel() > 4
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.load_mask(tmp_path / "clear.png", 8).unique().tolist() == [1]


# ---------------------------------------------------------------------------------------------- tensors to pictures


def test_to_pil_rounds_and_clamps():
    x = torch.tensor([-5.0, -1.0, -0.6, 0.0, 1.0, 7.0, level(0.4), level(0.6)])
    row = images.to_pil(x.expand(3, 1, 8))
    assert [pixel[0] for pixel in (row.getpixel((i, 0)) for i in range(8))] == [0, 0, 51, 128, 255, 255, 0, 1]


def test_to_pil_takes_each_shape():
    x = torch.linspace(-1, 1, 3 * 4 * 5).view(3, 4, 5)
    three, four = images.to_pil(x), images.to_pil(x[None].to(torch.bfloat16).float().requires_grad_())
    assert three.size == four.size == (5, 4)
    assert three.getpixel((4, 3)) == (82, 169, 255)  # entries 19, 39 and 59 of 0..59: 255 * 19 / 59 = 82.1, ...
    for grey in (x[:1], x[None, :1]):
        assert images.to_pil(grey).mode == "RGB"
        assert len(set(images.to_pil(grey).getpixel((1, 1)))) == 1
    for bad in (x[:2], x[0], x[None, None], x.expand(2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"a picture must be \(3, H, W\), .* got \("):
            images.to_pil(bad)
    x[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the picture holds NaN: half precision overflowed"):
        images.to_pil(x)


def grey(height: int, width: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((1, 3, height, width), value)


def test_strip_shows_small_pictures_enlarged_without_blur():
    small = torch.randn(1, 3, 64, 64).clamp(-1, 1)
    page = images.strip([[small, grey(256, 256)]], [["", ""]])
    assert page.size == (2 * 256 + 3 * 16, 256 + 2 * 16)
    left = page.crop((16, 16, 272, 272))
    assert np.array_equal(np.array(left), np.array(images.to_pil(small)).repeat(4, 0).repeat(4, 1))
    assert page.getpixel((288, 16)) == (128, 128, 128)
    assert [page.getpixel(at) for at in ((15, 100), (275, 100), (559, 100), (100, 275))] == [(255, 255, 255)] * 4


def test_strip_centres_what_no_whole_factor_fits():
    page = images.strip([[grey(100, 100), grey(256, 256)]], [["", ""]])  # 100 -> 200, 28 above and below
    white = [page.getpixel((100, y)) == (255, 255, 255) for y in range(page.height)]
    assert white.index(False) == 16 + 28
    assert sum(not w for w in white) == 200
    page = images.strip([[grey(256, 256)], [grey(100, 100)]], [[""], [""]])  # and 28 left and right
    white = [page.getpixel((x, 16 + 256 + 16 + 100)) == (255, 255, 255) for x in range(page.width)]
    assert white.index(False) == 16 + 28


def test_strip_of_small_pictures_only_is_enlarged_for_legible_labels():
    assert images.strip([[grey(64, 64, -1)]], [[""]]).size == (192 + 32, 192 + 32)
    assert images.strip([[grey(28, 28)] * 10] * 2, [[""] * 10] * 2).size == (10 * 112 + 11 * 16, 2 * 112 + 3 * 16)


def test_strip_writes_labels_below_and_the_title_above():
    plain = images.strip([[grey(192, 192)]], [[""]])
    labelled = images.strip([[grey(192, 192)]], [["t = 690"]])
    titled = images.strip([[grey(192, 192)]], [["t = 690"]], "a prompt")

    def ink(page: Image.Image, top: int, bottom: int) -> int:
        return int((np.array(page.crop((0, top, page.width, bottom)).convert("L")) < 100).sum())

    assert plain.height < labelled.height < titled.height
    assert ink(plain, 0, plain.height) == 0
    assert ink(labelled, 16 + 192, labelled.height) > 50
    assert ink(titled, 0, titled.height - labelled.height) > 50
    wrapped = images.strip([[grey(192, 192)]], [["a label of so many words that it takes three lines or so"]])
    assert wrapped.width == plain.width
    assert wrapped.height > labelled.height + 15
    edge = np.array(wrapped.convert("L"))[:, [0, 1, 2, -3, -2, -1]]
    assert edge.min() == 255  # no letter leaves the page


def test_strip_takes_rows_of_different_lengths_and_refuses_missing_labels():
    page = images.strip([[grey(192, 192)] * 2, [grey(192, 192)]], [["", ""], [""]])
    assert page.size == (2 * 192 + 3 * 16, 2 * 192 + 3 * 16)
    with pytest.raises(
        ValueError, match=r"every picture needs one label: got rows of \[2\] pictures and of \[1\] labels"
    ):
        images.strip([[grey(8, 8)] * 2], [["one"]])
    with pytest.raises(ValueError, match=r"every picture needs one label: got rows of \[\] pictures"):
        images.strip([], [])


def test_wrapping_keeps_every_word_and_every_width():
    font = ImageFont.load_default(size=15)
    text = "words of several lengths and aVeryLongWordThatCannotPossiblyFitIntoOneLineOfThisWidth\nnew paragraph"
    lines = images._wrap(text, 120, font)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert lines[-1] == "new paragraph"
    assert images._wrap("", 120, font) == []
    words, long = "il.W" * 3000, []  # without a space: letters of all widths
    for line in images._wrap(words, 120, font)[:-1]:
        long.append(font.getlength(line + "i"))
        assert font.getlength(line) <= 120
    assert min(long) > 110 and "".join(images._wrap(words, 120, font)) == words
    assert ImageDraw.Draw(Image.new("L", (1, 1))).textlength(lines[0], font) <= 120


# ---------------------------------------------------------------------------------------------- writing


def test_png_remembers_how_it_was_made(tmp_path):
    picture = images.to_pil(grey(8, 8, 1))
    path = tmp_path / "new" / "folder" / "a.png"
    images.save(picture, path, {"prompt": "a café, 猫", "seed": 7, "flags": "--steps 27", "version": "0.1.0"})
    assert images.read_metadata(path) == {
        "prompt": "a café, 猫",
        "seed": "7",
        "flags": "--steps 27",
        "version": "0.1.0",
    }
    assert torch.equal(images.load(path), grey(8, 8, 1))
    assert os.listdir(path.parent) == ["a.png"]


@pytest.mark.parametrize("ending", [e for e in images.KNOWN if e != ".png"])
def test_other_kinds_are_written_without_metadata(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    images.save(images.to_pil(grey(8, 8, 0.6)), path, {"seed": 7})
    assert images.read_metadata(path) == {}
    assert (images.load(path) - level(204)).abs().max() < 0.05


def test_metadata_of_no_picture(tmp_path):
    with pytest.raises(ValueError, match=r"a.png does not exist"):
        images.read_metadata(tmp_path / "a.png")


def test_what_is_too_large_for_its_kind_becomes_a_png(tmp_path):
    written = images.save(Image.new("RGB", (2, 17000)), tmp_path / "long.webp", {"seed": 3})
    assert written == tmp_path / "long.webp.png" and images.read_metadata(written)["seed"] == "3"
    assert not (tmp_path / "long.webp").exists()


@pytest.mark.parametrize("write", ["picture", "gif"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, write):
    path = tmp_path / ("a.png" if write == "picture" else "a.gif")
    path.write_bytes(b"old")

    def fail(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    picture = images.to_pil(grey(8, 8))
    with pytest.raises(OSError, match="disk full"):
        images.save(picture, path, {}) if write == "picture" else images.save_gif([picture], path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_gif_has_all_frames_their_time_and_no_end(tmp_path):
    frames = [images.to_pil(grey(16, 16, v)) for v in (-1, 0, 1)]
    images.save_gif(frames, tmp_path / "a.gif", 0.25)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0
        for i, value in enumerate((0, 128, 255)):
            gif.seek(i)
            assert gif.info["duration"] == 250
            assert gif.convert("RGB").getpixel((3, 3)) == (value,) * 3


def test_gif_refuses_what_it_cannot_show(tmp_path):
    frame = images.to_pil(grey(8, 8))
    with pytest.raises(ValueError, match="an animation needs frames of one size, got none"):
        images.save_gif([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"an animation needs frames of one size, got \[\(8, 8\), \(9, 8\)\]"):
        images.save_gif([frame, images.to_pil(grey(8, 9))], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="seconds_per_frame must be at least 0.02, got 0.01"):
        images.save_gif([frame], tmp_path / "a.gif", 0.01)
    with pytest.raises(ValueError, match=r"an animation must end in .gif, got .*a.png"):
        images.save_gif([frame], tmp_path / "a.png")


def test_check_output_makes_folders_and_leaves_nothing(tmp_path):
    images.check_output(tmp_path / "out" / "deep" / "a.PNG")
    assert os.listdir(tmp_path / "out" / "deep") == []
    (tmp_path / "old.png").write_bytes(b"old")
    images.check_output(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"
    images.check_output(tmp_path / "a.safetensors", known=(".safetensors",))


def test_check_output_fails_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"{tmp_path.name} is a folder; pass a file name, such as .*picture.png"):
        images.check_output(tmp_path)
    with pytest.raises(ValueError, match=r"a.xyz must end in one of .png, .jpg, .*, got '.xyz'"):
        images.check_output(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"must end in one of .png, .*, got 'no ending'"):
        images.save(images.to_pil(grey(8, 8)), tmp_path / "a", {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot write to .*file \(.*\); pass another --out"):
        images.check_output(tmp_path / "file" / "a.png")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # permissions themselves do not bind an administrator
    with pytest.raises(ValueError, match=r"cannot write to .* \(Permission denied\); pass another --out"):
        images.check_output(tmp_path / "a.png")
