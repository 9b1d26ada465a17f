"""Which models there are, where they lie on this machine, and how to fetch those that do not.

Everything on disk has the layout of the released DeepFloyd repositories: `unet/config.json` beside the UNet's
safetensors, `text_encoder/` in several shards, `tokenizer/spiece.model`, `scheduler/scheduler_config.json`. `resolve`
turns a name or a path into such a folder, and downloads a released model that is nowhere on this machine.

This is plumbing: skim it. Next: `weights.py`, which reads what lies there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch


class WeightsError(ValueError):
    """Weights that are missing, unreachable, broken or of another model. The message says what to do."""


class Released(NamedTuple):
    """A model published by DeepFloyd: where, which stage of the cascade, and how large its UNet is."""

    repo: str
    stage: int
    parameters: int
    fp16_bytes: float


RELEASED = {
    "IF-I-M-v1.0": Released("DeepFloyd/IF-I-M-v1.0", 1, 371_605_830, 0.74e9),
    "IF-I-L-v1.0": Released("DeepFloyd/IF-I-L-v1.0", 1, 935_365_830, 1.87e9),
    "IF-I-XL-v1.0": Released("DeepFloyd/IF-I-XL-v1.0", 1, 4_304_695_110, 8.61e9),
    "IF-II-M-v1.0": Released("DeepFloyd/IF-II-M-v1.0", 2, 461_064_198, 0.92e9),
    "IF-II-L-v1.0": Released("DeepFloyd/IF-II-L-v1.0", 2, 1_242_987_270, 2.49e9),
}
MINI = {1: "mini-IF-I", 2: "mini-IF-II"}  # what `--model mini` means, by stage
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # the folder of the repository, beside the package
PARTS = ("unet", "text_encoder")
LICENCE_PAGE = "https://huggingface.co/DeepFloyd/IF-I-XL-v1.0"
CHANNELS_OF_STAGE = {1: 3, 2: 6}  # stage 2 sees the low-resolution picture too
VARIANT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: ""}
# unet: diffusion_pytorch_model, text encoder: model; the variant stands before the shard number or, formerly, after it.
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(fp16|bf16))?(?:-(\d+)-of-(\d+))?(?:\.(fp16|bf16))?\.safetensors"
)


# ---------------------------------------------------------------------------------------------- finding


def resolve(
    model: str, stage: int, parts: Collection[str] = ("unet",), say: Callable[[str], None] = lambda text: None
) -> Path:
    """The folder that holds these parts of a model, in the released layout; downloaded if it must be.

    model: "mini" (embedded), a folder, a name in `weights/`, or a released name; looked for in that order, a released
    name then in the Hugging Face cache (without touching the network), then on the Hugging Face hub.
    stage: 1 or 2.  parts: of "unet" (with its scheduler) and "text_encoder" (with its tokenizer). All released models
    share one text encoder, so parts=("text_encoder",) accepts whichever is already here.
    say: is told what is about to be downloaded, and how large.
    Raises WeightsError if there is no such model, it is of the other stage, incomplete or cannot be downloaded.
    """
    if stage not in MINI or not parts or set(parts) - set(PARTS):
        raise WeightsError(f"stage must be 1 or 2 and parts some of {', '.join(PARTS)}, got {stage!r} and {parts!r}")
    name = model.removeprefix("DeepFloyd/")
    if name in RELEASED and "unet" in parts and RELEASED[name].stage != stage:
        raise _other_stage(name, RELEASED[name].stage, stage)
    folder = _find(model, name, stage, parts)
    if folder is None:
        folder = _download(RELEASED[name].repo, parts, say)
    if "unet" in parts:
        channels = read_config(folder / "unet").get("in_channels", CHANNELS_OF_STAGE[1])
        if channels != CHANNELS_OF_STAGE[stage]:
            raise _other_stage(str(folder), 2 if channels == CHANNELS_OF_STAGE[2] else 1, stage)
    return folder


def short_name(model: str, stage: int) -> str:
    """One name for one model, however it was spelled: "mini" for the embedded one, a released one without its owner.

    A folder of such a name comes first, here as in `resolve`, and keeps its own.
    """
    if Path(model).expanduser().is_dir():
        return model
    return "mini" if model == MINI[stage] else model.removeprefix("DeepFloyd/")


def _find(model: str, name: str, stage: int, parts: Collection[str]) -> Path | None:
    """The folder if it is on this machine, None if it is a released model that is not."""
    path = WEIGHTS / MINI[stage] if model == "mini" else Path(model).expanduser()
    if path.is_file():
        raise WeightsError(f"{path} is a file; pass the folder that holds unet/config.json")
    if path.is_dir():
        needed_files(listing(path), parts, str(path))
        return path
    if model == "mini":
        raise WeightsError(f"the embedded weights are missing: {path} is part of the repository, clone it again")
    if name not in RELEASED:
        if (WEIGHTS / name).is_dir():
            needed_files(listing(WEIGHTS / name), parts, str(WEIGHTS / name))
            return WEIGHTS / name
        raise WeightsError(
            f"no model {model!r}: neither a folder, nor embedded ({', '.join(['mini', *embedded()])}), "
            f"nor released ({', '.join(RELEASED)})"
        )
    for candidate in [name, *(RELEASED if set(parts) == {"text_encoder"} else ())]:
        for folder in (WEIGHTS / candidate, cached(RELEASED[candidate].repo, parts)):
            if folder is not None and folder.is_dir() and _is_complete(folder, parts):
                return folder
    return None


def embedded() -> list[str]:
    """The names of the models in `weights/`."""
    return sorted(p.parent.parent.name for p in WEIGHTS.glob("*/unet/config.json"))


def listing(folder: Path) -> list[str]:
    """The files of a model folder, relative to it: ["unet/config.json", ...]."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*") if p.is_file())


def cached(repo: str, parts: Collection[str]) -> Path | None:
    """The snapshot of a repository in the Hugging Face cache that has these parts' configs, or None. Stays offline."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, f"{min(parts)}/config.json")
    return Path(config).parent.parent if isinstance(config, str) else None


def needed_files(names: list[str], parts: Collection[str], where: str, dtype: torch.dtype | None = None) -> list[str]:
    """Of all files of a model, those that these parts need. Raises WeightsError naming what is not there."""
    needed = []
    for part in parts:
        inside = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")]
        if "config.json" not in inside:
            raise WeightsError(f"{where} has no {part}/config.json; it must have the layout of the released models")
        files = choose_files(inside, dtype, f"{where}/{part}")
        index = [n for n in inside if ".safetensors.index" in n and len(files) > 1]  # not read here, kept for others
        needed += [f"{part}/{n}" for n in ["config.json", *files, *index]]
        beside = "tokenizer/" if part == "text_encoder" else ("scheduler/sch", "image_noising_scheduler/sch")
        needed += [n for n in names if n.startswith(beside)]
    if "text_encoder" in parts and "tokenizer/spiece.model" not in needed:
        raise WeightsError(f"{where} has no tokenizer/spiece.model, which the text encoder needs")
    return needed


def choose_files(names: list[str], dtype: torch.dtype | None, where: str) -> list[str]:
    """Of the files of one part, those that hold its weights, in one variant (full, fp16 or bf16) and all its shards.

    dtype: what it is wanted for; the variant of that type is preferred, fp16 if None, and else whatever is there.
    Raises WeightsError if no variant is complete, naming the missing shards.
    """
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(names):
        if match := WEIGHT_FILE.fullmatch(name):
            before, number, total, after = match.groups()
            groups.setdefault((before or after or "", int(total or 1)), {})[int(number or 1)] = name
    wanted = VARIANT.get(dtype, "fp16") if dtype is not None else "fp16"
    order = [wanted, *(v for v in ("fp16", "", "bf16") if v != wanted)]
    for (_, total), shards in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        if len(shards) == total:
            return [shards[i] for i in sorted(shards)]
    if groups:
        (_, total), shards = next(iter(groups.items()))
        missing, like = ", ".join(str(i) for i in range(1, total + 1) if i not in shards), shards[max(shards)]
        raise WeightsError(f"{where}: of {total} shards like {like}, number {missing} is missing; fetch it too")
    others = [n for n in names if n.endswith((".safetensors", ".bin", ".pth", ".pt"))]
    if len(others) == 1 and others[0].endswith(".safetensors"):
        return others
    found = f"only {', '.join(others)}" if others else "nothing"
    raise WeightsError(f"{where}: expected a file like model.fp16.safetensors, found {found}; pickles are not read")


def _is_complete(folder: Path, parts: Collection[str]) -> bool:
    try:
        return bool(needed_files(listing(folder), parts, str(folder)))
    except WeightsError:
        return False


def _other_stage(what: str, stage: int, asked: int) -> WeightsError:
    kind = {1: "text to 64x64, 3 input channels", 2: "64x64 to 256x256, 6 input channels"}
    choices = [name for name, released in RELEASED.items() if released.stage == asked]
    return WeightsError(
        f"{what} is a stage {stage} model ({kind[stage]}), but a stage {asked} model ({kind[asked]}) is needed: "
        f"mini, {', '.join(choices)}"
    )


# ---------------------------------------------------------------------------------------------- downloading


def _download(repo: str, parts: Collection[str], say: Callable[[str], None]) -> Path:
    """Fetch what these parts need into the Hugging Face cache and return the folder there. Raises WeightsError."""
    import huggingface_hub as hub

    try:
        info = hub.HfApi().model_info(repo, files_metadata=True)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings}
        files = needed_files(list(sizes), parts, repo)
        missing = [f for f in files if not isinstance(hub.try_to_load_from_cache(repo, f), str)]
        cache = Path(hub.constants.HF_HUB_CACHE)
        total = sum(sizes[f] for f in missing)
        say(f"downloading {repo} ({', '.join(parts)}): {len(missing)} files, {in_words(total)}, to {cache}")
        _check_space(cache, total)
        for file in files:
            path = hub.hf_hub_download(repo, file)
    except WeightsError:
        raise
    except Exception as error:  # the hub's own classes and those of its network library, which changed between versions
        raise WeightsError(explain(error, repo, hub.get_token() is not None)) from error
    return Path(path).parent.parent


def explain(error: BaseException, repo: str, has_token: bool) -> str:
    """Why a download failed (not logged in, licence not accepted, unreachable) and the three steps that solve it."""
    status, link = None, error
    while link is not None and status is None:
        status = getattr(getattr(link, "response", None), "status_code", None)
        link = link.__cause__ or link.__context__
    log_in = f"log in at https://huggingface.co and accept the licence at {LICENCE_PAGE}, once for all models"
    token = "run `hf auth login` with a token of that account, or set HF_TOKEN"
    steps = [log_in, token, "run the same command again"]
    if status == 401 and not has_token:
        reason = "is licensed, and you are not logged in (401)"
    elif status == 401:
        reason = "was refused: your token is not valid (401)"
        steps[1] = "make a new token at https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN"
    elif status == 403:
        reason = "is licensed: you are logged in, but this account has not accepted the licence (403)"
        steps[1] += "; a fine-grained token must be allowed to read gated repositories"
    else:
        unreachable = f"the hub is unreachable or this machine offline ({type(error).__name__}: {error})"
        reason = f"cannot be downloaded: {f'the hub answered {status}' if status else unreachable}"
        steps = [
            f"with a connection: accept the licence at {LICENCE_PAGE}, run `hf auth login` or set HF_TOKEN",
            f"run `python -m minidiff.weights download {repo.split('/')[-1]}`, here or on another machine",
            "if on another: copy the folder it prints, and pass it here as --model PATH",
        ]
    numbered = "".join(f"\n  {i}. {step}" for i, step in enumerate(steps, 1))
    return f"{repo} {reason}.{numbered}\nOr use --model mini, which is embedded and needs none of this."


def _check_space(folder: Path, needed: float) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        room = f"{in_words(needed)} needed, {in_words(free)} free in {folder}"
        raise WeightsError(f"{room}; set HF_HOME to a folder on a larger disk")


def in_words(size: float) -> str:
    """A number of bytes for people: "134 B", "0.79 MB", "11.50 GB"."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.5 * scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def read_config(folder: Path) -> dict:
    """The config.json of a folder. Raises WeightsError as `read_json`."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict:
    """A file of a model folder. Raises WeightsError if it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"there is no {path}; the folder must have the layout of the released models") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON ({error}); delete it and fetch it again") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config
