"""README and walkthrough say what is true: the names in them exist, and their commands and their Python run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import minidiff
from minidiff import images
from minidiff.cascade import Cascade

ROOT = Path(minidiff.__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "walkthrough.md")}


@pytest.mark.parametrize("name", TEXTS)
def test_every_function_named_exists(name):
    found = re.findall(r"`([\w/]+)\.py::(\w+)`", TEXTS[name])
    for module, function in found:
        assert hasattr(importlib.import_module("minidiff." + module.replace("/", ".")), function), (module, function)
    assert name == "README.md" or len(found) >= 8


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_and_image_linked_is_there_and_small(name):
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "://" not in link]
    assert all((ROOT / link).exists() for link in linked), [link for link in linked if not (ROOT / link).exists()]
    paths = [ROOT / link for link in linked if link.endswith(".webp")]
    for path in paths:
        with Image.open(path) as opened:
            opened.load()
    assert sum(path.stat().st_size for path in paths) < 4_000_000


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS["walkthrough.md"], re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


def one_seed(argv: list[str]) -> list[str]:
    """The same flags with the first of several seeds."""
    if "--seed" not in argv:
        return argv
    first = argv.index("--seed") + 2
    rest = next((i for i in range(first, len(argv)) if not argv[i].isdigit()), len(argv))
    return argv[:first] + argv[rest:]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_walkthrough_runs(line, tmp_path, monkeypatch):
    """With --quick, one image or two digits each, and its results in a folder of the test's own."""
    monkeypatch.chdir(ROOT)
    python, _, module, *argv = shlex.split(line)
    assert python == "python"
    argv[argv.index("--out") + 1] = str(tmp_path / "out.png")
    if "--num-images" in argv:
        argv[argv.index("--num-images") + 1] = "1"
    if module == "minidiff.mnist.sample":
        argv += ["--digits", "3,7"]
    importlib.import_module(module).main([*one_seed(argv), "--quick"])
    widths = []
    for path in tmp_path.glob("out*.png"):  # images, and the sheet
        with Image.open(path) as opened:
            widths.append(opened.width)
    assert max(widths) > 200


@pytest.fixture
def quick_mini(monkeypatch):
    """Cascade.load as it is, with three steps at each stage."""
    load = Cascade.load

    def quick(*args, **options):
        cascade = load(*args, **options)
        cascade.settings[:] = (settings._replace(steps=3) for settings in cascade.settings)
        return cascade

    monkeypatch.setattr(Cascade, "load", quick)
    monkeypatch.chdir(ROOT)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, quick_mini):
    """Its first block is the door: an image from a prompt. Whatever it writes goes to a folder of the test's own."""
    blocks = python_blocks("README.md")
    assert blocks and "Cascade.load" in blocks[0], "README begins without the Python door"
    for block in blocks:
        exec(block.replace("out/", f"{tmp_path}/"), {})


def test_the_python_of_the_walkthrough_draws_what_its_command_draws(tmp_path, quick_mini):
    """The image that it writes to out/together-python.png, with three steps at each stage, up to rounding."""
    (code,) = python_blocks("walkthrough.md")
    exec(code.replace("out/together", f"{tmp_path}/together"), {})
    (line,) = [line for line in commands() if "together" in line]
    _, _, module, *argv = shlex.split(line)
    argv[argv.index("--out") + 1] = str(tmp_path / "out.png")
    importlib.import_module(module).main([*argv, "--steps", "3", "--stage2-steps", "3"])
    drawn, expected = images.load(tmp_path / "together-python.png"), images.load(tmp_path / "out.png")
    assert drawn.shape == expected.shape and (drawn - expected).abs().mean() < 0.001
