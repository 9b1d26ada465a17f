"""One digit that is another when it is turned: anagrams whose success a judge can count.

    python -m minidiff.mnist.anagram 4 7
    python -m minidiff.mnist.anagram 2 5 --view identity flip
    python -m minidiff.mnist.anagram 4 7 --view identity rotate_cw --num-images 100

The same formula as for images of prompts (`factorized.py`), with classes for prompts and the DDPM of digits for the
cascade. The judge looks at every sample both ways and counts those that are the first digit one way and the second the
other. Beside it stands the same count for plain samples of the first digit: what luck alone gives.

Read `minidiff/anagram.py` and `mnist/sample.py` first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff import images, views
from minidiff.cli import command, cost, device_of, file_path, finite, settings
from minidiff.factorized import Part, averaged, factorized
from minidiff.mnist import judge, models
from minidiff.mnist.data import CLASSES, one_hot
from minidiff.mnist.unet import UNet
from minidiff.weights import WEIGHTS

IN_FIGURE = 20  # samples


def answer(unet: UNet, digits: Sequence[int], turned: Sequence[views.View], guidance_scale: float) -> models.Answer:
    """The anagram of these digits, each through its view, for `models.walk`."""
    parts = [Part(one_hot(torch.tensor([digit]))[:, None], view) for digit, view in zip(digits, turned, strict=True)]
    return factorized(models.as_model(unet), averaged(*parts), torch.zeros(1, 1, CLASSES), guidance_scale)


def aligned(judge_of: judge.Judge, x: Tensor, digits: Sequence[int], turned: Sequence[views.View]) -> Tensor:
    """Which samples (B, 1, 28, 28) the judge takes for each digit through its view: (B,) bool, all must agree."""
    return torch.stack([judge.look(judge_of, view.view(x))[1] == k for k, view in zip(digits, turned)]).all(0)


def load(
    folder: Path, judge_folder: Path, digits: Sequence[int], names: Sequence[str], device: torch.device
) -> tuple[UNet, judge.Judge, list[views.View]]:
    """The network, the judge, and the views of these names.

    Raises ValueError if there is not one digit for each view, a view would leave 0 to 1, the network takes no digit, or
    the judge knows another data set.
    """
    turned = [views.named(name) for name in names]
    values = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 28, 28)
    results = [view.view(values) for view in turned]
    if len(digits) != len(names) or not all(x.min() >= 0 and x.max() <= 1 for x in results):
        raise ValueError(f"need one digit for each view, and views that leave values in 0 to 1, got {digits}, {names}")
    (unet, config), (judge_of, judges, _) = models.load(folder, device, "ddpm"), judge.load(judge_folder)
    if not unet.config.num_classes or config["dataset"] != judges["dataset"]:
        raise ValueError(f"{folder} must take a digit (`train_diffusion --preset class`) and draw what {judge_folder} "
                         f"judges, {judges['dataset']}; pass another --model or --judge")  # fmt: skip
    return unet, judge_of, turned


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("digits", type=int, nargs="+", choices=range(CLASSES), help="one for each view")
    p.add_argument("--view", nargs="+", default=["identity", "rotate_180"], help="(default identity rotate_180)")
    p.add_argument("--num-images", type=int, default=100, help="default %(default)s")
    p.add_argument("--guidance-scale", type=finite, default=models.GUIDANCE_SCALE, help="default %(default)s")
    p.add_argument("--steps", type=int, default=100, help="of 300 (default %(default)s)")
    samplers = models.SAMPLERS["ddpm"]
    p.add_argument("--sampler", choices=samplers, default=samplers[0], help="default %(default)s")
    p.add_argument("--model", type=file_path, default=WEIGHTS / "mnist" / "ddpm", help="default: the embedded one")
    p.add_argument("--judge", type=file_path, default=judge.EMBEDDED, help="default: the embedded one")
    p.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--out", type=file_path, default=Path("out/digit-anagram.png"), help="default %(default)s")
    p.add_argument("--quick", action="store_true", help="4 steps, 5 images: a smoke test")
    args = p.parse_args(argv)
    if args.quick:
        args.steps, args.num_images = 4, 5
    images.check_output(args.out)
    device = device_of(args.device)
    unet, judge_of, turned = load(args.model, args.judge, args.digits, args.view, device)
    both = answer(unet, args.digits, turned, args.guidance_scale)
    plain = models.guided_unet(unet, torch.tensor(args.digits[:1]), args.guidance_scale)
    seeds = range(args.seed, args.seed + args.num_images)
    x, alone = (models.draw(lambda _, a=a: a, seeds, device, args.steps, args.sampler) for a in (both, plain))
    good, lucky = (aligned(judge_of, samples, args.digits, turned) for samples in (x, alone))
    print(f"{int(good.sum())} of {len(x)} are {' and '.join(map(str, args.digits))} through {', '.join(args.view)}; "
          f"of plain samples of {args.digits[0]}: {int(lucky.sum())}; seeds from {args.seed} on")  # fmt: skip
    rows = [view.view(x[:IN_FIGURE]) for view in turned]
    names = (f"{view.name}: {digit}" for view, digit in zip(turned, args.digits))
    labels = [[name] + [""] * (len(row) - 1) for name, row in zip(names, rows)]
    title = f"{int(good.sum())} of {len(x)} succeed in the judge's eyes"
    images.save(models.strip(rows, labels, title), args.out, settings(args, "mnist.anagram"))
    print(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
