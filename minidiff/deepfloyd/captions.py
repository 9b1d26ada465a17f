"""What captions say of images, and what an image of a prompt must show: style, thing, and the traits of a person.

Each row is an object of captions.json: {"captions": [...], "kind", "concept", "style", "place"}. The kinds are sprite
(a thing alone), people (a portrait), colour and scene (either of them on a plain color, or in a place), full (a
landscape) and style (any of these through a filter).
Read `deepfloyd/tokenizer.py` first. Next: `deepfloyd/vocabulary.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from minidiff.deepfloyd.tokenizer import clean

NEUTRAL = ["a high quality photo", "a high quality picture"]  # what a landscape may be called, too
PERSON = re.compile(r"\b(man|woman|boy|girl|person)\b")
PERSON_CLASS = "person"
TRAITS = {"hat": ("hat", "cap", "beanie", "turban"), "glasses": ("glasses", "sunglasses"),
          "beard": ("beard", "goatee"), "old": ("old", "elderly")}  # fmt: skip
ARTICLE = re.compile(r"^(an?|the) ")
TIME = re.compile(r"(?<=\w) at (night|sunset|dawn)$")
HOURS = ("day", "night", "dawn", "sunset", "overcast")  # variants of a landscape that are one class


def words_of(text: str) -> list[str]:
    """Its words in lower case: "A 3D t-rex, please!" has 3d, t-rex and please."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", clean(text))


def singulars(word: str) -> list[str]:
    """The word, and what it may be the plural of: foxes, foxe, fox; berries, berrie, berri, berry."""
    endings = {"s": "", "es": "", "ies": "y", "ves": "f"}
    return [word] + [word.removesuffix(end) + new for end, new in endings.items() if word.endswith(end)]


def style_phrases(rows: Iterable[Mapping]) -> dict[str, list[str]]:
    """What stands before "of": {"oil painting": ["oil"], "cartoon": ["streamline", "toon-head"], "picture": []}.
    A phrase counts if the concept follows it, as in "a cartoon of a cat", not in "a cup of hot coffee". A phrase of
    more than two styles is of any, and its list is empty."""
    styles: dict[str, set[str]] = {}
    for row in rows:
        for caption in row["captions"]:
            phrase, _, rest = caption.partition(" of ")
            if row["concept"] in rest and "," not in phrase:
                styles.setdefault(ARTICLE.sub("", phrase), set()).add(row["style"])
    return {phrase: sorted(s) if len(s) <= 2 else [] for phrase, s in sorted(styles.items())}


def split_style(text: str, phrases: Mapping[str, list[str]]) -> tuple[str, str]:
    """("oil painting", "a dog") of "an oil painting of a dog"; ("", text) where no style comes first."""
    phrase, _, rest = text.partition(" of ")
    phrase = ARTICLE.sub("", phrase)
    return (phrase, rest) if phrase in phrases and rest else ("", text)


@dataclass(frozen=True)
class Expectation:
    """Concepts and styles of which one must be there (no style: any will do), and traits that must all be there."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()


Pair = tuple[Expectation, Expectation]  # a judge's answer, and what is expected of the image


def concept_class(concept: str) -> str:
    """The judge's class: "volcano" of "volcano/night", "campfire people" of "campfire/people", "beach" of "/beach"."""
    head, _, rest = concept.partition("/")
    if PERSON.search(concept):
        return PERSON_CLASS
    return head if head and rest in ("", *HOURS) else f"{head} {rest}".strip()


def class_names(rows: Sequence[Mapping], phrases: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """What captions call each class: {"puppy": ["dog"], "campfire": ["campfire alone", "fire"], ...}, no article."""
    names: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "people":
            texts = [re.split(" (?:with|wearing) ", row["concept"])[0]]
        elif row["kind"] in ("sprite", "full"):
            texts = [split_style(caption, phrases)[1] for caption in row["captions"] if "," not in caption]
        else:
            continue
        for text in texts:
            text = TIME.sub("", text.removesuffix(" on a white background"))
            names.setdefault(" ".join(words_of(ARTICLE.sub("", text))), set()).add(concept_class(row["concept"]))
    return {name: sorted(classes) for name, classes in sorted(names.items())}


def expected(prompt: str, names: Mapping[str, list[str]], phrases: Mapping[str, list[str]]) -> Expectation | None:
    """What an image of this prompt must show: its style phrase, then the first name in it, the longest one there.
    names: from `class_names`.  phrases: from `style_phrases`.  None if the prompt has none of the names."""
    phrase, text = split_style(" ".join(words_of(prompt)), phrases)
    words = words_of(text)
    for start in range(len(words)):
        for stop in range(len(words), start, -1):
            for last in singulars(words[stop - 1]):
                concepts = names.get(" ".join([*words[start : stop - 1], last]))
                if concepts:
                    return Expectation(tuple(concepts), tuple(phrases.get(phrase, ())), traits_in(words, concepts))
    return None


def traits_in(words: Sequence[str], concepts: Sequence[str]) -> tuple[str, ...]:
    """The traits that these words name, if the concepts include a person."""
    if PERSON_CLASS not in concepts:
        return ()
    return tuple(trait for trait, signs in TRAITS.items() if not set(signs).isdisjoint(words))


def agreement(answer: Expectation, expectation: Expectation) -> tuple[bool, bool]:
    """Are (concept and traits, style) of a judge's answer what is expected?"""
    concept = answer.concepts[0] in expectation.concepts and set(expectation.traits) <= set(answer.traits)
    return concept, not expectation.styles or answer.styles[0] in expectation.styles


def shares(pairs: Sequence[Pair]) -> dict[str, float]:
    """{"concept", "style", "both"}: which share of the pairs agrees. Where no style is expected, it counts for "both"
    as right, and for "style" not at all."""
    right = [agreement(*pair) for pair in pairs]
    styles = [style for (_, style), (_, expectation) in zip(right, pairs) if expectation.styles]
    kinds = {"concept": [concept for concept, _ in right], "style": styles, "both": [all(pair) for pair in right]}
    return {name: sum(values) / max(len(values), 1) for name, values in kinds.items()}


def floor(pairs: Sequence[Pair]) -> dict[str, float]:
    """The shares when each answer is held against all other expectations: what images reach that ignore the prompt."""
    return shares([(answer, other) for answer, e in pairs for _, other in pairs if other != e])
