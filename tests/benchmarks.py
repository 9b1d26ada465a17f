"""Seconds and memory of the parts that have no outside peer. Not a test; nothing here is asserted.

    python -m tests.benchmarks unet IF-I-M --dtype float32 --batch 2     one forward, random weights at released size
    python -m tests.benchmarks t5 --layers 24                            T5-XXL streamed from a random file
    python -m tests.benchmarks digits --hidden 128                       training the denoiser against the plain loop
    python -m tests.benchmarks picture                                   the README's picture, cold, in its own process

Weights are random, so only time and memory mean anything. Run on an idle machine; compare only numbers of one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minidiff import checkpoint
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.unet import UNet, UNetConfig
from minidiff.mnist import training
from minidiff.mnist.data import Digits
from minidiff.mnist.train_denoiser import Denoising
from minidiff.mnist.training import Plan
from minidiff.mnist.unet import UNet as UNetOfDigits
from minidiff.mnist.unet import UNetConfig as UNetConfigOfDigits
from tests.deepfloyd.test_unet import RELEASED

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def peak() -> str:
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def seconds(f, repetitions: int = 3) -> str:
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return f"first {times[0]:.2f} s, then {', '.join(f'{t:.2f}' for t in sorted(times[1:]))} s"


@torch.inference_mode()
def unet(name: str, dtype: torch.dtype, batch: int) -> None:
    config = UNetConfig.from_dict(RELEASED[name][0])
    torch.manual_seed(0)
    model = UNet(config).to(dtype).eval()
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    t, embeds = torch.full((batch,), 500), torch.randn(batch, 77, config.encoder_hid_dim)
    labels = t if config.class_embed_type else None
    print(f"{name} {dtype} batch {batch}: {seconds(lambda: model(x, t, embeds, labels))}, {peak()}")


def t5(layers: int) -> None:
    """T5-XXL's shapes with so many layers, float16 with float32 wo, one file per layer as if sharded."""
    spiece = Path(__file__).parent / "reference" / "spiece.model"
    config = T5Config(num_layers=layers)
    with checkpoint.on_meta():
        shapes = {key: value.shape for key, value in T5Encoder(config).state_dict().items()}
    tile = torch.randn(2**20)
    with tempfile.TemporaryDirectory() as folder:
        encoder = Path(folder) / "text_encoder"
        (Path(folder) / "tokenizer").mkdir()
        (Path(folder) / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
        encoder.mkdir()
        (encoder / "config.json").write_text(json.dumps(vars(config) | {"feed_forward_proj": "gated-gelu"}))
        by_layer: dict[int, list[str]] = {}
        for key in shapes:
            by_layer.setdefault(int(key.split(".")[2]) if ".block." in key else 0, []).append(key)
        for layer, keys in by_layer.items():
            state = {}
            for key in keys:
                numbers = tile.repeat(shapes[key].numel() // len(tile) + 1)[: shapes[key].numel()]
                numbers = numbers.view(shapes[key]) * shapes[key][-1] ** -0.5
                state[key] = numbers if key.endswith("wo.weight") else numbers.half()
            checkpoint.save(state, encoder / f"model.fp16-{layer + 1:05d}-of-{layers:05d}.safetensors", {})
        script = (
            "import sys; from pathlib import Path; from tests.benchmarks import checkpoint, peak, seconds;"
            "from minidiff.deepfloyd import text;"
            "e = text.load_text_encoder(Path(sys.argv[1]), checkpoint.default_dtype('cpu'), streamed=True);"
            f"print('T5-XXL, {layers} layers, streamed:', seconds(lambda: e(['a castle']), 2), peak())"
        )
        subprocess.run([sys.executable, "-c", script, folder], check=True)


def digits(hidden: int, batch: int) -> None:
    """Pictures a second of `mnist.training` and of the plain loop in float32, in turns, and the share of a conv's."""
    images = torch.rand(batch, 1, 28, 28)
    both = {"plain": UNetOfDigits(UNetConfigOfDigits(hidden)).train(), "ours": UNetOfDigits(UNetConfigOfDigits(hidden))}
    optimizer = torch.optim.Adam(both["plain"].parameters(), lr=1e-4)

    def plain() -> None:
        loss = F.mse_loss(both["plain"](images + 0.5 * torch.randn_like(images)), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    with FlopCounterMode(display=False) as counter:
        plain()
    with tempfile.TemporaryDirectory() as folder:
        some = Digits(images, torch.zeros(batch, dtype=torch.int64))
        run = training.Run(both["ours"], Denoising(0.5), some, some, Plan(1, batch, 1e-4), Path(folder) / "run")
        both["ours"].train()
        steps = {"plain": plain, "ours": lambda: run.one_step(some, 0).item()}
        found = {name: min(times) for name, times in in_turns(steps).items()}
    x = torch.rand(batch, hidden, 28, 28, dtype=run.dtype)
    weight = torch.rand(hidden, hidden, 3, 3, dtype=run.dtype)
    layouts = [(x.to(memory_format=m), weight.to(memory_format=m)) for m in training.LAYOUTS.values()]
    times = in_turns({str(i): lambda xw=xw: F.conv2d(*xw, padding=1) for i, xw in enumerate(layouts)})
    best = 2 * 9 * hidden * x.numel() / min(t for ts in times.values() for t in ts)
    share, speeds = counter.get_total_flops() / found["ours"] / best, {k: batch / t for k, t in found.items()}
    print(f"D = {hidden}, batch {batch}: plain {speeds['plain']:.1f}, ours {speeds['ours']:.1f} pictures/s, "
          f"ratio {speeds['ours'] / speeds['plain']:.2f}; "
          f"{share:.0%} of a lone convolution's {best / 1e9:.0f} GFLOP/s")  # fmt: skip


def in_turns(jobs: dict[str, Callable[[], object]], repetitions: int = 4) -> dict[str, list[float]]:
    """Seconds of each job, taking turns, the first round left out."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(repetitions + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if i:
                found[name].append(time.perf_counter() - start)
    return found


def picture() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "minidiff.generate", "a snowy mountain village", "--out", f"{folder}/p.png"]
        start = time.perf_counter()
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"{out.splitlines()[-1]}; {time.perf_counter() - start:.1f} s in all, start of Python included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("unet")
    one.add_argument("name", choices=list(RELEASED))
    one.add_argument("--dtype", choices=list(DTYPES), default="float32")
    one.add_argument("--batch", type=int, default=2)
    parts.add_parser("t5").add_argument("--layers", type=int, default=24)
    two = parts.add_parser("digits")
    two.add_argument("--hidden", type=int, default=128)
    two.add_argument("--batch", type=int, default=256)
    parts.add_parser("picture")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.part == "unet":
        unet(args.name, DTYPES[args.dtype], args.batch)
    elif args.part == "t5":
        t5(args.layers)
    elif args.part == "digits":
        digits(args.hidden, args.batch)
    else:
        picture()


if __name__ == "__main__":
    main()
