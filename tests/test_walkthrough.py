"""README and walkthrough say what is true: names and links exist, commands and Python run, library lines are copies."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from minidiff import images
from tests import draw_walkthrough
from tests.draw_walkthrough import ROOT, SOURCE, blocks, commands, help_of, source_of

CHAPTERS = draw_walkthrough.chapters()
PATHS = [ROOT / "README.md", ROOT / "walkthrough.md", *sorted((ROOT / "walkthrough").glob("*.md"))]
every_text = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


@every_text
def test_every_function_named_exists(path):
    for file, name in re.findall(r"`([\w/]+)\.py::([\w.]+)`", path.read_text()):
        module = file if file.split("/")[0] in ("minidiff", "tests") else f"minidiff/{file}"
        try:
            functools.reduce(getattr, name.split("."), importlib.import_module(module.replace("/", ".")))
        except (ImportError, AttributeError) as error:
            pytest.fail(f"{file}.py::{name}: {error}")


def prose(path: Path) -> str:
    """The text without its blocks and without `code`."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL))


@every_text
def test_every_link_leads_to_a_file(path):
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)", prose(path)) if "://" not in link]
    missing = [link for link in linked if not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {', '.join(missing)}"


def test_every_image_opens_belongs_to_a_text_and_all_are_small():
    paths, texts = sorted((ROOT / "walkthrough").glob("*.webp")), "".join(path.read_text() for path in PATHS)
    for path in paths:
        assert f"{path.name})" in texts, f"no text shows {path.name}"
        with Image.open(path) as opened:
            opened.load()
    assert 0 < sum(path.stat().st_size for path in paths) < 4_000_000


@every_text
def test_included_functions_are_the_library_s_own(path):
    text = path.read_text()
    assert draw_walkthrough.with_sources(text) == text, "run python tests/draw_walkthrough.py --sources"
    assert text.count("<!-- source:") == len(SOURCE.findall(text)), "a source comment without a block below"


def test_an_included_function_has_no_docstring_and_begins_at_the_margin(tmp_path, monkeypatch):
    code = ('import a\n\n\nclass Big:\n    """Doc."""\n\n    @property\n    def half(self) -> int:\n        """One\n\n'
            '        two."""\n        return 3  # three\n\n\ndef small():\n'
            '    def inner():\n        "Doc."\n\n        a()\n')  # fmt: skip
    (tmp_path / "some.py").write_text(code)
    monkeypatch.setattr(draw_walkthrough, "ROOT", tmp_path)
    half = "@property\ndef half(self) -> int:\n    return 3  # three"
    assert source_of("some.py::Big.half") == half
    assert source_of("some.py::Big") == "class Big:\n" + re.sub("^", "    ", half, flags=re.MULTILINE)
    assert source_of("some.py::small") == "def small():\n    def inner():\n        a()"
    old = "A\n<!-- source: some.py::Big.half -->\n```python\nx\n```\nB\n```python\ny\n```\n"
    assert draw_walkthrough.with_sources(old) == old.replace("\nx\n", f"\n{half}\n")
    with pytest.raises(ValueError, match="some.py::Big.none: no such function or class; correct the source comment"):
        source_of("some.py::Big.none")


@every_chapter
def test_a_chapter_has_its_parts(path):
    text = path.read_text()
    assert re.match(r"# \d+\. .*\?\n", text), "it begins with a number and a question"
    assert "<!-- source:" in text or re.search(r"^\n    \S", text, re.MULTILINE), "neither formula nor library lines"
    for part in ("\n**Try**", "\n**Exercise.**", "\n<details><summary>Answer</summary>\n\n", "\n\n</details>\n"):
        assert part in text, f"no {part.strip()}"
    long = [line for line in text.splitlines() if len(line) > 120 and line[0] != "|"]
    assert not long, f"more than 120 columns: {long[0]}"


@every_chapter
def test_every_image_has_a_caption_with_its_model_and_seed(path):
    found = re.findall(r"^!\[([^\]]*)\]\(([^)]+)\)\n+(.*?)(?=\n\n|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == path.read_text().count("![")
    for shown, link, caption in found:
        assert shown and re.fullmatch(r"\*[^*].*\*", caption.strip(), re.DOTALL), f"no caption below {link}"
        assert re.search(r"`mini`|weights/mnist/|`out/|`IF-|no model", caption, re.IGNORECASE), f"{link}: no model"
        assert re.search(r"seed|no model", caption, re.IGNORECASE), f"{link}: no seed"


def test_the_contents_page_has_every_chapter_in_order():
    rows = re.findall(r"^\| (\d+) \| \[(.*?)\]\(walkthrough/(\S+)\) \|.*\|.*\|$",
                      (ROOT / "walkthrough.md").read_text(), re.MULTILINE)  # fmt: skip
    assert [int(number) for number, _, _ in rows] == list(range(21))
    questions = {file: f"# {number}. {question}" for number, question, file in rows}
    for path in CHAPTERS:
        assert questions.get(path.name) == path.read_text().partition("\n")[0]
        assert path.name[:2] == f"{int(questions[path.name][2:].partition('.')[0]):02}"


# --- what runs --------------------------------------------------------------------------------------------------------


@every_chapter
def test_every_block_of_a_chapter_runs_and_draws_its_image(path, monkeypatch):
    """By `draw_walkthrough.py NN --quick`, which changes nothing in the repository."""
    def state() -> dict[Path, float]:
        folders = [ROOT, ROOT / "walkthrough", ROOT / "out"]
        return {file: file.stat().st_mtime for folder in folders for file in folder.glob("*") if file.is_file()}

    monkeypatch.chdir(ROOT)
    before = state()
    draw_walkthrough.main([path.name[:2], "--quick"])
    assert state() == before


def test_blocks_know_their_images_and_commands_are_whole():
    text = ("![a](before.webp)\n<!-- source: minidiff/flow.py::euler -->\n```python\nx\n```\n```bash\n# c\n"
            "python -m a \\\n    --b 'c d'   # e\n```\n![a](one.webp)\n\n![b](two.webp)\n```python\ny = 1\n```\n"
            "![c](three.webp)\n```console\nls\n```\n![c](four.webp)\n")  # fmt: skip
    assert [(b.kind, b.images) for b in blocks(text)] == [
        ("", ["before"]), ("bash", ["one", "two"]), ("python", ["three"]), ("console", ["four"])]  # fmt: skip
    assert commands(blocks(text)[1].text) == ["python -m a --b 'c d'"]


def test_what_cannot_be_drawn_says_why(tmp_path, capsys):
    for text, message in (
        ("```bash\nls\n```\n", "ls: not a command of minidiff; use ```console"),
        ("```bash\npython -m minidiff.generate x\n```\n", "pass --out out/NAME.png"),
        ("```python\nx = 1\n```\n![a](some.webp)\n", "the block above some.webp wrote neither out/some-sheet.png"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw_walkthrough.run(text, tmp_path, True)
    with pytest.raises(SystemExit):
        draw_walkthrough.main(["99"])
    assert "no chapter 99; choose from 0" in capsys.readouterr().err


def test_drawn_images_are_between_256_and_900_pixels_wide(tmp_path):
    cell = ("from PIL import Image\nImage.new('RGB', (1800, 90)).save('out/a.png')\n"
            "Image.new('RGB', (100, 50)).save('out/b.png')\nImage.new('RGB', (300, 30)).save('out/b-sheet.png')\n"
            "Image.new('RGB', (64, 32)).save('out/c.png')\n")  # fmt: skip
    chapter = tmp_path / "00-x.md"
    chapter.write_text(f"```python\n{cell}```\n![a](a.webp)\n\n![b](b.webp)\n\n![c](c.webp)\n")
    draw_walkthrough.draw(chapter)
    sizes = [Image.open(tmp_path / f"{name}.webp").size for name in "abc"]
    assert sizes == [(900, 45), (300, 30), (256, 128)]


def test_the_python_of_combining_draws_what_its_command_draws(tmp_path, monkeypatch):
    """With few steps, up to rounding."""
    monkeypatch.chdir(ROOT)
    (path,) = [path for path in CHAPTERS if path.name.startswith("13-")]
    draw_walkthrough.run(path.read_text(), tmp_path, True)
    drawn, expected = images.load(tmp_path / "together-python.png"), images.load(tmp_path / "together.png")
    assert drawn.shape == expected.shape and (drawn - expected).abs().mean() < 0.001


def python_blocks_of_readme() -> list[str]:
    return [block.text for block in blocks((ROOT / "README.md").read_text()) if block.kind == "python"]


def test_readme_knows_how_long_its_files_are():
    """The rows of "Start here": names and lines, within 3 %."""
    rows = re.findall(r"^\| (`[^|]*) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    for names, lines in rows:
        files = re.findall(r"`(?:deepfloyd/)?(\w+\.py)`", names)
        paths = [ROOT / "minidiff" / f for f in files]
        paths = [path if path.exists() else path.parent / "deepfloyd" / path.name for path in paths]
        assert int(lines) == pytest.approx(sum(len(path.read_text().splitlines()) for path in paths), rel=0.03), names


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """Its first block is the door: an image from a prompt, and a cascade for the others. What they write goes to a
    folder of the test's own."""
    monkeypatch.chdir(ROOT)
    assert "Cascade.load" in python_blocks_of_readme()[0], "README begins without the Python door"
    names: dict[str, object] = {}
    with draw_walkthrough.few_steps():
        for block in python_blocks_of_readme():
            exec(block.replace("out/", f"{tmp_path}/"), names)
    assert names["large"].shape == (2, 3, 256, 256)


def commands_of_readme() -> list[str]:
    found = [b.text for b in blocks((ROOT / "README.md").read_text()) if b.kind == "bash"]
    lines = [line for text in found for line in commands(text.replace(" && ", "\n"))]
    return [line for line in lines if line.startswith("python -m minidiff")]


@pytest.mark.parametrize("line", commands_of_readme())
def test_every_command_of_the_readme_is_understood(line, monkeypatch):
    """Its flags exist, take these values, and its input files are there; nothing is drawn."""
    monkeypatch.chdir(ROOT)
    _, _, module, *argv = shlex.split(line)
    known = help_of(module, argv)
    unknown = [word for word in argv if word.startswith("--") and not re.search(rf"{word}\b", known)]
    assert not unknown, f"{module} has no {', '.join(unknown)}"
    missing = [word for word in argv if word.startswith("walkthrough/") and not (ROOT / word).is_file()]
    assert not missing


def test_a_wrong_command_is_found():
    assert len(commands_of_readme()) >= 10
    with pytest.raises(ValueError, match="minidiff.generate refuses x --num-images two"):
        help_of("minidiff.generate", ["x", "--num-images", "two"])
    assert "--nun-images" not in help_of("minidiff.generate", ["x", "--nun-images", "2"])
