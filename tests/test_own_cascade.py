"""Training a cascade of one's own: the commands of its chapter run as they are printed, with few steps and images."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import minidiff
from minidiff import images
from minidiff.cascade import Cascade
from minidiff.deepfloyd import initial, train
from minidiff.deepfloyd.dataset import CaptionedImages

CHAPTER = Path(minidiff.__file__).parents[1] / "walkthrough" / "20-train-your-own.md"
TEXT = CHAPTER.read_text(encoding="utf-8")
FEW = {"--steps": "2", "--save-every": "2", "--batch-size": "2"}


def commands() -> list[list[str]]:
    """[module, argument, ...] of every line of the chapter's console block."""
    (block, _) = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = block.replace("\\\n", " ").strip().splitlines()
    assert all(line.startswith("python -m ") for line in lines)
    return [shlex.split(line)[2:] for line in lines]


def shortened(module: str, argv: list[str]) -> list[str]:
    """A training with two steps of two images; a drawing with --quick."""
    if not module.endswith(".train"):
        return [*argv, "--quick"]
    for flag, value in FEW.items():
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    return argv


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> Path:
    """What the chapter's first cell writes, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    cells = re.findall(r"(<!-- source: \S+ -->\n)?```python\n(.*?)```", TEXT, re.DOTALL)
    exec([code for is_source, code in cells if not is_source][0], {})
    return tmp_path / "out" / "shapes"


def test_the_cell_packs_sixty_shapes_and_keeps_ten_apart(shapes):
    """5 colours on 4 others in 3 shapes are 60, every sixth is held out. A corner has the colour of the ground, the
    centre that of the shape."""
    rows = json.loads((shapes / "captions.json").read_text())
    small, large = (np.load(shapes / f"images_{size}.npy") for size in (64, 256))
    assert small.shape == (60, 64, 64, 3) and large.shape == (60, 256, 256, 3)
    assert len({row["captions"][0] for row in rows}) == 60 and [row["split"] for row in rows].count("val") == 10
    assert rows[0]["captions"] == ["a red circle on green"]
    for image, size in ((small[0], 64), (large[0], 256)):
        assert image[0, 0].tolist() == [0, 128, 0] and image[size // 2, size // 2].tolist() == [255, 0, 0]
    assert len(set(CaptionedImages(shapes, 64).held_out()[1])) == 10


def test_the_commands_of_the_chapter_train_a_cascade_that_draws(shapes, monkeypatch):
    """On 8 of its images: 32 pixels, 64 from there, then stage 2; the last command draws 256 pixels."""
    for size in (64, 256):
        np.save(shapes / f"images_{size}.npy", np.load(shapes / f"images_{size}.npy")[:8])
    rows = json.loads((shapes / "captions.json").read_text())[:8]
    (shapes / "captions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(initial, "CONTRASTIVE_BATCH", 4)
    monkeypatch.setattr(train, "preview", lambda *_: None)  # slow, and tested with the trainer
    for module, *argv in commands():
        importlib.import_module(module).main(shortened(module, argv))
    assert images.load("out/shapes-own.png").shape == (1, 3, 256, 256)
    for name, size in (("shapes-32", 32), ("shapes-64", 64)):
        stage = Cascade.load(f"out/{name}", "none", device="cpu").stage(1)
        assert stage.unet.config.sample_size == size and stage.unet.config.block_out_channels == (16, 24, 32, 48)
        header, *errors = Path(f"out/{name}/training/held_out.csv").read_text().splitlines()
        assert header == "step,t,right,other,none" and len(errors) == len(train.EXAMINED)
