"""From a prompt to numbers: SentencePiece ids, an end mark, and padding to 77.

The text encoder never sees letters, only ids of word pieces from a fixed list (`tokenizer/spiece.model`). IF gives it
exactly 77 of them: the pieces of the prompt, the end mark 1, then padding 0. The limit is IF's choice, not T5's.

A prompt is lowered and stripped, nothing more. The original's longer cleaning (some 45 regular expressions against
URLs, file names and HTML in web captions) is left out: it also deletes words like "download" and "photo.jpg" from
prompts.
"""

import warnings
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

MAX_TOKENS = 77
PAD, EOS, UNKNOWN = 0, 1, 2


class Tokenizer:
    """SentencePiece with T5's special ids: pad 0, end 1, unknown 2, no begin mark."""

    def __init__(self, path: str | Path):
        """path: a `spiece.model`. Raises ValueError if it is missing, is no SentencePiece model, or has other ids."""
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no tokenizer at {self.path}; it is tokenizer/spiece.model in the model's folder")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} is not a SentencePiece model ({error}); download it again") from None
        ids = (self.pieces.pad_id(), self.pieces.eos_id())
        if ids != (PAD, EOS):
            raise ValueError(f"{self.path} pads with {ids[0]} and ends with {ids[1]}, but T5 uses {PAD} and {EOS}")

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts to (input_ids, attention_mask), both (B, 77) int64; the mask is 1 on pieces and the end mark.
        A prompt of more than 76 pieces is cut, and a warning shows the words that were lost."""
        rows = [self.encode(prompt) for prompt in prompts]
        ids = torch.tensor([row + [PAD] * (MAX_TOKENS - len(row)) for row in rows])  # (B, 77)
        return ids, (ids != PAD).long()

    def encode(self, prompt: str) -> list[int]:
        """One prompt to at most 77 ids, the last of them the end mark. The empty prompt is the end mark alone."""
        ids = self.pieces.encode(clean(prompt))
        if UNKNOWN in ids:
            pieces = [p for p, i in zip(self.pieces.encode(clean(prompt), out_type=str), ids) if i == UNKNOWN]
            warnings.warn(f"the tokenizer has no piece for {', '.join(pieces)} in {prompt!r}", stacklevel=3)
        if len(ids) > MAX_TOKENS - 1:
            lost = f"IF reads {MAX_TOKENS - 1} and an end mark; lost: {self.pieces.decode(ids[MAX_TOKENS - 1 :])!r}"
            warnings.warn(f"the prompt has {len(ids)} tokens, but {lost}", stacklevel=3)
        return ids[: MAX_TOKENS - 1] + [EOS]


def clean(prompt: str) -> str:
    """Lower case, without space around it: what IF's own pipelines do when their caption cleaning is switched off."""
    return prompt.encode("utf-8", "backslashreplace").decode().lower().strip()  # of bytes that are no text: escapes
