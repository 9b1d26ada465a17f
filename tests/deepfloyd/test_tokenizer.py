"""Prompts to ids: equal to transformers' T5Tokenizer (recorded), and what happens at the limit of 77."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from minidiff.deepfloyd.tokenizer import EOS, MAX_TOKENS, PAD, UNKNOWN, Tokenizer, clean

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(REFERENCE / "spiece.model")


def test_ids_and_masks_equal_the_reference(tokenizer):
    rows = json.loads((REFERENCE / "tokens.json").read_text())["prompts"]
    assert len(rows) >= 15 and "" in [row["prompt"] for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = tokenizer([row["prompt"] for row in rows])
    for i, row in enumerate(rows):
        n = len(row["ids"])
        assert ids[i].tolist() == row["ids"] + [PAD] * (MAX_TOKENS - n), row["prompt"]
        assert mask[i].tolist() == [1] * n + [0] * (MAX_TOKENS - n), row["prompt"]


def test_the_empty_prompt_is_the_end_mark_and_padding(tokenizer):
    ids, mask = tokenizer(["", "   "])
    assert torch.equal(ids, torch.tensor([[EOS] + [PAD] * 76] * 2)) and mask.sum(1).tolist() == [1, 1]


def test_prompts_are_lowered_and_stripped(tokenizer):
    assert clean("  A Rocket SHIP\n") == "a rocket ship"
    assert torch.equal(tokenizer(["  A Rocket SHIP\n"])[0], tokenizer(["a rocket ship"])[0])


def test_a_long_prompt_keeps_its_end_mark_and_the_warning_shows_the_lost_words(tokenizer):
    words = ["castle"] * 75 + ["volcano"] * 40
    with pytest.warns(UserWarning, match=r"IF reads 76 and an end mark; lost: '.*volcano volcano'"):
        ids, mask = tokenizer([" ".join(words)])
    assert ids.shape == (1, MAX_TOKENS) and ids[0, -1] == EOS and mask.all()


def test_a_prompt_of_unknown_pieces_is_named(tokenizer):
    """Chinese is in no piece of the reference tokenizer: the ids are the mark of the unknown, and a warning says so."""
    with pytest.warns(UserWarning, match="the tokenizer has no piece for .*中文"):
        ids = tokenizer.encode("中文")
    assert UNKNOWN in ids and ids[-1] == EOS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert UNKNOWN not in tokenizer.encode("a castle")


def test_a_missing_or_wrong_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at .*spiece.model; it is tokenizer/spiece.model"):
        Tokenizer(tmp_path / "spiece.model")
    (tmp_path / "spiece.model").write_text("not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "spiece.model")


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a castle", "a volcano", "a rocket ship"] * 20), model_prefix=str(tmp_path / "other"),
        vocab_size=40, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="pads with -1 and ends with 2, but T5 uses 0 and 1"):
        Tokenizer(tmp_path / "other.model")
