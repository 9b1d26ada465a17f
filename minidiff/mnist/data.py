"""MNIST in memory: the whole set as one tensor, and random sources that make training repeatable.

A digit is (1, 28, 28) float32 in [0, 1], as the course has it. There is no loader and no worker: 60,000 digits are 188
MB, so they lie on the device that trains, and a batch is a row of indices. Noise is not stored, but for reflow's pairs:
each training step draws its own, from a generator that knows only the seed and the number of the step, so a stopped run
can go on exactly.

Read `flow.py` first.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.checks import chosen

DATASETS = {"mnist": "MNIST", "fashion": "FashionMNIST"}  # our name -> torchvision's
CLASSES = 10
ORDER, STEP, TEST, FIGURE, NOISES = 0, 1, 2, 9, 10  # what a generator is for


@dataclass(frozen=True)
class Digits:
    """images: (N, 1, 28, 28) float32 in [0, 1].  labels: (N,) int64, 0 to 9.  Both on one device.

    (The pairs of `train_flow.make_pairs` have a second channel: the noise that each digit came from.)
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "Digits":
        return Digits(self.images[index], self.labels[index])

    def of_each_class(self, n: int) -> "Digits":
        """The first n of class 0, then of class 1, ..."""
        return self[torch.cat([(self.labels == k).nonzero().flatten()[:n] for k in range(CLASSES)])]


def load(folder: str | Path, dataset: str = "mnist", train: bool = True, device: torch.device | str = "cpu") -> Digits:
    """The 60,000 training or 10,000 test digits, in folder/MNIST/raw as torchvision puts them; downloaded if missing.

    Raises ValueError saying what to do if they are neither there nor to be had, or a file is broken.
    """
    import torchvision.datasets  # takes a second, so only where it is needed

    root, name = Path(folder).expanduser(), chosen("data set", dataset, DATASETS)
    try:
        files = getattr(torchvision.datasets, name)(root, train, download=True)
    except Exception as error:  # of many classes: network, disk, mirrors, damaged files
        raise ValueError(
            f"no {name} in {root / name / 'raw'}, and none to be had ({error!r}). Delete broken files; on a "
            f"machine with a network run `python -c \"import torchvision; torchvision.datasets.{name}('data', download="
            'True)"`, copy the folder `data` here, and pass --data data'
        ) from error
    return Digits((files.data[:, None].float() / 255).to(device), files.targets.to(device))


def one_hot(labels: Tensor) -> Tensor:
    """(B,) int64 to (B, 10) float; a row of zeros, which is no class at all, is what dropping a label leaves."""
    return torch.nn.functional.one_hot(labels, CLASSES).float()


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A random source for these numbers (seed, purpose, step, ...), unrelated to that for any others.

    It lives on the device: training need not be the same on every machine, only the same again on this one.
    """
    mixed = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))  # 32 bits, which is all that CPU generators read


def some(digits: Digits, n: int) -> Digits:
    """n of them (all, if there are fewer), the same ones every time, drawn from all: MNIST's first half is easier."""
    return digits[torch.randperm(len(digits), generator=generator("cpu", TEST))[:n]]
