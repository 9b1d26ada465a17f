"""One digit that is another when it is turned: anagrams whose success a judge can count.

    python -m minidiff.mnist.anagram 4 7
    python -m minidiff.mnist.anagram 2 5 --view identity flip
    python -m minidiff.mnist.anagram 4 7 --view identity rotate_cw --num-images 100

The same formula as for pictures of prompts (`factorized.py`), with classes for prompts and the DDPM of digits for the
cascade. The judge looks at every sample both ways and counts those that are the first digit one way and the second the
other. Beside it stands the same count for plain samples of the first digit, merely turned: what luck alone would give.

Read `minidiff/anagram.py` and `mnist/train_diffusion.py` first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import images, views
from minidiff.checkpoint import read_config
from minidiff.cli import Clock, command, device_of, file_path, finite, settings
from minidiff.factorized import Part, averaged, factorized
from minidiff.mnist import drawing, judge
from minidiff.mnist.data import CLASSES, one_hot
from minidiff.mnist.unet import UNet
from minidiff.sampling import Prediction, seeded
from minidiff.weights import WEIGHTS

SHOWN = 20  # samples in the picture


def prediction(unet: UNet, digits: Sequence[int], chosen: Sequence[views.View], guidance_scale: float) -> Prediction:
    """The anagram of these digits, each seen through its view, for `sampling.denoise`."""
    parts = [Part(one_hot(torch.tensor([digit]))[:, None], view) for digit, view in zip(digits, chosen)]
    nothing = torch.zeros(1, 1, CLASSES)
    return drawing.with_course_clock(factorized(drawing.as_model(unet), averaged(parts), nothing, guidance_scale))


def aligned(judge_of: judge.Judge, x: Tensor, digits: Sequence[int], chosen: Sequence[views.View]) -> Tensor:
    """Which samples (B, 1, 28, 28) the judge takes for each digit through its view: (B,) bool, all must agree.

    A sample that is not finite is none.
    """
    agrees = [judge.look(judge_of, view.view(x))[1] == digit for digit, view in zip(digits, chosen)]
    return torch.stack([*agrees, x.isfinite().flatten(1).all(1)]).all(0)


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("digits", type=int, nargs="+", help="one for each view")
    p.add_argument("--view", nargs="+", default=["identity", "rotate_180"], help="(default identity rotate_180)")
    p.add_argument("--num-images", type=int, default=100, help="default %(default)s")
    p.add_argument("--guidance-scale", type=finite, default=drawing.GUIDANCE_SCALE, help="default %(default)s")
    p.add_argument("--steps", type=int, default=100, help="of 300 (default %(default)s)")
    p.add_argument("--model", type=file_path, default=WEIGHTS / "mnist" / "ddpm", help="default: the embedded one")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="default: the embedded one")
    p.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digit-anagram.png"), help="default %(default)s")
    p.add_argument("--quick", action="store_true", help="4 steps, 5 pictures: a smoke test")
    args = p.parse_args(argv)
    if len(args.digits) != len(args.view) or not all(0 <= digit < CLASSES for digit in args.digits):
        raise ValueError(f"need one digit 0..9 for each view, got {args.digits} and {args.view}")
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    if args.quick:
        args.steps, args.num_images = 4, 5
    images.check_output(args.out)
    chosen, device, clock = [views.named(name) for name in args.view], device_of(args.device), Clock()
    black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    for view in chosen:
        if (seen := view.view(black_and_white)).min() < 0 or seen.max() > 1:
            raise ValueError(f"{view.name} is for pictures from -1 to 1; digits lie in 0 to 1, and would leave it")
    unet, (judge_of, config, _) = drawing.load(args.model, "ddpm", device), judge.load(args.judge)
    drawn, judged = (c.get("dataset", "mnist") for c in (read_config(args.model), config))
    if drawn != judged:
        raise ValueError(f"{args.model} draws {drawn}, {args.judge} judges {judged}; pass another --judge")
    if not unet.config.num_classes:
        raise ValueError(f"{args.model} is not told the digit; pass one of `train_diffusion --preset class` as --model")
    both = prediction(unet, args.digits, chosen, args.guidance_scale)
    x, alone, starts = [], [], range(0, args.num_images, drawing.at_once(device))
    with tqdm(total=2 * args.steps * len(starts), unit="step") as bar:
        for i in starts:
            n, first = min(drawing.at_once(device), args.num_images - i), args.seed + i
            x.append(drawing.draw_ddpm(both, seeded(first, n), device, args.steps, lambda *_: bar.update()))
            plain = drawing.prediction(unet, torch.full((n,), args.digits[0]), args.guidance_scale)
            alone.append(drawing.draw_ddpm(plain, seeded(first, n), device, args.steps, lambda *_: bar.update()))
    x, alone = torch.cat(x), torch.cat(alone)
    good, lucky = (aligned(judge_of, samples, args.digits, chosen) for samples in (x, alone))
    print(f"{int(good.sum())} of {len(x)} are {' and '.join(map(str, args.digits))} through {', '.join(args.view)}; "
          f"of plain samples of {args.digits[0]}: {int(lucky.sum())}; seeds {args.seed} to {args.seed + len(x) - 1}, "
          f"judge {config['accuracy']:.2%}")  # fmt: skip
    rows = [view.view(x[:SHOWN]) for view in chosen]
    labels = [
        ["" if i else f"{view.name}: {digit}" for i in range(len(rows[0]))] for view, digit in zip(chosen, args.digits)
    ]
    title = f"{int(good.sum())} of {len(x)} succeed in the judge's eyes"
    drawing.save_strip(rows, labels, title, args.out, settings(args, "mnist.anagram"))
    print(f"wrote {args.out}   ({clock})")


if __name__ == "__main__":
    main()
