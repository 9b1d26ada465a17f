"""The training loop that the denoiser, the diffusion models, the flows and the judge share.

A trainer gives it a network, the pictures, a plan, and its loss:

    loss(model, batch, generator) -> one number            batch: Digits; generator: for the noise of this step

What lies in OUT afterwards, beside the trainer's pictures:

    training/checkpoint.pt   network, optimizer, step, all losses: every epoch and on Ctrl-C, first under another name
    training/loss.csv        the loss of every step; test.csv: the loss on test pictures after every epoch
    training/loss.png        whole run, first and last epoch, the floors as lines
    config.json, model.fp16.safetensors     the network (`mnist/networks.py`) after every epoch, and of a run that was
                                            stopped, as far as it came (of the judge only at the end)

The same command again goes on from the checkpoint. The order of an epoch's pictures comes from (seed, epoch) and a
step's noise from (seed, step), so a run that was stopped anywhere ends in the same numbers as one that was not (on a
CPU to the last bit; a GPU may round otherwise from run to run).

How to compute is measured, not assumed: `measure` tries float32 and, but on Apple's GPUs, bfloat16, both memory
layouts; the checkpoint remembers which was chosen. Each rounds in its own way and so ends in other numbers. That two
runs of one command agree should not hang on a moment's noise, so of ways that are nearly as fast as the fastest, always
the same is taken.

Read `mnist/floors.py` first. Next: `mnist/flags.py`.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import charts, checkpoint, images
from minidiff.cli import stopped_between_steps
from minidiff.mnist import networks
from minidiff.mnist.data import Digits, generator

Loss = Callable[[nn.Module, Digits, torch.Generator], Tensor]
ORDER, STEP, TEST = range(3)  # what a generator is for
TEST_PICTURES = 2000  # on which the loss is measured after each epoch
CHECKPOINT = ("model", "optimizer", "losses", "test_losses", "what", "plan", "seed", "way")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
NEARLY = 1.15  # times the fastest way's seconds, and still as good


@dataclass(frozen=True)
class Plan:
    """How long and how fast. lr_decay: the factor by which lr has fallen after all epochs; it falls once per epoch.

    The last pictures of an epoch that would not fill a batch wait for another epoch: all batches are alike.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_decay: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError on numbers that no run can have."""
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.lr < math.inf or not 0 < self.lr_decay <= 1:
            raise ValueError(
                "need epochs and batch_size of at least 1, lr of at least 0, and lr_decay in (0, 1], got "
                f"{self.epochs}, {self.batch_size}, {self.lr:g}, {self.lr_decay:g}"
            )

    def lr_at(self, epoch: int) -> float:
        """lr * lr_decay^(epoch / epochs): with lr_decay 0.1 the course's ExponentialLR of gamma 0.1^(1 / epochs)."""
        return self.lr * self.lr_decay ** (epoch / self.epochs)

    def __str__(self) -> str:
        last = self.lr_at(self.epochs - 1)
        falling = f", falling to {last:.3g}" if last < self.lr else ""
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{epochs}, batches of {self.batch_size}, learning rate {self.lr:g}{falling}"


class Run:
    """One training run: what the checkpoint holds, and the step."""

    def __init__(
        self, model: nn.Module, loss: Loss, train: Digits, test: Digits, plan: Plan, folder: Path, *,
        what: str = "", seed: int = 0, floors: Callable[[], Mapping[str, float]] = dict, compiled: bool = False,
    ):  # fmt: skip
        """model, train and test on the device to train on.  floors() -> {name: level}, lines in the plot.

        what: what is trained, in words; a run only goes on with the same.
        Goes on from folder/checkpoint.pt if there is one. Raises ValueError as `checkpoint_of`, if a batch is larger
        than the training set, or the folder cannot be written.
        """
        if not 1 <= plan.batch_size <= len(train):
            raise ValueError(f"batch_size must lie in 1..{len(train)}, the pictures there are, got {plan.batch_size}")
        self.model, self.loss, self.train_set, self.test_set = model, loss, train, test
        self.plan, self.folder, self.what, self.seed = plan, folder, what, seed
        self.device = train.images.device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=plan.lr, fused=self.device.type in ("cpu", "cuda"))
        self.steps_per_epoch = len(train) // plan.batch_size
        self.losses: list[float] = []  # of every step
        self.test_losses: list[float] = []  # of every epoch
        self.checkpoint = folder / "checkpoint.pt"
        state = checkpoint_of(folder, what, plan, seed)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (probe := self.checkpoint.with_suffix(".tmp")).touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}); pass another --out") from error
        self.floors = floors()  # takes a while, so only once all else is well
        weights_in_all = sum(p.numel() for p in model.parameters())
        print(f"{plan}; {self.steps_per_epoch} batches in an epoch; {weights_in_all:,} weights")
        if state is not None:
            self.resume(state)
        else:
            self.way = measure(model, loss, train[: plan.batch_size])
            self.save()
        self.dtype, self.layout = DTYPES[self.way[0]], LAYOUTS[self.way[1]]
        self.model.to(memory_format=self.layout)
        # Only for the steps: asked with other batch sizes, too, it would be compiled otherwise in a run that goes on.
        self.in_step = torch.compile(model, dynamic=False) if compiled else model

    def resume(self, state: dict) -> None:
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"{self.checkpoint} is of another network; pass another --out") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.test_losses, self.way = state["losses"], state["test_losses"], tuple(state["way"])
        self.draw_curves()
        print(f"going on from step {len(self.losses)} of {self.checkpoint}")

    def save(self) -> None:
        """The checkpoint and the curves, each complete or not there."""
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            self.diverged(f"there are weights that are not finite after step {len(self.losses)}")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses,
                 "test_losses": self.test_losses, "what": self.what, "plan": asdict(self.plan), "seed": self.seed,
                 "way": list(self.way)}  # fmt: skip
        checkpoint.save_state(state, self.checkpoint)
        self.draw_curves()

    def draw_curves(self) -> None:
        _write_csv(self.folder / "loss.csv", ("step", "loss"), enumerate(self.losses, 1))
        _write_csv(self.folder / "test.csv", ("epoch", "loss"), enumerate(self.test_losses, 1))
        if self.losses:
            chart = curves(self.losses, self.test_losses, self.steps_per_epoch, self.floors)
            images.save(chart, self.folder / "loss.png", {})

    def one_step(self, batch: Digits, step: int) -> Tensor:
        """Loss, gradient, Adam. Returns the loss, still on the device: reading it would make every step wait.

        (Those of DDPM wait all the same, to look the noise of their times up: `Schedule.alpha_bar`.)
        """
        x = batch.images.to(memory_format=self.layout)
        with precision(self.device, self.dtype):
            loss = self.loss(self.in_step, Digits(x, batch.labels), generator(self.device, self.seed, STEP, step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, after_epoch: Callable[[int], None] | None = None) -> bool:
        """To the plan's end, or until Ctrl-C: which was it? after_epoch(epoch) is called with 1, 2, ...

        False after Ctrl-C, even in the last step.
        """
        n, total = self.steps_per_epoch, self.plan.epochs * self.steps_per_epoch
        self.model.eval()
        with stopped_between_steps() as stopped:
            while True:
                epoch, torn = divmod(len(self.losses), n)
                if epoch and not torn and after_epoch is not None:
                    after_epoch(epoch)  # once more if the run was killed while it did this
                if epoch == self.plan.epochs or stopped():
                    break
                self.one_epoch(epoch, stopped)
            interrupted = stopped()
        if interrupted:
            print(f"stopped after step {len(self.losses)} of {total}; the same command goes on from there")
        return not interrupted

    def complete(self, out: Path, config: Mapping[str, object], after_epoch: Callable[[int], None]) -> bool:
        """`train`, and say how good the network is; as `train`. It is written into out after every epoch and on Ctrl-C.

        config: what goes into its config.json beside the plan, the seed, and how far the run has come.
        """

        def write() -> None:
            about = {"plan": asdict(self.plan), "seed": self.seed, "trained": self.progress()}
            networks.write(out, self.model, dict(config) | about | {"unet": asdict(self.model.config)})

        def write_and_draw(epoch: int) -> None:
            write()
            after_epoch(epoch)

        finished = self.train(write_and_draw)
        write()
        if finished:
            print(f"loss on {len(self.test_set)} test pictures: "
                  f"{loss_on(some(self.test_set, len(self.test_set)), self.model, self.loss, self.seed):.5f}"
                  + "".join(f"; {name} {level:.4f}" for name, level in self.floors.items()))  # fmt: skip
        return finished

    def one_epoch(self, epoch: int, stopped: Callable[[], bool]) -> None:
        """The steps of an epoch that are still to be made, and the checkpoint."""
        n, size, what = self.steps_per_epoch, self.plan.batch_size, f"epoch {epoch + 1}/{self.plan.epochs}"
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr_at(epoch)
        random = generator(self.device, self.seed, ORDER, epoch)
        order = torch.randperm(len(self.train_set), generator=random, device=self.device)
        self.model.train()
        pending, first, start = [], len(self.losses) - epoch * n, time.perf_counter()
        bar = tqdm(range(first, n), desc=what, initial=first, total=n, mininterval=2, leave=False)
        for i in bar:
            pending.append(self.one_step(self.train_set[order[i * size : (i + 1) * size]], epoch * n + i))
            stop = stopped()  # asked once, so that what was stepped is also written down
            if len(pending) == 50 or i + 1 == n or stop:
                self.take_down(pending)
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
            if stop:
                bar.close()
                break
        per_second = (len(self.losses) - epoch * n - first) * size / (time.perf_counter() - start)
        self.model.eval()
        if len(self.losses) == (epoch + 1) * n:
            test_loss = loss_on(some(self.test_set, TEST_PICTURES), self.model, self.loss, self.seed)
            if not math.isfinite(test_loss):
                self.diverged(f"loss on test pictures is {test_loss} after step {len(self.losses)}")
            self.test_losses.append(test_loss)
            print(f"{what}: loss {sum(self.losses[-n:]) / n:.5f}, on test pictures {self.test_losses[-1]:.5f}, "
                  f"{per_second:.0f} images/s")  # fmt: skip
        self.save()

    def take_down(self, pending: list[Tensor]) -> None:
        """Move losses from the device to the list."""
        for loss in torch.stack(pending).tolist():
            if not math.isfinite(loss):
                self.diverged(f"loss is {loss} at step {len(self.losses) + 1}")
            self.losses.append(loss)
        pending.clear()

    def diverged(self, how: str) -> NoReturn:
        """Ends the run: the curves show how it came to this, the checkpoint stays as it was."""
        self.draw_curves()
        raise FloatingPointError(
            f"{how}; the last good checkpoint is {self.checkpoint}, the curves lie beside it: "
            "train with a smaller --lr into another --out"
        )

    def progress(self) -> str:
        """How far the run has come, like "3.5 of 20 epochs"."""
        return f"{len(self.losses) / self.steps_per_epoch:.3g} of {self.plan.epochs} epochs"


def checkpoint_of(folder: Path, what: str, plan: Plan, seed: int) -> dict | None:
    """What folder/checkpoint.pt holds, or None if the run is new.

    Raises ValueError if it is damaged or of another run, or if there is none, but the folder above has a network, which
    a new run would replace.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        if (folder.parent / "config.json").is_file():
            raise ValueError(f"{folder.parent} holds a trained network, which this would replace; pass another --out")
        return None
    state = checkpoint.read_state(path, CHECKPOINT)
    for name, said, value in (
        ("what", "training", what), ("plan", "by the plan", asdict(plan)), ("seed", "from the seed", seed)
    ):  # fmt: skip
        if state[name] != value:
            raise ValueError(
                f"{path} is of a run {said} {state[name]}, not {value}; pass its settings to go on with it, "
                "or another --out"
            )
    return state


def some(digits: Digits, n: int) -> Digits:
    """n of them (all, if there are fewer), the same ones every time, drawn from all: MNIST's first half is easier."""
    order = torch.randperm(len(digits), generator=generator("cpu", TEST))
    return digits[order[:n].to(digits.labels.device)]


@torch.no_grad()
def loss_on(test: Digits, model: nn.Module, loss: Loss, seed: int) -> float:
    """The loss on these pictures, with the same noise every time; for a model in eval mode."""
    random = generator(test.images.device, seed, TEST)
    parts = [test[i : i + 500] for i in range(0, len(test), 500)]
    return sum(loss(model, part, random).item() * len(part) for part in parts) / len(test)


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to dtype; nothing for float32, as not every device has an autocast."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def measure(model: nn.Module, loss: Loss, batch: Digits) -> tuple[str, str]:
    """Which precision and memory layout trains fastest here: names of DTYPES and LAYOUTS. Prints what it found.

    A copy of the model makes a few steps in each; on a CPU with 32 pictures, which is enough to see a difference, and
    counting the time of this process alone, whatever else the machine does. Apple's GPUs are only asked for float32:
    not every torch has another precision for them.
    """
    device = batch.images.device
    batch = batch if device.type == "cuda" else batch[:32]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[tuple[str, str], float] = {}
    for dtype, layout in itertools.product(["float32"] if device.type == "mps" else DTYPES, LAYOUTS):
        trial = copy.deepcopy(model).to(memory_format=LAYOUTS[layout]).train()
        digits = Digits(batch.images.to(memory_format=LAYOUTS[layout]), batch.labels)
        runs: list[float] = []
        while len(runs) < 2 or sum(runs) < 0.3:
            start = clock()
            with precision(device, DTYPES[dtype]):
                value = loss(trial, digits, generator(device, 0))
            value.backward()
            value.item()  # waits for the device
            runs.append(clock() - start)
            if device.type == "cpu" and runs[0] > 3 * min([*seconds.values(), math.inf]):
                break  # no warming up will make that good
        seconds[dtype, layout] = min(runs)
    best = fastest(seconds)
    print(", ".join(f"{dtype} {layout} {len(batch) / s:.0f}" for (dtype, layout), s in seconds.items()),
          "images/s" if device.type != "cpu" else "images per second of one core")  # fmt: skip
    print(f"training in {best[0]}, {best[1]}")
    return best


def fastest(seconds: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """The first way that takes at most NEARLY times as long as the fastest.

    With equals first come float32 and channels_last, so that the same command chooses alike every time.
    """
    return next(way for way, s in seconds.items() if s <= NEARLY * min(seconds.values()))


def curves(losses: list[float], test_losses: list[float], n: int, floors: Mapping[str, float]) -> Image.Image:
    """The whole run, its first and its last epoch of n steps; floors as dashed lines."""
    steps, name = list(enumerate(losses, 1)), "training, each step"
    tests = [(n * epoch, value) for epoch, value in enumerate(test_losses, 1)]
    last = (len(losses) - 1) // n
    panels = [("whole run", {name: steps, "test pictures, each epoch": tests}), ("first epoch", {name: steps[:n]}),
              (f"epoch {last + 1}", {name: steps[n * last :]})]  # fmt: skip
    return charts.chart(panels, {f"{floor}: {level:.4f}": level for floor, level in floors.items()})


def _write_csv(path: Path, header: tuple[str, str], rows: Iterable[tuple[int, float]]) -> None:
    with path.with_suffix(".tmp").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows((i, f"{value:.9g}") for i, value in rows)
    os.replace(path.with_suffix(".tmp"), path)
