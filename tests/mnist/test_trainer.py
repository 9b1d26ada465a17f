"""What the trainers share: plans, the order of digits and noise, and runs that go on."""

import argparse

import pytest
import torch
from torch import nn

from minidiff.mnist import train_flow, trainer
from minidiff.mnist.data import Digits
from minidiff.mnist.trainer import Plan


def test_the_learning_rate_is_the_courses_exponential_schedule():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1 ** (1.0 / 20))
    plan = Plan(epochs=20, batch_size=1, lr=1e-2, lr_decay=0.1)
    for epoch in range(20):
        assert plan.lr_at(epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert Plan(epochs=20, batch_size=1, lr=5e-3).lr_at(13) == 5e-3


def test_an_epoch_has_every_digit_once_in_an_order_of_its_own_and_each_step_its_own_noise(digits):
    """400 digits, 13 batches of 30: the last 10 wait. Asked again from the middle, all is the same."""
    train, batch_at = digits[:400], trainer.batches(digits[:400], Plan(2, 30, 1e-3), 5)
    steps = [batch_at(step) for step in range(26)]
    assert [len(batch) for batch, _ in steps] == [30] * 26
    rows = [[(train.images == x).flatten(1).all(1).nonzero()[0].item() for x in batch.images] for batch, _ in steps]
    first, second = sum(rows[:13], []), sum(rows[13:], [])
    assert len(set(first)) == len(set(second)) == 390 and first != second
    noises = [torch.rand(3, generator=random).tolist() for _, random in steps]
    assert len({tuple(x) for x in noises}) == 26
    batch, random = trainer.batches(train, Plan(2, 30, 1e-3), 5)(17)
    assert torch.equal(batch.images, steps[17][0].images) and torch.rand(3, generator=random).tolist() == noises[17]
    assert not torch.equal(trainer.batches(train, Plan(2, 30, 1e-3), 6)(17)[0].images, batch.images)


def test_processes_share_a_batch_and_draw_noises_of_their_own(digits, monkeypatch):
    whole, _ = trainer.batches(digits, Plan(1, 40, 1e-3), 0)(3)
    parts, noises = [], []
    for rank in (0, 1):
        monkeypatch.setattr(trainer.training, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(trainer.training, "world", lambda: 2)
        batch, random = trainer.batches(digits, Plan(1, 40, 1e-3), 0)(3)
        parts.append(batch.images)
        noises.append(torch.rand(1, generator=random).item())
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole.images) and noises[0] != noises[1]


def test_the_loss_on_test_digits_is_the_mean_over_all_of_them():
    """1,100 are three parts, the last of them smaller; the noise is the same every time."""
    test = Digits(torch.zeros(1100, 1, 28, 28), torch.arange(1100))
    assert trainer.loss_on(test, None, lambda model, batch, random: batch.labels.double().mean(), 0) == 549.5
    draw = lambda model, batch, random: torch.rand(1, generator=random)  # noqa: E731
    first, again, other = (trainer.loss_on(test, None, draw, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_without_out_the_folder_has_the_name_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def out(*argv):
        p = argparse.ArgumentParser()
        trainer.add_flags(p, train_flow.PRESETS)
        p.add_argument("--pure-noise", action="store_true")
        args = p.parse_args(argv)
        trainer.complete(args, "flow", train_flow.PRESETS)
        return args.out.as_posix()

    assert out() == out("--preset", "time") == "out/mnist/flow" and out("--preset", "class") == "out/mnist/flow-class"
    assert out("--dataset", "fashion", "--quick") == "out/mnist/flow-fashion-quick" and out("--out", "x") == "x"
    assert out("--pure-noise", "--preset", "class", "--quick") == "out/mnist/flow-class-pure-noise-quick"
    assert out("--figures", str(train_flow.WEIGHTS / "mnist" / "flow")) == "out/mnist/flow-class-figures"
