"""Which models there are, where they lie on this machine, how to fetch those that do not, and whether they are whole.

    python -m minidiff.weights list                     every model, and whether it is here
    python -m minidiff.weights download IF-I-M-v1.0     into the Hugging Face cache
    python -m minidiff.weights check mini               builds every part, takes one step, reads every number

A model folder has the layout of the released DeepFloyd repositories: `unet/config.json` beside the UNet's safetensors,
`scheduler/scheduler_config.json`, `text_encoder/`, `tokenizer/spiece.model`. Skim it. Next: `deepfloyd/captions.py`.
"""

import argparse
import contextlib
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff import cli
from minidiff.checkpoint import VARIANT, Checkpoint, WeightsError, blaming, built, choose_files, read_config
from minidiff.deepfloyd.stages import read_process
from minidiff.deepfloyd.text import plan_text_encoder
from minidiff.deepfloyd.unet import UNet, UNetConfig

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
PARTS = ("unet", "text_encoder")
NEEDED = {"unet": "scheduler/scheduler_config.json", "text_encoder": "tokenizer/spiece.model"}  # beside each part
LICENCE_PAGE = "https://huggingface.co/DeepFloyd/IF-I-XL-v1.0"
CHANNELS_OF_STAGE = {1: 3, 2: 6}  # stage 2 sees the low-resolution image too
PATIENCE = 10  # seconds for an answer of the hub


def resolve(model: str, stage: int, parts: Collection[str] = ("unet",), say: Callable[[str], object] = str) -> Path:
    """The folder that holds these parts of a model, in the released layout; downloaded if it must be.

    model: "mini" (embedded), a folder, a name in `weights/`, or a released name; looked for in that order, a released
    name then in the Hugging Face cache (without touching the network), then on the Hugging Face hub.
    stage: 1 or 2.  parts: of "unet" (with its scheduler) and "text_encoder" (with its tokenizer). All released models
    share one text encoder, so parts=("text_encoder",) accepts whichever is already here.
    say: hears what is about to be downloaded, and how large it is.
    Raises WeightsError if there is no such model, it is of the other stage, incomplete or cannot be downloaded.
    """
    if stage not in MINI or not parts or set(parts) - set(PARTS):
        raise WeightsError(f"stage must be 1 or 2 and parts some of {', '.join(PARTS)}, got {stage!r} and {parts!r}")
    name = model.removeprefix("DeepFloyd/")
    if name in RELEASED and "unet" in parts and RELEASED[name][0] != stage:
        raise _other_stage(name, RELEASED[name][0], stage)
    folder = find(model, stage, parts) or _download(f"DeepFloyd/{name}", parts, say)
    channels = read_config(folder / "unet").get("in_channels", CHANNELS_OF_STAGE[1]) if "unet" in parts else None
    if channels not in (None, CHANNELS_OF_STAGE[stage]):
        raise _other_stage(str(folder), 2 if channels == CHANNELS_OF_STAGE[2] else 1, stage)
    return folder


def short_name(model: str, stage: int) -> str:
    """One name for one model, however it is spelled: "mini" for the embedded one, a released one without its owner.
    A folder of such a name comes first, here as in `resolve`, and keeps its name."""
    if cli.file_path(model).is_dir():
        return model
    return "mini" if model == MINI[stage] else model.removeprefix("DeepFloyd/")


def find(model: str, stage: int, parts: Collection[str]) -> Path | None:
    """As `resolve`, without the network: None if it is a released model that is not here, or only in part."""
    name = model.removeprefix("DeepFloyd/")
    path = WEIGHTS / MINI[stage] if model == "mini" else cli.file_path(model)
    if path.is_file():
        raise WeightsError(f"{path} is a file; pass the folder that holds unet/config.json")
    if not path.is_dir() and model != "mini" and name not in RELEASED:
        path = WEIGHTS / name
    if path.is_dir():
        if fault := lack(path, parts):
            raise WeightsError(fault)
        return path
    if model == "mini":
        raise WeightsError(f"the embedded weights are missing: {path} is part of the repository, clone it again")
    if name not in RELEASED:
        known = f"nor embedded ({', '.join(['mini', *embedded()])}), nor released ({', '.join(RELEASED)})"
        raise WeightsError(f"no model {model!r}: neither a folder, {known}")
    for candidate in [name, *(RELEASED if set(parts) == {"text_encoder"} else ())]:
        for folder in (WEIGHTS / candidate, *snapshots(candidate)):
            if not lack(folder, parts):
                return folder
    return None


def encoder_here(model: str) -> Path | None:
    """The folder with a whole text encoder for a model, if it is on this machine."""
    with contextlib.suppress(WeightsError):
        return find(model, 1, ("text_encoder",))


def embedded() -> list[str]:
    """The names of the models in `weights/`."""
    return sorted(p.parent.parent.name for p in WEIGHTS.glob("*/unet/config.json"))


def snapshots(name: str) -> list[Path]:
    """A released model in the Hugging Face cache, whole or not: the copy of refs/main first, then the newest."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--DeepFloyd--{name}"
    found = sorted((p for p in home.glob("snapshots/*") if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    with contextlib.suppress(OSError, ValueError):  # a cache that was copied may lack it
        main = (home / "refs" / "main").read_text().strip()
        found.sort(key=lambda p: p.name != main)
    return found


def lack(folder: Path, parts: Collection[str]) -> str:
    """What a folder lacks of these parts, in words; empty if nothing."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*") if p.is_file())
    try:
        needed_files(names, parts, str(folder))
        return ""
    except WeightsError as error:
        return str(error)


def needed_files(names: list[str], parts: Collection[str], where: str) -> list[str]:
    """Of all files of a model, those that these parts need. Raises WeightsError naming all that is not there."""
    needed, faults = [], []
    for part in parts:
        missing = [name for name in (f"{part}/config.json", NEEDED[part]) if name not in names]
        needs = f"which the {part.replace('_', ' ')} needs in the layout of the released models"
        faults += [f"{where} lacks {' and '.join(missing)}, {needs}"] if missing else []
        inside = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")]
        try:
            files = choose_files(inside, None, f"{where}/{part}")
        except WeightsError as error:
            faults += [str(error)] if inside else []
            continue
        index = [n for n in inside if ".safetensors.index" in n and len(files) > 1]
        needed += [f"{part}/{n}" for n in ["config.json", *files, *index]]
        beside = "tokenizer/" if part == "text_encoder" else ("scheduler/sch", "image_noising_scheduler/sch")
        needed += [n for n in names if n.startswith(beside)]
    if faults:
        raise WeightsError("; ".join(faults))
    return needed


def _other_stage(what: str, stage: int, wanted: int) -> WeightsError:
    kind = {1: "text to 64x64, 3 input channels", 2: "64x64 to 256x256, 6 input channels"}
    choices = ", ".join(["mini", *(name for name, (number, _) in RELEASED.items() if number == wanted)])
    kinds = f"a stage {stage} model ({kind[stage]}), but a stage {wanted} model ({kind[wanted]})"
    return WeightsError(f"{what} is {kinds} is needed: {choices}")


def _download(repo: str, parts: Collection[str], say: Callable[[str], None]) -> Path:
    """Fetch what these parts need into the Hugging Face cache and return the folder there. Raises WeightsError."""
    import huggingface_hub as hub

    try:
        info = hub.HfApi().model_info(repo, files_metadata=True, timeout=PATIENCE)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings}
        files = needed_files(list(sizes), parts, repo)
        missing = [f for f in files if not isinstance(hub.try_to_load_from_cache(repo, f), str)]
        cache = Path(hub.constants.HF_HUB_CACHE)
        total = sum(sizes[f] for f in missing)
        size = tqdm.format_sizeof(total, "B")
        say(f"downloading {repo} ({', '.join(parts)}): {len(missing)} files, {size}, to {cache}")
        _check_space(cache, total)
        for file in files:
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=PATIENCE)  # one try; the download has many
            path = hub.hf_hub_download(repo, file)
    except WeightsError:
        raise
    except Exception as error:  # the hub's own classes and those of its network library, which changed between versions
        partial = "".join(f"\nThe cache has a part: {lack(f, parts)}" for f in snapshots(repo.split("/")[1])[:1])
        raise WeightsError(explain(error, repo, hub.get_token() is not None) + partial) from error
    return Path(path).parent.parent


def explain(error: BaseException, repo: str, has_token: bool) -> str:
    """Why a download failed (not logged in, licence not accepted, unreachable) and the three steps that solve it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    status = next(filter(None, (getattr(getattr(e, "response", None), "status_code", None) for e in chain)), None)
    log_in = f"log in at https://huggingface.co and accept the licence at {LICENCE_PAGE}, once for all models"
    steps = [log_in, "run `hf auth login` with a token of that account, or set HF_TOKEN", "run the same command again"]
    if status == 401 and not has_token:
        reason = "is licensed, and you are not logged in (401)"
    elif status == 401:
        reason = "was refused: your token is not valid (401)"
        steps[1] = "make a new token at https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN"
    elif status == 403:
        reason = "is licensed: you are logged in, but this account has not accepted the licence (403)"
        steps[1] += "; a fine-grained token must be allowed to read gated repositories"
    else:
        reason = f"the hub is unreachable or this machine offline ({type(error).__name__}: {error})"
        if any("ReadTimeout" in type(e).__name__ for e in chain):
            reason = f"the hub does not answer within {PATIENCE} seconds; try again later"
        reason = f"cannot be downloaded: {f'the hub answered {status}' if status else reason}"
        steps[0] = f"with a connection: accept the licence at {LICENCE_PAGE}, run `hf auth login` or set HF_TOKEN"
        steps[1] = f"run `python -m minidiff.weights download {repo.split('/')[-1]}`, here or on another machine"
        steps[2] = "if on another: copy the folder it prints, and pass it here as --model PATH"
    steps = "".join(f"\n  {i}. {step}" for i, step in enumerate(steps, 1))
    return f"{repo} {reason}.{steps}\nOr use --model mini, which is embedded and needs none of this."


def _check_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        sizes = [tqdm.format_sizeof(size, "B") for size in (needed, free)]
        raise WeightsError(f"{sizes[0]} needed, {sizes[1]} free in {folder}; set HF_HOME to a folder on a larger disk")


def check(folder: Path, say: Callable[[str], None], model: str = "") -> bool:
    """Build each part of a model folder as drawing does, take one step without numbers, and read each number once.
    Returns False, after saying why, if anything is missing, broken or of another architecture.

    model: its name, if it has one: a released model may find its text encoder elsewhere.
    """
    parts = [part for part in PARTS if (folder / part).is_dir()]
    say(str(folder) if parts else f"{folder} has none of {', '.join(PARTS)}")
    widths, faults = {}, [] if "unet" in parts else ["unet: not here, so this model draws nothing"]
    for part in parts:
        try:
            files = []
            for checkpoint in (Checkpoint(folder, part, dtype) for dtype in VARIANT):
                if checkpoint.files not in files:
                    files.append(checkpoint.files)
                    widths[part] = _check_part(folder, part, checkpoint, say)
        except (ValueError, OSError, UserWarning) as error:
            faults.append(f"{part}: {error}")
    stage_1 = "unet" in widths and read_config(folder / "unet").get("in_channels") != CHANNELS_OF_STAGE[2]
    if stage_1 and "text_encoder" not in parts and not encoder_here(model or str(folder)):
        faults.append("text_encoder: not here, but stage 1 needs one; fetch it too")
    if len(set(widths.values())) > 1:
        faults.append(f"text_encoder: its states are {widths['text_encoder']} wide, the unet reads {widths['unet']}")
    say("\n".join(f"  {fault}" for fault in faults) or "  this model is whole")
    return not faults


def _check_part(folder: Path, part: str, checkpoint: Checkpoint, say: Callable[[str], None]) -> int:
    """One variant of a part. Returns the width of its text states. Raises ValueError, OSError or UserWarning."""
    for path in checkpoint.files:
        say(f"  {part}/{path.name}: {tqdm.format_sizeof(path.stat().st_size, 'B')}")
    types = sorted({str(d).removeprefix("torch.") for d in checkpoint.dtypes.values()})
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    say(f"  {part}: {parameters:,} parameters in {len(checkpoint.shapes)} tensors, {', '.join(types)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*scheduler_config.json")
        width = _step(folder, part, checkpoint)
    checkpoint.check_finite()
    if checkpoint.unused:
        unused, used = ", ".join(checkpoint.unused), checkpoint.files[0].name
        raise WeightsError(f"{unused} lies beside {used} and is not read; delete what is old")
    say(f"  {part}: every key and shape fits, one step works, every number is finite")
    return width


@torch.inference_mode()
def _step(folder: Path, part: str, checkpoint: Checkpoint) -> int:
    """Build a part with all that lies beside it, and take one step on `meta`. Returns the width of its text states."""
    if part == "text_encoder":
        tokenizer, network = plan_text_encoder(folder, checkpoint)
        inputs, width = [x.to("meta") for x in tokenizer([""])], network.config.d_model
    else:
        network = built(lambda config: UNet(UNetConfig.from_dict(config)), checkpoint)
        channels, size, width = network.config.in_channels, network.config.sample_size, network.config.encoder_hid_dim
        read_process(folder, channels)
        with torch.device("meta"):
            t = torch.zeros(1, dtype=torch.int64)
            inputs = [torch.empty(1, channels, size, size), t, torch.empty(1, 77, width)]
        inputs += [t] if channels == CHANNELS_OF_STAGE[2] else []
    with blaming(checkpoint.folder / "config.json"):
        network(*inputs)
    return width


def _list() -> None:
    faults = [fault for name in MINI.values() if (fault := lack(WEIGHTS / name, ("unet",)))]
    print(f"{'mini':14} {f'incomplete: {faults[0]}' if faults else f'embedded        {WEIGHTS}'}")
    for name in sorted(set(embedded()) - set(RELEASED)):
        print(f"{name:14} embedded        {WEIGHTS / name}")
    for name, (stage, size) in RELEASED.items():
        here = [folder for folder in (WEIGHTS / name, *snapshots(name)) if folder.is_dir()]
        state = next((str(folder) for folder in here if not lack(folder, ("unet",))), None)
        state = state or (f"incomplete: {lack(here[0], ('unet',))}" if here else "not on this machine")
        print(f"{name:14} stage {stage} {size:>9} {state}")
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
        parts = PARTS if args.part == "all" else (args.part,)
        print(resolve(args.name, RELEASED[args.name][0], parts, print))
    else:
        name = args.model.removeprefix("DeepFloyd/")
        places = [cli.file_path(args.model), WEIGHTS / name, *(snapshots(name) if name in RELEASED else ())]
        folders = [WEIGHTS / m for m in MINI.values()] if name == "mini" else [p for p in places if p.is_dir()][:1]
        if not folders:
            raise WeightsError(f"{name} is neither a folder, nor in {WEIGHTS}, nor in the Hugging Face cache")
        if not all([check(folder, print, args.model) for folder in folders]):
            sys.exit(1)


if __name__ == "__main__":
    main()
