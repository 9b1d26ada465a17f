"""Train a stage of the cascade on captioned images, on one device or several.

    python -m minidiff.deepfloyd.train 1 IMAGES --out out/IF-I
    python -m minidiff.deepfloyd.train 2 IMAGES --out out/IF-II --text-encoder out/IF-I
    torchrun --nproc-per-node 2 -m minidiff.deepfloyd.train 1 IMAGES --out out/IF-I

Stage 1 learns the text encoder and the 64x64 UNet together. Stage 2 learns from crops: 64x64 out of the 256x256 image,
beside the same crop of its noised small version, with the text encoder of stage 1 frozen. It must end with whole images
(--size 256): its norms take their means over all that they see, and it draws whole images. --out gets the layout of the
released repositories and loads like them; it holds the averaged weights (EMA).

IMAGES is a folder with either image files, each beside a .txt of the same name with one caption a line (UTF-8), or
packed: images_64.npy and images_256.npy, uint8 (N, size, size, 3), and captions.json, a list of N objects
{"captions": [...], "weight": how often to draw it (1), "split": "val" if it is never to be drawn}.

--out/training holds the state of the run (`training.py`), samples/ and, at stage 1, held_out.csv: what a prompt is
worth on images that are never drawn. The same command goes on from the last checkpoint, to the same numbers; more
--steps go further.
Read `training.py`, `deepfloyd/dataset.py` and `deepfloyd/initial.py` first.
Source: DDPM Alg. 1; iDDPM Eq. 16; Imagen Sec. 2.4 (noise conditioning); Min-SNR Sec. 3.4 (times drawn);
Progressive Distillation Sec. 4 (loss weight SNR + 1); simple diffusion Sec. 3.2 (errors of areas).
"""

import argparse
import contextlib
import functools
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, cli, ddpm, images, training
from minidiff.cascade import Cascade
from minidiff.deepfloyd import initial, stages, vocabulary
from minidiff.deepfloyd.dataset import CPU, CaptionedImages, train_tokenizer
from minidiff.deepfloyd.t5 import T5Encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import FIXED, MIRROR, UNet
from minidiff.factorized import Part
from minidiff.schedule import Schedule, squaredcos_cap_v2

SIZES, LARGE = {1: (32, 64), 2: (64, 256)}, 256  # pixels a side to train each stage on; LARGE: a whole image
EMA_DECAY, FALL = 0.999, 0.6  # of the averaged weights; the last part of a run, in which the learning rate falls
MIN_SNR_GAMMA, OFFSET_NOISE = 5.0, 0.1
MIN_SHARE = 0.4  # how often times below 169 are drawn, compared with those from 261 on
COARSE = (16, 64)  # pixels a side of the areas whose mean errors stage 2 pays for
MAX_WEIGHT = 100.0
VARIANCE_SHARE, MAX_BOUND_WEIGHT = 0.02, 40.0  # of the bound, which trains the variance, in the loss
COLUMNS = ("step", "t", "right", "other", "none")  # of held_out.csv
LOG_EVERY = 20  # steps whose mean loss is a row of loss.csv
EXAMINED = (300, 600, 800, 950)  # times at which the held-out error is measured
PREVIEWS = 16  # prompts that are drawn after a checkpoint


class Trainee(nn.Module):
    """What is optimised: a UNet, and in stage 1 its text encoder. forward is the loss, so that DDP can wrap it.

        weight = min(1 / alpha_bar_t, MAX_WEIGHT) on L_simple: SNR + 1 on the error of x_start

    Source: Progressive Distillation Sec. 4.
    """

    def __init__(self, stage: int, unet: UNet, text_encoder: T5Encoder, schedule: Schedule):
        super().__init__()
        self.unet, self.schedule, self.stage = unet, schedule, stage
        self.text_encoder = text_encoder if stage == 1 else None
        self.frozen = [] if stage == 1 else [text_encoder.requires_grad_(False)]  # in a list: not a submodule

    def forward(self, x_start: Tensor, ids: Tensor, mask: Tensor, random: dict[str, Tensor]) -> Tensor:
        """One loss per image, (B,). random: noise, t and, for stage 2, low_noise, level, top, left."""
        labels = None
        if self.stage == 2:
            x_start, low_res, labels = self.crop(x_start, random)
        t, noise = random["t"], random["noise"]
        alpha_bar = self.schedule.alpha_bar(t)
        x_t = ddpm.add_noise(x_start, noise, alpha_bar)
        with _fast_attention(x_start.device):
            prompt_embeds = (self.text_encoder or self.frozen[0])(ids, mask)
            stacked = x_t if self.stage == 1 else torch.cat([x_t, low_res], dim=1)
            out = self.unet(stacked, t.to(x_t.device), prompt_embeds, labels)
        eps, pred_var = out.float().chunk(2, dim=1)
        # Where nearly all is noise, a small error in eps is a large one in the image, and there the prompt decides:
        # weighted by 1 / alpha_bar (a v-prediction's loss), cut at MAX_WEIGHT.
        weight = (1 / alpha_bar).clamp(max=MAX_WEIGHT).flatten().float().to(x_start.device)
        bound_weight = variance_weight(self.schedule, t).to(x_start.device)
        value = ddpm.loss(self.schedule, x_start, noise, t, eps, pred_var, weight, bound_weight)
        return value if self.stage == 1 else value + weight * coarse_loss(noise - eps)

    def crop(self, x_start: Tensor, random: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 256, 256) -> the crop to learn, the same crop of the noised small image, and its noise level."""
        low_res = stages.upsample(F.avg_pool2d(x_start, 4), x_start.shape[2:])
        alpha_bar = self.schedule.alpha_bar(random["level"])
        low_res = ddpm.add_noise(low_res, random["low_noise"], alpha_bar)
        both = torch.cat([x_start, low_res], dim=1)
        corners = zip(random["top"].tolist(), random["left"].tolist())
        side = random["noise"].shape[-1]
        both = torch.stack([x[:, y : y + side, z : z + side] for x, (y, z) in zip(both, corners)])
        return both[:, :3], both[:, 3:], random["level"].to(both.device)


def coarse_loss(error: Tensor) -> Tensor:
    """What the errors of whole areas cost on top of the loss, (B,). error: noise - eps, (B, 3, H, W).

        L_coarse = sum over s in COARSE of mean |D_s(error)|^2,    D_s: the mean of each s x s area

    In a mean over pixels the wrong color of an area costs no more than fine grain as strong. But later steps take grain
    away, and keep the color: the network reads it off x_t. This does not move the lowest point of the loss.
    Source: simple diffusion Sec. 3.2.
    """
    return sum(F.avg_pool2d(error, side).square().mean((1, 2, 3)) for side in COARSE)


def variance_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """The weight of the bound at times t, (B,). With it a misplaced variance costs as much at one time as at another.

        bound_weight = min(VARIANCE_SHARE / log(beta_t / beta_tilde_t)^2, MAX_BOUND_WEIGHT)

    In one step of 1,000 the two limits of the variance nearly touch, and the bound hardly tells where between them the
    variance belongs: at t = 38 it changes by at most 0.0007 bit. In a walk of few steps the limits lie far apart, and a
    variance in the wrong place is grain. The weight does not move the lowest point of the bound.
    """
    alpha_bar_t, alpha_bar_prev = (schedule.alpha_bar(s).flatten() for s in (t, t - 1))
    lower = ddpm.posterior_variance(alpha_bar_t, alpha_bar_prev).clamp(min=1e-20)
    distance = ((1 - alpha_bar_t / alpha_bar_prev) / lower).log()
    return (VARIANCE_SHARE / distance.square()).clamp(max=MAX_BOUND_WEIGHT).float()


def _fast_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, attention written out: the backward pass of the fused one takes a fifth of a step longer."""
    cpu = device.type == "cpu"
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if cpu else contextlib.nullcontext()


def random_numbers(
    stage: int, batch_size: int, size: int, schedule: Schedule, generator: torch.Generator,
    device: torch.device = CPU,
) -> dict[str, Tensor]:  # fmt: skip
    """Every random choice of one step except the images: the noise on the device, single numbers on the CPU.
    size: pixels a side of what is learned, for stage 2 of the crop.

        P(t) ~ max(MIN_SHARE, min(1, MIN_SNR_GAMMA / SNR_t)),    SNR_t = alpha_bar_t / (1 - alpha_bar_t)

    Where an image is nearly clean there is less left to learn, yet every walk ends there, and noise that is left there
    stays in the image. Drawing by a weight is the same in the mean as multiplying the loss by it.

    Stage 2 gets offset noise, OFFSET_NOISE of one more number for each color of an image. Without it the network reads
    the mean color off x_t, where it is clear at t = 946 already. But a walk begins at t = 999 with an estimate that is
    a guess, and would keep the color of that guess. With it the network reads the color off the small image.
    Source: Min-SNR Sec. 3.4; Guttenberg, Diffusion with Offset Noise (2023).
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    share = (MIN_SNR_GAMMA / snr).clamp(min=MIN_SHARE, max=1)
    t = torch.multinomial(share, batch_size, replacement=True, generator=generator)
    there = generator if device.type == "cpu" else torch.Generator(device).manual_seed(generator.initial_seed())

    def below(high: int) -> Tensor:
        return torch.randint(high, (batch_size,), generator=generator)

    def normal(side: int) -> Tensor:
        return torch.randn(batch_size, 3, side, side, generator=there, device=device)

    random = {"t": t, "noise": normal(size)}
    if stage == 2:
        random |= {"level": below(schedule.num_train_timesteps)}
        random |= {"top": below(LARGE - size + 1), "left": below(LARGE - size + 1)}
        random["low_noise"] = normal(LARGE)
        random["noise"] += OFFSET_NOISE * normal(1)
    return random


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm up over 200 steps, stay, and fall linearly to 0 over the last FALL of the run."""
    return peak * min(1, (step + 1) / 200, (total - step) / (total * FALL))


def write_folder(out: Path, model: Trainee) -> None:
    """The weights as float16 in the released layout, with their configs."""
    process = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    unet = model.unet.config
    up = [MIRROR[kind] for kind in reversed(unet.down_block_types)]
    derived = {"_class_name": "UNet2DConditionModel", "up_block_types": up, "encoder_hid_dim_type": "text_proj"}
    checkpoint.write_json(out / "unet" / "config.json", FIXED | asdict(unet) | derived)
    _write_half(model.unet, out / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    checkpoint.write_json(out / "scheduler" / "scheduler_config.json", process | {
        "variance_type": "learned_range", "prediction_type": "epsilon", "thresholding": True, "clip_sample": True,
        "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5 if model.stage == 1 else 1.0,
    })  # fmt: skip
    if model.stage == 2:
        checkpoint.write_json(out / "image_noising_scheduler" / "scheduler_config.json", process)
        return
    kind = {"model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu"}
    checkpoint.write_json(out / "text_encoder" / "config.json", asdict(model.text_encoder.config) | kind)
    _write_half(model.text_encoder, out / "text_encoder" / "model.fp16.safetensors")


def _write_half(module: nn.Module, path: Path) -> None:
    """As in the released float16 files, the last matrix of T5's feed-forward stays float32."""
    half = {k: v if k.endswith(".wo.weight") else v.half() for k, v in module.state_dict().items()}
    checkpoint.save(half, path, {"format": "pt"})


def tokenizer_of(args: argparse.Namespace, dataset: CaptionedImages) -> Tokenizer:
    """The tokenizer in the text encoder's folder; stage 1 copies that of --start-from there, or trains one."""
    spiece = (args.out if args.stage == 1 else args.text_encoder) / "tokenizer" / "spiece.model"
    if args.stage == 1 and training.rank() == 0 and not spiece.is_file():
        if args.start_from:
            source = args.start_from / "tokenizer" / "spiece.model"
            Tokenizer(source)  # raises if it is none
            checkpoint.write_whole(spiece, lambda file: shutil.copy(source, file))
        else:
            train_tokenizer(dataset.captions, spiece, initial.MINI_T5.vocab_size)
    training.barrier()
    return Tokenizer(spiece)


@torch.inference_mode()
def examine(model: Trainee, tokenizer: Tokenizer, x_start: Tensor, texts: list[str]) -> list[tuple]:
    """A prompt's worth: (t, error with the right prompt, with another image's, with none) for EXAMINED times.

    The error is the mean squared difference between x_start (N, 3, H, W) and its estimate, clipped, with one noise for
    all. Stage 1 only.
    """
    device, rows = x_start.device, []
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).to(device)
    columns = (texts, texts[1:] + texts[:1], [""] * len(texts))
    states = [model.text_encoder(*(x.to(device) for x in tokenizer(column))) for column in columns]
    for time in EXAMINED:
        t = torch.full((len(x_start),), time, device=device)
        alpha_bar, errors = model.schedule.alpha_bar(t), []
        x_t = ddpm.add_noise(x_start, noise, alpha_bar)
        for embeds in states:
            out = torch.cat([model.unet(*part) for part in zip(x_t.split(32), t.split(32), embeds.split(32))])
            estimate = ddpm.predict_x_start(x_t, out.float()[:, :3], alpha_bar).clamp(-1, 1)
            errors.append((estimate - x_start).square().mean().item())
        rows.append((time, *errors))
    return rows


def preview(out: Path, stage: int, path: Path, text_encoder: Path | None, dataset: CaptionedImages) -> None:
    """Samples of the weights just written: captions of held-out images drawn, or two training images enlarged."""
    if stage == 1:
        texts = dataset.held_out()[1]
        prompts = texts[:: math.ceil(len(texts) / PREVIEWS)]
        cascade, seeds = Cascade.load(str(out), "none", dtype=torch.float32), range(len(prompts))
        x = cascade.draw([Part(torch.cat(cascade.encode(*prompts)))], seeds, steps=20, guidance_scale=4.0)
        sheet = images.sheet(*images.grid(list(x), prompts))
    else:
        cascade = Cascade.load("none", str(out), text_model=str(text_encoder), dtype=torch.float32)
        x_start, texts = dataset.draw(2, torch.Generator().manual_seed(1))
        low_res = F.avg_pool2d(x_start, 4)
        x = cascade.enlarge(low_res, [Part(torch.cat(cascade.encode(*texts)))], range(2), steps=10)
        rows = [[stages.upsample(low_res, (256, 256))[i], x[i], x_start[i]] for i in range(2)]
        sheet = images.sheet(rows, [["bilinear", "stage 2", "original"]] * 2)
    images.save(sheet, path, {"minidiff": "sheet"})


def train(args: argparse.Namespace, device: torch.device) -> None:
    """To --steps; weights, samples and the held-out error after every checkpoint."""
    dataset, folder = CaptionedImages(args.images, 64 if args.stage == 1 else LARGE, device), args.out / "training"
    settings = {name: getattr(args, name) for name in ("stage", "batch_size", "lr", "seed", "size", "mirror")}
    training.previous(folder, settings)  # raises before the work
    tokenizer = tokenizer_of(args, dataset)
    if args.stage == 1 and training.rank() == 0:
        vocabulary.write(dataset.rows, args.out)
    networks = initial.first_networks(args, tokenizer, dataset, device)
    model = Trainee(args.stage, *networks, squaredcos_cap_v2()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    plan = training.Plan(args.steps, args.save_every, lambda step: learning_rate(step, args.steps, args.lr), LOG_EVERY,
                         EMA_DECAY, clip=1.0)  # fmt: skip
    tokens = functools.cache(lambda text: tokenizer([text]))  # each caption comes hundreds of times

    def pooled(x_start: Tensor) -> Tensor:  # --size: a quarter of the pixels costs a quarter, and still holds at 64
        return x_start if args.stage == 2 else F.avg_pool2d(x_start, x_start.shape[-1] // args.size)

    def batch_at(step: int) -> tuple:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 1024 + training.rank())
        x_start, texts = dataset.draw(args.batch_size // training.world(), generator, mirror=args.mirror)
        random = random_numbers(args.stage, len(x_start), args.size, model.schedule, generator, device)
        ids, mask = (torch.cat(x).to(device) for x in zip(*map(tokens, texts)))
        return pooled(x_start), ids, mask, random

    for record in training.run(model, lambda net, batch: net(*batch).mean(), batch_at, optimizer, plan, folder,
                               settings, dtype=args.dtype):  # fmt: skip
        tqdm.write(str(record))
        write_folder(args.out, model)
        samples = folder / "samples" / f"step-{record.step:07d}.png"
        if record.stopped or samples.is_file():
            continue
        if args.stage == 1:
            x_start, texts = dataset.held_out()
            with training.precision(device, record.dtype):
                rows = examine(model, tokenizer, pooled(x_start), texts)
            training.add_rows(folder / "held_out.csv", COLUMNS, [(record.step, *row) for row in rows])
            tqdm.write("held-out error with the right prompt / another / none: "
                       + ", ".join(f"t {t}: {a:.4f} / {b:.4f} / {c:.4f}" for t, a, b, c in rows))  # fmt: skip
        preview(args.out, args.stage, samples, args.text_encoder, dataset)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=int, choices=(1, 2))
    parser.add_argument("images", type=cli.file_path, help="folder of captioned images")
    parser.add_argument("--out", type=cli.file_path, required=True, help="folder to write, in the released layout")
    parser.add_argument("--text-encoder", type=cli.file_path, help="stage 2: the folder of the trained stage 1")
    parser.add_argument("--start-from", type=cli.file_path, help="a folder of the released layout to train on")
    parser.add_argument("--config", type=cli.file_path, help="a unet/config.json to train instead of the miniature")
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps in all (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="over all processes (default %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--size", type=int, default=64,
                        help="pixels a side: 32, then 64 (default); of the crops of stage 2: 64, then 256")
    parser.add_argument("--mirror", action="store_true", help="mirror half of the images; not if captions say left")
    parser.add_argument("--dtype", choices=training.DTYPES, default="auto", help="auto: bfloat16 where it is fast")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for flag in ("steps", "batch_size", "save_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if not (0 <= args.lr < math.inf and 0 <= args.seed < 2**32):
        parser.error(f"--lr must be 0 or more, --seed lie in 0..2^32 - 1, got {args.lr} and {args.seed}")
    if args.size not in SIZES[args.stage]:
        parser.error(f"--size of stage {args.stage} is one of {SIZES[args.stage]}, got {args.size}")
    if args.stage == 2 and args.text_encoder is None:
        parser.error("stage 2 reads prompts through a trained text encoder: --text-encoder weights/mini-IF-I")
    with training.processes("cuda" if torch.cuda.is_available() else "cpu") as device:
        train(args, device)


if __name__ == "__main__":
    main()
