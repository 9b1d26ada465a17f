"""Any picture four times as large: stage 2 as a super-resolution network of its own.

    python -m minidiff.upscale small.png "a castle"
    python -m minidiff.upscale photo.jpg "a dog" --model IF-II-M-v1.0 --noise-level 100

The picture is cropped to a square and shrunk to 64x64, noised to --noise-level, and enlarged to 256x256. More noise
lets the network invent more. Writes a strip: 64 pixels, bilinear enlargement, stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minidiff import cli, hub, images
from minidiff.deepfloyd import stages
from minidiff.sampling import seeded


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    p = cli.parser(__doc__, "out/upscale.png")
    p.add_argument("image", type=Path)
    p.add_argument("prompt", nargs="?", default="", help="what the picture shows (default: the empty prompt)")
    p.add_argument("--model", default="mini", help="stage 2: mini, a released name, or a folder (default %(default)s)")
    p.add_argument("--text-model", help="whose text encoder (default: mini, or the released one)")
    p.add_argument("--steps", help="a count, smart27, ... (default: mini 20, others 50)")
    p.add_argument("--guidance-scale", type=float, help="1 is none (default: mini 1, others 4)")
    p.add_argument("--noise-level", type=int, default=stages.NOISE_LEVEL, help="0 to 999 (default %(default)s)")
    cli.add_text_flags(p)
    args = p.parse_args(argv)
    if args.guidance_scale is None:
        args.guidance_scale = 1.0 if args.model == "mini" else 4.0
    clock = cli.Clock()
    images.check_output(args.out)
    low_res = images.load(args.image, 64)
    ts = cli.timesteps(cli.QUICK_STEPS if args.quick else args.steps or ("20" if args.model == "mini" else "50"))
    device, dtype = cli.choose(args)
    folder = hub.resolve(args.model, 2, ("unet",), print)
    text_model = args.text_model or ("mini" if args.model == "mini" else "IF-I-XL-v1.0")
    prompt_embeds, negative = cli.encode(args, text_model, [args.prompt, args.negative_prompt])[:, None]
    stage = stages.load_stage(folder, dtype, device)
    x = stages.sample_super_resolution(
        stage, low_res, prompt_embeds, negative, ts, seeded(args.seed, 1), guidance_scale=args.guidance_scale,
        noise_level=args.noise_level, split_batch=args.split_batch, on_step=cli.progress(len(ts), "256 px"),
    ).cpu()  # fmt: skip
    rows = [[low_res[0], stages.upsample(low_res, x.shape[2:])[0], x[0]]]
    title = f"{args.image.name}: {args.prompt or '(empty prompt)'}"
    cli.finish(args, "upscale", rows, [["64 px", "bilinear", f"stage 2, {len(ts)} steps"]], title, clock)


if __name__ == "__main__":
    main()
