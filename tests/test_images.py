"""images.py: files of every kind to the same tensors, and images that are written whole or not at all."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont

from minidiff import images


def level(value: float) -> float:
    """Where an 8-bit value lies in [-1, 1]."""
    return value / 127.5 - 1


def rgb(x: torch.Tensor, column: int = 0) -> list[int]:
    """The 8-bit colour of a pixel in the first row."""
    return [round((v + 1) * 127.5) for v in x[0, :, 0, column].tolist()]


def png(path: Path, width: int, depth: int, kind: int, row: bytes, **chunks: bytes) -> Path:
    """A PNG of one row, by hand.  kind: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    parts = {"IHDR": struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(b"\0" + row), "IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in parts.items():
        data += struct.pack(">I", len(part)) + name.encode() + part
        data += struct.pack(">I", zlib.crc32(name.encode() + part))
    path.write_bytes(data)
    return path


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A colour profile, by hand: Specification ICC.1, a header of 128 bytes and a table of tags."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)  # D50
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78 + 1)
    tags = {b"wtpt": white, b"desc": text, b"cprt": b"text\0\0\0\0none", **tags}
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    kind = b"prtrCMYKLab " if space == b"CMYK" else b"mntr" + space + b"XYZ "
    header = struct.pack(">I4sI", start + len(data), b"lcms", 0x2400000) + kind + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header + bytes(128 - len(header)) + table + data


def display_p3() -> bytes:
    """sRGB's curves and the primaries of Display P3, adapted to D50."""
    curve = b"para\0\0\0\0\0\3\0\0" + struct.pack(
        ">5i", *(round(65536 * v) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    )
    primaries = {b"r": (0.51512, 0.24120, -0.00105), b"g": (0.29198, 0.69225, 0.04189), b"b": (0.15710, 0.06657, 0.78407)}
    tags = {}
    for letter, xyz in primaries.items():
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in xyz))
        tags[letter + b"TRC"] = curve
    return profile(b"RGB ", tags)


def grey_gamma(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"})


def grey_inks() -> bytes:
    """A printer whose cyan, magenta and yellow are all the same mid grey, L* = 50.2 of Lab."""
    table = b"mft1\0\0\0\0" + struct.pack(">4B9i", 4, 3, 2, 0, *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    line = bytes(range(256))
    corners = [(255 if i == 0 else 128 * (1 - i % 2), 128, 128) for i in range(16)]  # paper, inks, black is the last bit
    table += line * 4 + bytes(v for corner in corners for v in corner) + line * 3
    return profile(b"CMYK", {b"A2B0": table, b"A2B1": table})


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
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([1, 2, 3, 0, 200, 100])
    name = "a.tif" if mode == "I" else "a.png"
    image.save(tmp_path / name)
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
    x = images.load(tmp_path / "a.png")  # nothing scaled, nothing cropped
    assert x.shape == (1, 3, 40, 120)
    assert rgb(x[:, :, :, 60:]) == [10, 120, 250]
    assert rgb(x) == [0, 0, 0]


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    x = images.load(tmp_path / "a.png", 16)
    assert x[..., 2:-2].abs().max() < 0.05  # the mean of black and white; without antialiasing it would be all of one


def test_bad_images_are_named_with_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere.jpg does not exist; pass the path of an image file, such as image.png"
    ):
        images.load(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder; pass the path of an image file"):
        images.load(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, data in {"cut.png": whole[:1000], "text.png": b"hello", "empty.png": b"", "head.png": whole[:20]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read as an image \(.*open it in an image viewer and save"
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
    values[:, 3:5] = 51
    Image.fromarray(values).save(tmp_path / "soft.png")
    soft = images.load_mask(tmp_path / "soft.png", 8)
    torch.testing.assert_close(soft[0, 0, 0], torch.tensor([0.0, 0, 0, 0.2, 0.2, 1, 1, 1]))
    larger = images.load_mask(tmp_path / "soft.png", 64)
    assert larger.min() >= 0 and larger.max() <= 1 and larger.unique().numel() > 4
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.load_mask(tmp_path / "clear.png", 8).unique().tolist() == [1]


# ---------------------------------------------------------------------------------------------- tensors to images


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
        with pytest.raises(ValueError, match=r"an image must be \(3, H, W\), .* got \("):
            images.to_pil(bad)
    x[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN: the network's output is not finite; try --dtype float32"):
        images.to_pil(x)


def grey(height: int, width: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((1, 3, height, width), value)


def test_sheet_shows_small_images_enlarged_without_blur():
    small = torch.randn(1, 3, 64, 64).clamp(-1, 1)
    page = images.sheet([[small, grey(256, 256)]], [["", ""]])
    assert page.size == (2 * 256 + 3 * 16, 256 + 2 * 16)
    left = page.crop((16, 16, 272, 272))
    assert np.array_equal(np.array(left), np.array(images.to_pil(small)).repeat(4, 0).repeat(4, 1))
    assert page.getpixel((288, 16)) == (128, 128, 128)
    assert [page.getpixel(at) for at in ((15, 100), (275, 100), (559, 100), (100, 275))] == [(255, 255, 255)] * 4


def test_sheet_centres_what_no_whole_factor_fits():
    page = images.sheet([[grey(100, 100), grey(256, 256)]], [["", ""]])  # 100 -> 200, 28 above and below
    white = [page.getpixel((100, y)) == (255, 255, 255) for y in range(page.height)]
    assert white.index(False) == 16 + 28
    assert sum(not w for w in white) == 200
    page = images.sheet([[grey(256, 256)], [grey(100, 100)]], [[""], [""]])  # and 28 left and right
    white = [page.getpixel((x, 16 + 256 + 16 + 100)) == (255, 255, 255) for x in range(page.width)]
    assert white.index(False) == 16 + 28


def test_sheet_of_small_images_only_is_enlarged_for_legible_labels():
    assert images.sheet([[grey(64, 64, -1)]], [[""]]).size == (192 + 32, 192 + 32)
    assert images.sheet([[grey(28, 28)] * 10] * 2, [[""] * 10] * 2).size == (10 * 112 + 11 * 16, 2 * 112 + 3 * 16)


def test_sheet_writes_labels_below_and_the_title_above():
    plain = images.sheet([[grey(192, 192)]], [[""]])
    labelled = images.sheet([[grey(192, 192)]], [["t = 690"]])
    titled = images.sheet([[grey(192, 192)]], [["t = 690"]], "a prompt")

    def ink(page: Image.Image, top: int, bottom: int) -> int:
        return int((np.array(page.crop((0, top, page.width, bottom)).convert("L")) < 100).sum())

    assert plain.height < labelled.height < titled.height
    assert ink(plain, 0, plain.height) == 0
    assert ink(labelled, 16 + 192, labelled.height) > 50
    assert ink(titled, 0, titled.height - labelled.height) > 50
    wrapped = images.sheet([[grey(192, 192)]], [["a label of so many words that it takes three lines or so"]])
    assert wrapped.width == plain.width
    assert wrapped.height > labelled.height + 15
    edge = np.array(wrapped.convert("L"))[:, [0, 1, 2, -3, -2, -1]]
    assert edge.min() == 255  # no letter leaves the page


def test_sheet_takes_rows_of_different_lengths_and_refuses_missing_labels():
    page = images.sheet([[grey(192, 192)] * 2, [grey(192, 192)]], [["", ""], [""]])
    assert page.size == (2 * 192 + 3 * 16, 2 * 192 + 3 * 16)
    with pytest.raises(
        ValueError, match=r"every image needs one label: got rows of \[2\] images and of \[1\] labels"
    ):
        images.sheet([[grey(8, 8)] * 2], [["one"]])
    with pytest.raises(ValueError, match=r"every image needs one label: got rows of \[\] images"):
        images.sheet([], [])


# ---------------------------------------------------------------------------------------------- writing


def test_png_remembers_how_it_was_made(tmp_path):
    image = images.to_pil(grey(8, 8, 1))
    path = tmp_path / "new" / "folder" / "a.png"
    images.save(image, path, {"prompt": "a café, 猫", "seed": 7, "flags": "--steps 27", "version": "0.1.0"})
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


def test_metadata_of_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"a.png does not exist"):
        images.read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize("write", ["image", "gif"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, write):
    path = tmp_path / ("a.png" if write == "image" else "a.gif")
    path.write_bytes(b"old")

    def fail(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    image = images.to_pil(grey(8, 8))
    with pytest.raises(OSError, match="disk full"):
        images.save(image, path, {}) if write == "image" else images.save_gif([image], path)
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
    with pytest.raises(ValueError, match=r"a.png must end in one of .gif, got '.png'"):
        images.save_gif([frame], tmp_path / "a.png")


def test_check_output_makes_folders_and_leaves_nothing(tmp_path):
    images.check_output(tmp_path / "out" / "deep" / "a.PNG")
    assert os.listdir(tmp_path / "out" / "deep") == []
    (tmp_path / "old.png").write_bytes(b"old")
    images.check_output(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"
    images.check_output(tmp_path / "a.safetensors", known=(".safetensors",))


def test_check_output_fails_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"{tmp_path.name} is a folder; pass a file name, such as .*image.png"):
        images.check_output(tmp_path)
    with pytest.raises(ValueError, match=r"a.xyz must end in one of .png, .jpg, .*, got '.xyz'"):
        images.check_output(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"must end in one of .png, .*, got 'no ending'"):
        images.save(images.to_pil(grey(8, 8)), tmp_path / "a", {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot write to .*file.a.png \(.*\); pass another --out"):
        images.check_output(tmp_path / "file" / "a.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.tempfile, "NamedTemporaryFile", refuse)  # permissions do not bind an administrator
    with pytest.raises(ValueError, match=r"cannot write to .*a.png \(Permission denied\); pass another --out"):
        images.check_output(tmp_path / "a.png")
