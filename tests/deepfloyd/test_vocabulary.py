"""The vocabulary: collected from rows written by hand, words that no caption had, and the listing letter by letter."""

import json

from minidiff.deepfloyd import vocabulary


def row(kind, concept, *captions):
    return {"captions": list(captions), "kind": kind, "concept": concept, "style": "noto"}


ROWS = [
    row("sprite", "fox", "an emoji of a fox", "a fox", "fox, animal"),
    row("sprite", "pancakes", "an emoji of pancakes"),
    row("sprite", "old man", "an emoji of an old man"),
    row("people", "bald man with a red beard wearing glasses and a hat", "a bald man"),
    row("people", "man with a beard", "a man"),
    row("scene", "fox", "two foxes on the grass at sunset"), row("scene", "fox", "a fox at night"),
    row("full", "lake/dawn", "a mountain lake at dawn", "an emoji of a lake"),
]  # fmt: skip


def test_the_collection_by_hand():
    found = vocabulary.collect(ROWS)
    words = set(found.pop("words"))
    assert found == {
        "things": ["fox", "pancakes"], "people": ["bald man", "man", "old man"],
        "attributes": ["beard", "glasses", "hat", "red beard"], "places": ["at night", "at sunset", "on the grass"],
        "scenes": ["a lake", "a mountain lake"], "styles": {"emoji": ["noto"]},
    }  # fmt: skip
    assert {"fox", "foxes", "animal", "dawn", "photo", "quality"} <= words and "red" not in words  # no caption has it


def test_unknown_words_are_those_that_no_caption_had_in_any_number():
    known = vocabulary.collect(ROWS)
    assert vocabulary.unknown_words("A high quality photo of two FOXES, lakes and a pancake", known) == ["and"]
    assert vocabulary.unknown_words("a volvo, a volvo and a barista", known) == ["volvo", "and", "barista"]
    assert vocabulary.unknown_words("", known) == []


def test_the_listing_by_hand(monkeypatch):
    """Columns are read downwards. Four of 3 + 2, 3 + 2, 3 + 2 and 2 + 2 letters need 19; two of 3 + 2 fit into 12."""
    kinds = {"people": ["man"], "attributes": ["beard", "glasses", "red beard"], "places": [], "scenes": ["a lake"]}
    things = ["ant", "bee", "cat", "ox"]
    monkeypatch.setattr(vocabulary, "WIDTH", 12)
    lines = vocabulary.listing(kinds | {"things": things, "styles": {"emoji": []}}).splitlines()
    assert lines[:3] == ["things", "  ant  cat", "  bee  ox"] and lines[3] == "people: man"
    monkeypatch.setattr(vocabulary, "WIDTH", 110)
    lines = vocabulary.listing(kinds | {"things": things, "styles": {"emoji": []}}).splitlines()
    assert lines == ["things", "  ant  bee  cat  ox", "people: man", "attributes: beard (red), glasses",
                     "scenes: a lake", "styles: emoji"]  # fmt: skip


def test_what_is_written_is_the_collection(tmp_path):
    vocabulary.write([*ROWS, {"captions": ["a cat"]}], tmp_path)  # a set without kinds, as a folder of files is
    vocabulary.write([{"captions": ["a cat"]}], tmp_path)
    assert not list(tmp_path.iterdir())
    vocabulary.write(ROWS, tmp_path)
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == vocabulary.collect(ROWS)
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.json"]
    assert vocabulary.read(tmp_path) == vocabulary.collect(ROWS)
