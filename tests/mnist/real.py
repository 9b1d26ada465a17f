"""500 real digits, the first 50 of each class in MNIST's training set (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0).

tests/reference/digits.npz holds them as uint8, sorted by class. Here they become Digits, and a folder as torchvision
would have downloaded it.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.mnist.data import Digits

FILE = Path(__file__).parents[1] / "reference" / "digits.npz"


def pixels() -> tuple[np.ndarray, np.ndarray]:
    with np.load(FILE) as file:
        order = np.random.default_rng(0).permutation(500)
        return file["images"][order], file["labels"][order]


def digits() -> Digits:
    """All 500, shuffled: (500, 1, 28, 28) in [0, 1]."""
    x, labels = pixels()
    return Digits(torch.from_numpy(x)[:, None].float() / 255, torch.from_numpy(labels).long())


def write_folder(folder: Path, name: str = "MNIST", train: int = 400) -> Path:
    """400 to train, 100 to test, in the files of MNIST's original format, under torchvision's name of a data set."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    x, labels = pixels()
    for name, part in (("train", slice(train)), ("t10k", slice(train, None))):
        images, classes = x[part], labels[part]
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(classes)) + classes.tobytes())
    return folder


def fails(capsys, main, *argv) -> str:
    """A command ends with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    assert exit_info.value.code == 2
    return capsys.readouterr().err
