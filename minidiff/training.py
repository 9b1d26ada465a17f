"""The one training loop: the cascade's stages, the digits' networks and both judges learn in it.

Read `ddpm.py`, `images.py` and `charts.py` first. A trainer has a model, an optimizer, a loss and batches:

    for record in run(model, loss, batch_at, optimizer, plan, folder, settings):
        print(record)                                  # the model now holds its averaged weights: draw, or write them

`run` is a generator. It pauses after every checkpoint, and what happens then is the trainer's affair. The folder holds

    checkpoint.pt   weights, optimizer, average and step; there before the first step, and always whole
    loss.csv        the loss, a row for every `log_every` steps;  test.csv: the loss on held-out images
    loss.png        both as curves, with reference levels as dashed lines

`batch_at(step)` draws everything random of a step from a generator that knows only the seed and the step. So a run that
was stopped anywhere, by Ctrl-C or by force, ends in the same numbers as one that was not (on a CPU to the last bit).
The precision is part of those numbers: `fast_dtype` chooses it by the machine, and the first checkpoint keeps it.

Under `torchrun` every process makes its share of a batch and the gradients are averaged (`processes`).
"""

import contextlib
import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minidiff import checkpoint, images
from minidiff.charts import plot, read_rows
from minidiff.cli import device_of, stopped_between_steps

DTYPES = ("auto", "float32", "bfloat16")  # of --dtype
STATE = ("model", "optimizer", "ema", "step", "losses", "dtype", "settings")  # what a checkpoint holds
READ_EVERY = 50  # steps; reading a loss makes a GPU wait


@dataclass(frozen=True)
class Plan:
    """How a run goes.  steps: in all.  save_every: steps between checkpoints.  lr: step, from 0, to learning rate.

    log_every: steps whose mean loss is one row.  ema_decay: 0 keeps no average.  clip: largest norm of a gradient.
    """

    steps: int
    save_every: int
    lr: Callable[[int], float]
    log_every: int = 1
    ema_decay: float = 0.0
    clip: float = math.inf


class Record(NamedTuple):
    """Where a run is, after a checkpoint."""

    step: int
    steps: int
    loss: float  # mean of the steps since the last record; nan if there is none
    held_out: float | None  # the loss on held-out images
    steps_per_second: float
    dtype: str  # what it is trained in
    stopped: bool  # by Ctrl-C: this is the last record

    def __str__(self) -> str:
        held_out = "" if self.held_out is None else f", on held-out images {self.held_out:.5f}"
        stopped = "; stopped: the same command goes on from here" if self.stopped else ""
        loss = "no new step" if math.isnan(self.loss) else f"loss {self.loss:.5f}"
        return f"step {self.step} of {self.steps}: {loss}{held_out}, {self.steps_per_second:.3g} steps/s{stopped}"


def run(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch_at: Callable[[int], Any],
    optimizer: torch.optim.Optimizer, plan: Plan, folder: Path, settings: Mapping[str, object], *, dtype: str = "auto",
    held_out: Callable[[], float] | None = None, levels: Mapping[str, float] | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Train to the plan's end or until Ctrl-C, with a Record after every checkpoint, in the first process only.

    loss(model, batch) -> one number.  held_out() -> the loss on other images.  levels: reference levels of the plot.
    settings: what must be the same when a run goes on.  dtype: one of DTYPES; one that is named counts from now on.
    At a record, and after the last one, the model holds its averaged weights and is in eval mode.
    Raises ValueError as `previous`, and if the checkpoint is of another network or beyond the plan's end, or the folder
    cannot be written; FloatingPointError where a loss, a gradient or a weight is not finite (the checkpoint stays).
    """
    state = _begin(model, optimizer, plan, folder, settings, dtype)
    parallel = DistributedDataParallel(model) if world() > 1 else model
    recent, start = [], time.perf_counter()
    bar = tqdm(total=plan.steps, initial=state["step"], disable=rank() > 0, mininterval=5, leave=False)
    with stopped_between_steps() as stopped, bar:
        while True:
            step, stop = state["step"], _anyone(stopped(), model)
            end = stop or step == plan.steps
            if end or step % plan.save_every == 0:
                recent += _read_losses(state, plan, folder)
                if rank() == 0:
                    trained = _averaged(model, state["ema"])
                    value = held_out() if held_out is not None and step else None
                    _save(trained, optimizer, state, plan, folder, value, levels or {})
                    if step or end:
                        mean, speed = sum(recent) / max(len(recent), 1), len(recent) / (time.perf_counter() - start)
                        yield Record(step, plan.steps, mean if recent else math.nan, value, speed, state["dtype"], stop)
                if end:
                    return
                if rank() == 0:
                    model.load_state_dict(trained)
                recent, start = [], time.perf_counter()
            _step(model, parallel, loss, batch_at(step), optimizer, plan, state)
            bar.update()
            if len(state["losses"]) >= max(READ_EVERY, plan.log_every):
                recent += _read_losses(state, plan, folder)
                bar.set_postfix(loss=f"{recent[-1]:.4f}")


def _step(
    model: nn.Module, parallel: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any,
    optimizer: torch.optim.Optimizer, plan: Plan, state: dict,
) -> None:  # fmt: skip
    """One step of the optimizer and of the average. The loss stays on its device; nan if the gradient is not finite."""
    parallel.train()
    with precision(next(model.parameters()).device, state["dtype"]):
        value = loss(parallel, batch)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    if plan.clip < math.inf:
        norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        value = torch.where(norm.isfinite(), value, math.nan)
    for group in optimizer.param_groups:
        group["lr"] = plan.lr(state["step"])
    optimizer.step()
    if state["ema"] and rank() == 0:
        update_average(state["ema"], model, state["step"], plan.ema_decay)
    state["losses"].append(value.detach())
    state["step"] += 1


def update_average(ema: dict[str, Tensor], module: nn.Module, step: int, decay: float) -> None:
    """The exponential moving average of all weights, faster at first.

        ema = d ema + (1 - d) weights,    d = min(decay, (1 + step) / (10 + step))
    """
    decay = min(decay, (1 + step) / (10 + step))
    state = module.state_dict()
    torch._foreach_lerp_(list(ema.values()), [state[k] for k in ema], 1 - decay)


def _averaged(model: nn.Module, ema: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the average into the model, ready to draw. Returns the weights that it is trained with."""
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(trained | ema)
    model.eval()
    return trained


# ---------------------------------------------------------------------------------------------- precision, processes


def fast_dtype(device: torch.device) -> str:
    """bfloat16 where the machine has arithmetic for it, else float32. One machine always gets the same answer."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    has_avx512_bf16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bfloat16" if has_avx512_bf16 or checkpoint.default_dtype(device) == torch.float16 else "float32"


def precision(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Autocast to dtype; nothing for float32, as not every device has an autocast."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[torch.device]:
    """The device of this process. Under torchrun, all processes are joined inside, each with a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device_of(device)
        return
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    finally:
        torch.distributed.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 reads, writes and prints."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        torch.distributed.barrier()


def _anyone(stopped: bool, model: nn.Module) -> bool:
    """Has Ctrl-C reached any process? All must stop after the same step."""
    if world() == 1:
        return stopped
    flag = torch.tensor(float(stopped), device=next(model.parameters()).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


# ---------------------------------------------------------------------------------------------- what lies in the folder


def previous(folder: Path, settings: Mapping[str, object]) -> dict | None:
    """The state in folder/checkpoint.pt, or None if the run is new.

    Raises ValueError if it is damaged or of a run with other settings, or if a new run would replace a network.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        if any((folder.parent / name).is_file() for name in ("config.json", "unet/config.json")):
            raise ValueError(f"{folder.parent} holds a trained network, which this would replace; pass another --out")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: state[key] for key in STATE}
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of many classes, on files that are no checkpoints
        raise ValueError(f"{path} is no checkpoint of a run; pass another --out") from error
    for name, now in settings.items():
        if (before := state["settings"].get(name)) != now:
            raise ValueError(f"{path} is of a run with {name} {before}, not {now}; pass the settings of that run to go "
                             "on with it, or another --out")  # fmt: skip
    return state


def _begin(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, folder: Path, settings: Mapping[str, object],
    dtype: str,
) -> dict:  # fmt: skip
    """The state to go on from: that of the checkpoint, which fills model and optimizer, or of a new run."""
    device, state = next(model.parameters()).device, previous(folder, settings)
    images.check_output(folder / "loss.png")
    if state is not None and state["step"] > plan.steps:
        raise ValueError(f"{folder / 'checkpoint.pt'} is at step {state['step']} already, and the run is to end at "
                         f"{plan.steps}; pass more --steps, or another --out")  # fmt: skip
    if state is None:
        floats = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        average = {key: value.detach().clone() for key, value in floats.items()} if plan.ema_decay else {}
        state = {"ema": average, "step": 0, "losses": [], "dtype": fast_dtype(device), "settings": dict(settings)}
    else:
        try:
            model.load_state_dict(state.pop("model"))
        except RuntimeError as error:
            raise ValueError(f"{folder / 'checkpoint.pt'} is of another network; pass another --out") from error
        optimizer.load_state_dict(state.pop("optimizer"))
        state["ema"] = {key: value.to(device) for key, value in state["ema"].items()}
    barrier()  # the first process writes only when all have read
    if dtype != "auto":
        state["dtype"] = dtype
    if rank() == 0:
        for name, last in (("loss.csv", state["step"]), ("test.csv", state["step"] - 1)):  # what follows is made again
            rows = [row for row in read_rows(folder / name) if row[0] <= last]
            (folder / name).unlink(missing_ok=True)
            add_rows(folder / name, ("step", "loss"), rows)
    return state


def _read_losses(state: dict, plan: Plan, folder: Path) -> list[float]:
    """Bring the losses since the last call from the device into loss.csv. Returns them.

    Raises FloatingPointError if one is not finite.
    """
    n, values = plan.log_every, [float(value) for value in state["losses"]]
    first, old = state["step"] - len(values), sum(isinstance(value, float) for value in state["losses"])
    bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), len(values))
    rows = [(first + end, sum(values[end - n : end]) / n) for end in range(n, bad + 1, n)]
    state["losses"] = values[len(rows) * n :]  # too few for a row
    if rank() == 0:
        add_rows(folder / "loss.csv", ("step", "loss"), rows)
    if bad < len(values):
        _diverged(f"the loss or its gradient is {values[bad]} at step {first + bad + 1}", plan, folder)
    return values[old:]


def _diverged(how: str, plan: Plan, folder: Path) -> None:
    plot(folder, plan.save_every, {})
    raise FloatingPointError(f"{how}; the last good checkpoint is {folder / 'checkpoint.pt'}, the curves lie beside "
                             "it: train with a smaller --lr into another --out")  # fmt: skip


def _save(
    trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict, plan: Plan, folder: Path,
    held_out: float | None, levels: Mapping[str, float],
) -> None:  # fmt: skip
    """The checkpoint, complete or not there, and the curves. Raises FloatingPointError if a number is not finite."""
    step = state["step"]
    if not all(value.isfinite().all() for value in trained.values()):
        _diverged(f"there are weights that are not finite after step {step}", plan, folder)
    if held_out is not None:
        if not math.isfinite(held_out):
            _diverged(f"the loss on held-out images is {held_out} after step {step}", plan, folder)
        add_rows(folder / "test.csv", ("step", "loss"), [(step, held_out)])
    checkpoint.save_state(state | {"model": trained, "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    plot(folder, plan.save_every, levels)


def add_rows(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Rows (step, numbers ...) at the end of a table, which begins with its header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if new else [])
        writer.writerows((step, *(f"{value:.9g}" for value in more)) for step, *more in rows)
