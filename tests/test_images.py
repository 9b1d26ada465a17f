"""images.py: files of every kind to the same tensors, and images that are written whole or not at all."""

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
    header = struct.pack(">I4sI", start + len(data), b"lcms", 0x2400000) + kind  # version 2.4
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white[8:]
    return header + bytes(128 - len(header)) + table + data


def display_p3() -> bytes:
    """sRGB's curves and the primaries of Display P3, adapted to D50."""
    curve = b"para\0\0\0\0\0\3\0\0" + struct.pack(
        ">5i", *(round(65536 * v) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    )
    primaries = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
    tags = {}
    for letter, xyz in zip((b"r", b"g", b"b"), primaries):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in xyz))
        tags[letter + b"TRC"] = curve
    return profile(b"RGB ", tags)


def grey_gamma(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"})


def grey_inks() -> bytes:
    """A printer whose cyan, magenta and yellow are all the same mid grey, L* = 50.2 of Lab."""
    table = b"mft1\0\0\0\0" + struct.pack(">4B9i", 4, 3, 2, 0, *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    line = bytes(range(256))
    corners = [(255 if i == 0 else 128 * (1 - i % 2), 128, 128) for i in range(16)]  # the last bit is black
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
    with pytest.raises(ValueError, match=rf"{tmp_path.name} cannot be read as an image \(.*[Dd]irectory"):
        images.load(tmp_path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, data in {"cut.png": whole[:1000], "text.png": b"hello", "empty.png": b"", "head.png": whole[:20]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read as an image \(.*open it in an image viewer and save"
        ):
            images.load(tmp_path / name)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_a_profile_is_converted_to_srgb(tmp_path, ending):
    """Display P3 (200, 80, 60) is sRGB (216, 69, 50)."""
    image, path = Image.new("RGB", (8, 8), (200, 80, 60)), tmp_path / f"a{ending}"
    image.save(path, icc_profile=display_p3(), **({} if ending in (".png", ".tif") else {"quality": 100}))
    tolerance = 1 if ending in (".png", ".tif") else 4
    assert rgb(images.load(path)) == pytest.approx([216, 69, 50], abs=tolerance)


def test_a_profile_is_converted_in_every_mode(tmp_path):
    def read(image: Image.Image, icc: bytes, name: str = "a.png") -> list[int]:
        image.save(tmp_path / name, icc_profile=icc)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return rgb(images.load(tmp_path / name))

    # alpha stays as it is: a fifth of (216, 69, 50), four fifths of white
    assert read(Image.new("RGBA", (4, 4), (200, 80, 60, 51)), display_p3()) == pytest.approx([247, 218, 214], abs=1)
    assert read(Image.new("RGBA", (4, 4), (200, 80, 60, 255)), display_p3()) == pytest.approx([216, 69, 50], abs=1)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([1, 2, 3, 200, 80, 60])
    assert read(palette, display_p3()) == pytest.approx([216, 69, 50], abs=1)
    palette.info["transparency"] = bytes((0, 51))
    assert read(palette, display_p3()) == pytest.approx([247, 218, 214], abs=1)
    # linear grey: 55 / 255 = 0.2157, and 1.055 * 0.2157^(1 / 2.4) - 0.055 = 0.502 = 128 / 255
    assert read(Image.new("L", (4, 4), 55), grey_gamma(1)) == pytest.approx([128] * 3, abs=1)
    assert read(Image.new("LA", (4, 4), (55, 51)), grey_gamma(1)) == pytest.approx([230] * 3, abs=1)  # as above
    assert read(Image.new("I;16", (4, 4), 257 * 55), grey_gamma(1)) == pytest.approx([128] * 3, abs=1)
    assert read(Image.new("L", (4, 4), 55), display_p3()) == pytest.approx([55] * 3, abs=1)  # the curve of sRGB
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # L* = 50.2 is Y = 0.186, sRGB 119
    assert read(cyan, grey_inks(), "a.tif") == pytest.approx([119] * 3, abs=1)
    cyan.save(tmp_path / "a.jpg", icc_profile=grey_inks(), quality=100)
    assert rgb(images.load(tmp_path / "a.jpg")) == pytest.approx([119] * 3, abs=2)


def test_srgb_stays_exactly_as_it_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=srgb)
    assert torch.equal(images.load(tmp_path / "a.png"), images.from_pil(Image.fromarray(values)))


@pytest.mark.parametrize(
    ("mode", "icc"),
    [("RGB", b"garbage"), ("RGB", display_p3()[:200]), ("L", b"garbage"), ("RGBA", b"garbage")],
)
def test_an_image_with_a_broken_profile_loads_with_a_warning(tmp_path, mode, icc):
    colour = {"RGB": (200, 80, 60), "RGBA": (200, 80, 60, 255), "L": 77}[mode]
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png", icc_profile=icc)
    with pytest.warns(UserWarning, match=r"a.png: its colour profile is broken; sRGB is assumed"):
        x = images.load(tmp_path / "a.png")
    assert rgb(x) == ([77] * 3 if mode == "L" else [200, 80, 60])


def test_a_profile_chunk_that_cannot_be_unpacked_is_warned_of(tmp_path):
    png(tmp_path / "a.png", 1, 8, 2, bytes((200, 80, 60)), iCCP=b"name\0\0no zlib")
    with pytest.warns(UserWarning, match=r"a.png: its colour profile is broken"):
        assert rgb(images.load(tmp_path / "a.png")) == [200, 80, 60]


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.array([[0, 13107, 65535]], dtype=np.int32), 65535),
        (np.array([[0, 13107, 65535]], dtype=np.uint16), 65535),
        (np.array([[0, 51, 257]], dtype=np.uint16), 65535),  # 16 bits and dark: 51 / 257 is 0
        (np.array([[0, 0.2, 1]], dtype=np.float32), 1),
        (np.array([[0, 0.2, 1.0005]], dtype=np.float32), 1),  # rounded
        (np.array([[0, 0.25, 0.75]], dtype=np.float32), 1),
        (np.zeros((1, 3), dtype=np.float32), 1),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled_by_its_type(tmp_path, values, white):
    Image.fromarray(values).save(tmp_path / "a.tif")
    x = images.load(tmp_path / "a.tif")
    expected = [[round(min(255, 255 * v / white))] * 3 for v in values[0].tolist()]
    assert [rgb(x, i) for i in range(3)] == expected


def test_a_dark_16_bit_image_stays_dark_where_pillow_says_32(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 200, 257 * 40))
    assert rgb(images.load(tmp_path / "a.pgm"), 1) == [40] * 3
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 0, 255))  # 255 of 65535, not of 255
    with pytest.warns(UserWarning, match="a.pgm holds grey values up to 255 where white is 65535: nearly black"):
        assert rgb(images.load(tmp_path / "a.pgm"), 1) == [1] * 3


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([[-1.0, 1.0]], dtype=np.float32), "-1 to 1"),
        (np.array([[-5, 300]], dtype=np.int32), "-5 to 300"),
        (np.array([[0, 70000]], dtype=np.int32), "0 to 70000"),
        (np.array([[0, 1e6]], dtype=np.float32), "0 to 1e[+]06"),
        (np.array([[0, np.nan]], dtype=np.float32), "nan to nan"),
        (np.array([[0, np.inf]], dtype=np.float32), "0 to inf"),
        (np.array([[0, 51, 255]], dtype=np.float32), "0 to 255"),
    ],
)
def test_grey_that_fits_no_range_is_refused_with_its_range(tmp_path, values, found):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a.tif holds grey values from {found}; scale them to 0..(1|65535)$"):
        images.load(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a.tif holds grey values from {found}"):
        images.load_mask(tmp_path / "a.tif", 8)


WHITE, CLEAR = [255, 255, 255], [255, 255, 255]


@pytest.mark.parametrize(
    ("width", "depth", "kind", "row", "chunks", "expected"),
    [
        # grey, and one value of it transparent: 1 bit (0, 1) and 8 bits
        (2, 1, 0, b"\x40", {}, [[0] * 3, WHITE]),
        (2, 1, 0, b"\x40", {"tRNS": b"\0\0"}, [CLEAR, WHITE]),
        (2, 8, 0, b"\x05\x80", {"tRNS": b"\0\5"}, [CLEAR, [128] * 3]),
        # grey and alpha; a fifth of 100 and four fifths of white are 224
        (3, 8, 4, bytes((9, 0, 100, 51, 100, 255)), {}, [CLEAR, [224] * 3, [100] * 3]),
        (3, 16, 4, struct.pack(">6H", 9, 0, 25700, 13107, 25700, 65535), {}, [CLEAR, [224] * 3, [100] * 3]),
        # colours
        (2, 8, 2, bytes((1, 2, 3, 1, 2, 4)), {"tRNS": struct.pack(">3H", 1, 2, 3)}, [CLEAR, [1, 2, 4]]),
        (2, 16, 6, struct.pack(">8H", 9, 9, 9, 0, 25700, 0, 0, 13107), {}, [CLEAR, [224, 204, 204]]),
        (2, 8, 6, bytes((9, 9, 9, 0, 100, 0, 0, 51)), {}, [CLEAR, [224, 204, 204]]),
        (3, 2, 3, b"\x18", {"PLTE": bytes((9, 9, 9, 100, 0, 0, 1, 2, 3)), "tRNS": b"\0\x33"},
         [CLEAR, [224, 204, 204], [1, 2, 3]]),
    ],
)  # fmt: skip
def test_transparency_at_every_depth(tmp_path, width, depth, kind, row, chunks, expected):
    x = images.load(png(tmp_path / "a.png", width, depth, kind, row, **chunks))
    assert [rgb(x, i) for i in range(width)] == expected


def test_what_is_no_readable_file_gets_its_own_true_sentence(tmp_path, monkeypatch):
    for url in ("https://example.org/a.png", "http://example.org/a.png", Path("https://example.org/a.png")):
        with pytest.raises(ValueError, match=r"example.org/a.png is a web address; download it first and pass"):
            images.load(url)
    with pytest.raises(ValueError, match="~nosuchuser/a.png does not exist; pass the path of an image file"):
        images.load("~nosuchuser/a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=r"loop.png cannot be read as an image \(.*Too many levels"):
        images.load(tmp_path / "loop.png")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"a.heic cannot be read as an image \(no known kind of image\); .* as PNG"):
        images.load(tmp_path / "a.heic")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", refuse, raising=False)  # permissions do not bind an administrator
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image \(.*Permission denied"):
        images.load(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------- masks


def hard(size: int) -> np.ndarray:
    """(size, size) bool: a mark whose edges lie on the grid of 16."""
    i = np.arange(size) * 16 // size
    return (3 <= i[:, None]) & (i[:, None] < 9) & (i[None] >= 6) & (i[None] < 15)


@pytest.mark.parametrize(
    "array",
    [
        hard(32),
        hard(32).astype(np.uint8),
        hard(32).astype(np.uint8) * 255,
        hard(32).astype(np.uint16) * 65535,
        hard(32).astype(np.int32) * 65535,
        hard(32).astype(np.float32),
        hard(32).astype(np.uint8)[..., None].repeat(3, 2),
        hard(32)[..., None] * np.array([255, 0, 0], dtype=np.uint8),  # red on black
    ],
    ids=lambda a: f"{a.dtype}-{a.max()}-{a.ndim}",
)
def test_a_mask_of_zeros_and_ones_is_black_and_white_at_every_depth(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "a.tif")
    assert torch.equal(images.load_mask(tmp_path / "a.tif", 32)[0, 0], torch.from_numpy(hard(32)).float())


@pytest.mark.parametrize("second", [(1, 1, 1), (128, 0, 0), (255, 255, 255), (0, 0, 90)])
def test_the_brightest_of_a_palette_mask_is_1(tmp_path, second):
    image = Image.new("P", (32, 32))
    image.putdata(hard(32).astype(np.uint8).ravel().tolist())
    image.putpalette([0, 0, 0, *second])
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name)
        assert torch.equal(images.load_mask(tmp_path / name, 32)[0, 0], torch.from_numpy(hard(32)).float())


def test_shades_of_a_mask_are_scaled_like_those_of_an_image(tmp_path):
    for dtype, white in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (np.int32, 65535)):
        values = (np.array([[0, 0.2, 0.6, 1]]).repeat(4, 0) * white).astype(dtype)
        Image.fromarray(values).save(tmp_path / "a.tif")
        found = images.load_mask(tmp_path / "a.tif", 4)[0, 0, 0]
        torch.testing.assert_close(found, torch.tensor([0, 0.2, 0.6, 1]))
    two = np.where(hard(32), 245, 10).astype(np.uint8)
    Image.fromarray(two).save(tmp_path / "a.png")
    found = images.load_mask(tmp_path / "a.png", 256).unique()  # hard edges: no third value
    torch.testing.assert_close(found, torch.tensor([10 / 255, 1]))  # round(10 * 255 / 245) = 10


def layers(kind: str) -> np.ndarray:
    """(32, 32, 4) uint8: `hard` is what a person sees marked in each of these."""
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    paints = {"white paint": (255, 255, 255), "light paint": (200, 180, 255), "red paint": (255, 0, 0)}
    if kind in paints:
        rgba[hard(32)] = (*paints[kind], 255)
    elif kind == "white paint, white ground":
        rgba[...] = 255, 255, 255, 0
        rgba[hard(32), 3] = 255
    elif kind == "hole in black":
        rgba[~hard(32)] = 0, 0, 0, 255
    elif kind == "hole in a photo":
        rgba[...] = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
        rgba[..., 3] = np.where(hard(32), 0, 255)
    elif kind == "opaque":
        rgba[...] = hard(32)[..., None] * np.uint8(255)
        rgba[..., 3] = 255
    return rgba


@pytest.mark.parametrize(
    "kind",
    ["white paint", "light paint", "red paint", "white paint, white ground", "opaque",
     "hole in black", "hole in a photo"],
)  # fmt: skip
def test_a_mask_with_transparency_marks_what_a_person_sees(tmp_path, kind):
    for name in ("a.png", "a.tif"):
        Image.fromarray(layers(kind)).save(tmp_path / name)
        assert torch.equal(images.load_mask(tmp_path / name, 32)[0, 0], torch.from_numpy(hard(32)).float()), name


def test_strength_of_paint_and_of_erasing(tmp_path):
    rgba = layers("white paint")
    rgba[rgba[..., 3] == 255, 3] = 102  # a brush of 40 %
    Image.fromarray(rgba).save(tmp_path / "a.png")
    torch.testing.assert_close(images.load_mask(tmp_path / "a.png", 32).unique(), torch.tensor([0, 0.4]))
    rgba = layers("hole in black")
    rgba[rgba[..., 3] == 0, 3] = 51  # erased to four fifths
    Image.fromarray(rgba).save(tmp_path / "a.png")
    torch.testing.assert_close(images.load_mask(tmp_path / "a.png", 32).unique(), torch.tensor([0, 0.8]))
    for colour in (0, 255):  # erased all over
        Image.new("RGBA", (8, 8), (colour, colour, colour, 0)).save(tmp_path / "a.png")
        assert images.load_mask(tmp_path / "a.png", 8).unique().tolist() == [1]


def test_a_mask_ignores_profiles_and_other_modes_mean_the_same(tmp_path):
    image = Image.fromarray(hard(32).astype(np.uint8) * 255)
    for name, mode in (("a.png", "1"), ("a.png", "L"), ("a.png", "LA"), ("a.png", "P"), ("a.tif", "CMYK")):
        image.convert(mode).save(tmp_path / name)
        assert torch.equal(images.load_mask(tmp_path / name, 32)[0, 0], torch.from_numpy(hard(32)).float()), mode
    image.convert("CMYK").save(tmp_path / "a.tif", icc_profile=b"garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.load_mask(tmp_path / "a.tif", 32).sum() == hard(32).sum()


@pytest.mark.parametrize("size", [16, 64, 256, 512, 1024])
def test_both_stages_paint_the_same_region(tmp_path, size):
    Image.fromarray(hard(size)).save(tmp_path / "a.png")
    small, large = images.load_mask(tmp_path / "a.png", 64), images.load_mask(tmp_path / "a.png", 256)
    assert torch.equal(torch.nn.functional.avg_pool2d(large, 4), small)
    assert torch.equal(small[0, 0], torch.from_numpy(hard(64)).float())


def test_a_mask_has_the_shape_of_its_image(tmp_path):
    for name, size in {"image": (512, 384), "half": (256, 192), "odd": (130, 97), "other": (256, 256)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    images.check_same_shape(tmp_path / "image.png", tmp_path / "half.png")
    images.check_same_shape(tmp_path / "image.png", tmp_path / "odd.png")
    with pytest.raises(ValueError, match=r"image.png is 512x384, .*other.png is 256x256; any size of the same shape"):
        images.check_same_shape(tmp_path / "image.png", tmp_path / "other.png")


def test_a_thin_line_vanishes_at_64_pixels(tmp_path):
    line = np.zeros((512, 512), dtype=np.uint8)
    line[:, 8] = 255  # at 64 the nearest pixels are 4, 12, 20, ...
    Image.fromarray(line).save(tmp_path / "a.png")
    assert images.load_mask(tmp_path / "a.png", 64).sum() == 0
    assert images.load_mask(tmp_path / "a.png", 512).mean() == 1 / 512


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


@pytest.mark.parametrize("other", [np.zeros((8, 8, 3), np.uint8), None, 5, b"png", [torch.zeros(3, 8, 8)]])
def test_what_is_no_image_is_named_by_its_type(other):
    with pytest.raises(ValueError, match=f"a Pillow image or a tensor, got {type(other).__name__}; "):
        images.load(other, 64)


def test_a_tensor_of_bytes_is_not_taken_for_values_in_minus_1_to_1():
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    whole = ((x + 1) * 127.5).round().to(torch.uint8)
    with pytest.raises(ValueError, match=r"an image is floats in \[-1, 1\], got torch.uint8.*; of 0\.\.255 pass x"):
        images.load(whole)
    assert torch.allclose(images.load(whole / 127.5 - 1), x.expand(1, 3, 16, 16), atol=1 / 255)


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
    return torch.full((1, 3, height, width), float(value))


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


def drawn(monkeypatch, title: str, width: int = 192) -> list[str]:
    """The lines of a title that a sheet draws."""
    lines, draw = [], ImageDraw.ImageDraw.text

    def record(self, place, text, *args, **kwargs):
        lines.append(text)
        draw(self, place, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", record)
        images.sheet([[grey(width, width)]], [[""]], title)
    return lines


def test_wrapping_keeps_every_word_and_every_width(monkeypatch):
    font = ImageFont.load_default(images.TITLE_SIZE)
    text = "words of several lengths and aVeryLongWordThatCannotPossiblyFitIntoOneLineOfThisWidth\nnew paragraph"
    lines = drawn(monkeypatch, text)
    assert all(font.getlength(line) <= 192 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert lines[-1] == "new paragraph" and lines[0] == "words of several"
    words = "il.W" * 300  # without a space: letters of all widths
    lines = drawn(monkeypatch, words)
    assert "".join(lines) == words
    assert all(170 < font.getlength(line) <= 192 for line in lines[:-1])
    assert drawn(monkeypatch, "") == []


def test_letters_that_the_font_lacks_are_no_boxes(monkeypatch):
    for text, expected in {
        "a village": "a village",
        "a 中": r"a \u4e2d",
        "a 😀": r"a \U0001f600",
        "a\udce9": r"a\udce9",  # of a file name that is no Unicode
        "x → y": r"x \u2192 y",
        "“it’s…”": "“it’s…”",  # it has these
        "café": "cafe" if boxed("é") else "café",
        "cafe\u0301": "cafe" if boxed("é") else "café",
    }.items():
        assert " ".join(drawn(monkeypatch, text)) == expected
        assert not any(boxed(letter) for letter in expected)


def boxed(letter: str) -> bool:
    """Does Pillow's default font draw the same for it as for what is no letter?"""
    font = ImageFont.load_default(images.TITLE_SIZE)
    return bytes(font.getmask(letter)) == bytes(font.getmask("\U0010ffff"))


@pytest.mark.parametrize(("n", "shape"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [2, 2]), (5, [3, 2]), (10, [4, 4, 2])])
def test_grid_is_about_as_wide_as_high(n, shape):
    items, labels = [grey(8, 8, i / n) for i in range(n)], [str(i) for i in range(n)]
    rows, texts = images.grid(items, labels)
    assert [len(row) for row in rows] == [len(row) for row in texts] == shape
    assert sum(texts, []) == labels and all(a is b for a, b in zip(sum(rows, []), items))
    assert images.sheet(rows, texts).width >= images.sheet(rows, texts).height - 100  # a label is not an image


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


def test_a_written_image_says_nothing_of_another_colour_space(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 80, 60))
    image.info |= {"icc_profile": display_p3(), "gamma": 0.3, "dpi": (3, 3)}
    for ending in images.KNOWN:
        images.save(image, tmp_path / f"a{ending}", {})
        with Image.open(tmp_path / f"a{ending}") as file:
            assert not {"icc_profile", "gamma"} & set(file.info), ending
            assert file.convert("RGB").getpixel((3, 3)) == pytest.approx((216, 69, 50), abs=5), ending


def test_the_bare_images_lie_beside_the_labelled_sheet(tmp_path):
    some = [torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(3, 256, 256) * 2 - 1]
    page = images.sheet([some], [["a", "b"]])
    written = images.save_images(some, page, tmp_path / "new" / "village.png", {"prompt": "a village", "seed": 3})
    assert [path.name for path in written] == ["village-0.png", "village-1.png", "village-sheet.png"]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(path.name for path in written)
    for path, x in zip(written, some):
        assert (images.load(path)[0] - x.view(x.shape[-3:])).abs().max() <= 1 / 255 + 1e-6  # own size, own values
        assert images.read_metadata(path) == {"prompt": "a village", "seed": "3"}
    assert images.read_metadata(written[-1]) == {
        "prompt": "a village", "seed": "3", "minidiff": "sheet", "images": "village-0.png, village-1.png",
    }  # fmt: skip
    assert np.array_equal(np.array(Image.open(written[-1])), np.array(page))


def test_one_image_keeps_the_name_and_the_sheet_is_always_a_png(tmp_path):
    page = images.sheet([[grey(8, 8)]], [[""]])
    written = images.save_images([grey(8, 8)], page, tmp_path / "a.png", {})
    assert written == [tmp_path / "a.png", tmp_path / "a-sheet.png"]
    written = images.save_images([grey(8, 8)], page, tmp_path / "b.jpg", {"seed": 3})
    assert written == [tmp_path / "b.jpg", tmp_path / "b-sheet.png"]
    assert images.read_metadata(written[1]) == {"seed": "3", "minidiff": "sheet", "images": "b.jpg"}
    with pytest.raises(ValueError, match="the image holds NaN"):
        images.save_images([grey(8, 8), grey(8, 8, torch.nan)], page, tmp_path / "c.png", {})
    assert not list(tmp_path.glob("c*"))  # all or nothing


def test_a_sheet_is_no_input(tmp_path):
    page = images.sheet([[grey(8, 8)] * 2], [["", ""]])
    *bare, written = images.save_images([grey(8, 8)] * 2, page, tmp_path / "a.png", {})
    message = r"a-sheet.png is a sheet of labels; pass the image itself: a-0.png, a-1.png"
    for read in (
        images.load,
        lambda path: images.load_mask(path, 8),
        lambda path: images.check_same_shape(path, bare[0]),
        lambda path: images.check_same_shape(bare[0], path),
    ):
        with pytest.raises(ValueError, match=message):
            read(written)
        read(bare[1])


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


@pytest.mark.parametrize(("height", "factor"), [(64, 3), (96, 2), (28, 7), (191, 2), (192, 1), (256, 1)])
def test_small_frames_are_enlarged_by_whole_factors(tmp_path, height, factor):
    x = torch.zeros(3, height, 40)
    x[:, :, :20], x[:, 0] = -1, 1
    images.save_gif([images.to_pil(x), images.to_pil(-x)], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        found = np.array(gif.convert("RGB"))
    assert np.array_equal(found, np.array(images.to_pil(x)).repeat(factor, 0).repeat(factor, 1))


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


def test_check_output_looks_at_every_file_of_save_images(tmp_path):
    assert [path.name for path in images.output_paths("out/a.jpg", 1)] == ["a.jpg", "a-sheet.png"]
    assert images.output_paths("out/a.jpg", 2) == [Path("out/a-0.jpg"), Path("out/a-1.jpg"), Path("out/a-sheet.png")]
    images.check_output(*images.output_paths(tmp_path / "a.png", 3))
    (tmp_path / "a-1.png").mkdir()
    images.check_output(tmp_path / "a.png")
    images.check_output(*images.output_paths(tmp_path / "a.png", 1))
    with pytest.raises(ValueError, match=r"a-1.png is a folder; pass a file name"):
        images.check_output(*images.output_paths(tmp_path / "a.png", 2))
    (tmp_path / "b-sheet.png").mkdir()
    with pytest.raises(ValueError, match=r"b-sheet.png is a folder"):
        images.check_output(*images.output_paths(tmp_path / "b.png", 1))
    assert sorted(os.listdir(tmp_path)) == ["a-1.png", "b-sheet.png"]
    with pytest.raises(ValueError, match=r"cannot write to .*\(File name too long\); pass another --out"):
        images.check_output(tmp_path / f"{'a' * 250}.png")


def test_numbers_that_are_no_image_are_refused_where_they_come_in():
    """Values in 0..255 would be clamped to white. A noisy image reaches about 5, and stays one; so does what a walk
    without thresholding leads to, far beyond on both sides."""
    for value in (200.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"an image lies in \[-1, 1\], got values from .*; of 0..255 pass x"):
            images.load(torch.full((3, 4, 4), value))
    for wrong in (torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(3, 0, 4)):
        with pytest.raises(ValueError, match=r"an image is floats in \[-1, 1\], got torch.* \(3, .*; of 0..255 pass x"):
            images.load(wrong)
    with pytest.warns(UserWarning, match=r"an image in \[0, 1\] is lighter than grey"):
        images.load(torch.linspace(0, 1, 48).view(3, 4, 4))
    assert images.load(torch.full((3, 4, 4), 5.0)).unique().tolist() == [1.0]
    assert images.load(torch.tensor([-112.0, 113.0]).expand(3, 4, 2)).unique().tolist() == [-1.0, 1.0]
