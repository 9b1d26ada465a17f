"""Every equation of the package: its formula, the function that computes it, its test, its chapter.

    python -m minidiff.equations                    the table, in reading order
    python -m minidiff.equations "DDPM Eq. 7"       one equation in full, with the arithmetic of its test

A docstring gives its formula indented under its first sentence, and the tag either behind "Source:" or at the end of
the formula's own line. The table is read from these docstrings, from tests/test_equations.py and from the chapters in
walkthrough/; where the last two are not installed, it has three columns.
"""

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import minidiff

HERE = Path(__file__).parent
ORDER = re.findall(r"^    ([\w/]+)\.py ", minidiff.__doc__, re.MULTILINE)  # the files, as one reads them
TESTS, WALKTHROUGH = HERE.parent / "tests" / "test_equations.py", HERE.parent / "walkthrough"
KEYS = (
    "Attention Is All You Need", "CLIP", "DDIM", "DDPM", "DPM-Solver++", "Dormand-Prince", "FFJORD", "FM",
    "Factorized Diffusion", "FiLM", "Frechet distance", "GEGLU", "GLIDE", "Imagen", "Min-SNR", "Neural ODE",
    "Progressive Distillation", "RePaint", "Rectified Flow", "SDEdit", "T5", "Visual Anagrams", "Wilson interval",
    "iDDPM", "simple diffusion",
)  # fmt: skip
TAG = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, KEYS))})(?: (?:Eq|Sec|Alg)\. \d+(?:\.\d+)*|(?!\w))")
LONGEST = 120  # characters of a formula in the table


class Row(NamedTuple):
    """One equation. home: file.py::name, below minidiff/.  test: its name in tests/test_equations.py, or "".

    chapter: of the walkthrough, "-" if none names the tag, "" without the walkthrough.  docstring, worked: in full.
    """

    tag: str
    formula: str
    home: str
    test: str
    chapter: str
    docstring: str
    worked: str


def rows() -> list[Row]:
    """All equations in reading order. One tag has several rows where several functions compute parts of it."""
    found, tests, chapters = [], _tests(), _chapters()
    for file in ORDER:
        for node, docstring in _documented(HERE / f"{file}.py"):
            for tag, formula in _formulas(docstring).items():
                chapter = chapters.get(tag, "-" if chapters else "")
                of_tag = tests.get(tag, [("", "", ())])  # one that uses this function, or else the first
                test, worked, _ = min(of_tag, key=lambda test: node.name not in test[2])
                found.append(Row(tag, formula, f"{file}.py::{node.name}", test, chapter, docstring, worked))
    return found


def _documented(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """(node, docstring) of the functions and classes of a file, in its order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            yield node, ast.get_docstring(node)


def _formulas(docstring: str) -> dict[str, str]:
    """{tag: formula}: the lines that end in the tag; for a tag behind "Source:", the lines that end in none."""
    tagged, plain = {}, []
    for line in re.findall(r"^    +(\S.*)", docstring, re.MULTILINE):
        formula, tags = re.fullmatch(rf"(.*?)((?:(?: {{2,}}|, ){TAG.pattern})*)", line).groups()
        formula = re.sub(r"(?<!,) {4,}.*", "", formula)  # a remark beside the formula
        for tag in TAG.findall(tags):
            tagged.setdefault(tag, []).append(formula)
        plain += [] if tags else [formula]
    behind = TAG.findall(docstring.partition("Source:")[2]) if plain else []
    together = {tag: plain for tag in behind} | tagged
    joined = {tag: re.sub(r" +", " ", "; ".join(lines)) for tag, lines in together.items()}
    return {tag: text.replace("; +", " +").replace(",;", ",") for tag, text in joined.items()}


def _tests() -> dict[str, list[tuple[str, str, set[str]]]]:
    """{tag: (name, docstring, names it uses) of every test whose docstring begins with the tag}."""
    found = {}
    for node, docstring in _documented(TESTS) if TESTS.is_file() else ():
        if node.name.startswith("test_"):
            used = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node)}
            for tag in TAG.findall(docstring.partition(":")[0]):
                found.setdefault(tag, []).append((node.name, docstring, used))
    return found


def _chapters() -> dict[str, str]:
    """{tag: the first chapter that names it}, where walkthrough/02-walk.md is chapter 2."""
    paths = sorted(WALKTHROUGH.glob("[0-9][0-9]-*.md"), reverse=True)
    return {tag: str(int(path.name[:2])) for path in paths for tag in TAG.findall(path.read_text(encoding="utf-8"))}


def table() -> list[list[str]]:
    """The head and the rows as cells, formulas cut to LONGEST; without the columns that no row fills."""
    cells = [Row._fields[:5], *((row.tag, _shortened(row.formula), *row[2:5]) for row in rows())]
    return [list(row) for row in zip(*(column for column in zip(*cells) if any(column[1:])))]


def _shortened(formula: str) -> str:
    """Whole, or cut behind its last whole line that fits, or else between two words."""
    if len(formula) <= LONGEST:
        return formula
    start = formula[: LONGEST - 4]
    return (start.rpartition("; ")[0] or start.rpartition(" ")[0]) + " ..."


def markdown() -> str:
    """The table for README, from its head to its last row."""
    head, *body = table()
    lines = [head, ["---"] * len(head)]
    for tag, formula, home, *rest in body:
        code = [f"`{cell}`" for cell in (formula.replace("|", "\\|"), home, *rest[:1])]
        lines.append([tag, *code, *rest[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_full(tag: str) -> str:
    """Everything about one equation. Raises ValueError with the list of tags if there is none such."""
    found = [row for row in rows() if re.sub(r"\s", "", row.tag.lower()) == re.sub(r"\s", "", tag.lower())]
    if not found:
        known = ", ".join(dict.fromkeys(row.tag for row in rows()))
        raise ValueError(f"no equation {tag!r}; choose from {known}")
    parts = []
    for row in found:
        chapter = f"    walkthrough, chapter {row.chapter}" if row.chapter.isdigit() else ""
        parts += [f"{row.tag}    minidiff/{row.home}{chapter}", row.docstring]
        parts += [f"tests/test_equations.py::{row.test}", row.worked] if row.test else []
    return "\n\n".join(dict.fromkeys(parts))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show(text: str) -> None:
    """Print it; a pipe that closes ends that quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it fails no second time


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tag", nargs="?", help='one equation in full, such as "DDPM Eq. 7"')
    tag = p.parse_args(argv).tag
    try:
        show(in_full(tag) if tag else columns(table()))
    except ValueError as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
