"""Captions, prompts and vocabularies by hand: style phrases, names, classes, what the thirty prompts expect, the
collection of what a cascade learned, words that no caption had, and the listing letter by letter."""

import json

import pytest

from minidiff.deepfloyd import vocabulary
from minidiff.deepfloyd.judge import PROMPTS
from minidiff.deepfloyd.vocabulary import Expectation


def row(kind, concept, style, *texts, place=""):
    return {"captions": list(texts), "kind": kind, "concept": concept, "style": style, "place": place}


def sprite(concept, style, phrase, *aliases):
    texts = [f"{phrase} of a {concept}", f"a {concept}", *(f"{phrase} of {alias}" for alias in aliases)]
    texts += [f"a picture of a {concept}", f"a {concept} on a white background", f"{concept}, thing, face"]
    return row("sprite", concept, style, *texts)


ROWS = [
    *(sprite(name, "noto", "an emoji") for name in ("pencil", "castle", "volcano", "lion", "penguin", "mountain")),
    *(sprite(name, "twemoji", "a flat emoji") for name in ("octopus", "sailboat", "astronaut", "dragon", "wolf")),
    sprite("skull", "streamline", "a cartoon", "a human skull"), sprite("cat", "streamline", "a cartoon"),
    sprite("rocket", "fluent-3d", "a 3d render", "a rocket ship"), sprite("dog", "fluent-3d", "a 3d render", "a puppy"),
    sprite("old man", "noto", "an emoji", "an elderly man"), sprite("fire", "noto", "an emoji", "a campfire"),
    row("sprite", "cup of hot coffee", "noto", "a cup of hot coffee", "an emoji of a cup of hot coffee"),
    row("people", "man with a red beard wearing glasses", "personas",
        "a flat portrait of a man with a red beard wearing glasses"),
    row("people", "man wearing a turban", "toon-head", "a cartoon of a man wearing a turban"),
    row("full", "campfire/alone", "", "a campfire", "a picture of a campfire"),
    row("full", "campfire/people", "", "people around a campfire at night"),
    row("full", "waterfall/overcast", "", "waterfalls", "a waterfall over rocks"),
    row("full", "village/night", "", "a snowy mountain village at night", "a village in the snowy mountains at night"),
    row("full", "coast/day", "", "the amalfi coast", "colorful houses on the coast"),
    row("full", "lake/dawn", "", "a mountain lake at dawn"), row("full", "/beach", "", "a sandy beach by the sea"),
    row("style", "pencil", "oil", "an oil painting of a pencil"), row("style", "cat", "litho", "a lithograph of a cat"),
    row("style", "dog", "pencil", "a pencil sketch of a dog"),
    row("style", "dog", "water", "a watercolor painting of a dog"),
]  # fmt: skip
PHRASES = vocabulary.style_phrases(ROWS)
NAMES = vocabulary.class_names(ROWS, PHRASES)


def test_words_and_singulars_by_hand():
    assert vocabulary.words_of(" A 3D t-rex, please! ") == ["a", "3d", "t-rex", "please"]
    assert vocabulary.singulars("foxes") == ["foxes", "foxe", "fox"] and vocabulary.singulars("dog") == ["dog"]
    assert "berry" in vocabulary.singulars("berries") and "wolf" in vocabulary.singulars("wolves")


def test_a_style_phrase_stands_before_the_concept_and_names_at_most_two_styles():
    assert PHRASES["oil painting"] == ["oil"] and PHRASES["cartoon"] == ["streamline", "toon-head"]
    assert PHRASES["picture"] == []  # noto, twemoji, streamline, fluent-3d
    coffee = "a cup of hot coffee"
    assert "cup" not in PHRASES and vocabulary.split_style(coffee, PHRASES) == ("", coffee)
    assert vocabulary.split_style("an oil painting of a cup of tea", PHRASES) == ("oil painting", "a cup of tea")


@pytest.mark.parametrize("concept, expected", [
    ("volcano/night", "volcano"), ("volcano", "volcano"), ("campfire/people", "campfire people"), ("/beach", "beach"),
    ("old man with gray hair", "person"), ("snowman", "snowman"),
])  # fmt: skip
def test_the_class_of_a_concept(concept, expected):
    assert vocabulary.concept_class(concept) == expected


def test_names_are_what_captions_call_a_class_without_keywords_articles_and_times():
    assert NAMES["puppy"] == ["dog"] and NAMES["campfire"] == ["campfire alone", "fire"] and NAMES["man"] == ["person"]
    assert NAMES["snowy mountain village"] == ["village"] and "face" not in NAMES and "picture" not in NAMES
    assert not any(" on a white background" in name or name.startswith(("a ", "the ")) for name in NAMES)


def test_the_first_name_counts_and_there_the_longest():
    def concepts(prompt):
        return vocabulary.expected(prompt, NAMES, PHRASES).concepts

    assert concepts("a lion on a mountain") == ("lion",)  # not mountain
    assert concepts("snowy mountain village") == ("village",) and concepts("a snowy mountain") == ("mountain",)
    assert concepts("two wolves") == ("wolf",) and concepts("A DOG!") == ("dog",)
    assert vocabulary.expected("a barista", NAMES, PHRASES) is None


def test_all_thirty_prompts_are_understood():
    """By hand, in the order of PROMPTS: classes, then styles and traits where there are any."""
    person, village, camp = ("person",), ("village",), ("campfire people",)
    expected = [
        ("rocket",), ("pencil",), ("skull",), ("castle",), ("volcano",), ("dog",), (person, (), ("old",)),
        (person, (), ("hat",)), ("campfire alone", "fire"), ("waterfall",), village, camp, (village, ("oil",), ()),
        (camp, ("oil",), ()), (person, ("oil",), ("old",)), (("skull",), ("litho",), ()),
        (("waterfall",), ("litho",), ()), ("coast",), (("rocket",), ("fluent-3d",), ()),
        (("cat",), ("streamline", "toon-head"), ()), (("castle",), ("pencil",), ()), (("lion",), ("water",), ()),
        ("dragon",), (("octopus",), ("oil",), ()), ("lion",), ("penguin",), ("sailboat",), ("astronaut",),
        (person, ("personas",), ("glasses", "beard")), ("lake",),
    ]  # fmt: skip
    for prompt, e in zip(PROMPTS, expected, strict=True):
        whole = Expectation(*e) if isinstance(e[0], tuple) else Expectation(e)
        assert vocabulary.expected(prompt, NAMES, PHRASES) == whole, prompt


# --- what a cascade knows ---------------------------------------------------------------------------------------------


def learned(kind, concept, *captions):
    return {"captions": list(captions), "kind": kind, "concept": concept, "style": "noto"}


LEARNED = [
    learned("sprite", "fox", "an emoji of a fox", "a fox", "fox, animal"),
    learned("sprite", "pancakes", "an emoji of pancakes"),
    learned("sprite", "old man", "an emoji of an old man"),
    learned("people", "bald man with a red beard wearing glasses and a hat", "a bald man"),
    learned("people", "man with a beard", "a man"),
    learned("scene", "fox", "two foxes on the grass at sunset"), learned("scene", "fox", "a fox at night"),
    learned("full", "lake/dawn", "a mountain lake at dawn", "an emoji of a lake"),
]  # fmt: skip


def test_the_collection_by_hand():
    found = vocabulary.collect(LEARNED)
    words = set(found.pop("words"))
    assert found == {
        "things": ["fox", "pancakes"], "people": ["bald man", "man", "old man"],
        "attributes": ["beard", "glasses", "hat", "red beard"], "places": ["at night", "at sunset", "on the grass"],
        "scenes": ["a lake", "a mountain lake"], "styles": {"emoji": ["noto"]},
    }  # fmt: skip
    assert {"fox", "foxes", "animal", "dawn", "photo", "quality"} <= words and "red" not in words  # no caption has it


def test_unknown_words_are_those_that_no_caption_had_in_any_number():
    known = vocabulary.collect(LEARNED)
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
    vocabulary.write([*LEARNED, {"captions": ["a cat"]}], tmp_path)  # a set without kinds, as a folder of files is
    vocabulary.write([{"captions": ["a cat"]}], tmp_path)
    assert not list(tmp_path.iterdir())
    vocabulary.write(LEARNED, tmp_path)
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == vocabulary.collect(LEARNED)
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.json"]
    assert vocabulary.read(tmp_path) == vocabulary.collect(LEARNED)
