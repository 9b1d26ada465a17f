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
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import checkpoint, cli, ddpm, training
from minidiff.deepfloyd import stages, vocabulary
from minidiff.deepfloyd.dataset import CPU, CaptionedImages, train_tokenizer
from minidiff.deepfloyd.initial import CONTRASTIVE_BATCH, initialise, match_captions, pass_through
from minidiff.deepfloyd.progress import examine, preview
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.text import plan_text_encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import FIXED, MIRROR, UNet, UNetConfig
from minidiff.schedule import Schedule, squaredcos_cap_v2

R, S = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
MINI_T5 = T5Config(vocab_size=2048, d_model=192, d_kv=48, d_ff=512, num_layers=3, num_heads=4)
MINI_1 = UNetConfig(
    block_out_channels=(32, 64, 128, 192), layers_per_block=(1, 1, 1, 1), down_block_types=(R, R, S, S),
    cross_attention_dim=192, encoder_hid_dim=192, attention_head_dim=32, norm_num_groups=8,
    addition_embed_type_num_heads=4, time_embedding_dim=192,
)  # fmt: skip
MINI_2 = UNetConfig(
    block_out_channels=(16, 16, 32, 48, 64), layers_per_block=(1, 1, 1, 1, 1), down_block_types=(R, R, R, S, S),
    in_channels=6, sample_size=256, cross_attention_dim=192, encoder_hid_dim=192, attention_head_dim=16,
    norm_num_groups=8, addition_embed_type_num_heads=4, only_cross_attention=True, class_embed_type="timestep",
    time_embedding_dim=192, time_embedding_act_fn="gelu", resnet_skip_time_act=True,
    resnet_out_scale_factor=1 / 0.7071, mid_block_scale_factor=1 / 0.7071,
)  # fmt: skip
SIZES, LARGE = {1: (32, 64), 2: (64, 256)}, 256  # pixels a side to train each stage on; LARGE: a whole image
EMA_DECAY, FALL = 0.999, 0.6  # of the averaged weights; the last part of a run, in which the learning rate falls
MIN_SNR_GAMMA, OFFSET_NOISE = 5.0, 0.1
MIN_SHARE = 0.4  # how often times below 169 are drawn, compared with those from 261 on
COARSE = (16, 64)  # pixels a side of the areas whose mean errors stage 2 pays for
MAX_WEIGHT = 100.0
VARIANCE_SHARE, MAX_BOUND_WEIGHT = 0.02, 40.0  # of the bound, which trains the variance, in the loss
LOG_EVERY = 20  # steps whose mean loss is a row of loss.csv


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


def load_into(module: nn.Module, source: checkpoint.Checkpoint) -> None:
    """The weights of a released-layout folder as float32 to train on. Raises WeightsError if they do not fit."""
    checkpoint.check_fit(module, source)
    module.load_state_dict({key: tensor.float() for key, tensor in source.tensors().items()})


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
            train_tokenizer(dataset.captions, spiece, MINI_T5.vocab_size)
    training.barrier()
    return Tokenizer(spiece)


def first_weights(
    args: argparse.Namespace, tokenizer: Tokenizer, dataset: CaptionedImages, device: torch.device
) -> Trainee:
    """The networks as a run begins with them: of --start-from, or new, with a text encoder that matches captions."""
    torch.manual_seed(args.seed)
    default = replace(MINI_1, sample_size=args.size) if args.stage == 1 else MINI_2
    unet = UNet(UNetConfig.from_dict(checkpoint.read_json(args.config)) if args.config else default)
    if args.stage == 1:
        t5 = T5Encoder(MINI_T5)
    else:
        source = checkpoint.Checkpoint(args.text_encoder, "text_encoder", torch.float32)
        t5 = checkpoint.fill(plan_text_encoder(args.text_encoder, source)[1], source, torch.float32)
    model = Trainee(args.stage, unet, t5.to(device), squaredcos_cap_v2())
    initialise(model)
    pass_through(unet)
    if args.start_from:
        load_into(unet, checkpoint.Checkpoint(args.start_from, "unet", torch.float32))
        if args.stage == 1:
            load_into(t5, checkpoint.Checkpoint(args.start_from, "text_encoder", torch.float32))
    elif args.stage == 1 and not (args.out / "training" / "checkpoint.pt").is_file():
        dtype = training.fast_dtype(device) if args.dtype == "auto" else args.dtype
        quiet, longest = training.rank() > 0, max(1, args.steps // 4)
        share = match_captions(t5, tokenizer, dataset, args.seed, dtype, quiet, longest)
        if training.rank() == 0:
            tqdm.write(f"{share:.0%} of the images find their caption among {CONTRASTIVE_BATCH}")
    return model.to(device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """To --steps; weights, samples and the held-out error after every checkpoint."""
    dataset, folder = CaptionedImages(args.images, 64 if args.stage == 1 else LARGE, device), args.out / "training"
    settings = {name: getattr(args, name) for name in ("stage", "batch_size", "lr", "seed", "size", "mirror")}
    training.previous(folder, settings)  # raises before the work
    tokenizer = tokenizer_of(args, dataset)
    if args.stage == 1 and training.rank() == 0:
        vocabulary.write(dataset.rows, args.out)
    model = first_weights(args, tokenizer, dataset, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    plan = training.Plan(args.steps, args.save_every, lambda step: learning_rate(step, args.steps, args.lr), LOG_EVERY,
                         EMA_DECAY, clip=1.0)  # fmt: skip
    tokens = functools.cache(lambda text: tokenizer([text]))  # each caption comes hundreds of times

    def pooled(x_start: Tensor) -> Tensor:  # --size: a quarter of the pixels costs a quarter, and still holds at 64
        return x_start if args.stage == 2 else F.avg_pool2d(x_start, x_start.shape[-1] // args.size)

    def batch_at(step: int) -> tuple:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 1024 + training.rank())
        x_start, texts = dataset.draw(args.batch_size // training.world(), generator, mirror=args.mirror)
        x_start = pooled(x_start)
        random = random_numbers(args.stage, len(x_start), args.size, model.schedule, generator, device)
        ids, mask = (torch.cat(x).to(device) for x in zip(*map(tokens, texts)))
        return x_start, ids, mask, random

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
            columns = ("step", "t", "right", "other", "none")
            training.add_rows(folder / "held_out.csv", columns, [(record.step, *row) for row in rows])
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
