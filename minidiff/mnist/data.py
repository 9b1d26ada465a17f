"""MNIST in memory: the whole set as one tensor, and random sources that make training repeatable.

A digit is (1, 28, 28) float32 in [0, 1], as the course has it. There is no loader and no worker: 60,000 digits are
188 MB, so they lie on the device that trains, and a batch is a row of indices. Noise is never stored: each training
step draws its own, from a generator that knows only the seed and the number of the step, so a stopped run can go on
exactly.

Read `flow.py` first. Next: `mnist/unet.py`.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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

    def to(self, device: torch.device) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))

    def of_each_class(self, n: int) -> "Digits":
        """The first n of class 0, then of class 1, ... Raises ValueError if a class has fewer."""
        found = [(self.labels == k).nonzero().flatten()[:n] for k in range(CLASSES)]
        short = [k for k, index in enumerate(found) if len(index) < n]
        if short:
            raise ValueError(f"need {n} of each class, but there are fewer of {short}")
        return self[torch.cat(found)]


def load(folder: str | Path, dataset: str = "mnist", train: bool = True) -> Digits:
    """The 60,000 training or 10,000 test digits, read from folder, or downloaded into it first.

    The files may be packed (.gz) or not, named -idx3-ubyte or .idx3-ubyte, and lie in folder/MNIST/raw, folder/MNIST
    or in folder itself, which may also be the inner one, data/MNIST or data/MNIST/raw.
    Raises ValueError saying what to do if they are neither there nor to be had, or a file is broken.
    """
    name, root = DATASETS[dataset], Path(folder).expanduser()
    if root.absolute().name == name:
        root = root.absolute().parent
    elif root.absolute().parts[-2:] == (name, "raw"):
        root = root.absolute().parent.parent
    part = "train" if train else "t10k"
    kinds = (f"{part}-images", "idx3-ubyte"), (f"{part}-labels", "idx1-ubyte")
    if not all(_find(root, name, *kind) for kind in kinds):
        _download(root, name, [first for first, _ in kinds])
    paths = [_find(root, name, *kind) for kind in kinds]
    images, labels = (_read(path) for path in paths)
    fits = images.shape[1:] == (28, 28) and labels.shape == images.shape[:1] and labels.numel()
    if not fits or labels.max() >= CLASSES:
        raise ValueError(f"{paths[0]} of {tuple(images.shape)} and {paths[1]} of {tuple(labels.shape)} are not "
                         "N digits of 28x28 and N labels 0 to 9; delete both to download them anew")  # fmt: skip
    return Digits(images[:, None].float() / 255, labels.long())


def _find(root: Path, name: str, first: str, last: str) -> Path | None:
    """A file of the set, wherever it lies, whatever stands between its names: "-" or "."."""
    names = [f"{first}{between}{last}{packed}" for packed in ("", ".gz") for between in "-."]
    of_another = set(root.absolute().parts[-2:]) & (set(DATASETS.values()) - {name})
    places = (root / name / "raw", root / name, *(() if of_another else (root,)))
    return next((place / file for place in places for file in names if (place / file).is_file()), None)


def _read(path: Path) -> Tensor:
    """An IDX file of bytes, packed or not: zeros, type 8, number of axes, their lengths (big-endian), the values."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if data[:3] != b"\0\0\x08":
            raise ValueError("it is no IDX file of bytes")
        shape = tuple(np.frombuffer(data, ">u4", data[3], 4).tolist())
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy it here again, or delete this one file, so "
                         "that it is downloaded anew") from error  # fmt: skip


def _download(root: Path, name: str, missing: list[str]) -> None:
    """Fetch the set by torchvision. Raises ValueError with the way out if that fails."""
    import torchvision.datasets  # takes a second, so only where it is needed

    try:
        getattr(torchvision.datasets, name)(str(root), download=True)
    except MemoryError:
        raise
    except Exception as error:  # of many classes: network, disk, mirrors
        why = str(error) or type(error).__name__
        raise ValueError(
            f"no {name} in {root} (no {' or no '.join(missing)}-idx?-ubyte), and none to be had ({why}). On a machine "
            f"with a network run `python -c \"import torchvision; torchvision.datasets.{name}('data', download=True)\"`"
            ", copy the folder `data` here, and pass --data data"
        ) from error


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
    order = torch.randperm(len(digits), generator=generator("cpu", TEST))
    return digits[order[:n].to(digits.labels.device)]
