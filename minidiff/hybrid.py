"""An image that is one thing from afar and another from nearby: hybrid images, and other divided images.

    python -m minidiff.hybrid "a skull" "a waterfall"                         far, near
    python -m minidiff.hybrid "a volcano" "waterfalls" "a campfire" --kind triple
    python -m minidiff.hybrid "a volcano" "a campfire" --kind color           in grey, with colour
    python -m minidiff.hybrid "waterfalls" "a volcano" --kind motion          moving, still
    python -m minidiff.hybrid "waterfalls" "a volcano" --kind scale --weights 0.5 0.5    composition (negative: without)
    python -m minidiff.hybrid "a volcano" --reference photo.png               far is the photo, near is new

Each prompt decides one component of the noise (`components.py`); together they are the whole. With --reference the
first component is taken from an image instead of a prompt, and the prompts are for the others.

Writes the image, a sheet of how it looks from afar (64 and 20 pixels) and of its components, and an animation that
walks away from it (or, for other kinds, from the image to its first component), OUT.gif.

Source: the Factorized Diffusion paper; see `factorized.py`. Sigma 2 and kernel 33, at 64 pixels, are the course's.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff import cli, components, editing, flags, images
from minidiff.cascade import Cascade, Mask
from minidiff.checks import number
from minidiff.factorized import Part, listed
from minidiff.sampling import seeded

KINDS = ("frequency", "triple", "color", "motion", "scale")
FAR = 20  # pixels; what is left of the image across the room
FRAMES = 30


def hybrid(
    cascade: Cascade, prompts: Sequence[str], kind: str = "frequency", seeds: Sequence[int] = (0,), *,
    sigma: float = components.SIGMA, weights: Sequence[float] | None = None, reference: object = None,
    image: object = None, mask: Mask | None = None, i_start: int | None = None, feather: float = 0.0,
    **changes: object,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """An image divided among prompts: (small, large or None), each (B, 3, H, W) in [-1, 1].

    kind: one of KINDS.  sigma: of the low pass, pixels of 64.  weights: of kind "scale", one for each prompt.
    reference: an image whose first component is kept; the prompts are then for the others.
    image, mask, i_start, feather, changes: as for `Cascade.make`.
    Raises ValueError if these do not go together.    Source: the Factorized Diffusion paper.
    """
    prompts, is_edit = listed(prompts), image is not None or mask is not None or i_start is not None or feather != 0
    chosen = divided(len(prompts), kind, sigma, weights, reference is not None, is_edit)
    # The component of a reference needs no prompt: what the network predicts of it is replaced.
    prompts = prompts[:1] * (len(chosen) - len(prompts)) + prompts
    parts = [Part(prompt, component=component) for prompt, component in zip(prompts, chosen)]
    if reference is None:
        return cascade.make(parts, seeds, image=image, mask=mask, i_start=i_start, feather=feather, **changes)
    size, generators = cascade.stage(1).unet.config.sample_size, seeded(seeds)
    keep = editing.reference(images.load(reference, size), chosen[0])
    small = cascade.draw(parts, generators, keep=keep, **changes)
    if not cascade.has_upper:
        return small, None
    keep = editing.reference(images.load(reference, 4 * size), chosen[0])
    return small, cascade.enlarge(small, parts, generators, keep=keep)


def divided(
    prompts: int, kind: str, sigma: float, weights: Sequence[float] | None, has_reference: bool, is_edit: bool
) -> list[components.Component]:
    """The components of so many prompts. is_edit: image, mask or i_start is given. Raises ValueError as `hybrid`."""
    if weights is not None and kind != "scale":
        raise ValueError(f"weights go with kind scale, not {kind}")
    if sigma != components.SIGMA and kind not in ("frequency", "triple"):
        raise ValueError(f"sigma goes with kind frequency and triple, not {kind}")
    number("sigma", sigma, 0)
    if sigma == 0:
        raise ValueError("sigma 0 leaves nothing to the prompts after the first; pass more, such as 2")
    if has_reference and is_edit:
        raise ValueError("a reference says what is kept already; leave out image, mask or box, feather and i_start")
    if isinstance(weights, int | float):
        raise ValueError(f"weights are a list, one for each prompt, got {weights}")
    chosen = components.of_kind(kind, sigma, None if weights is None else list(weights))
    if prompts != (needed := len(chosen) - has_reference):
        raise ValueError(f"{kind}{' with a reference' * has_reference} needs {needed} prompts, got {prompts}")
    return chosen


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    animation = flags.animation_beside(args)
    seeds, mask, cascade = flags.seeds_of(args), args.mask or args.box, flags.load_cascade(args, beside=[animation])
    small, large = hybrid(cascade, args.prompts, args.kind, seeds, sigma=args.sigma, weights=args.weights,
                          reference=args.reference, image=args.image, mask=mask, i_start=args.i_start,
                          feather=args.feather)  # fmt: skip
    results, chosen = list(small if large is None else large), components.of_kind(args.kind, args.sigma, args.weights)
    names = [args.reference.name, *args.prompts] if args.reference else args.prompts
    sizes = {64: "64 px: some steps away", FAR: f"{FAR} px: across the room"}
    sizes = sizes if args.kind in ("frequency", "triple") else {}
    parts = [] if args.kind == "scale" else list(zip(chosen, names))
    rows = [[x, *(_from_afar(x, size) for size in sizes), *(part(x[None])[0] for part, _ in parts)] for x in results]
    texts = [*sizes.values(), *(f"component {k}: {name}" for k, (_, name) in enumerate(parts, 1))]
    labels = [[f"seed {seed}, {results[0].shape[-1]} px", *texts] for seed in seeds]
    title = f"{' / '.join(names)}   [{args.kind}]"
    flags.finish(args, "hybrid", results, seeds, rows, labels, title, cascade)
    images.save_gif(frames(results[0], args.kind, chosen[0]), animation, 0.06)
    print(f"wrote {animation}")


def _from_afar(x: Tensor, size: int) -> Tensor:
    """The image (3, H, H) shrunk to size pixels, shown as large as before."""
    small = F.interpolate(x[None], size, mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic").clamp(-1, 1)[0]


def frames(x: Tensor, kind: str, first: components.Component) -> list[Image.Image]:
    """Walking away from a hybrid of frequencies; of other kinds, fading to the first component and back."""
    image, size = images.to_pil(x), x.shape[-1]

    def at(part: float) -> Image.Image:
        if kind not in ("frequency", "triple"):
            return images.to_pil(torch.lerp(x, first(x[None])[0], part))
        small = round(size * (FAR / size) ** part)
        page, margin = Image.new("RGB", (size, size), "white"), (size - small) // 2
        page.paste(image.resize((small, small), Image.Resampling.BICUBIC), (margin, margin))
        return page

    way = [at(k / (FRAMES - 1)) for k in range(FRAMES)]
    return way + way[::-1]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = flags.parser(__doc__, "out/hybrid.png")
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="one per component: low frequencies first")
    p.add_argument("--kind", choices=KINDS, default="frequency", help="how the image is divided (default %(default)s)")
    p.add_argument("--sigma", type=cli.finite, default=components.SIGMA, help="of the low pass, in pixels of 64 (2)")
    p.add_argument("--weights", type=cli.finite, nargs="+", help="of --kind scale, one per prompt")
    p.add_argument("--reference", type=cli.file_path, metavar="IMAGE", help="an image whose first component is kept")
    flags.add_edit_flags(p)
    args = p.parse_intermixed_args(argv)
    is_edit = any(edit is not None for edit in (args.image, args.mask, args.box, args.i_start))
    divided(len(args.prompts), args.kind, args.sigma, args.weights, args.reference is not None, is_edit)
    return args


if __name__ == "__main__":
    main()
