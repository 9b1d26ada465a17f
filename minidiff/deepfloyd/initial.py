"""The networks that training begins with: of a folder, or new ones of the miniature's sizes.

Read `deepfloyd/unet.py` and `deepfloyd/t5.py` first.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from minidiff import checkpoint, training
from minidiff.deepfloyd.dataset import CaptionedImages
from minidiff.deepfloyd.t5 import GatedFeedForward, SelfAttention, T5Config, T5Encoder
from minidiff.deepfloyd.text import plan_text_encoder
from minidiff.deepfloyd.tokenizer import Tokenizer
from minidiff.deepfloyd.unet import Attention, ResnetBlock, UNet, UNetConfig

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
CONTRASTIVE_STEPS = 1500
CONTRASTIVE_BATCH = 96


def initialise(module: nn.Module) -> None:
    """T5's own scales, as its scores are not divided by sqrt(d); and every residual branch of the UNet starts at 0."""
    for m in module.modules():
        if isinstance(m, SelfAttention | GatedFeedForward):
            for name, f in m.named_parameters():
                if name != "relative_attention_bias.weight":
                    d = f.shape[0] // m.heads if name == "q.weight" else 1
                    nn.init.normal_(f, std=(f.shape[1] * d) ** -0.5)
        elif isinstance(m, ResnetBlock):
            nn.init.zeros_(m.conv2.weight)
        elif isinstance(m, Attention):
            nn.init.zeros_(m.to_out[0].weight)


@torch.no_grad()
def pass_through(unet: UNet) -> None:
    """Let eps begin as x_t itself at unit variance, which is right where all is noise.

    There, an error in eps is many times as large in the image. So the mean colour of x_t must pass unharmed. It is
    small: a mean over 64 x 64 noisy pixels deviates by 1/64. Random layers take very long to learn this. A pair of
    channels +x and -x does it: the outermost skip connection carries it past all layers, the last norm only divides it
    by a known factor, since the mean of a pair is 0, and the last activation leaves it whole, since gelu(x) - gelu(-x)
    = x.
    """
    last = unet.up_blocks[-1].resnets[-1]
    size = len(unet.conv_in.weight) // unet.config.norm_num_groups  # channels that one norm shares: +x, -x and zeros
    from_skip = last.conv_shortcut.in_channels - len(unet.conv_in.weight)
    for module in (unet.conv_out, last.conv_shortcut, unet.conv_in, last.conv2):
        module.bias[: 3 * size] = 0
    unet.conv_out.weight[:3] = 0
    for colour in range(3):
        plus, minus, group = colour * size, colour * size + 1, slice(colour * size, (colour + 1) * size)
        for layer in (unet.conv_in, last.conv2, last.conv_shortcut):
            layer.weight[group] = 0
        unet.conv_in.weight[plus, colour, 1, 1], unet.conv_in.weight[minus, colour, 1, 1] = 1, -1
        last.conv_shortcut.weight[plus, from_skip + plus] = last.conv_shortcut.weight[minus, from_skip + minus] = 1
        unet.conv_norm_out.weight[group], unet.conv_norm_out.bias[group] = 1, 0
        unet.conv_out.weight[colour, plus, 1, 1] = (2 / size) ** 0.5
        unet.conv_out.weight[colour, minus, 1, 1] = -((2 / size) ** 0.5)


def image_encoder(dim: int) -> nn.Sequential:
    """A small convolutional network: images of any size to (B, dim)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, dim)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, dim))


def match_captions(
    text_encoder: T5Encoder, tokenizer: Tokenizer, dataset: CaptionedImages, seed: int, dtype: str, quiet: bool,
    longest: int = CONTRASTIVE_STEPS,
) -> float:  # fmt: skip
    """Teach the text encoder which caption belongs to which image, before any diffusion.

        L = cross entropy of softmax(s <text_i, image_j>) both ways,   s learned,   vectors of length 1

    The text vector is the mean state of the real tokens. An encoder that starts like this makes a prompt worth about
    twice as much after the same number of images. It takes CONTRASTIVE_STEPS steps, or `longest` if that is fewer.
    Returns the share of images that find their caption in the last batches.
    Source: CLIP (arXiv 2103.00020) Sec. 2.3, InfoNCE.
    """
    device = text_encoder.shared.weight.device
    images, text_head = image_encoder(192).to(device), nn.Linear(text_encoder.config.d_model, 192).to(device)
    scale = nn.Parameter(torch.tensor(2.7, device=device))
    parameters = [*text_encoder.parameters(), *images.parameters(), *text_head.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    steps, found = min(CONTRASTIVE_STEPS, longest), []
    for step in tqdm(range(steps), desc="captions", disable=quiet, mininterval=5):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1024 + 1023)
        x_start, texts = dataset.draw(CONTRASTIVE_BATCH, generator, dropout=0)
        x_start = F.avg_pool2d(x_start, x_start.shape[-1] // 32)
        ids, mask = tokenizer(texts)
        length = int(mask.sum(1).max())  # padding is hidden from real tokens, and the mean leaves it out
        ids, mask = ids[:, :length].to(device), mask[:, :length].to(device)
        same = torch.tensor([[float(a == b) for b in texts] for a in texts], device=device)  # both, if equal
        with training.precision(device, dtype):
            states = text_encoder(ids, mask)
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            text_vectors, image_vectors = F.normalize(text_head(pooled).float()), F.normalize(images(x_start).float())
        scores = scale.exp().clamp(max=100) * image_vectors @ text_vectors.T  # (B images, B texts)
        target = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, (steps - step) / (steps / 3))
        optimizer.step()
        found.append(same.gather(1, scores.argmax(1, keepdim=True)).mean().item())
    return sum(found[-20:]) / len(found[-20:])


def load_into(module: nn.Module, folder: Path, part: str) -> None:
    """The weights of a released-layout folder as float32 to train on. Raises WeightsError if they do not fit."""
    source = checkpoint.Checkpoint(folder, part, torch.float32)
    checkpoint.check_fit(module, source)
    module.load_state_dict({key: tensor.float() for key, tensor in source.tensors().items()})


def first_networks(
    args: argparse.Namespace, tokenizer: Tokenizer, dataset: CaptionedImages, device: torch.device
) -> tuple[UNet, T5Encoder]:
    """The UNet and the text encoder as a run begins with them: of --start-from, or new, the encoder of stage 1 then
    taught to match captions. args: of `train.main`. Stage 2 gets the encoder of --text-encoder."""
    torch.manual_seed(args.seed)
    default = replace(MINI_1, sample_size=args.size) if args.stage == 1 else MINI_2
    unet = UNet(UNetConfig.from_dict(checkpoint.read_json(args.config)) if args.config else default)
    initialise(unet)
    pass_through(unet)
    if args.start_from:
        load_into(unet, args.start_from, "unet")
    if args.stage == 2:
        _, t5, source = plan_text_encoder(args.text_encoder, torch.float32)
        return unet, checkpoint.fill(t5, source, torch.float32).to(device)
    t5 = T5Encoder(MINI_T5).to(device)
    initialise(t5)
    if args.start_from:
        load_into(t5, args.start_from, "text_encoder")
    elif not (args.out / "training" / "checkpoint.pt").is_file():
        dtype = training.fast_dtype(device) if args.dtype == "auto" else args.dtype
        quiet, longest = training.rank() > 0, max(1, args.steps // 4)
        share = match_captions(t5, tokenizer, dataset, args.seed, dtype, quiet, longest)
        if not quiet:
            tqdm.write(f"{share:.0%} of the images find their caption among {CONTRASTIVE_BATCH}")
    return unet, t5
