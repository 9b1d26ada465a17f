"""What captions say: style phrases, names and classes on rows written by hand, and what the thirty prompts expect."""

import pytest

from minidiff.deepfloyd import captions
from minidiff.deepfloyd.captions import Expectation
from minidiff.deepfloyd.judge import PROMPTS


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
PHRASES = captions.style_phrases(ROWS)
NAMES = captions.class_names(ROWS, PHRASES)


def test_words_and_singulars_by_hand():
    assert captions.words_of(" A 3D t-rex, please! ") == ["a", "3d", "t-rex", "please"]
    assert captions.singulars("foxes") == ["foxes", "foxe", "fox"] and captions.singulars("dog") == ["dog"]
    assert "berry" in captions.singulars("berries") and "wolf" in captions.singulars("wolves")


def test_a_style_phrase_stands_before_the_concept_and_names_at_most_two_styles():
    assert PHRASES["oil painting"] == ["oil"] and PHRASES["cartoon"] == ["streamline", "toon-head"]
    assert PHRASES["picture"] == []  # noto, twemoji, streamline, fluent-3d
    assert "cup" not in PHRASES and captions.split_style("a cup of hot coffee", PHRASES) == ("", "a cup of hot coffee")
    assert captions.split_style("an oil painting of a cup of tea", PHRASES) == ("oil painting", "a cup of tea")


@pytest.mark.parametrize("concept, expected", [
    ("volcano/night", "volcano"), ("volcano", "volcano"), ("campfire/people", "campfire people"), ("/beach", "beach"),
    ("old man with gray hair", "person"), ("snowman", "snowman"),
])  # fmt: skip
def test_the_class_of_a_concept(concept, expected):
    assert captions.concept_class(concept) == expected


def test_names_are_what_captions_call_a_class_without_keywords_articles_and_times():
    assert NAMES["puppy"] == ["dog"] and NAMES["campfire"] == ["campfire alone", "fire"] and NAMES["man"] == ["person"]
    assert NAMES["snowy mountain village"] == ["village"] and "face" not in NAMES and "picture" not in NAMES
    assert not any(" on a white background" in name or name.startswith(("a ", "the ")) for name in NAMES)


def test_the_first_name_counts_and_there_the_longest():
    def concepts(prompt):
        return captions.expected(prompt, NAMES, PHRASES).concepts

    assert concepts("a lion on a mountain") == ("lion",)  # not mountain
    assert concepts("snowy mountain village") == ("village",) and concepts("a snowy mountain") == ("mountain",)
    assert concepts("two wolves") == ("wolf",) and concepts("A DOG!") == ("dog",)
    assert captions.expected("a barista", NAMES, PHRASES) is None


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
        assert captions.expected(prompt, NAMES, PHRASES) == whole, prompt


def test_agreement_shares_and_floor_by_hand():
    cat, oil_dog = Expectation(("cat",)), Expectation(("dog",), ("oil",))
    old_man = Expectation(("person",), (), ("old",))
    assert captions.agreement(Expectation(("cat",), ("noto",)), cat) == (True, True)
    assert captions.agreement(Expectation(("dog",), ("noto",)), oil_dog) == (True, False)
    assert captions.agreement(Expectation(("person",), ("noto",), ("hat",)), old_man) == (False, True)
    assert captions.agreement(Expectation(("person",), ("noto",), ("hat", "old")), old_man) == (True, True)
    answers = [Expectation(("cat",), ("oil",)), Expectation(("dog",), ("noto",)), Expectation(("dog",), ("oil",))]
    expectations = [cat, oil_dog, oil_dog]
    pairs = list(zip(answers, expectations))
    # right: cat; dog but no oil; both
    assert captions.shares(pairs) == {"concept": 1, "style": 0.5, "both": 2 / 3}
    # cat against oil_dog twice (style right, concept not), the dogs against cat (concept wrong, no style expected)
    assert captions.floor(pairs) == {"concept": 0, "style": 1, "both": 0}
