"""Which models there are, where they lie on this machine, how to fetch those that do not, and whether they are whole.

    python -m minidiff.weights list                     every model, and whether it is here
    python -m minidiff.weights download IF-I-M-v1.0     into the Hugging Face cache
    python -m minidiff.weights check mini               builds every part, reads every number

A model folder has the layout of the released DeepFloyd repositories: `unet/config.json` beside the UNet's safetensors,
`scheduler/scheduler_config.json`, `text_encoder/`, `tokenizer/spiece.model`. Skim it.
"""

import argparse
import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff import cli
from minidiff.checkpoint import VARIANT, Checkpoint, WeightsError, choose_files, read_config
from minidiff.deepfloyd.stages import plan_stage
from minidiff.deepfloyd.text import plan_text_encoder

RELEASED = {  # published as DeepFloyd/NAME: stage, and the size of its UNet in float16
    "IF-I-M-v1.0": (1, "0.74 GB"),
    "IF-I-L-v1.0": (1, "1.87 GB"),
    "IF-I-XL-v1.0": (1, "8.61 GB"),
    "IF-II-M-v1.0": (2, "0.92 GB"),
    "IF-II-L-v1.0": (2, "2.49 GB"),
}
MINI = {1: "mini-IF-I", 2: "mini-IF-II"}  # what `--model mini` means, by stage
PACKAGED = Path(__file__).parent / "weights_data"  # of a wheel: see pyproject.toml
WEIGHTS = PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parent.parent / "weights"
PARTS = {  # the files of each part on the hub: two that every folder must have, then the weights in float16 and more
    "unet": ("unet/config.json", "scheduler/scheduler_config.json", "unet/*fp16*.safetensors", "image_noising_*"),
    "text_encoder": ("text_encoder/config.json", "tokenizer/spiece.model", "text_encoder/*fp16*.safetensors"),
}
LICENCE_PAGE = "https://huggingface.co/DeepFloyd/IF-I-XL-v1.0"
PATIENCE = 10  # seconds for an answer of the hub


def resolve(model: str, stage: int, parts: Collection[str] = ("unet",), say: Callable[[str], object] = str) -> Path:
    """The folder that holds these parts of a model, in the released layout; downloaded if it must be.

    model: "mini" (embedded), a folder, a name in `weights/`, or a released name; looked for in that order, a released
    name then in the Hugging Face cache (without touching the network), then on the hub.    Raises WeightsError.
    stage: 1 or 2.  parts: of "unet" (with its scheduler) and "text_encoder" (with its tokenizer). All released models
    share one text encoder, so parts=("text_encoder",) accepts whichever is already here.
    say: hears what is about to be downloaded, and how large it is.
    """
    name, folder, found = model.removeprefix("DeepFloyd/"), find(model, stage, parts), stage
    if "unet" in parts and folder is None:
        found = RELEASED[name][0]
    elif "unet" in parts:  # that of stage 2 sees the low-resolution image, too
        found = 2 if read_config(folder / "unet").get("in_channels") == 6 else 1
    if found != stage:
        kind = {1: "text to 64x64", 2: "64x64 to 256x256"}
        choices = ", ".join(["mini", *(name for name, (number, _) in RELEASED.items() if number == stage)])
        raise WeightsError(f"{model} is a model of stage {found} ({kind[found]}), but one of stage {stage} "
                           f"({kind[stage]}) is needed: {choices}")  # fmt: skip
    return folder or _download(f"DeepFloyd/{name}", parts, say)


def short_name(model: str | Path, stage: int) -> str:
    """One name for one model, however it is spelled: "mini" for the embedded one, a released one without its owner.
    A folder of a released name comes first, here as in `resolve`, and keeps its name."""
    model = str(model)
    if cli.file_path(model).is_dir():
        return model
    return "mini" if model == MINI[stage] else model.removeprefix("DeepFloyd/")


def names_of(model: str | Path, stage2: str | Path) -> dict[int, str]:
    """{1: name, 2: name} of the models of a cascade, without those that are "none".

    stage2 "auto" is what fits the model; a folder has none.  Raises ValueError if no stage is left.
    """
    model, stage2 = short_name(model, 1), short_name(stage2, 2)
    if stage2 == "auto":
        stage2 = "mini" if model == "mini" else "IF-II-M-v1.0" if model in RELEASED else "none"
    names = {number: name for number, name in ((1, model), (2, stage2)) if name != "none"}
    if not names:
        raise ValueError("a cascade needs a stage; pass a model of stage 1, or of stage 2, that is not none")
    return names


def find(model: str, stage: int, parts: Collection[str]) -> Path | None:
    """As `resolve`, without the network: None if it is a released model that is not here, or only in part."""
    name, folders = model.removeprefix("DeepFloyd/"), places(model, stage)
    if name in RELEASED and not cli.file_path(model).is_dir():
        others = RELEASED if set(parts) == {"text_encoder"} else ()
        folders += [folder for other in others for folder in places(other, stage)]
        return next((folder for folder in folders if not lack(folder, parts)), None)
    if not folders:
        known = f"nor embedded ({', '.join(['mini', *embedded()])}), nor released ({', '.join(RELEASED)})"
        raise WeightsError(f"no model {model!r}: neither a folder, {known}")
    if fault := lack(folders[0], parts):
        raise WeightsError(fault)
    return folders[0]


def places(model: str, stage: int) -> list[Path]:
    """The folders of this model on this machine, whole or not, in the order in which they are taken."""
    name = model.removeprefix("DeepFloyd/")
    elsewhere = [WEIGHTS / name, *(snapshots(name) if name in RELEASED else ())]
    found = [WEIGHTS / MINI[stage]] if model == "mini" else [cli.file_path(model), *elsewhere]
    return [folder for folder in found if folder.is_dir()]


def encoder_here(model: str) -> Path | None:
    """The folder with a whole text encoder for a model, if it is on this machine."""
    with contextlib.suppress(WeightsError):
        return find(model, 1, ("text_encoder",))


def embedded() -> list[str]:
    """The names of the models in `weights/`."""
    return sorted(p.parent.parent.name for p in WEIGHTS.glob("*/unet/config.json"))


def snapshots(name: str) -> list[Path]:
    """The folders of a released model in the Hugging Face cache, the newest first."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--DeepFloyd--{name}" / "snapshots"
    return sorted(folder.glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)


def lack(folder: Path, parts: Collection[str]) -> str:
    """What a folder lacks of these parts, in words; empty if nothing."""
    faults = []
    for part in parts:
        missing = [name for name in PARTS[part][:2] if not (folder / name).is_file()]
        needs = f"which the {part.replace('_', ' ')} needs in the layout of the released models"
        faults += [f"{folder} lacks {' and '.join(missing)}, {needs}"] if missing else []
        try:
            names = [path.name for path in folder.glob(f"{part}/*")]
            choose_files(names, None, f"{folder}/{part}")
        except WeightsError as error:
            faults += [str(error)] if names else []
    return "; ".join(faults)


def _download(repo: str, parts: Collection[str], say: Callable[[str], object]) -> Path:
    """Fetch what these parts need into the Hugging Face cache and return the folder there. Raises WeightsError."""
    import huggingface_hub as hub

    patterns, cache = [pattern for part in parts for pattern in PARTS[part]], Path(hub.constants.HF_HUB_CACHE)
    try:
        files = hub.HfApi().model_info(repo, files_metadata=True, timeout=PATIENCE).siblings
        files = hub.utils.filter_repo_objects(files, allow_patterns=patterns, key=lambda file: file.rfilename)
        missing = [f for f in files if not isinstance(hub.try_to_load_from_cache(repo, f.rfilename), str)]
        size = sum(f.size or 0 for f in missing)
        text = tqdm.format_sizeof(size, "B")
        say(f"downloading {repo} ({', '.join(parts)}): {len(missing)} files, {text}, to {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(cache).free) < size:
            raise WeightsError(f"{text} needed, {tqdm.format_sizeof(free, 'B')} free in {cache}; set HF_HOME to a "
                               "folder on a larger disk")  # fmt: skip
        folder = Path(hub.snapshot_download(repo, allow_patterns=patterns, etag_timeout=PATIENCE))
    except WeightsError:
        raise
    except Exception as error:  # the hub's own classes and those of its network library, which changed between versions
        partial = "".join(f"\nThe cache has a part: {lack(f, parts)}" for f in snapshots(repo.split("/")[1])[:1])
        raise WeightsError(explain(error, repo, hub.get_token() is not None) + partial) from error
    if fault := lack(folder, parts):
        raise WeightsError(fault)
    return folder


def explain(error: BaseException, repo: str, has_token: bool) -> str:
    """Why a download failed (not logged in, licence not accepted, unreachable) and the three steps that solve it."""
    status, cause = None, error
    while status is None and cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__ or cause.__context__
    log_in = f"log in at https://huggingface.co and accept the licence at {LICENCE_PAGE}, once for all models"
    token = "run `hf auth login`, or set HF_TOKEN, with a token of that account that may read gated repositories"
    steps = [log_in, token, "run the same command again"]
    if status == 401:
        reason = "was refused: your token is not valid" if has_token else "is licensed, and you are not logged in"
    elif status == 403:
        reason = "is licensed: you are logged in, but this account has not accepted the licence"
    else:
        offline = f"the hub is unreachable or this machine offline ({error})"
        reason = f"cannot be downloaded: {'the hub answers with an error' if status else offline}"
        steps = [f"with a connection: {log_in}; {token}",
                 f"run `python -m minidiff.weights download {repo.split('/')[-1]}`, here or on another machine",
                 "if on another: copy the folder it prints, and pass it here as --model PATH"]  # fmt: skip
    reason += f" ({status})" if status else ""
    steps = "".join(f"\n  {i}. {step}" for i, step in enumerate(steps, 1))
    return f"{repo} {reason}.{steps}\nOr use --model mini, which is embedded and needs none of this."


def check(folder: Path, say: Callable[[str], object]) -> bool:
    """Build each part of a model folder as drawing does, and read each number once.
    Returns False, after saying why, if anything is missing, broken or of another architecture."""
    say(str(folder))
    parts = [part for part in PARTS if (folder / part).is_dir()]
    faults = [] if parts else [f"has none of {', '.join(PARTS)}"]
    for part in parts:
        try:
            for dtype in {Checkpoint(folder, part, dtype).files[0]: dtype for dtype in VARIANT}.values():
                _check_part(folder, part, dtype, say)
        except (ValueError, OSError) as error:
            faults.append(f"{part}: {error}")
    verdict = "this model is whole" if "unet" in parts else "the text encoder is whole; there is no unet to draw with"
    say("\n".join(f"  {fault}" for fault in faults) or f"  {verdict}")
    return not faults


def _check_part(folder: Path, part: str, dtype: torch.dtype, say: Callable[[str], object]) -> None:
    """The variant of a part that dtype takes, with all that lies beside it. Raises ValueError or OSError."""
    checkpoint = Checkpoint(folder, part, dtype)
    for path in checkpoint.files:
        say(f"  {part}/{path.name}: {tqdm.format_sizeof(path.stat().st_size, 'B')}")
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    types = sorted({str(dtype).removeprefix("torch.") for dtype in checkpoint.dtypes.values()})
    say(f"  {part}: {parameters:,} parameters in {len(checkpoint.shapes)} tensors, {', '.join(types)}")
    plan = plan_stage if part == "unet" else plan_text_encoder
    plan(folder, dtype)
    checkpoint.check_finite()
    say(f"  {part}: every key and shape fits, every number is finite")


def _list() -> None:
    rows = {"mini": (WEIGHTS, MINI.values())}  # name: where it lies, and the folders of its unets
    rows |= {name: (WEIGHTS / name, [name]) for name in embedded() if name not in RELEASED}
    for name, (place, folders) in rows.items():
        fault = "; ".join(filter(None, (lack(WEIGHTS / folder, ("unet",)) for folder in folders)))
        print(f"{name:14} {f'incomplete: {fault}' if fault else f'embedded        {place}'}")
    for name, (stage, size) in RELEASED.items():
        whole = find(name, stage, ("unet",))
        parts = [f"incomplete: {lack(folder, ('unet',))}" for folder in places(name, stage)]
        print(f"{name:14} stage {stage} {size:>9} {whole or ', '.join(parts) or 'not on this machine'}")
    print(f"{'text encoder':14} of all    11.5 GB {encoder_here('IF-I-M-v1.0') or 'not on this machine'}")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="which models there are, and which are on this machine")
    fetch = commands.add_parser("download", help="fetch a released model into the Hugging Face cache")
    fetch.add_argument("name", choices=list(RELEASED))
    fetch.add_argument("--part", choices=[*PARTS, "all"], default="unet", help="default: unet")
    look = commands.add_parser("check", help="does a model on this machine fit the architecture, and is it whole?")
    look.add_argument("model", help="mini, a folder, a name in weights/, or a released name that is in the cache")
    args = parser.parse_args(argv)
    if args.command == "list":
        _list()
    elif args.command == "download":
        parts = tuple(PARTS) if args.part == "all" else (args.part,)
        print(resolve(args.name, RELEASED[args.name][0], parts, print))
    else:
        folders = [folder for stage in MINI for folder in places(args.model, stage)[:1]]
        if not folders:
            raise WeightsError(f"{args.model} is neither a folder, nor in {WEIGHTS}, nor in the Hugging Face cache")
        if not all([check(folder, print) for folder in dict.fromkeys(folders)]):
            sys.exit(1)


if __name__ == "__main__":
    main()
