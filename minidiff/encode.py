"""Encode prompts once, into a small file that the commands on pictures read with --prompt-embeds.

    python -m minidiff.encode "a rocket ship" "a pencil" --out embeds.safetensors
    python -m minidiff.encode "a rocket ship" --model IF-I-XL-v1.0 --text-encoder streamed --out embeds.safetensors

The empty prompt, which guidance needs, is always added. The file holds (N, 77, D) states, the prompts, and the
fingerprint of the encoder that made them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minidiff import cli, images, weights
from minidiff.cascade import encode
from minidiff.deepfloyd.text import fingerprint, write_embeds


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    p.add_argument("--model", default="mini", help="whose text encoder (default %(default)s)")
    p.add_argument("--text-encoder", choices=["auto", "whole", "streamed"], default="auto",
                   help="streamed: half a block in memory at a time; auto: if free memory is short")  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default %(default)s)")
    p.add_argument("--dtype", choices=["auto", *cli.DTYPES], default="auto", help="precision to compute in")
    p.add_argument("--out", type=Path, default=Path("out/embeds.safetensors"), help="default %(default)s")
    args = p.parse_intermixed_args(argv)
    args.prompt_embeds = None
    clock = cli.Clock()
    images.check_output(args.out, known=(".safetensors", ".pth", ".pt"))
    texts = list(dict.fromkeys([*args.prompts, ""]))
    embeds = encode(args, args.model, texts)
    folder = weights.resolve(args.model, 1, ("text_encoder",))
    write_embeds(args.out, texts, embeds, fingerprint(folder))
    print(f"wrote {args.out}: {len(texts)} prompts, {tuple(embeds.shape)} {embeds.dtype}   ({clock})")


if __name__ == "__main__":
    main()
