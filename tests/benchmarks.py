"""Seconds and memory of the parts that have no outside peer. Not a test; nothing here is asserted.

    python -m tests.benchmarks unet IF-I-M --dtype float32 --batch 2     one forward, random weights at released size
    python -m tests.benchmarks t5 --layers 24                            T5-XXL streamed from a random file
    python -m tests.benchmarks digits --hidden 128                       training the denoiser against the plain loop
    python -m tests.benchmarks image                                     the README's image, cold, in its own process

Weights are random, so only time and memory mean anything. Run on an idle machine; compare only numbers of one run.
"""

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

from minidiff import checkpoint, training
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.unet import UNet, UNetConfig
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


def digits(hidden: int, batch: int, steps: int = 8) -> None:
    """Images a second of the trainer, and of the plain loop in float32 and in bfloat16, in turns. Then the rate of its
    arithmetic, beside that of one convolution alone (2D to D channels at 28 x 28, forwards and backwards)."""
    device = torch.device("cpu")
    fast = training.fast_dtype(device)
    layout = torch.channels_last if fast == "bfloat16" else torch.contiguous_format
    images = torch.rand(batch, 1, 28, 28)

    def loss(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(network(x + 0.5 * torch.randn_like(x)), x)

    def plain(dtype: str) -> None:
        network = UNetOfDigits(UNetConfigOfDigits(hidden)).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        for _ in range(steps):
            optimizer.zero_grad()
            with training.precision(device, dtype):
                value = loss(network, images)
            value.backward()
            optimizer.step()
            value.item()

    def ours() -> None:
        network = UNetOfDigits(UNetConfigOfDigits(hidden)).to(memory_format=layout)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
        plan = training.Plan(steps, steps, lambda step: 1e-4)
        with tempfile.TemporaryDirectory() as folder:
            for _ in training.run(network, loss, lambda step: images, optimizer, plan, Path(folder) / "run", {}):
                pass

    lone = torch.nn.Conv2d(2 * hidden, hidden, 3, 1, 1).to(memory_format=layout)
    x = torch.rand(batch, 2 * hidden, 28, 28).to(memory_format=layout).requires_grad_()

    def convolution() -> None:
        for _ in range(steps):
            with training.precision(device, fast):
                y = lone(x)
            y.backward(torch.ones_like(y))

    jobs = {"plain float32": lambda: plain("float32"), "plain bfloat16": lambda: plain("bfloat16"), "ours": ours,
            "lone convolution": convolution}  # fmt: skip
    best = {name: batch * steps / min(times) for name, times in in_turns(jobs).items()}
    others = [f"{name} {best[name]:.1f}, ratio {best['ours'] / best[name]:.2f}" for name in list(jobs)[:2]]
    print(f"D = {hidden}, batch {batch}: ours {best['ours']:.1f} images/s in {fast}; {'; '.join(others)}")
    flops = {"ours": flops_of(lambda: loss(UNetOfDigits(UNetConfigOfDigits(hidden)), images).backward()),
             "lone convolution": flops_of(lambda: lone(x).sum().backward())}  # fmt: skip
    rates = {name: best[name] * count / batch for name, count in flops.items()}
    print(*(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()), sep="; ", end="; ")
    print(f"share {rates['ours'] / rates['lone convolution']:.0%}")


def flops_of(job: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


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


def image() -> None:
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
    parts.add_parser("image")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.part == "unet":
        unet(args.name, DTYPES[args.dtype], args.batch)
    elif args.part == "t5":
        t5(args.layers)
    elif args.part == "digits":
        digits(args.hidden, args.batch)
    else:
        image()


if __name__ == "__main__":
    main()
