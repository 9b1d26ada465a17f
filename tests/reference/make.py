"""Record what the reference implementations compute, for the tests to compare with.

This script alone needs diffusers, transformers and torchdiffeq, so it runs in an environment of its own, and the tests
never import it:

    python3 -m venv refenv
    refenv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 safetensors==0.8.0 \
        sentencepiece==0.2.3 numpy==2.4.6 torchdiffeq==0.2.5 accelerate==1.15.0 protobuf==7.36.2
    OMP_NUM_THREADS=1 refenv/bin/python tests/reference/make.py

It rewrites the files below (about fifteen seconds). All networks are tiny; their weights and inputs come from
`fill.py` by name, so the files hold outputs only. Each file says in its metadata which programs made it.

    unet.safetensors, unet.json      UNet outputs, configs, tensor names, two numbers for each inner block
    t5.safetensors, t5.json          T5 encoder outputs, with and without mask; relative position buckets
    spiece.model, tokens.json        a small SentencePiece model and the ids of awkward prompts
    schedule.json                    alpha-bar tables and timestep lists
    ddpm.safetensors                 steps and whole walks of the scheduler
    stages.safetensors               both pipelines from start to end
    edits.safetensors                the pipelines that edit an image; RePaint's walks
    flow.safetensors                 where ODE solvers lead along a velocity field
    solvers.safetensors              whole walks of DDIM and DPM-Solver++(2M), by `walks.py`
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import tempfile
from pathlib import Path
from unittest import mock

import diffusers
import sentencepiece
import torch
import transformers
from diffusers import (
    DDPMScheduler,
    IFImg2ImgPipeline,
    IFInpaintingPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    RePaintScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.deepfloyd_if import timesteps as if_timesteps
from diffusers.utils.torch_utils import randn_tensor
from fill import HERE, bent, calm, digest, fill, normal
from safetensors.torch import save_file
from torchdiffeq import odeint
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from walks import STEPS, record

PINS = {
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "safetensors": "0.8.0",
    "sentencepiece": "0.2.3",
    "numpy": "2.4.6",
    "torchdiffeq": "0.2.5",
}

# --- networks ---------------------------------------------------------------------------------------------------------

COMMON = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}
STAGE_2 = {
    "in_channels": 6,
    "class_embed_type": "timestep",
    "time_embedding_dim": 64,
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}
R, S = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def unet_config(kinds: list[tuple[str, str]], **more: object) -> dict:
    down, up = [k[0] for k in kinds], [k[1] for k in reversed(kinds)]
    return {**COMMON, "down_block_types": down, "up_block_types": up, **more}


UNETS = {
    # stage 1: attention beside the image's own tokens, 32 norm groups, time activated in each resnet
    "stage_1": unet_config(
        [R, S, S], in_channels=3, sample_size=8, block_out_channels=[32, 64, 96], layers_per_block=2,
        attention_head_dim=16, norm_num_groups=32,
    ),
    # stage 2: noise level, 1/0.7071, time activated once, uneven depths
    "stage_2": unet_config(
        [R, R, S], sample_size=16, block_out_channels=[32, 32, 64], layers_per_block=[1, 2, 2],
        attention_head_dim=32, norm_num_groups=16, **STAGE_2,
    ),
    # stage 2 large: attention reads the text alone
    "stage_2_only_cross": unet_config(
        [R, S], sample_size=16, block_out_channels=[32, 64], layers_per_block=[1, 2], attention_head_dim=16,
        norm_num_groups=8, only_cross_attention=True, **STAGE_2,
    ),
    # the middle block may differ from the levels
    "middle_only_cross": unet_config(
        [S, S], in_channels=3, sample_size=8, block_out_channels=[32, 64], layers_per_block=1, attention_head_dim=16,
        norm_num_groups=32, mid_block_only_cross_attention=True,
    ),
}  # fmt: skip

# name: batch, height, width, tokens, timesteps, noise levels
UNET_CASES = {
    "one": (1, 8, 8, 77, [999], [250]),
    "two": (2, 8, 12, 13, [37, 500], [0, 999]),
    "three": (3, 12, 8, 77, [0, 250, 980], [250, 75, 10]),
}

T5 = {
    "vocab_size": 211, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def unet_inputs(name: str, case: str) -> dict:
    """The inputs of one recorded case; the tests repeat this formula."""
    B, H, W, L, t, noise_level = UNET_CASES[case]
    stage_2 = UNETS[name].get("class_embed_type") == "timestep"
    return {
        "x": normal(f"unet.{case}.x", B, 6 if stage_2 else 3, H, W),
        "t": torch.tensor(t),
        "prompt_embeds": normal(f"unet.{case}.prompt_embeds", B, L, 32),
        "class_labels": torch.tensor(noise_level) if stage_2 else None,
    }


def build_unet(name: str) -> UNet2DConditionModel:
    return fill(UNet2DConditionModel(**UNETS[name]))


@torch.inference_mode()
def make_unet() -> None:
    outputs, about = {}, {"cases": UNET_CASES, "networks": {}}
    for name in UNETS:
        unet = build_unet(name)
        digests = {}
        for case in UNET_CASES:
            inputs = unet_inputs(name, case)
            hooks = watch(unet, digests) if case == "two" else []
            y = unet(inputs["x"], inputs["t"], inputs["prompt_embeds"], class_labels=inputs["class_labels"]).sample
            for hook in hooks:
                hook.remove()
            outputs[f"{name}.{case}"] = y
        about["networks"][name] = {
            "config": {k: v for k, v in unet.config.items() if k != "_use_default_values"},
            "shapes": {k: list(x.shape) for k, x in unet.state_dict().items()},
            "digests_of_two": digests,
        }
    save("unet", outputs)
    save_json("unet", about)


def watch(unet: torch.nn.Module, digests: dict) -> list:
    """Hooks that write down every block's digest in order of evaluation."""
    ends = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj", "conv_norm_out")
    parts = ("resnets", "attentions", "downsamplers", "upsamplers")

    def record(name: str):
        return lambda module, args, y: digests.update({name: digest(name, y)})

    names = [n for n, _ in unet.named_modules() if n in ends or n.split(".")[-2:-1] and n.split(".")[-2] in parts]
    return [unet.get_submodule(n).register_forward_hook(record(n)) for n in names]


def t5_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of 77: the empty prompt, a short one, a longer one, a full one."""
    lengths = [1, 6, 40, 77]
    ids = (normal("t5.ids", 4, 77).abs() * 1000).long() % 208 + 3
    for row, n in zip(ids, lengths):
        row[n - 1], row[n:] = 1, 0
    mask = (torch.arange(77) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


@torch.inference_mode()
def make_t5() -> None:
    model = fill(T5EncoderModel(T5Config(**T5)))
    ids, mask = t5_tokens()
    distances = torch.arange(-200, 201)
    attention = model.encoder.block[0].layer[0].SelfAttention
    masked, unmasked = model(ids, mask).last_hidden_state, model(ids).last_hidden_state
    save(
        "t5",
        {
            "input_ids": ids,
            "attention_mask": mask,
            "masked": masked,
            "unmasked": unmasked[1:2],
            "distances": distances,
            "buckets": attention._relative_position_bucket(distances, True, 32, 128),
            "bias_13": attention.compute_bias(13, 13),
        },
    )
    names = [k for k in model.state_dict() if k != "encoder.embed_tokens.weight"]
    save_json("t5", {"config": T5, "shapes": {k: list(model.state_dict()[k].shape) for k in names}})


# --- tokenizer --------------------------------------------------------------------------------------------------------

TEXT = """
a photo of a small red panda sitting on a branch in the rain
an oil painting of snowy mountains under a golden sky
a pencil drawing of an old man, a young woman and a waterfall
the quick brown fox jumps over the lazy dog
pack my box with five dozen liquor jugs
a photograph of two cats sleeping on a blue sofa, 35 mm film, high quality
a rocket ship and a skull: a hybrid picture that changes with distance
we build a picture from noise, step by step, and a word is all it takes
how vexingly quick daft zebras jump! is it 10, 25, 47 or 98?
a café in a naïve style with crème brûlée and a piñata
"""
# What normalisation does to a few characters; the full NFKC table would be 240 kB.
RULES = {
    "\t": " ", "\n": " ", "\u00a0": " ", "\u3000": " ", "\u2026": "...", "\ufb01": "fi", "\u2019": "'", "\uff21": "A",
    "\uff22": "B", "\uff41": "a", "\uff42": "b", "e\u0301": "\u00e9", "\u2460": "1", "\u00bd": "1/2", "\u200b": "",
}  # fmt: skip
PROMPTS = [
    "",
    " ",
    "a photo of a red panda",
    "  A Photo   of\ta\nRED panda  ",
    "a",
    "!!! ??? ... ,,,",
    "café crème naïve",
    "cafe\u0301",
    "\uff41 \uff22\u3000box",
    "\ufb01ve dozen \u2026 \u00bd \u2460",
    "a\u00a0photo\u200bgraph",
    "a \U0001f600 smiling \U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f1eb\U0001f1f7",
    "красная панда",
    "赤いパンダ",
    "لوحة زيتية",
    "supercalifragilisticexpialidocious",
    "STRASSE Straße İstanbul ǅ",
    "3:45 10x20 $5 #1 50% a&b a/b a_b a-b \u2014 a\u2013b",
    "<a> {b} [c] \\d \"e\" 'f' `g`",
    " ".join(["a photo of a red panda,"] * 20),
    "zebra " * 38,
    "\x00\x07 bell",
]


def make_tokens() -> None:
    def code_points(text: str) -> str:
        return " ".join(f"{ord(c):X}" for c in text)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the model remembers the path of its rules
        rules = Path("rules.tsv")
        rules.write_text("".join(f"{code_points(a)}\t{code_points(b)}\n" for a, b in sorted(RULES.items())))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.strip().splitlines()), model_writer=model, model_type="unigram",
            vocab_size=200, character_coverage=1.0, normalization_rule_tsv=str(rules), hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
        Path("spiece.model").write_bytes(model.getvalue())
        (HERE / "spiece.model").write_bytes(model.getvalue())
        tokenizer = T5Tokenizer.from_pretrained(folder)
    encoded = tokenizer(
        [prompt.lower().strip() for prompt in PROMPTS], padding="max_length", max_length=77, truncation=True,
        add_special_tokens=True,
    )  # fmt: skip
    rows = zip(PROMPTS, encoded["input_ids"], encoded["attention_mask"])
    save_json(
        "tokens",
        {
            "spiece_sha256": hashlib.sha256(model.getvalue()).hexdigest(),
            "prompts": [{"prompt": p, "ids": ids[: sum(mask)], "padded_to": len(ids)} for p, ids, mask in rows],
        },
    )


# --- schedule ---------------------------------------------------------------------------------------------------------

SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "variance_type": "learned_range", "clip_sample": True, "thresholding": True, "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}  # fmt: skip


def scheduler(max_value: float = 1.5, float64: bool = False) -> DDPMScheduler:
    """As released, or with the same tables in float64 (diffusers multiplies them up in float32)."""
    made = DDPMScheduler(**{**SCHEDULER, "sample_max_value": max_value})
    if float64:
        betas = [min(1 - if_alpha_bar((i + 1) / 1000) / if_alpha_bar(i / 1000), 0.999) for i in range(1000)]
        made.alphas_cumprod = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    return made


def if_alpha_bar(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def make_schedule() -> None:
    made = scheduler()
    names = ["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super40", "super100"]
    leading = {}
    for n in [1, 2, 3, 7, 10, 20, 27, 50, 64, 100, 150, 333, 999, 1000]:
        made.set_timesteps(n)
        leading[str(n)] = made.timesteps.tolist()
    leading["999"], leading["1000"] = leading["999"][:3] + leading["999"][-3:], leading["1000"][:3] + [2, 1, 0]
    where = [*range(0, 1000, 25), 1, 2, 10, 990, 997, 998, 999]
    linear = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    save_json(
        "schedule",
        {
            "named": {n: getattr(if_timesteps, f"{n}_timesteps") for n in names},
            "leading": leading,
            "at": where,
            "betas": made.betas[where].tolist(),
            "alphas_cumprod": made.alphas_cumprod[where].tolist(),
            "linear_alphas_cumprod": linear.alphas_cumprod[where].tolist(),
        },
    )


# name: sample_max_value, number of steps or a list of them, steps to write down (others are only walked through)
WALKS = {
    "ten": (1.5, 10, [0, 4, 8, 9]),
    "twenty_seven": (1.0, 27, [0, 13, 25]),
    "fifty": (1.5, 50, [20, 48, 49]),
    "hundred": (1.0, 100, [50, 98]),
    "fast27": (1.5, if_timesteps.fast27_timesteps, [0, 1, 12, 25]),
}
SHAPE = (2, 3, 8, 8)


def model_output(walk: str, i: int, x_t: torch.Tensor, alpha_bar_t: float) -> torch.Tensor:
    """What stands in for a network in step i: mostly the right answer for an image of zeros, so x_start stays of
    order 1, and a variance output that also leaves [-1, 1]. The tests repeat this formula."""
    eps = (1 - alpha_bar_t) ** 0.5 * x_t + 0.3 * alpha_bar_t**0.5 * normal(f"{walk}.{i}.eps", *SHAPE)
    return torch.cat([eps, 1.2 * torch.tanh(normal(f"{walk}.{i}.pred_var", *SHAPE))], dim=1)


def make_ddpm() -> None:
    out = {}
    for walk, (max_value, steps, written) in WALKS.items():
        made = scheduler(max_value)
        made.set_timesteps(timesteps=steps) if isinstance(steps, list) else made.set_timesteps(steps)
        exact = scheduler(max_value, float64=True)
        exact.timesteps, exact.num_inference_steps = made.timesteps, made.num_inference_steps
        exact.custom_timesteps = made.custom_timesteps
        out[f"{walk}.timesteps"] = made.timesteps
        for table, s in (("released", made), ("float64", exact)):
            x = normal(f"{walk}.x_T", *SHAPE)
            for i, t in enumerate(made.timesteps):
                y = model_output(walk, i, x, exact.alphas_cumprod[t].item())
                z = normal(f"{walk}.{i}.noise", *SHAPE)
                with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=z):
                    result = s.step(y, t, x)
                if table == "released" and i in written:
                    out[f"{walk}.{i}.x_t"], out[f"{walk}.{i}.x_prev"] = x, result.prev_sample
                    out[f"{walk}.{i}.pred_x_start"] = result.pred_original_sample
                x = result.prev_sample
            out[f"{walk}.final.{table}"] = x
    save("ddpm", out)


# --- pipelines --------------------------------------------------------------------------------------------------------


class Draws:
    """Stands in for diffusers' randn_tensor, and writes down the shape of every draw."""

    def __init__(self, real):
        self.real, self.shapes = real, []

    def __call__(self, shape, generator=None, **more):
        self.shapes.append(list(shape))
        return self.real(shape, generator=generator, **more)


def make_stages() -> None:
    parts = {
        "tokenizer": None, "text_encoder": None, "safety_checker": None, "feature_extractor": None,
        "watermarker": None, "requires_safety_checker": False,
    }  # fmt: skip
    positive, negative = normal("stages.prompt_embeds", 2, 77, 32), normal("stages.negative_prompt_embeds", 2, 77, 32)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    out, draws_of = {}, {}
    where = ("pipelines.deepfloyd_if.pipeline_if", "pipelines.deepfloyd_if.pipeline_if_superresolution")
    where += ("schedulers.scheduling_ddpm",)
    for table in ("released", "float64"):
        draws = Draws(randn_tensor)
        patches = [mock.patch(f"diffusers.{w}.randn_tensor", draws) for w in where]
        for patch in patches:
            patch.start()
        stage_1 = IFPipeline(unet=calm(build_unet("stage_1")), scheduler=scheduler(1.5, table == "float64"), **parts)
        stage_1.set_progress_bar_config(disable=True)
        runs = {"ten": {"num_inference_steps": 10}, "fast27": {"timesteps": if_timesteps.fast27_timesteps}}
        for name, steps in runs.items():
            draws.shapes = []
            out[f"stage_1.{name}.{table}"] = stage_1(
                prompt_embeds=positive, negative_prompt_embeds=negative, guidance_scale=7.0, output_type="pt",
                generator=[torch.Generator().manual_seed(s) for s in (5, 6)], height=8, width=8, **steps,
            ).images  # fmt: skip
            draws_of[f"stage_1.{name}"] = [list(s) for s in draws.shapes]
        low_res = normal("stages.low_res", 2, 3, 4, 4).tanh()
        if table == "float64":
            noising.alphas_cumprod = stage_1.scheduler.alphas_cumprod
        stage_2 = IFSuperResolutionPipeline(
            unet=calm(build_unet("stage_2")), scheduler=scheduler(1.0, table == "float64"),
            image_noising_scheduler=noising, **parts,
        )  # fmt: skip
        stage_2.set_progress_bar_config(disable=True)
        draws.shapes = []
        out[f"stage_2.{table}"] = stage_2(
            image=low_res, prompt_embeds=positive, negative_prompt_embeds=negative, guidance_scale=4.0, noise_level=250,
            output_type="pt", generator=[torch.Generator().manual_seed(s) for s in (7, 8)], height=16, width=16,
            num_inference_steps=5,
        ).images  # fmt: skip
        draws_of["stage_2"] = [list(s) for s in draws.shapes]
        for patch in patches:
            patch.stop()
    out["first_draw_of_seed_5"] = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    save("stages", out, draws=draws_of)


def make_edits() -> None:
    """Starting from an image (img2img), keeping some of it (inpainting), and the walk of RePaint."""
    parts = {
        "tokenizer": None, "text_encoder": None, "safety_checker": None, "feature_extractor": None,
        "watermarker": None, "requires_safety_checker": False,
    }  # fmt: skip
    picture, mask = normal("edits.picture", 1, 3, 8, 8).tanh(), torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 3:8] = 1
    given = {
        "prompt_embeds": normal("stages.prompt_embeds", 2, 77, 32)[:1], "guidance_scale": 7.0, "output_type": "pt",
        "negative_prompt_embeds": normal("stages.negative_prompt_embeds", 2, 77, 32)[:1], "num_inference_steps": 10,
        "image": picture,
    }  # fmt: skip
    out = {}
    for table in ("released", "float64"):
        for name, kind, more in (
            ("inpaint", IFInpaintingPipeline, {"mask_image": mask, "strength": 1.0}),
            ("inpaint_late", IFInpaintingPipeline, {"mask_image": mask, "strength": 0.6}),
            ("img2img", IFImg2ImgPipeline, {"strength": 0.7}),
        ):
            pipeline = kind(unet=calm(build_unet("stage_1")), scheduler=scheduler(1.5, table == "float64"), **parts)
            pipeline.set_progress_bar_config(disable=True)
            generator = [torch.Generator().manual_seed(5)]
            out[f"{name}.{table}"] = pipeline(**given, **more, generator=generator).images
    walks = {}
    for steps, jump_length, jump_n_sample in ((250, 10, 10), (10, 2, 2), (34, 10, 3), (20, 5, 1)):
        made = RePaintScheduler()
        made.set_timesteps(steps, jump_length, jump_n_sample)
        walks[f"{steps},{jump_length},{jump_n_sample}"] = (made.timesteps // (1000 // steps)).tolist()
    save("edits", out, repaint=walks)


def make_flow() -> None:
    """From noise at time 0 to time 1, in seven steps or within a tolerance, in float64."""
    x_0, times = normal("flow.x_0", 4, 1, 2, 3).double(), torch.linspace(0, 1, 8, dtype=torch.float64)

    def velocity(time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return bent(x, time.expand(len(x)))

    out = {
        ours: odeint(velocity, x_0, times, method=method)[-1]
        for ours, method in (("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"))
    }
    for tolerance in (1e-3, 1e-6, 1e-12):
        x = odeint(velocity, x_0, times[[0, -1]], method="dopri5", rtol=tolerance, atol=tolerance)
        out[f"dormand_prince.{tolerance:g}"] = x[-1]
    save("flow", out)


def make_solvers() -> None:
    """The times are those of minidiff.schedule.respaced: 0 to 999, both included, rounded."""
    times = {n: [round(k * 999 / (n - 1)) for k in reversed(range(n))] for n in STEPS}
    tensors, about = record(scheduler(float64=True).alphas_cumprod, times)
    save("solvers", tensors, **about, dtype="float64, CPU, one thread; released: float32 tables, end as float32")


# --- files ------------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, str]:
    versions = " ".join(f"{name}=={importlib.metadata.version(name)}" for name in PINS)
    return {
        "script": "tests/reference/make.py",
        "programs": versions,
        "seeds": "CRC-32 of each tensor's name (fill.py); torch.Generator seeds 5 to 8 in stages",
        "dtype": "float32, CPU, one thread",
    }


def save(name: str, tensors: dict[str, torch.Tensor], **more: object) -> None:
    """The metadata has one entry, for safetensors writes several in random order and the file would never be equal."""
    tensors = {k: x.detach().clone().contiguous() for k, x in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", metadata={"provenance": json.dumps({**provenance(), **more})})


def save_json(name: str, content: dict) -> None:
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {"provenance": provenance(), **content}.items())
    (HERE / f"{name}.json").write_text("{" + lines + "}\n", encoding="utf-8")


def main() -> None:
    for name, pin in PINS.items():
        version = importlib.metadata.version(name).split("+")[0]
        if version != pin:
            raise SystemExit(f"{name} is {version}, but these files are made with {pin}; see the head of this script")
    logging.disable(logging.WARNING)
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parts = (make_unet, make_t5, make_tokens, make_schedule, make_ddpm, make_stages, make_edits, make_flow)
    for make in (*parts, make_solvers):
        make()
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model"):
            print(f"{path.stat().st_size:8d}  {path.name}")


if __name__ == "__main__":
    main()
