"""What captions and prompts say: style, thing, traits of a person; and what a cascade learned of them, word by word.

Each row is an object of captions.json, and describes one image:

    {"captions": ["an oil painting of an erupting volcano"], "kind": "style", "concept": "volcano/day", "style": "oil"}

    kind      sprite: a thing alone, people: a portrait, colour: one of these on a plain color, scene: one in a place,
              full: a landscape, style: any of these through a filter
    concept   what is shown; of a landscape also its hour
    class     what the judge tells apart: one for "volcano/day" and "volcano/night", one for all people
    name      what captions call a class: "erupting volcano" and "volcano with lava and smoke" for "volcano"
    phrase    what captions call a style, before "of": "oil painting" for "oil"
Read `deepfloyd/tokenizer.py` first.
"""

import cmd
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minidiff.checkpoint import read_json, write_json
from minidiff.deepfloyd.tokenizer import clean

WIDTH = 110  # of a listing, in letters
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


def collect(rows: Sequence[Mapping]) -> dict:
    """{"things", "people", "attributes", "places", "scenes": lists of phrases, "styles": {phrase: styles}, "words"}."""
    phrases, people, attributes, places, scenes = style_phrases(rows), set(), set(), set(), set()
    things = {row["concept"] for row in rows if row["kind"] == "sprite"}
    for row in rows:
        if row["kind"] == "people":
            head, *parts = re.split(r" (?:with|wearing|and) ", row["concept"])
            people.add(head)
            attributes |= {ARTICLE.sub("", part) for part in parts}
        elif row["kind"] in ("scene", "colour"):
            rest = re.sub(r"^e?s(?= )", "", row["captions"][0].partition(row["concept"])[2]).strip()  # of "cats on ..."
            places |= {TIME.sub("", rest), *(f"at {time}" for time in TIME.findall(rest))} - {""}
        elif row["kind"] == "full":
            scenes |= {TIME.sub("", split_style(caption, phrases)[1]) for caption in row["captions"]}
    people |= {concept for concept in things if PERSON.search(concept)}
    words = {word for row in rows for caption in row["captions"] for word in words_of(caption)}
    lists = {"things": things - people, "people": people, "attributes": attributes, "places": places, "scenes": scenes,
             "words": words | set(words_of(" ".join(NEUTRAL)))}  # fmt: skip
    return {name: sorted(entries) for name, entries in lists.items()} | {"styles": phrases}


def write(rows: Sequence[Mapping], folder: Path) -> None:
    """The collection as vocabulary.json, if all rows name their "kind", "concept" and "style"; else nothing."""
    if all({"kind", "concept", "style"} <= row.keys() for row in rows):
        write_json(folder / "vocabulary.json", collect(rows))


def read(folder: Path) -> dict | None:
    """What `write` wrote into a model's folder; None if there is nothing. Raises WeightsError if it is broken."""
    path = folder / "vocabulary.json"
    return read_json(path) if path.is_file() else None


def unknown_words(prompt: str, vocabulary: Mapping) -> list[str]:
    """The words of the prompt that no caption had, each once. A plural is known with its singular, and the reverse."""
    known = set(vocabulary["words"])
    return [word for word in dict.fromkeys(words_of(prompt)) if known.isdisjoint([*singulars(word), f"{word}s"])]


def listing(vocabulary: Mapping) -> str:
    """All of it but the words, for a terminal of WIDTH letters: things in columns, attributes by what they are of."""
    nouns: dict[str, list[str]] = {}
    for attribute in vocabulary["attributes"]:
        kind, _, noun = attribute.rpartition(" ")
        nouns.setdefault(noun, []).extend([kind] if kind else [])
    grouped = [f"{noun} ({', '.join(kinds)})" if kinds else noun for noun, kinds in sorted(nouns.items())]
    columns = io.StringIO()
    cmd.Cmd(stdout=columns).columnize(vocabulary["things"], WIDTH - 2)
    lines = ["things", *(f"  {line}".rstrip() for line in columns.getvalue().splitlines())]
    for kind in filter(vocabulary.get, ("people", "attributes", "places", "scenes", "styles")):
        text = f"{kind}: " + ", ".join(grouped if kind == "attributes" else vocabulary[kind])
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


# --------------------------------------------------------------------------- what an image of a prompt must show


@dataclass(frozen=True)
class Expectation:
    """Concepts and styles of which one must be there (no style: any will do), and traits that must all be there."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()


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
