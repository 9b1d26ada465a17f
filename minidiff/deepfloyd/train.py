"""Train a stage of the cascade on captioned pictures, on one device or several.

    python -m minidiff.deepfloyd.train 1 PICTURES --out weights/mini-IF-I
    python -m minidiff.deepfloyd.train 2 PICTURES --out weights/mini-IF-II --text-encoder weights/mini-IF-I
    torchrun --nproc-per-node 2 -m minidiff.deepfloyd.train 1 PICTURES --out weights/mini-IF-I

Stage 1 learns the text encoder and the 64x64 UNet together. Stage 2 learns from crops: 64x64 out of the 256x256
picture, beside the same crop of its noised small version, with the text encoder of stage 1 frozen. What is written to
--out has the layout of the released repositories and loads like them; the averaged weights (EMA) are what is kept.

PICTURES is a folder with either picture files, each beside a .txt of the same name with one caption per line, or
packed: images_64.npy and images_256.npy, uint8 (N, size, size, 3), and captions.json, a list of N objects
{"captions": [...], "weight": how often to draw it (1)}.

Training state goes to --out/training: checkpoint.pt (every --save-every steps and on Ctrl-C), loss.csv, loss.png,
samples/. Each batch is drawn from a generator seeded by (seed, step, process), so a resumed run continues exactly.
Read `deepfloyd/pictures.py` and `deepfloyd/initial.py` first.
Source: DDPM Alg. 1; iDDPM Eq. 16; Imagen Sec. 2.4 (noise conditioning); Min-SNR Sec. 3.4 (times drawn);
Progressive Distillation Sec. 4 (loss weight SNR + 1).
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minidiff import charts, cli, ddpm, images
from minidiff.cascade import Cascade
from minidiff.checkpoint import (
    Checkpoint,
    built,
    check_fit,
    default_dtype,
    fill,
    read_json,
    read_state,
    save,
    save_state,
)
from minidiff.deepfloyd import stages
from minidiff.deepfloyd.initial import CONTRASTIVE_BATCH, initialise, match_captions, pass_through
from minidiff.deepfloyd.pictures import Pictures, train_tokenizer
from minidiff.deepfloyd.t5 import T5Config, T5Encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import FIXED, MIRROR, UNet, UNetConfig
from minidiff.factorized import Part
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
CROP = 64
EMA_DECAY = 0.9995
MIN_SNR_GAMMA = 5.0
MIN_SHARE = 0.4  # how often the last steps of a walk are drawn, compared with the noisy half
EXAMINED = (300, 600, 800, 950)  # times at which the held-out error is measured
MAX_WEIGHT = 100.0
LOG_EVERY = 20  # steps whose mean loss is a row of loss.csv
PREVIEW = ["a rocket ship", "a pencil", "a skull", "a castle", "a volcano", "a dog", "an old man",
           "a man wearing a hat", "people around a campfire at night", "waterfalls", "a snowy mountain village",
           "a lion on a beach", "an oil painting of an old man", "a lithograph of a skull", "a cartoon of a cat",
           "a 3d render of a rocket"]  # fmt: skip


class Trainee(nn.Module):
    """What is optimised: a UNet, and in stage 1 its text encoder. forward is the loss, so that DDP can wrap it."""

    def __init__(self, stage: int, unet: UNet, text_encoder: T5Encoder, schedule: Schedule):
        super().__init__()
        self.unet, self.schedule, self.stage = unet, schedule, stage
        self.text_encoder = text_encoder if stage == 1 else None
        self.frozen = [] if stage == 1 else [text_encoder.requires_grad_(False)]  # in a list: not a submodule

    def forward(
        self, x_start: Tensor, ids: Tensor, mask: Tensor, random: dict[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """One loss per picture, (B,). random: noise, t and, for stage 2, low_noise, level, top, left."""
        labels = None
        if self.stage == 2:
            x_start, low_res, labels = self.crop(x_start, random)
        t, noise = random["t"], random["noise"]
        alpha_bar = self.schedule.alpha_bar(t)
        x_t = ddpm.add_noise(x_start, noise, alpha_bar)
        with _fast_attention(x_start.device), torch.autocast(x_start.device.type, dtype, dtype != torch.float32):
            prompt_embeds = (self.text_encoder or self.frozen[0])(ids, mask)
            stacked = x_t if self.stage == 1 else torch.cat([x_t, low_res], dim=1)
            out = self.unet(stacked, t, prompt_embeds, labels)
        eps, pred_var = out.float().chunk(2, dim=1)
        # Where nearly all is noise, a small error in eps is a large one in the picture, and what the prompt says is
        # decided there: weighed by 1 / alpha_bar (a v-prediction's loss), cut at MAX_WEIGHT.
        weight = (1 / alpha_bar).clamp(max=MAX_WEIGHT).flatten().float().to(x_start.device)
        return ddpm.loss(self.schedule, x_start, noise, t, eps, pred_var, weight)

    def crop(self, x_start: Tensor, random: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 256, 256) -> the crop to learn, the same crop of the noised small picture, and its noise level."""
        low_res = stages.upsample(F.avg_pool2d(x_start, 4), x_start.shape[2:])
        alpha_bar = self.schedule.alpha_bar(random["level"])
        low_res = ddpm.add_noise(low_res, random["low_noise"], alpha_bar)
        both = torch.cat([x_start, low_res], dim=1)
        corners = zip(random["top"].tolist(), random["left"].tolist())
        both = torch.stack([x[:, y : y + CROP, z : z + CROP] for x, (y, z) in zip(both, corners)])
        return both[:, :3], both[:, 3:], random["level"]


def _fast_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, attention written out: the backward pass of the fused one takes a fifth of a step longer."""
    cpu = device.type == "cpu"
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if cpu else contextlib.nullcontext()


def load_into(module: nn.Module, checkpoint: Checkpoint) -> None:
    """The weights of a released-layout folder as float32 to train on. Raises WeightsError if they do not fit."""
    check_fit(module, checkpoint)
    module.load_state_dict({key: tensor.float() for key, tensor in checkpoint.tensors().items()})


def random_numbers(
    stage: int, batch_size: int, size: int, schedule: Schedule, generator: torch.Generator
) -> dict[str, Tensor]:
    """Every random choice of one step except the pictures, drawn on the CPU.

    t is drawn in proportion to min(1, MIN_SNR_GAMMA / SNR(t)), but at least MIN_SHARE: where a picture is nearly clean
    there is less left to learn, yet every walk ends there, and what noise is left then stays in the picture. Drawing
    by a weight is the same in the mean as multiplying the loss by it.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    share = (MIN_SNR_GAMMA / snr).clamp(min=MIN_SHARE, max=1)
    t = torch.multinomial(share, batch_size, replacement=True, generator=generator)
    side = size if stage == 1 else CROP

    def below(high: int) -> Tensor:
        return torch.randint(high, (batch_size,), generator=generator)

    random = {"t": t, "noise": torch.randn(batch_size, 3, side, side, generator=generator)}
    if stage == 2:
        random["level"] = below(schedule.num_train_timesteps)
        random |= {"top": below(size - CROP + 1), "left": below(size - CROP + 1)}
        random["low_noise"] = torch.randn(batch_size, 3, size, size, generator=generator)
    return random


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm up over 200 steps, stay, and fall linearly to 0 over the last third."""
    return peak * min(1, (step + 1) / 200, (total - step) / (total / 3))


def update_average(ema: dict[str, Tensor], module: nn.Module, step: int) -> None:
    """EMA of all weights, faster at first: decay = min(EMA_DECAY, (1 + step) / (10 + step))."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    state = module.state_dict()
    torch._foreach_lerp_(list(ema.values()), [state[k] for k in ema], 1 - decay)


def write_folder(out: Path, stage: int, ema: dict[str, Tensor], unet: UNetConfig, t5: T5Config) -> None:
    """The averaged weights as float16 in the released layout, with their configs."""
    for part in ("unet", "text_encoder") if stage == 1 else ("unet",):
        (out / part).mkdir(parents=True, exist_ok=True)
    save(
        {k.removeprefix("unet."): v.half() for k, v in ema.items() if k.startswith("unet.")},
        out / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        {"format": "pt"},
    )
    derived = {
        "_class_name": "UNet2DConditionModel",
        "up_block_types": [MIRROR[kind] for kind in reversed(unet.down_block_types)],
        "encoder_hid_dim_type": "text_proj",
    }
    _write_json(out / "unet" / "config.json", FIXED | asdict(unet) | derived)
    process = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    sampling = {
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "thresholding": True,
        "clip_sample": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.5 if stage == 1 else 1.0,
    }
    _write_json(out / "scheduler" / "scheduler_config.json", process | sampling)
    if stage == 2:
        _write_json(out / "image_noising_scheduler" / "scheduler_config.json", process)
        return
    # The feed-forward's last matrix stays float32, as in the released float16 files.
    text = {k.removeprefix("text_encoder."): v for k, v in ema.items() if k.startswith("text_encoder.")}
    text = {k: v if k.endswith(".wo.weight") else v.half() for k, v in text.items()}
    save(text, out / "text_encoder" / "model.fp16.safetensors", {"format": "pt"})
    kind = {"model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu"}
    _write_json(out / "text_encoder" / "config.json", asdict(t5) | kind)


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


@torch.inference_mode()
def examine(model: Trainee, ema: dict[str, Tensor], tokenizer: Tokenizer, x_start: Tensor, texts: list[str],
            dtype: torch.dtype) -> list[tuple[int, float, float, float]]:  # fmt: skip
    """What the prompt is worth: (t, error with the right prompt, with another image's, with none) for EXAMINED times.

    The error is the mean squared difference between x_start (N, 3, H, W) and its estimate, clipped, with the averaged
    weights and one noise for all. Stage 1 only.
    """
    device, rows = x_start.device, []
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).to(device)
    prompts_of = {"right": texts, "other": texts[1:] + texts[:1], "none": [""] * len(texts)}
    swapped = {k.removeprefix("unet."): v for k, v in ema.items() if k.startswith("unet.")}
    with torch.autocast(device.type, dtype, dtype != torch.float32):
        encoder = {k.removeprefix("text_encoder."): v for k, v in ema.items() if k.startswith("text_encoder.")}
        states = {
            name: torch.func.functional_call(model.text_encoder, encoder, tuple(x.to(device) for x in tokenizer(row)))
            for name, row in prompts_of.items()
        }
        for time_ in EXAMINED:
            t = torch.full((len(x_start),), time_, device=device)
            alpha_bar, errors = model.schedule.alpha_bar(t), []
            x_t = ddpm.add_noise(x_start, noise, alpha_bar)
            for embeds in states.values():
                out = [torch.func.functional_call(model.unet, swapped, (a, b, c)) for a, b, c in
                       zip(x_t.split(32), t.split(32), embeds.split(32))]  # fmt: skip
                eps = torch.cat(out).float()[:, :3]
                estimate = ddpm.predict_x_start(x_t, eps, alpha_bar).clamp(-1, 1)
                errors.append((estimate - x_start).square().mean().item())
            rows.append((time_, *errors))
    return rows


def preview(out: Path, stage: int, step: int, text_encoder: Path, pictures: Pictures) -> None:
    """Samples of the weights just written: the PREVIEW prompts, or two training images enlarged by stage 2."""
    if stage == 1:
        cascade, n = Cascade.load(str(out), "none", dtype=torch.float32), len(PREVIEW)
        x = cascade.draw([Part(torch.cat(cascade.encode(*PREVIEW)))], range(n), steps=20, guidance_scale=4.0)
        sheet = images.sheet(*images.grid(list(x), PREVIEW))
    else:
        cascade = Cascade.load("none", str(out), text_model=str(text_encoder), dtype=torch.float32)
        x_start, texts = pictures.draw(2, torch.Generator().manual_seed(1))
        low_res = F.avg_pool2d(x_start, 4)
        x = cascade.enlarge(low_res, [Part(torch.cat(cascade.encode(*texts)))], range(2), steps=10)
        rows = [[stages.upsample(low_res, (256, 256))[i], x[i], x_start[i]] for i in range(2)]
        sheet = images.sheet(rows, [["bilinear", "stage 2", "original"]] * 2)
    images.save(sheet, out / "training" / "samples" / f"step-{step:07d}.png", {})


def plot(csv_path: Path) -> None:
    """loss.png from loss.csv."""
    if not csv_path.is_file():  # stopped before the first row
        return
    rows = np.atleast_1d(np.genfromtxt(csv_path, delimiter=",", names=True))
    points = list(zip(rows["step"].astype(int).tolist(), rows["loss"].tolist()))
    chart = charts.chart([("", {f"mean of {LOG_EVERY} steps": points})], {})
    images.save(chart, csv_path.with_suffix(".png"), {})


class Run:
    """One training run: everything a checkpoint holds, and the step."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.stage, self.step = args.stage, 0
        self.folder = args.out / "training"
        self.pictures = Pictures(args.pictures, 64 if args.stage == 1 else 256)
        text_encoder = args.out if args.stage == 1 else args.text_encoder
        spiece = text_encoder / "tokenizer" / "spiece.model"
        if args.stage == 1 and rank == 0 and not spiece.is_file():
            if args.start_from:
                Tokenizer(args.start_from / "tokenizer" / "spiece.model")  # raises if it is none
                spiece.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(args.start_from / "tokenizer" / "spiece.model", spiece.with_suffix(".tmp"))
                os.replace(spiece.with_suffix(".tmp"), spiece)
            else:
                train_tokenizer(self.pictures.captions, spiece, MINI_T5.vocab_size)
        if world > 1:
            torch.distributed.barrier()
        self.tokenizer, self.text_folder = Tokenizer(spiece), text_encoder
        torch.manual_seed(args.seed)
        default = MINI_1 if args.stage == 1 else MINI_2
        self.config = UNetConfig.from_dict(read_json(args.config)) if args.config else default
        self.t5_config = MINI_T5
        unet, t5 = UNet(self.config), T5Encoder(MINI_T5)
        if args.stage == 2:
            checkpoint = Checkpoint(text_encoder, "text_encoder", torch.float32)
            t5 = built(lambda config: T5Encoder(T5Config.from_dict(config)), checkpoint)
            fill(t5, checkpoint, torch.float32)
        self.model = Trainee(args.stage, unet, t5.to(device), squaredcos_cap_v2())
        self.dtype = torch.bfloat16 if default_dtype(device.type) != torch.float32 else torch.float32
        if args.dtype:
            self.dtype = getattr(torch, args.dtype)
        initialise(self.model)
        pass_through(unet)
        fresh = not args.start_from and not (self.folder / "checkpoint.pt").is_file()
        if args.stage == 1 and fresh:
            share = match_captions(t5.to(device), self.tokenizer, self.pictures, args.seed, self.dtype, rank > 0)
            if rank == 0:
                tqdm.write(f"{share:.0%} of the images find their caption among {CONTRASTIVE_BATCH}")
        if args.start_from:
            load_into(unet, Checkpoint(args.start_from, "unet", torch.float32))
            if args.stage == 1:
                load_into(t5, Checkpoint(args.start_from, "text_encoder", torch.float32))
        self.model.to(device)
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        if (self.folder / "checkpoint.pt").is_file():
            self.resume()
        self.parallel = DistributedDataParallel(self.model) if world > 1 else self.model

    def resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        state = read_state(path, ("model", "optimizer", "ema", "step"))
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{path} is of another network or stage; pass another --out") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = {key: value.to(self.device) for key, value in state["ema"].items()}
        self.step = state["step"]
        path = self.folder / "loss.csv"
        if path.is_file():  # steps after the checkpoint are made again
            header, *rows = path.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[0]) <= self.step]
            path.write_text("\n".join([header, *kept]) + "\n")

    def save(self) -> None:
        """Checkpoint and released-layout weights, each written under another name first, then renamed."""
        if self.rank:
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
                 "step": self.step}  # fmt: skip
        save_state(state, self.folder / "checkpoint.pt")
        write_folder(self.args.out, self.stage, self.ema, self.config, self.t5_config)
        plot(self.folder / "loss.csv")

    def one_step(self) -> float:
        """Draw a batch, step, average the weights. Returns the loss; on NaN it raises before anything moves."""
        per_process = self.args.batch_size // self.world
        seed = (self.args.seed * 1_000_003 + self.step) * 1024 + self.rank
        generator = torch.Generator().manual_seed(seed)
        x_start, texts = self.pictures.draw(per_process, generator)
        x_start = self.pooled(x_start)
        random = random_numbers(self.stage, per_process, x_start.shape[-1], self.model.schedule, generator)
        ids, mask = (x.to(self.device) for x in self.tokenizer(texts))
        random = {k: v.to(self.device) for k, v in random.items()}
        loss = self.parallel(x_start.to(self.device), ids, mask, random, self.dtype).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            last = self.folder / "checkpoint.pt"
            kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
            raise FloatingPointError(
                f"loss is {loss.item()}, its gradient's norm {norm.item()}, at step {self.step}; {kept}: rerun with a "
                "smaller --lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args.steps, self.args.lr)
        self.optimizer.step()
        update_average(self.ema, self.model, self.step)
        self.step += 1
        return loss.item()

    def pooled(self, x_start: Tensor) -> Tensor:
        """Stage 1 at --size: a quarter of the pixels costs a quarter, and what is learned there holds at 64."""
        return x_start if self.stage == 2 else F.avg_pool2d(x_start, x_start.shape[-1] // self.args.size)

    def examine(self) -> None:
        """A row of held_out.csv for each of the EXAMINED times."""
        x_start, texts = self.pictures.held_out()
        path = self.folder / "held_out.csv"
        new = not path.exists()
        rows = examine(self.model, self.ema, self.tokenizer, self.pooled(x_start).to(self.device), texts, self.dtype)
        with path.open("a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["step", "t", "right", "other", "none"])
            writer.writerows([self.step, t, *(f"{e:.5f}" for e in errors)] for t, *errors in rows)
        text = ", ".join(f"t {t}: {right:.4f} / {other:.4f} / {none:.4f}" for t, right, other, none in rows)
        tqdm.write(f"step {self.step}: held-out error with the right prompt / another / none: {text}")

    def train(self) -> None:
        """To --steps, writing the loss every LOG_EVERY steps."""
        losses, start = [], time.time()
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=self.args.steps, initial=self.step, disable=self.rank > 0, mininterval=5)
        with cli.stopped_between_steps() as stopped:
            while self.step < self.args.steps and not self.anyone(stopped()):
                losses.append(self.one_step())
                bar.update()
                if self.step % LOG_EVERY == 0 and self.rank == 0:
                    self.log(sum(losses) / len(losses), time.time() - start)
                    bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                    losses = []
                if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                    self.save()
                    if self.rank == 0:
                        preview(self.args.out, self.stage, self.step, self.text_folder, self.pictures)
                        if self.stage == 1:
                            self.examine()
        if self.step < self.args.steps:
            self.save()
            tqdm.write(f"stopped at step {self.step}; the same command goes on from there")

    def anyone(self, stopped: bool) -> bool:
        """Has Ctrl-C reached any process? All must stop after the same step."""
        if self.world == 1:
            return stopped
        flag = torch.tensor(float(stopped), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def log(self, loss: float, seconds: float) -> None:
        path = self.folder / "loss.csv"
        new = not path.exists()
        with path.open("a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["step", "loss", "seconds"])
            writer.writerow([self.step, f"{loss:.6f}", f"{seconds:.1f}"])


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=int, choices=(1, 2))
    parser.add_argument("pictures", type=cli.file_path, help="folder of captioned pictures")
    parser.add_argument("--out", type=cli.file_path, required=True, help="folder to write, in the released layout")
    parser.add_argument("--text-encoder", type=cli.file_path, help="stage 2: the folder of the trained stage 1")
    parser.add_argument("--start-from", type=cli.file_path, help="a folder of the released layout to train on")
    parser.add_argument("--config", type=cli.file_path, help="a unet/config.json to train instead of the miniature")
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps in all (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="over all processes (default %(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, choices=(32, 64), help="stage 1: pixels a side; begin with 32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what is fast here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for flag in ("steps", "batch_size", "save_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.stage == 2 and args.text_encoder is None:
        parser.error("stage 2 reads prompts through a trained text encoder: --text-encoder weights/mini-IF-I")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    Run(args, rank, world, device).train()
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
