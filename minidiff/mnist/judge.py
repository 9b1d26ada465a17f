"""A small classifier that judges samples: are they the right digits, and as varied as real ones?

    python -m minidiff.mnist.judge train
    python -m minidiff.mnist.judge score out/digits.safetensors

`score` reads a file that `minidiff.mnist.sample --tensors` wrote, clamps it to [0, 1] as an image does, and says

    agreement     share of samples that the classifier takes for their class, with its 95 % confidence interval
    balance       share of each class, and the entropy of these shares: ln 10 = 2.303 if all classes are alike
    border        mean of the outermost pixels, a measure of grain: 0.0002 in MNIST's training digits
    Frechet       of more than 64 samples, the distance between samples and training digits, both taken as Gaussians
                  in the 64 features that the classifier decides by. 0 is perfect; real test digits do not reach it.
                  Beside it stands the distance of N test digits drawn at random, or of the nearest two of 100, 1,000,
                  5,000 and 10,000. With equal classes, which samples have, it is 0.40 for 100 test digits of MNIST,
                  0.072 for 1,000 and 0.039 for 8,900

The usual Frechet distance (FID) looks through a network trained on photographs, which says little about digits.
Distances are comparable only if features and N are the same.

Read `mnist/trainer.py` first.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minidiff import checkpoint, training
from minidiff.cli import command, cost, file_path
from minidiff.mnist import models, trainer
from minidiff.mnist.data import CLASSES, Digits
from minidiff.mnist.trainer import Plan, Preset, say
from minidiff.weights import WEIGHTS

EMBEDDED = WEIGHTS / "mnist" / "judge"
FEATURES = 64
LARGEST_SHIFT = 2
LEVEL_SIZES = (100, 1000, 5000, 10000)  # how many test digits the reference levels of `score` are measured on
PRESETS = {"course": Preset(Plan(epochs=8, batch_size=128, lr=2e-3, lr_decay=0.01), None)}
Gaussian = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), float64


class Judge(nn.Module):
    """Digits to 64 features to 10 scores; 70,330 weights."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.body = nn.Sequential(
            block(1, 16, 1), block(16, 32, 2), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1), nn.AvgPool2d(7)
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 1, 28, 28) in [0, 1]. Returns (B, 64)."""
        return self.body(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to LARGEST_SHIFT pixels either way, black comes in from outside."""
    B, _, H, W = images.shape
    dy, dx = torch.randint(0, 2 * LARGEST_SHIFT + 1, (2, B, 1), generator=generator, device=images.device)
    rows = dy + torch.arange(H, device=images.device)  # (B, H)
    columns = dx + torch.arange(W, device=images.device)  # (B, W)
    index = torch.arange(B, device=images.device)[:, None, None]
    return F.pad(images, (LARGEST_SHIFT,) * 4)[:, 0][index, rows[:, :, None], columns[:, None, :]][:, None]


def loss(model: nn.Module, batch: Digits, generator: torch.Generator) -> Tensor:
    """Cross-entropy; in training on shifted images."""
    images = shifted(batch.images, generator) if model.training else batch.images
    return F.cross_entropy(model(images), batch.labels)


@torch.no_grad()
def look(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features of these images, clamped to [0, 1], (N, 64) float64, and the verdicts, (N,).

    Raises ValueError unless they are (N, 1, 28, 28), N at least 1, of finite float32: NaN would count as the digit 0.
    """
    if images.shape[1:] != (1, 28, 28) or images.dtype != torch.float32 or not len(images):
        raise ValueError(f"digits must be (N, 1, 28, 28) of float32, got {tuple(images.shape)} of {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("the digits hold NaN or infinity, which no judge can read; draw them with less guidance")
    judge.eval()
    features = torch.cat([judge.features(x.clamp(0, 1)) for x in images.split(500)])
    return features.cpu().double(), judge.head(features).argmax(1).cpu()


def agreement(verdicts: Tensor, labels: Tensor) -> float:
    """The share of verdicts that are the label."""
    return (verdicts == labels.cpu()).float().mean().item()


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share counted among n independent samples; it stays within 0 to 1.

        (share + z^2 / 2n +- z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z = 1.96

    Source: Wilson interval.
    """
    z = 1.96
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def border(images: Tensor) -> float:
    """The mean of the outermost pixels of images (N, 1, 28, 28), clamped to [0, 1]."""
    x = images.clamp(0, 1)
    return torch.cat([x[..., [0, -1], :].flatten(), x[..., 1:-1, [0, -1]].flatten()]).mean().item()


def entropy(verdicts: Tensor) -> float:
    """-sum p ln p of the classes' shares: 0 if all are one class, ln 10 = 2.303 if all are alike."""
    shares = torch.bincount(verdicts, minlength=CLASSES).double() / len(verdicts)
    return torch.special.entr(shares).sum().item()


def gaussian(features: Tensor) -> Gaussian:
    """That of features (N, D)."""
    return features.double().mean(0), features.double().T.cov()


def frechet(first: Gaussian, second: Gaussian) -> float:
    """The Frechet distance between two Gaussians, squared, as FID has it:

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))

    The product inside is symmetric, so its root is made of the roots of its eigenvalues, and the trace is their sum.
    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions, 1982.
    """
    (m1, c1), (m2, c2) = first, second
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()


def real_distances(features: Tensor, reference: Gaussian) -> dict[str, float]:
    """The Frechet distance of n real test digits for each n of LEVEL_SIZES: the mean over all shuffled parts of n."""
    shuffled = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]
    distances = {}
    for n in (n for n in LEVEL_SIZES if n <= len(features)):
        parts = shuffled[: len(shuffled) // n * n].split(n)
        distances[str(n)] = sum(frechet(gaussian(part), reference) for part in parts) / len(parts)
    return distances


def near(distances: dict[str, float], n: int) -> str:
    """Of `real_distances`: that of n digits, or of the nearest smaller and larger numbers of digits."""
    sizes = sorted(map(int, distances))
    pair = [size for size in sizes if size < n][-1:] + [size for size in sizes if size > n][:1]
    return ", ".join(f"{distances[str(size)]:.3f} for {size}" for size in ([n] if n in sizes else pair))


Loaded = tuple[Judge, dict, Gaussian]  # the config: data set, test accuracy, levels; the Gaussian: of training digits


def load(folder: Path) -> Loaded:
    """A trained judge. Raises ValueError as `models.read`, or if a part is missing."""
    config, tensors = models.read(folder, "judge")
    judge = Judge().eval()
    with checkpoint.blaming(folder, "holds only part of a judge"):
        reference = tensors.pop("feature_mean"), tensors.pop("feature_covariance")
        judge.load_state_dict(tensors)
    return judge, config, reference


def report(loaded: Loaded, images: Tensor, labels: Tensor | None, seed: int, dataset: str) -> list[str]:
    """The lines of `score` about images (N, 1, 28, 28).  labels: (N,), the classes they should be, if any."""
    judge, config, reference = loaded
    if dataset != config["dataset"]:
        return [f"not judged: the judge knows {config['dataset']}, these are of {dataset}; pass another --judge"]
    features, verdicts = look(judge, images)
    shares = torch.bincount(verdicts, minlength=CLASSES) / len(verdicts)
    lines = [f"N = {(n := len(images))}, seeds {seed} to {seed + n - 1}, values clamped to [0, 1]; the judge is right "
             f"about {config['accuracy']:.2%} of test digits"]  # fmt: skip
    if labels is not None:
        if (labels := torch.as_tensor(labels)).shape != images.shape[:1]:
            raise ValueError(f"{n} images need as many labels, got {tuple(labels.shape)}")
        low, high = wilson(share := agreement(verdicts, labels), n)
        lines.append(f"agreement with the class asked for: {share:.2%} (95 % interval {low:.2%} to {high:.2%})")
    lines.append("balance: " + ", ".join(f"{k} {s:.1%}" for k, s in enumerate(shares.tolist()))
                 + f"; entropy {entropy(verdicts):.3f} of 2.303")  # fmt: skip
    lines.append(f"border: {border(images):.4f}, the mean of the outermost pixels (MNIST's training digits: 0.0002)")
    if n > FEATURES:  # a covariance of fewer says nothing
        distance = frechet(gaussian(features), reference)
        lines.append(f"Frechet distance to the training digits, in the judge's {FEATURES} features: {distance:.3f}; "
                     f"of real test digits drawn at random: {near(config['floors'], n)}")  # fmt: skip
    return lines


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train the judge, and keep with it what `score` compares with."""
    digits, test = trainer.digits(args, device)
    torch.manual_seed(args.seed)
    judge, kind = Judge().to(device), {"kind": "judge"}
    if not trainer.fit(args, judge, loss, digits, test, kind):
        return
    features, verdicts = look(judge, test.images)
    accuracy, reference = agreement(verdicts, test.labels), gaussian(look(judge, digits.images)[0])
    distances = real_distances(features, reference)
    config = kind | {"dataset": args.dataset, "accuracy": accuracy, "floors": distances}
    models.write(args.out, judge, config, dict(zip(("feature_mean", "feature_covariance"), reference)))
    say(f"right about {accuracy:.2%} of {len(test)} test digits; Frechet distance of test to training digits: "
        + ", ".join(f"{value:.3f} for {n}" for n, value in distances.items()))  # fmt: skip
    say(f"wrote {args.out}   ({cost()})")


def score(path: Path, folder: Path) -> None:
    """Print the `report` of a file of samples. Raises ValueError if it holds none."""
    try:
        with safe_open(path, "pt") as f:
            tensors, dataset = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()["dataset"]
        images, labels, seed = tensors["images"], tensors.get("labels"), int(tensors["seed"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no samples ({error}); write it with sample --tensors") from error
    print("\n".join(report(load(folder), images, labels, seed, dataset)))


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = p.add_subparsers(dest="part", required=True)
    trainer.add_flags(parts.add_parser("train", help="train a judge"), PRESETS)
    scoring = parts.add_parser("score", help="judge a file of samples")
    scoring.add_argument("file", type=file_path, help="written by `minidiff.mnist.sample --tensors`")
    scoring.add_argument("--judge", type=file_path, default=EMBEDDED, help="default: the embedded one")
    args = p.parse_args(argv)
    if args.part == "score":
        score(args.file, args.judge)
        return
    trainer.complete(args, "judge", PRESETS)
    with training.processes(args.device) as device:
        train(args, device)


if __name__ == "__main__":
    main()
