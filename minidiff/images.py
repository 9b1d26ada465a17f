"""Images: from files to tensors and back, labelled sheets of them, GIFs, and what a file remembers of its making.

This is plumbing: skim it. An image in the package is (1, 3, H, W) float32 in [-1, 1], in a file 8-bit sRGB:

    x = value / 127.5 - 1          value = round(255 (x / 2 + 0.5)), clamped to 0..255
"""

import io
import math
import os
import re
import tempfile
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minidiff.checkpoint import write_whole
from minidiff.checks import number, short

KNOWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC  # Pillow's bicubic is antialiased

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # the colours of a profile, and Pillow's mode for them
MARGIN, TITLE_SIZE, LABEL_SIZE, LEGIBLE = 16, 18, 15, 192  # of a sheet, in pixels; LEGIBLE: least height of an image


def load(path: str | Path | Image.Image | Tensor, size: int | None = None) -> Tensor:
    """An image file of any kind, a Pillow image, or a tensor as in `to_pil`: (1, 3, H, W) float32 in [-1, 1].

    An embedded colour profile is converted to sRGB, transparency is laid over white, a camera's rotation is applied,
    of an animation the first frame is taken. Grey of more than 8 bits is rounded to 8: white is 65535, in floats 1.
    size: the image is scaled until it just covers size x size, and cropped at its centre; None keeps it as it is.
    Raises ValueError if the file is missing, broken, no image, or a labelled sheet of `save_images`.
    """
    if isinstance(path, Tensor):
        if 0 <= in_range(path).min() < path.max() <= 1:
            warnings.warn("an image in [0, 1] is lighter than grey; if 0 is to be black, pass 2 * x - 1", stacklevel=2)
        path = to_pil(path)
    number("size", 1 if size is None else size, 1, whole=True)
    image = _flat(path, "the image") if isinstance(path, Image.Image) else _flat(_read(path), path)
    return from_pil(image if size is None else ImageOps.fit(image, (size, size), BICUBIC))


def load_mask(path: str | Path, size: int) -> Tensor:
    """Read a mask: (1, 1, H, W) float32 in [0, 1], 1 = paint here. Cropped as `load` crops, no colour profile.

        transparency | visible pixels          | marked
        none         | shades                  | the light ones: the largest of red, green, blue; the brightest is 1
        some         | all light: 128 or more  | the visible ones, a layer of paint; opacity = strength
        some         | others: a photo, or none| the transparent ones: erased; transparency = strength

    A mask of two values keeps hard edges (nearest neighbour); shades are scaled like an image.
    Raises ValueError as `load` does.
    """
    pixels = np.array(_eight_bits(_read(path), path).convert("RGBA"))
    light, alpha = pixels[..., :3].max(2), pixels[..., 3]
    visible = alpha >= max(1, alpha.max() / 2)
    if alpha.min() == 255:
        marked = (light * (255 / max(light.max(), 1))).round().astype(np.uint8)
    else:
        is_paint = visible.any() and (light[visible] >= 128).mean() > 0.99
        marked = alpha if is_paint else 255 - alpha
    resample = NEAREST if len(np.unique(marked)) <= 2 else BICUBIC
    mask = ImageOps.fit(Image.fromarray(marked), (size, size), resample)
    return torch.from_numpy(np.array(mask, dtype=np.float32) / 255)[None, None]


def check_same_shape(image: str | Path | Image.Image | Tensor, mask: str | Path) -> None:
    """Raise ValueError if image and mask differ in shape by more than a pixel in 64: cropped, they would not fit."""
    page = to_pil(image) if isinstance(image, Tensor) else image
    name, page = ("the image", page) if isinstance(page, Image.Image) else (page, _read(page))
    (w, h), (mask_w, mask_h) = page.size, _read(mask).size
    if abs(w / h * mask_h / mask_w - 1) > 1 / 64:
        sizes = f"{name} is {w}x{h}, {mask} is {mask_w}x{mask_h}"
        raise ValueError(f"the mask must have the shape of its image: {sizes}; any size of the same shape will do")


def from_pil(image: Image.Image) -> Tensor:
    """Any Pillow image to (1, 3, H, W) float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(_flat(image, "the image")))  # (H, W, 3) uint8
    return (values.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def in_range(x: Tensor) -> Tensor:
    """The same image; a walk without thresholding may lead it beyond [-1, 1]. Raises ValueError on 0..255, NaN and
    infinity."""
    if not x.is_floating_point() or not x.numel():
        raise ValueError(f"an image is floats in [-1, 1], got {x.dtype} {tuple(x.shape)}; of 0..255 pass x / 127.5 - 1")
    if not x.isfinite().all() or x.min() >= 0 and x.max() > 10:
        what = f"values from {x.min():g} to {x.max():g}"
        raise ValueError(f"an image lies in [-1, 1], got {what}; of 0..255 pass x / 127.5 - 1")
    return x


def to_pil(x: Tensor) -> Image.Image:
    """One image in [-1, 1] to Pillow: (3, H, W), (1, 3, H, W) or, as grey, (1, 1, H, W) or (1, H, W). Clamped.

    Raises ValueError on another shape, or if x holds NaN or bytes.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"an image is a tensor here, got {short(x)}; images.load reads files and Pillow images")
    if not x.is_floating_point():
        raise ValueError(f"an image is floats in [-1, 1], got {x.dtype}; of 0..255 pass x / 127.5 - 1")
    if x.ndim == 4 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"an image must be (3, H, W), (1, 3, H, W) or (1, 1, H, W), got {tuple(x.shape)}")
    x = x.detach().float().cpu()
    if x.isnan().any():
        raise ValueError("the image holds NaN: the network's output is not finite; try --dtype float32")
    values = (255 * (in_range(x) / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(values.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _open(path: str | Path) -> tuple[Image.Image, dict[str, str]]:
    """An image file as Pillow reads it, turned upright, and the text in it."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"an image is a file, a Pillow image or a tensor, got {type(path).__name__}; of a numpy array "
                         "pass PIL.Image.fromarray(array)")  # fmt: skip
    if re.match("https?:/", str(path)):
        address = re.sub("^(https?):/+", r"\1://", str(path))  # a Path has one slash
        raise ValueError(f"{address} is a web address; download it first and pass the file")
    try:
        with open(os.path.expanduser(path), "rb") as stream, Image.open(stream) as file:
            file.load()
            return ImageOps.exif_transpose(file), getattr(file, "text", {})
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; pass the path of an image file, such as image.png") from error
    except Exception as error:  # Pillow's decoders raise errors of many classes on broken files
        reason = "no known kind of image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path} cannot be read as an image ({reason}); pass the path of an image file, and if it is "
                         "one, open it in an image viewer and save it again as PNG") from error  # fmt: skip


def _read(path: str | Path) -> Image.Image:
    image, text = _open(path)
    if text.get("minidiff") == "sheet":
        raise ValueError(f"{path} is a sheet of labels; pass the image itself: {text.get('images', 'another file')}")
    return image


def _eight_bits(image: Image.Image, name: str | Path) -> Image.Image:
    """Grey of more than 8 bits to 8, the other modes as they are.  name: for messages."""
    if not image.mode.startswith(("I", "F")):
        return image
    values, white = np.array(image).astype(np.float64), 65535 if image.mode.startswith("I") else 1
    low, high = values.min(), values.max()
    if not -0.001 <= low <= high <= white + 0.001:
        raise ValueError(f"{name} holds grey values from {low:g} to {high:g}; scale them to 0..{white}")
    if 0 < high <= 255 and white == 65535:
        warnings.warn(f"{name} holds grey values up to {high:g} where white is 65535: nearly black", stacklevel=2)
    grey = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return grey


def _flat(image: Image.Image, name: str | Path) -> Image.Image:
    """Any mode to 8-bit sRGB, over white where transparent."""
    image = _eight_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("LA" if Image.getmodebase(image.mode) == "L" else "RGBA")
    colours = _srgb(image, name)
    if image.has_transparency_data:
        colours.putalpha(image.getchannel("A"))
        colours = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    colours.info = {}  # neither the old profile nor a transparent colour goes along
    return colours


def _srgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Colours to RGB, through the embedded profile if there is one; alpha is dropped."""
    if "icc_profile" in image.info:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            pixels = image.convert(PROFILE_MODES[profile.profile.xcolor_space.strip()])
            return ImageCms.profileToProfile(pixels, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except Exception:  # as many classes as there are ways to be broken
            warnings.warn(f"{name}: its colour profile is broken; sRGB is assumed", stacklevel=2)
    return image.convert("RGB")


def grid(images: Sequence[Tensor], labels: Sequence[str]) -> tuple[list[list[Tensor]], list[list[str]]]:
    """A list of images as rows for `sheet`: a grid about as wide as high.    Returns the rows and their labels."""
    columns = max(1, math.ceil(math.sqrt(len(images))))
    starts = range(0, len(images), columns)
    return [list(images[i : i + columns]) for i in starts], [list(labels[i : i + columns]) for i in starts]


def sheet(rows: Sequence[Sequence[Tensor]], labels: Sequence[Sequence[str]], title: str = "") -> Image.Image:
    """A labelled grid, white around it: each image with its label below, the title on top; text is wrapped.

    rows: images as in `to_pil`, of any sizes; small ones are enlarged by whole factors, pixel by pixel, towards the
    height of the largest (at least 192, or 128 if there are many), so that 64 stands beside 256 and nothing is blurred.
    labels: one for each image, "" for none.    Raises ValueError if not, or if there are no images.
    """
    counts, label_counts = [len(row) for row in rows], [len(row) for row in labels]
    if not any(counts) or counts != label_counts:
        raise ValueError(f"every image needs one label: got rows of {counts} images and of {label_counts} labels")
    images = [[to_pil(x) for x in row] for row in rows]
    height = max(LEGIBLE if max(counts) <= 6 else 128, *(image.height for row in images for image in row))
    images = [[ImageOps.scale(image, height // image.height, NEAREST) for image in row] for row in images]
    widths = [max(row[i].width for row in images if i < len(row)) for i in range(max(counts))]
    texts = [[_text(label, w, LABEL_SIZE, centred=True) for label, w in zip(row, widths)] for row in labels]
    heading = _text(title, sum(widths) + MARGIN * (len(widths) - 1), TITLE_SIZE)
    y = MARGIN + (heading.height + MARGIN if title else 0)
    places = [(heading, (MARGIN, MARGIN))]
    for row, row_texts in zip(images, texts):
        x, height = MARGIN, max((image.height for image in row), default=0)
        for image, text, w in zip(row, row_texts, widths):
            places.append((image, (x + (w - image.width) // 2, y + (height - image.height) // 2)))
            places.append((text, (x, y + height)))
            x += w + MARGIN
        y += height + max((text.height for text in row_texts), default=0) + MARGIN
    page = Image.new("RGB", (heading.width + 2 * MARGIN, y), "white")
    for part, place in places:
        page.paste(part, place)
    return page


def _text(text: str, width: int, size: int, centred: bool = False) -> Image.Image:
    """Black text on white, this wide: broken between words, or inside a word that is longer than a line."""
    font, lines = ImageFont.load_default(size), []
    text = _legible(text, font)
    for letters in range(min(len(text), width), 0, -1):  # the most letters whose lines all fit
        lines = [textwrap.wrap(part, letters, break_on_hyphens=False) or [""] for part in text.split("\n")]
        lines = sum(lines, [])
        if all(font.getlength(line) <= width for line in lines):
            break
    page = Image.new("RGB", (width, round(1.3 * size * len(lines) + size / 3 * bool(lines))), "white")
    for i, line in enumerate(lines):
        place = width // 2 if centred else 0, round(1.3 * size * i + size / 3)
        ImageDraw.Draw(page).text(place, line, "black", font, anchor="ma" if centred else "la")
    return page


def _legible(text: str, font: ImageFont.FreeTypeFont) -> str:
    r"""Letters that the font lacks: without their accent (e for é) or as an escape, such as \u4e2d, not as boxes."""
    text, box = unicodedata.normalize("NFC", text), bytes(font.getmask("\uffff"))  # which is no letter
    for letter in set(text) - {"\n"}:
        choices = letter, unicodedata.normalize("NFD", letter)[0]
        escape = letter.encode("unicode_escape").decode()
        text = text.replace(letter, next((c for c in choices if bytes(font.getmask(c)) != box), escape))
    return text


def output_paths(path: str | Path, count: int) -> list[Path]:
    """Where `save_images` writes: a.png or a-0.png, a-1.png, ..., and last the sheet, a-sheet.png."""
    path = Path(path)
    names = [path.name] if count == 1 else [f"{path.stem}-{i}{path.suffix}" for i in range(count)]
    return [path.with_name(name) for name in [*names, f"{path.stem}-sheet.png"]]


def check_output(*paths: str | Path, known: Sequence[str] = KNOWN) -> None:
    """Find out before the work whether its results can be written here. Missing folders are made.

    Raises ValueError if a path is a folder, its ending is not among the known, or nothing can be written beside it.
    """
    for path in paths:
        file = Path(os.path.expanduser(path))
        if file.is_dir():
            raise ValueError(f"{file} is a folder; pass a file name, such as {file / 'image'}{known[0]}")
        if file.suffix.lower() not in known:
            raise ValueError(f"{file} must end in one of {', '.join(known)}, got {file.suffix or 'no ending'!r}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.").close()
        except OSError as error:
            raise ValueError(f"cannot write to {file} ({error.strerror}); pass another --out") from error


def save(image: Image.Image, path: str | Path, metadata: dict[str, object]) -> Path:
    """Write an image as 8-bit sRGB. In a PNG, metadata (prompt, seed, flags ...) goes along as text.

    Returns the path.    Raises ValueError if its ending is not one of KNOWN.
    """
    text = PngImagePlugin.PngInfo()
    for key, value in metadata.items():  # iTXt where Latin-1 does not suffice; file names need not be Unicode
        text.add_text(key, str(value).encode("utf-8", "backslashreplace").decode())
    options = {"quality": 95} if Path(path).suffix.lower() in (".jpg", ".jpeg", ".webp") else {"pnginfo": text}
    check_output(path)
    write_whole(path, lambda file: _flat(image, path).save(file, **options))
    return Path(path)


def save_images(
    images: Sequence[Tensor], sheet: Image.Image, path: str | Path, metadata: dict, own: Sequence[dict] | None = None
) -> list[Path]:
    """Write each image bare, at its own size, and beside them the labelled sheet, always a PNG: see `output_paths`.

    images: as in `to_pil`.  own: the metadata of each, if not the sheet's.  Returns the paths, the sheet's last.
    """
    pages, paths, own = [to_pil(x) for x in images], output_paths(path, len(images)), own or [metadata] * len(images)
    if len(own) != len(pages):
        raise ValueError(f"{len(pages)} images, but metadata of {len(own)}")
    written = [save(page, place, each) for page, place, each in zip(pages, paths, own)]
    is_sheet = {"minidiff": "sheet", "images": ", ".join(place.name for place in written)}  # for `load`
    return [*written, save(sheet, paths[-1], metadata | is_sheet)]


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save` wrote beside the image; empty for other kinds than PNG.    Raises ValueError as `load` does."""
    return dict(_open(path)[1])


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds_per_frame: float = 0.1) -> None:
    """Write an endless animation. Frames less than 192 pixels high are enlarged by a whole factor to at least that.

    Raises ValueError if there are no frames, they differ in size, or path does not end in .gif.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"an animation needs frames of one size, got {sorted(sizes) or 'none'}")
    check_output(path, known=(".gif",))
    duration, factor = round(1000 * seconds_per_frame), math.ceil(LEGIBLE / frames[0].height)
    frames = [frame.convert("RGB") for frame in frames]
    some = np.concatenate([np.array(frame) for frame in frames[:: max(1, len(frames) // 8)]], axis=1)
    colours = Image.fromarray(some).quantize(256)  # one palette for all, or it takes seconds
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    first, *rest = [ImageOps.scale(frame, factor, NEAREST) for frame in frames]
    options = {"save_all": True, "append_images": rest, "duration": duration, "loop": 0}
    write_whole(path, lambda file: first.save(file, **options))
