"""README and walkthrough say what is true: the names in them exist, and their commands run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import minidiff
from minidiff import images

ROOT = Path(minidiff.__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "walkthrough.md")}


@pytest.mark.parametrize("name", TEXTS)
def test_every_function_named_exists(name):
    found = re.findall(r"`([\w/]+)\.py::(\w+)`", TEXTS[name])
    for module, function in found:
        assert hasattr(importlib.import_module("minidiff." + module.replace("/", ".")), function), (module, function)
    assert name == "README.md" or len(found) >= 8


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_and_picture_linked_is_there_and_small(name):
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "://" not in link]
    assert all((ROOT / link).exists() for link in linked), [link for link in linked if not (ROOT / link).exists()]
    pictures = [ROOT / link for link in linked if link.endswith(".webp")]
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.load()
    assert sum(picture.stat().st_size for picture in pictures) < 1_200_000


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXTS["walkthrough.md"], re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_walkthrough_runs(line, tmp_path, monkeypatch):
    """With --quick, one picture or two digits each, and its result in a folder of the test's own."""
    monkeypatch.chdir(ROOT)
    python, _, module, *argv = shlex.split(line)
    assert python == "python"
    argv[argv.index("--out") + 1] = str(tmp_path / "out.png")
    if "--num-images" in argv:
        argv[argv.index("--num-images") + 1] = "1"
    if module == "minidiff.mnist.sample":
        argv += ["--digits", "3,7"]
    importlib.import_module(module).main([*argv, "--quick"])
    with Image.open(tmp_path / "out.png") as opened:
        assert opened.width > 200


def test_the_python_of_the_walkthrough_draws_what_its_command_draws(tmp_path, monkeypatch):
    """With three steps each instead of 27 and 20; inside the box and outside, up to rounding."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["walkthrough.md"], re.DOTALL)
    code = code.replace("respaced(steps)", "respaced(3)").replace("out/together", f"{tmp_path}/together")
    drawn = {}
    exec(code, drawn)
    strips = []
    monkeypatch.setattr(images, "strip", lambda rows, *_: strips.append(rows) or Image.new("RGB", (8, 8)))
    (line,) = [line for line in commands() if "together" in line]
    _, _, module, *argv = shlex.split(line)
    argv[argv.index("--out") + 1] = str(tmp_path / "out.png")
    importlib.import_module(module).main([*argv, "--steps", "3", "--stage2-steps", "3", "--dtype", "float32"])
    assert (drawn["x"][0] - strips[0][0][0]).abs().mean() < 0.01
    assert (tmp_path / "together-python.png").is_file()
