"""Draws the images of the walkthrough anew, and copies the library's own lines into it.

    python tests/draw_walkthrough.py                run the blocks of every chapter, write its images
    python tests/draw_walkthrough.py 03 06          the same for two chapters
    python tests/draw_walkthrough.py 03 --quick     run them with few steps, write no image: what the tests do
    python tests/draw_walkthrough.py --sources      copy the included functions, and README's table of equations

The blocks of a chapter run in their order: each line of ```bash, each ```python cell without a source comment; all
cells of a chapter share one namespace. The working directory is the repository, and a temporary folder stands in for
out/. An image NAME.webp belongs to the block above it, which writes out/NAME-sheet.png or out/NAME.png.
```console blocks hold trainings, downloads and what needs MNIST. They do not run, and images below them stay.
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from PIL import Image

import minidiff
from minidiff import equations
from minidiff.cascade import Cascade
from minidiff.flags import QUICK_STEPS

ROOT = Path(minidiff.__file__).parents[1]
WIDEST, SMALLEST = 900, 256  # pixels: wider images shrink, narrower ones grow by a whole factor
FENCE = r"^```(\w*)\n(.*?)^```$"
SOURCE = re.compile(r"^<!-- source: (\S+) -->\n```python\n.*?^```$", re.MULTILINE | re.DOTALL)
PIECE = re.compile(rf"{SOURCE.pattern}|{FENCE}|^!\[[^\]]*\]\(([\w-]+)\.webp\)", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """kind: bash, python, console ...  images: the names of the images that stand below it."""

    kind: str
    text: str
    images: list[str]


def chapters() -> list[Path]:
    """walkthrough/00-denoiser-by-hand.md and all that follow."""
    return sorted((ROOT / "walkthrough").glob("[0-9][0-9]-*.md"))


def blocks(text: str) -> list[Block]:
    """The blocks of a chapter in their order, without the included functions."""
    found = [Block("", "", [])]
    for source, kind, body, image in PIECE.findall(text):
        if image:
            found[-1].images.append(image)
        elif not source:
            found.append(Block(kind, body, []))
    return found


def commands(text: str) -> list[str]:
    """The lines of a ```bash block, those that a backslash continues joined, without comments."""
    lines = [shlex.join(shlex.split(line, comments=True)) for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def source_of(where: str) -> str:
    """The lines of minidiff/file.py::name or ::Class.method, dedented, without docstrings.

    Raises ValueError if there is none such.
    """
    file, _, name = where.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{where}: no such function or class; correct the source comment")
    lines = dict(enumerate(text.splitlines(), 1))
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            docstring = inner.body[0]
            behind = docstring.end_lineno + 1
            for i in range(docstring.lineno, behind + (lines.get(behind) == "")):
                del lines[i]
    first = min(n.lineno for n in [node, *node.decorator_list])
    return textwrap.dedent("\n".join(line for i, line in lines.items() if first <= i <= node.end_lineno))


def with_sources(text: str) -> str:
    """The text with every included function as the library has it."""
    return SOURCE.sub(lambda m: f"<!-- source: {m[1]} -->\n```python\n{source_of(m[1])}\n```", text)


def with_equations(readme: str) -> str:
    """README with the table of `minidiff.equations` between its two markers."""
    head, start, rest = readme.partition("<!-- equations -->\n")
    _, end, tail = rest.partition("<!-- /equations -->")
    return f"{head}{start}{equations.markdown()}\n{end}{tail}"


def help_of(module: str, argv: Sequence[str] = ()) -> str:
    """What a command says to these arguments and --help.    Raises ValueError if it refuses one of them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(module).main([*argv, "--help"])
    except SystemExit as end:
        if end.code:
            raise ValueError(f"{module} refuses {shlex.join(argv)}: {said.getvalue()}") from None
    return said.getvalue()


def few(module: str, argv: list[str], known: str) -> list[str]:
    """The arguments with --quick, if the command knows it; one image, two digits, the first of several seeds."""
    argv = list(argv)
    if "--num-images" in argv:
        argv[argv.index("--num-images") + 1] = "1"
    if "--seed" in argv:
        first = argv.index("--seed") + 2
        while first < len(argv) and argv[first].isdigit():
            del argv[first]
    argv += ["--digits", "3,7"] if module == "minidiff.mnist.sample" else []
    return [*argv, "--quick"] if "--quick" in known else argv


def run_command(line: str, out: Path, quick: bool) -> None:
    """Run one line in this process; its results go to the folder out.

    Raises ValueError unless it is a command of minidiff and writes below out/.
    """
    if not line.startswith("python -m minidiff."):
        raise ValueError(f"{line}: not a command of minidiff; use ```console for what does not run here")
    _, _, module, *argv = shlex.split(line)
    known = help_of(module, argv)
    if "--out " in known and not ("--out" in argv and argv[argv.index("--out") + 1].startswith("out/")):
        raise ValueError(f"{line}: pass --out out/NAME.png")
    argv = [re.sub(r"^out/", f"{out}/", word) for word in argv]
    importlib.import_module(module).main(few(module, argv, known) if quick else argv)


def few_steps() -> contextlib.AbstractContextManager:
    """`Cascade.load` gives cascades with as many steps at each stage as --quick takes."""
    load = Cascade.load

    def quick(*arguments: object, **options: object) -> Cascade:
        cascade = load(*arguments, **options)
        cascade.settings[:] = (settings.but(steps=QUICK_STEPS) for settings in cascade.settings)
        return cascade

    return mock.patch.object(Cascade, "load", quick)


def run(text: str, out: Path, quick: bool) -> dict[str, Path]:
    """Run the blocks of a chapter: {name: file} of the images that they drew in the folder out.

    Raises ValueError if an image stands below a block that did not draw it.
    """
    namespace, drawn = {"__name__": "walkthrough"}, {}
    with few_steps() if quick else contextlib.nullcontext():
        for block in blocks(text):
            if block.kind == "bash":
                for line in commands(block.text):
                    run_command(line, out, quick)
            elif block.kind == "python":
                exec(re.sub(r"(?<![\w/.])out/", f"{out}/", block.text), namespace)
            for name in block.images if block.kind in ("bash", "python") else ():
                files = [out / f"{name}-sheet.png", out / f"{name}.png"]
                drawn[name] = next((file for file in files if file.is_file()), None)
                if drawn[name] is None:
                    raise ValueError(f"the block above {name}.webp wrote neither out/{name}-sheet.png nor {name}.png")
    return drawn


def to_webp(file: Path, target: Path) -> None:
    """At most WIDEST pixels wide; what is narrower than SMALLEST is enlarged, its pixels kept."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    factor = max(1, SMALLEST // image.width)
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.save(target, quality=85, method=6)


def draw(chapter: Path, quick: bool = False) -> None:
    """Run a chapter in a temporary folder; unless quick, its images go where the chapter looks for them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, file in run(chapter.read_text(encoding="utf-8"), Path(folder), quick).items():
            if not quick:
                to_webp(file, chapter.with_name(f"{name}.webp"))
                print(f"wrote {chapter.with_name(name)}.webp")


def copy_sources() -> None:
    """Write every included function, and README's table of equations, as they are now."""
    changes = {path: with_sources for path in (ROOT / "walkthrough").glob("*.md")}
    for path, change in (changes | {ROOT / "README.md": with_equations}).items():
        text = path.read_text(encoding="utf-8")
        if change(text) != text:
            path.write_text(change(text), encoding="utf-8")
            print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("chapters", nargs="*", metavar="NN", help="numbers of chapters (default: all)")
    p.add_argument("--quick", action="store_true", help="few steps, one image; writes nothing into the repository")
    p.add_argument("--sources", action="store_true", help="copy the included functions; draws nothing")
    args = p.parse_args(argv)
    os.chdir(ROOT)
    if args.sources:
        return copy_sources()
    known = {path.name[:2]: path for path in chapters()}
    for number in args.chapters or known:
        if number not in known:
            p.error(f"no chapter {number}; choose from {', '.join(known)}")
        draw(known[number], args.quick)


if __name__ == "__main__":
    main()
