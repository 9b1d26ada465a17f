"""Encode prompts once, into a small file that the commands that draw read with --prompt-embeds.

    python -m minidiff.encode "a volcano" "waterfalls" --out embeds.safetensors
    python -m minidiff.encode "a volcano" --model IF-I-XL-v1.0 --text-encoder streamed --out embeds.safetensors

The empty prompt, which guidance needs, is always added. A .safetensors file holds (N, 77, D) states, the prompts, and
the fingerprint of the encoder that made them; a .pth file is the dictionary {prompt: (1, 77, D)} of the course.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minidiff import cli, images, weights
from minidiff.cascade import TEXT_ENCODERS
from minidiff.deepfloyd import text


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    p.add_argument("--model", default="mini", help="whose text encoder (default %(default)s)")
    p.add_argument("--out", type=cli.file_path, default=Path("out/embeds.safetensors"), help="default %(default)s")
    args = cli.add_machine_flags(p).parse_intermixed_args(argv)
    images.check_output(args.out, known=(".safetensors", ".pth"))
    texts = list(dict.fromkeys([*args.prompts, ""]))
    device, streamed = cli.device_of(args.device), TEXT_ENCODERS[args.text_encoder]
    folder = weights.resolve(args.model, 1, ("text_encoder",), print)
    embeds = text.load_text_encoder(folder, cli.DTYPES[args.dtype], device, streamed)(texts).cpu()
    text.write_embeds(args.out, texts, embeds, text.fingerprint(folder))
    print(f"wrote {args.out}: {len(texts)} prompts, {tuple(embeds.shape)} {embeds.dtype}\n{cli.cost()}")


if __name__ == "__main__":
    main()
