"""Pictures: from files to tensors and back, labelled strips of them, GIFs, and what the file remembers of its making.

A picture inside the package is (1, 3, H, W) float32 in [-1, 1]; in a file it is 8-bit RGB. Only here the two meet:

    x = value / 127.5 - 1          value = round(255 (x / 2 + 0.5)), clamped to 0..255

Every file is first written under a temporary name and then renamed, so a picture is there whole or not at all.

This is plumbing: skim it.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

KNOWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MOST_PIXELS = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}  # a side of such a file
Size = int | tuple[int, int]

MARGIN, TITLE_SIZE, LABEL_SIZE = 16, 18, 15  # of a strip, in pixels


# ---------------------------------------------------------------------------------------------- reading


def load(path: str | Path, size: Size | None = None) -> Tensor:
    """Read a picture file of any kind: (1, 3, H, W) float32 in [-1, 1].

    Transparency is laid over white, a camera's rotation is applied, 16-bit is rounded to 8, of an animation the first
    frame is taken. size: the picture is scaled (Pillow's antialiased bicubic) until it just covers size x size, or
    (height, width), and cropped at its centre; None keeps it as it is.
    Raises ValueError if the file is missing, broken or no picture.
    """
    if isinstance(path, Tensor):
        path = to_pil(path)
    image = path if isinstance(path, Image.Image) else _open(path)
    return from_pil(_fit(_rgb(image), size, Image.Resampling.BICUBIC))


def load_mask(path: str | Path, size: Size) -> Tensor:
    """Read a mask: (1, 1, H, W) float32 in [0, 1], 1 where it is white: paint here. Cropped as `load` crops.

    A mask of only black and white keeps hard edges (nearest neighbour); shades are scaled like a picture. Transparent
    counts as white.    Raises ValueError as `load` does.
    """
    grey = _rgb(_open(path)).convert("L")
    is_binary = set(grey.getextrema()) <= {0, 255} and sum(grey.histogram()[1:255]) == 0
    grey = _fit(grey, size, Image.Resampling.NEAREST if is_binary else Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(grey, dtype=np.float32) / 255)[None, None]


def check_same_shape(picture: str | Path, mask: str | Path) -> None:
    """Raise ValueError if these files differ in shape by more than a pixel in 64: cropped, they would not fit."""
    (w, h), (mask_w, mask_h) = _open(picture).size, _open(mask).size
    if abs(w / h * mask_h / mask_w - 1) > 1 / 64:
        raise ValueError(
            f"the mask must have the shape of its picture: {picture} is {w}x{h}, {mask} is {mask_w}x{mask_h}; any size "
            "of the same shape will do"
        )


def from_pil(picture: Image.Image) -> Tensor:
    """Any Pillow picture to (1, 3, H, W) float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(_rgb(picture)))  # (H, W, 3) uint8
    return (values.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def to_pil(x: Tensor) -> Image.Image:
    """One picture in [-1, 1] to Pillow: (3, H, W), (1, 3, H, W) or, as grey, (1, 1, H, W) or (1, H, W). Clamped.

    Raises ValueError on another shape, or if x holds NaN.
    """
    if x.ndim == 4 and x.shape[0] == 1:
        x = x[0]
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"a picture must be (3, H, W), (1, 3, H, W) or (1, 1, H, W), got {tuple(x.shape)}")
    x = x.detach().float().cpu()
    if x.isnan().any():
        raise ValueError("the picture holds NaN: half precision overflowed? try --dtype float32")
    values = (255 * (x / 2 + 0.5).clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values if values.shape[2] == 3 else values[:, :, 0]).convert("RGB")


def _open(path: str | Path) -> Image.Image:
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; pass the path of a picture file, such as {path.stem or 'picture'}.png")
    try:
        with Image.open(path) as file:
            file.load()
            return ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow's decoders raise errors of many classes on broken files
        raise ValueError(
            f"{path} cannot be read as a picture ({error}); it is broken, cut short or of an unknown kind: "
            "open it in an image viewer and save it again as PNG"
        ) from error


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB: over white where transparent, 16 bits rounded to 8."""
    if picture.mode.startswith("I") or picture.mode == "F":  # grey of 16 bits (also where Pillow says 32), or 0 to 1
        values = np.array(picture).astype(np.float64) * (255 if picture.mode == "F" else 1 / 257)
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _fit(picture: Image.Image, size: Size | None, resample: Image.Resampling) -> Image.Image:
    if size is None:
        return picture
    height, width = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(picture, (width, height), resample, centering=(0.5, 0.5))


# ---------------------------------------------------------------------------------------------- strips


def strip(rows: Sequence[Sequence[Tensor]], labels: Sequence[Sequence[str]], title: str = "") -> Image.Image:
    """A labelled grid, white around it: each picture with its label below, the title on top; text is wrapped.

    rows: pictures as in `to_pil`, of any sizes; small ones are enlarged by whole factors, pixel by pixel, towards the
    height of the largest (at least 192, or 128 if there are many), so that 64 stands beside 256 and nothing is blurred.
    labels: as many rows and entries as rows; "" for none.
    Raises ValueError if labels and pictures differ in number, or there are none.
    """
    if not any(rows) or [len(row) for row in rows] != [len(row) for row in labels]:
        raise ValueError(
            f"every picture needs one label: got rows of {[len(row) for row in rows]} pictures "
            f"and of {[len(row) for row in labels]} labels"
        )
    pictures = [[to_pil(x) for x in row] for row in rows]
    columns = max(map(len, pictures))
    height = max(192 if columns <= 6 else 128, *(p.height for row in pictures for p in row))
    pictures = [[_enlarge(p, height // p.height) for p in row] for row in pictures]
    widths = [max(row[i].width for row in pictures if i < len(row)) for i in range(columns)]
    heights = [max((p.height for p in row), default=0) for row in pictures]

    font, title_font = (ImageFont.load_default(size=s) for s in (LABEL_SIZE, TITLE_SIZE))
    texts = [[_wrap(text, w, font) for text, w in zip(row, widths)] for row in labels]
    title_lines = _wrap(title, sum(widths) + MARGIN * (columns - 1), title_font)
    title_height = _text_height(title_lines, title_font)
    label_heights = [max((_text_height(lines, font) for lines in row), default=0) for row in texts]

    total_width = sum(widths) + MARGIN * (columns + 1)
    total_height = MARGIN + title_height + sum(heights) + sum(label_heights) + MARGIN * len(rows)
    total_height += MARGIN if title_height else 0
    page = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(page)
    draw.multiline_text((MARGIN, MARGIN), "\n".join(title_lines), "black", title_font)
    y = MARGIN + title_height + (MARGIN if title_height else 0)
    for row, row_texts, h, label_height in zip(pictures, texts, heights, label_heights):
        x = MARGIN
        for picture, lines, w in zip(row, row_texts, widths):
            page.paste(picture, (x + (w - picture.width) // 2, y + (h - picture.height) // 2))
            where = (x + w // 2, y + h + LABEL_SIZE // 3)
            draw.multiline_text(where, "\n".join(lines), "black", font, anchor="ma", align="center")
            x += w + MARGIN
        y += h + label_height + MARGIN
    return page


def _enlarge(picture: Image.Image, factor: int) -> Image.Image:
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break text into lines of at most width pixels, between words, or inside a word that is longer than a line."""
    lines: list[str] = []
    for paragraph in text.split("\n") if text else []:
        line = ""
        for word in paragraph.split(" "):
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
            while len(line) > 1 and font.getlength(line[: width + 1]) > width:  # no letter is narrower than a pixel
                fits = bisect.bisect(range(1, min(len(line), width + 1)), width, key=lambda n: font.getlength(line[:n]))
                lines.append(line[: max(1, fits)])
                line = line[max(1, fits) :]
        lines.append(line)
    return lines


def _text_height(lines: list[str], font: ImageFont.FreeTypeFont) -> int:
    if not lines:
        return 0
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), "\n".join([*lines[:-1], "Ag"]), font)
    return round(box[3]) + LABEL_SIZE // 3


# ---------------------------------------------------------------------------------------------- writing


def check_output(path: str | Path, known: Sequence[str] = KNOWN) -> None:
    """Find out before the work whether its result can be written here. Missing folders are made.

    Raises ValueError if path is a folder, its ending is not among the known, or nothing can be written beside it.
    """
    path = Path(path).expanduser()
    if len(path.name.encode()) > 200:
        raise ValueError(f"{path.name[:40]}... is too long for a file name; pass another --out")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass a file name, such as {path / 'picture'}{known[0]}")
    if path.suffix.lower() not in known:
        raise ValueError(f"{path} must end in one of {', '.join(known)}, got {path.suffix or 'no ending'!r}")
    probe = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent} ({error.strerror}); pass another --out") from error


def save(picture: Image.Image, path: str | Path, metadata: dict[str, object]) -> Path:
    """Write a picture. In a PNG, metadata (prompt, seed, flags ...) goes along as text; other kinds leave it out.

    Returns the path written to: with .png behind it if the picture is too large for the kind of file asked for.
    Raises ValueError if the ending is not one of KNOWN.
    """
    options: dict[str, object] = {}
    if max(picture.size) > MOST_PIXELS.get(Path(path).suffix.lower(), math.inf):
        path = Path(f"{path}.png")
    if Path(path).suffix.lower() == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            text = str(value).encode("utf-8", "backslashreplace").decode()  # file names need not be Unicode
            options["pnginfo"].add_text(key, text)  # iTXt where Latin-1 does not suffice
    elif Path(path).suffix.lower() in (".jpg", ".jpeg", ".webp"):
        options["quality"] = 95
    _write(path, lambda file, kind: picture.save(file, kind, **options))
    return Path(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save` wrote beside the picture; empty for other kinds than PNG.    Raises ValueError as `load` does."""
    _open(path)
    with Image.open(Path(path).expanduser()) as file:
        file.load()
        return dict(getattr(file, "text", {}))


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds_per_frame: float = 0.1) -> None:
    """Write an endless animation. seconds_per_frame: at least 0.02, which is the shortest that viewers show.

    Raises ValueError if there are no frames, they differ in size, go by too fast, or path does not end in .gif.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"an animation needs frames of one size, got {sorted(sizes) or 'none'}")
    if seconds_per_frame < 0.02:
        raise ValueError(f"seconds_per_frame must be at least 0.02, got {seconds_per_frame}")
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"an animation must end in .gif, got {path}")
    duration = round(1000 * seconds_per_frame)
    colours = _sheet(frames[:: max(1, len(frames) // 8)]).quantize(256)  # one palette for all, or it takes seconds
    first, *rest = [frame.convert("RGB").quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    _write(path, lambda f, kind: first.save(f, kind, save_all=True, append_images=rest, duration=duration, loop=0))


def _sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """All frames in one row."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i * width, 0))
    return sheet


def _write(path: str | Path, write: Callable[[Path, str], None]) -> None:
    """Call write(temporary file, Pillow's name of the format), then give the file its name."""
    path = Path(path).expanduser()
    check_output(path)
    temporary = _temporary(path)
    try:
        write(temporary, Image.registered_extensions()[path.suffix.lower()])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def grid(images, labels):
    columns = math.ceil(math.sqrt(len(images)))
    starts = range(0, len(images), columns or 1)
    return [list(images[i : i + columns]) for i in starts], [list(labels[i : i + columns]) for i in starts]


sheet = strip


def save_images(images, sheet, path, metadata):
    path = Path(path)
    names = [path] if len(images) == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(images))]
    for x, name in zip(images, names):
        save(to_pil(x), name, metadata)
    save(sheet, path.with_name(f"{path.stem}-sheet{path.suffix}"), metadata)
    return [*names, path.with_name(f"{path.stem}-sheet{path.suffix}")]
