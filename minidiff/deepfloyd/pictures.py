"""Captioned pictures to train on, and a tokenizer of their captions.

Read `deepfloyd/unet.py` first. Next: `deepfloyd/initial.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from minidiff import images
from minidiff.deepfloyd.tokenizer import clean

CAPTION_DROPOUT = 0.1  # how often a picture is shown with the empty prompt, for classifier-free guidance


class Pictures:
    """The training set in memory: `size` pixels a side, uint8, and the captions of each picture."""

    def __init__(self, folder: Path, size: int):
        """Raises ValueError naming the folder and what it should hold."""
        packed = folder / f"images_{size}.npy"
        if packed.is_file():
            self.pixels = np.load(packed, mmap_mode="r")  # (N, size, size, 3)
            rows = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
            self.captions = [row["captions"] for row in rows]
            self.weights = torch.tensor([float(row.get("weight", 1)) for row in rows])
        else:
            files = sorted(
                p for p in folder.glob("*") if p.suffix.lower() in images.KNOWN and p.with_suffix(".txt").is_file()
            )
            if not files:
                raise ValueError(f"{folder} holds neither {packed.name} nor pictures with a .txt of captions each")
            self.pixels = np.stack([np.asarray(images.to_pil(images.load(p, size))) for p in files])
            self.captions = [p.with_suffix(".txt").read_text(encoding="utf-8").strip().splitlines() for p in files]
            self.weights = torch.ones(len(files))
        if len(self.pixels) != len(self.captions) or not all(self.captions):
            raise ValueError(f"{folder}: {len(self.pixels)} pictures, {len(self.captions)} captions; each needs one")

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """A batch (B, 3, size, size) in [-1, 1], half of it mirrored, each picture with one of its captions."""
        picks = torch.multinomial(self.weights, batch_size, replacement=True, generator=generator)
        pixels = torch.from_numpy(np.stack([self.pixels[i] for i in picks.tolist()]))
        x_start = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        mirror = torch.rand(batch_size, generator=generator) < 0.5
        x_start = torch.where(mirror.view(-1, 1, 1, 1), x_start.flip(3), x_start)
        choice = torch.rand(batch_size, 2, generator=generator).tolist()
        texts = [self.captions[i][int(c * len(self.captions[i]))] for i, (c, _) in zip(picks.tolist(), choice)]
        return x_start, ["" if drop < CAPTION_DROPOUT else text for text, (_, drop) in zip(texts, choice)]


def train_tokenizer(captions: list[list[str]], path: Path, vocab_size: int) -> None:
    """A SentencePiece unigram model of the captions, with T5's special ids, and the course's words beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = sorted({clean(c) for row in captions for c in row}) + ["a high quality photo", "a high quality picture"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix(".tmp")), vocab_size=vocab_size,
        hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.with_suffix(".tmp.vocab").unlink()
    path.with_suffix(".tmp.model").replace(path)
