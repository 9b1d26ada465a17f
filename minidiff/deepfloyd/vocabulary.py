"""What a cascade knows, collected from the captions that it learned: things, people, places, scenes, styles, words.

Read `deepfloyd/captions.py` first. Next: `minidiff/cascade.py`, which warns of words that its model does not know.
"""

import cmd
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from minidiff.checkpoint import read_json, write_json
from minidiff.deepfloyd import captions
from minidiff.deepfloyd.captions import singulars, words_of

WIDTH = 110  # of a listing, in letters


def collect(rows: Sequence[Mapping]) -> dict:
    """{"things", "people", "attributes", "places", "scenes": lists of phrases, "styles": {phrase: styles}, "words"}."""
    phrases, people, attributes, places, scenes = captions.style_phrases(rows), set(), set(), set(), set()
    things = {row["concept"] for row in rows if row["kind"] == "sprite"}
    for row in rows:
        if row["kind"] == "people":
            head, *parts = re.split(r" (?:with|wearing|and) ", row["concept"])
            people.add(head)
            attributes |= {captions.ARTICLE.sub("", part) for part in parts}
        elif row["kind"] in ("scene", "colour"):
            rest = re.sub(r"^e?s(?= )", "", row["captions"][0].partition(row["concept"])[2]).strip()  # of "cats on ..."
            places |= {captions.TIME.sub("", rest), *(f"at {time}" for time in captions.TIME.findall(rest))} - {""}
        elif row["kind"] == "full":
            scenes |= {captions.TIME.sub("", captions.split_style(caption, phrases)[1]) for caption in row["captions"]}
    people |= {concept for concept in things if captions.PERSON.search(concept)}
    words = {word for row in rows for caption in row["captions"] for word in words_of(caption)}
    lists = {"things": things - people, "people": people, "attributes": attributes, "places": places, "scenes": scenes,
             "words": words | set(words_of(" ".join(captions.NEUTRAL)))}  # fmt: skip
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
