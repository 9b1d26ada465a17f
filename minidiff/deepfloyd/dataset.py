"""Captioned images to train on, and a tokenizer of their captions.

Read `deepfloyd/unet.py` first.
"""

import io
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from minidiff import images
from minidiff.checkpoint import write_whole
from minidiff.deepfloyd.tokenizer import clean
from minidiff.deepfloyd.vocabulary import NEUTRAL

CAPTION_DROPOUT = 0.12  # how often an image is shown with the empty prompt, for classifier-free guidance
PHOTO = {"full": 0.18, None: 0.04}  # how often one of NEUTRAL names a landscape, and an image without a kind
CPU = torch.device("cpu")
HELD_OUT = 128  # images on which the error is measured


class CaptionedImages:
    """The training set in memory: `size` pixels a side, uint8, and the captions of each image.
    rows: of captions.json, or {"captions": [...]} from text files. A row with "split": "val" is never drawn; `held` has
    the indices of these rows, and `held_out` returns up to HELD_OUT of them."""

    def __init__(self, folder: Path, size: int, device: torch.device = CPU):
        """device: where `take` puts images. Raises ValueError naming the file that is missing or wrong."""
        self.device = device
        packed = folder / f"images_{size}.npy"
        if packed.is_file():
            self.pixels = read_pixels(packed, size)
            self.rows = read_rows(folder / "captions.json")
        else:
            files = sorted(p for p in folder.glob("*") if p.suffix.lower() in images.KNOWN)
            bare, files = len(files), [p for p in files if p.with_suffix(".txt").is_file()]
            if not files:
                raise ValueError(f"{folder} holds neither {packed.name} nor images with a .txt of captions each")
            if bare := bare - len(files):
                warnings.warn(f"{bare} images in {folder} have no .txt of captions and are left out", stacklevel=2)
            self.rows = [{"captions": read_lines(p.with_suffix(".txt"))} for p in files]
            self.pixels = np.stack([np.asarray(images.to_pil(images.load(p, size))) for p in files])
        if len(self.pixels) != (n := len(self.rows)):
            raise ValueError(f"{folder}: {len(self.pixels)} images, but captions of {n}; make them as many")
        self.captions: list[list[str]] = [row["captions"] for row in self.rows]
        self.held = [i for i, row in enumerate(self.rows) if row.get("split") == "val"]
        self.weights = torch.tensor([float(row.get("weight", 1)) for row in self.rows])
        self.weights[self.held] = 0
        if not (0 < self.weights.sum() < math.inf and self.weights.min() >= 0):  # NaN is not, either
            raise ValueError(f"{folder}: each weight must be a number of 0 or more, and one that is not held out above "
                             "0")  # fmt: skip

    def draw(self, batch_size: int, generator: torch.Generator,
             dropout: float = CAPTION_DROPOUT, mirror: bool = False) -> tuple[Tensor, list[str]]:  # fmt: skip
        """A batch (B, 3, size, size) in [-1, 1], each image with a text for it (`_text`). mirror: half are mirrored."""
        picks = torch.multinomial(self.weights, batch_size, replacement=True, generator=generator).tolist()
        choice = torch.rand(batch_size, 3, generator=generator).tolist()
        x_start = self.take(picks)
        if mirror:
            mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator).to(x_start.device) < 0.5
            x_start = torch.where(mirrored, x_start.flip(3), x_start)
        return x_start, [self._text(i, *numbers, dropout) for i, numbers in zip(picks, choice)]

    def _text(self, i: int, which: float, drop: float, neutral: float, dropout: float) -> str:
        """A caption of image i, the empty prompt, or one of NEUTRAL, as often as PHOTO says: "a high quality photo".
        which, drop, neutral: numbers in [0, 1) that choose."""
        if drop < dropout:
            return ""
        is_photo = dropout and drop < dropout + PHOTO.get(self.rows[i].get("kind"), 0)
        texts, place = (NEUTRAL, neutral) if is_photo else (self.captions[i], which)
        return texts[int(place * len(texts))]

    def held_out(self) -> tuple[Tensor, list[str]]:
        """HELD_OUT images that are never drawn, with their first captions; without any, images of the whole set."""
        candidates = self.held or list(range(len(self.captions)))
        count = min(HELD_OUT, len(candidates))
        spread = [candidates[i * len(candidates) // count] for i in range(count)]
        return self.take(spread), [self.captions[i][0] for i in spread]

    def take(self, picks: Sequence[int]) -> Tensor:
        """(B, 3, size, size) in [-1, 1], on the device."""
        return torch.from_numpy(self.pixels[list(picks)]).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError if it has none or is not UTF-8."""
    lines = [line.strip() for line in _read_utf8(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; write one caption or prompt on each line")
    return lines


def read_pixels(path: Path, size: int) -> np.ndarray:
    """Packed images, mapped: (N, size, size, 3) uint8. Raises ValueError naming the file."""
    try:
        pixels = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of images ({error}); pack them again") from None
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
        raise ValueError(f"{path} must hold uint8 (N, {size}, {size}, 3), got {pixels.dtype} {pixels.shape}")
    return pixels


def read_rows(path: Path) -> list[dict]:
    """The rows of captions.json, without blank captions. Raises ValueError naming the file and the row."""
    if not path.is_file():
        raise ValueError(f"there is no {path}, the captions of the packed images beside it")
    shape = 'each row must be like {"captions": ["a red square"]}'
    try:
        rows = json.loads(_read_utf8(path))
        if any(isinstance(row["captions"], str) for row in rows if "captions" in row):  # a list of letters, as it were
            raise TypeError
        rows = [row | {"captions": [text for text in row.get("captions", ()) if text.strip()]} for row in rows]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it again") from None
    except (AttributeError, TypeError):
        raise ValueError(f"{path} holds other things than rows of captions; {shape}") from None
    for i, row in enumerate(rows):
        if not row["captions"]:
            raise ValueError(f"{path}: row {i} has no caption; {shape}")
        if row.get("split", "train") not in ("train", "val"):
            raise ValueError(f'{path}: the split of row {i} must be "train" or "val", got {row["split"]!r:.60}')
    return rows


def _read_utf8(path: Path) -> str:
    """A text file, with or without a byte order mark. Raises ValueError naming the file if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it in that encoding") from None


def train_tokenizer(captions: list[list[str]], path: Path, vocab_size: int) -> None:
    """A SentencePiece unigram model of the captions and of the neutral prompts, with T5's special ids."""
    lines, model = sorted({clean(c) for row in captions for c in row}) + NEUTRAL * 5, io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    write_whole(path, lambda file: file.write_bytes(model.getvalue()))
