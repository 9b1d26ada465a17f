"""The shared loop: it follows its plan, resumes to the last bit, stops at a NaN, and measures before it trains."""

import csv
import itertools
import signal

import pytest
import torch
from torch import nn

from minidiff import charts, cli, images
from minidiff.mnist import drawing, networks, training
from minidiff.mnist.data import Digits
from minidiff.mnist.training import Plan, Run

PLAN = Plan(epochs=3, batch_size=40, lr=1e-2, lr_decay=0.1)  # 400 digits: 10 steps an epoch


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 1, 3, 1, 1))


def loss(net, batch, generator):
    noise = torch.randn(len(batch), 1, 28, 28, generator=generator)
    return (net(batch.images + 0.5 * noise) - batch.images[:, :1]).square().mean()


@pytest.fixture
def start(digits, tmp_path, fast):
    def start(name="run", loss=loss, net=None, plan=PLAN, **more):
        return Run(net or model(), loss, digits[:400], digits[400:], plan, tmp_path / name, **more)

    return start


def numbers(path):
    with path.open() as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def weights_of(run):
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def test_it_learns_and_writes_down_every_step(start, capsys):
    run = start(floors=lambda: {"mean image": 0.0673})
    epochs = []
    assert run.train(epochs.append) and epochs == [1, 2, 3]
    written = numbers(run.folder / "loss.csv")
    assert len(written) == 30 and written == pytest.approx(run.losses, rel=1e-8)
    assert numbers(run.folder / "test.csv") == pytest.approx(run.test_losses, rel=1e-8)
    assert run.test_losses[-1] < run.test_losses[0] < 0.3 and len(run.test_losses) == 3
    assert images.load(run.folder / "loss.png").shape[1:] == (3, *charts.chart([("", {})] * 3, {}).size[::-1])
    assert "epoch 3/3: loss 0.0" in capsys.readouterr().out


def test_the_curve_has_three_parts_and_the_floors(monkeypatch):
    monkeypatch.setattr(charts, "chart", lambda panels, levels: (panels, levels))
    panels, levels = training.curves([5.0, 4.0, 3.0, 2.0, 1.0], [4.5, 2.5], 2, {"mean image": 0.067251})
    each, tests = "training, each step", "test pictures, each epoch"
    whole = {each: [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (5, 1.0)], tests: [(2, 4.5), (4, 2.5)]}
    first, last = {each: [(1, 5.0), (2, 4.0)]}, {each: [(5, 1.0)]}
    assert panels == [("whole run", whole), ("first epoch", first), ("epoch 3", last)]
    assert levels == {"mean image: 0.0673": 0.067251}
    ended_with_an_epoch, _ = training.curves([4.0, 3.0, 2.0, 1.0], [], 2, {})
    assert ended_with_an_epoch[2] == ("epoch 2", {each: [(3, 2.0), (4, 1.0)]})


def test_an_epoch_sees_every_digit_once_in_an_order_of_its_own(start):
    seen = []
    run = start(loss=lambda net, batch, g: seen.append(batch.labels) or loss(net, batch, g))
    run.train()
    at_train = [x for x in seen if len(x) == 40]
    first, second = torch.cat(at_train[:10]), torch.cat(at_train[10:20])
    assert torch.equal(first.bincount(), run.train_set.labels.bincount()) and torch.equal(
        first.bincount(), second.bincount()
    )
    assert not torch.equal(first, second)


def test_the_same_digit_gets_new_noise_in_every_step(start):
    drawn = []

    def note(net, batch, generator):
        if net.training:
            drawn.append(torch.randn(5, generator=generator).tolist())
        return loss(net, batch, generator)

    start(loss=note).train()
    assert len({tuple(x) for x in drawn}) == 30


def test_the_learning_rate_is_the_courses_exponential_schedule():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1 ** (1.0 / 20))
    plan = Plan(epochs=20, batch_size=1, lr=1e-2, lr_decay=0.1)
    for epoch in range(20):
        assert plan.lr_at(epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert Plan(epochs=20, batch_size=1, lr=5e-3).lr_at(13) == 5e-3


def test_the_optimizer_uses_the_rate_of_the_epoch(start):
    rates = []
    run = start()
    original = run.optimizer.step
    run.optimizer.step = lambda: rates.append(run.optimizer.param_groups[0]["lr"]) or original()
    run.train()
    assert rates == [PLAN.lr_at(e) for e in range(3) for _ in range(10)]


def with_accident(step, accident):
    """The loss, and in that training step, counted from 1, an accident."""
    steps = itertools.count(1)

    def accidental(net, batch, generator):
        if net.training and next(steps) == step:
            accident()
        return loss(net, batch, generator)

    return accidental


@pytest.mark.parametrize(
    ("at", "way"),
    [(3, ("float32", "contiguous")), (17, ("float32", "contiguous")), (17, ("bfloat16", "channels_last"))],
)
def test_a_run_that_is_killed_resumes_exactly(start, monkeypatch, at, way):
    """Killed in step `at`, between checkpoints: the torn epoch is made again, bit for bit."""
    monkeypatch.setattr(training, "measure", lambda *args: way)
    whole = start("whole")
    whole.train()

    def die():
        raise MemoryError("killed")

    with pytest.raises(MemoryError):
        start("parts", loss=with_accident(at, die)).train()
    torch.manual_seed(99)
    resumed = start("parts")
    assert len(resumed.losses) == at // 10 * 10
    resumed.train()
    assert resumed.losses == whole.losses and resumed.test_losses == whole.test_losses
    assert all(torch.equal(weights_of(whole)[k], v) for k, v in weights_of(resumed).items())
    assert (whole.folder / "loss.csv").read_text() == (resumed.folder / "loss.csv").read_text()


def test_ctrl_c_saves_at_once_and_the_next_run_goes_on_from_there(start, capsys):
    whole = start("whole")
    whole.train()

    before = signal.getsignal(signal.SIGINT)
    run = start("parts", loss=with_accident(14, lambda: signal.raise_signal(signal.SIGINT)))
    assert not run.train() and signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 14 of 30; the same command goes on from there" in capsys.readouterr().out
    resumed = start("parts")
    assert len(resumed.losses) == 14 and "going on from step 14" in capsys.readouterr().out
    assert resumed.train() and resumed.losses == whole.losses and resumed.test_losses == whole.test_losses
    assert all(torch.equal(weights_of(whole)[k], v) for k, v in weights_of(resumed).items())


def test_a_finished_run_trains_no_further(start):
    start().train()
    again = start(loss=lambda net, *args: pytest.fail("a step was made") if net.training else torch.zeros(()))
    assert again.train() and len(again.losses) == 30 and not again.model.training
    assert not list(again.folder.glob("*.tmp"))


def test_a_nan_stops_with_the_last_good_checkpoint_named(start):
    def breaks(net, batch, generator):
        breaks.calls += net.training
        return loss(net, batch, generator) * (torch.nan if breaks.calls == 14 else 1)

    breaks.calls = 0
    run = start(loss=breaks)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 14; the last good checkpoint is .*checkpoint\.pt"
    ):
        run.train()
    kept = start()
    assert len(kept.losses) == 10 and all(v.isfinite().all() for v in weights_of(kept).values())


def test_a_nan_that_only_the_test_pictures_show_is_not_saved_either(start):
    start(plan=Plan(1, 40, 1e-2)).train()

    def breaks(net, batch, generator):
        return loss(net, batch, generator) * (1 if net.training else torch.nan)

    with pytest.raises(
        FloatingPointError, match=r"loss on test pictures is nan after step 10; the last good checkpoint"
    ):
        start("other", loss=breaks).train()
    assert len(numbers(start("other").folder / "loss.csv")) == 0  # drawn again from the checkpoint
    assert len(start("other").losses) == 0


def test_weights_that_are_not_finite_are_not_saved_though_the_loss_was(start):
    """A gradient that explodes at the root of 0, and Ctrl-C in the same step."""

    def breaks(net, batch, generator):
        if net.training and len(run.losses) == 10:
            signal.raise_signal(signal.SIGINT)
            return loss(net, batch, generator) + (net[0].weight * 0).sqrt().sum()
        return loss(net, batch, generator)

    run = start(loss=breaks)
    with pytest.raises(
        FloatingPointError, match=r"weights that are not finite after step 11; the last good .*, the cur"
    ):
        run.train()
    assert len(numbers(run.folder / "loss.csv")) == 11  # the curves show how far it came
    kept = start()
    assert len(kept.losses) == 10 and all(v.isfinite().all() for v in weights_of(kept).values())


def test_what_is_drawn_after_an_epoch_is_drawn_again_if_the_run_was_killed_while_it_did(start):
    def die(epoch):
        raise MemoryError("killed")

    with pytest.raises(MemoryError):
        start().train(die)
    epochs = []
    start().train(epochs.append)
    assert epochs == [1, 2, 3]


def test_the_first_ctrl_c_is_answered_and_the_second_stops_at_once(capfd):
    with cli.stopped_between_steps() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped() and "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_trained_network_is_not_replaced_by_a_new_run(start, tmp_path):
    networks.write(tmp_path, model(), {"kind": "flow"})
    with pytest.raises(ValueError, match="holds a trained network, which this would replace; pass another --out"):
        start("training")
    assert not (tmp_path / "training").exists()


def test_ctrl_c_in_the_last_step_is_obeyed_too(start, capsys):
    run = start(loss=with_accident(30, lambda: signal.raise_signal(signal.SIGINT)))
    assert not run.train() and "stopped after step 30 of 30" in capsys.readouterr().out
    assert start().train()


def test_lack_of_memory_is_not_taken_for_a_broken_checkpoint(start, monkeypatch):
    start().train()

    def full(*args, **more):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        start()


def test_ctrl_c_between_two_looks_loses_no_step(start):
    """However the signal falls, every step that was made is written down."""
    run = start()
    looks = iter([False] * 4 + [True] * 9)
    run.one_epoch(0, lambda: next(looks))
    made = max(int(s["step"]) for s in run.optimizer.state.values())
    assert len(run.losses) == made == 5


def test_the_loss_on_test_pictures_is_the_mean_over_all_of_them():
    """1,100 are three parts, the last of them smaller."""
    test = Digits(torch.zeros(1100, 1, 28, 28), torch.arange(1100))
    found = training.loss_on(test, None, lambda model, batch, random: batch.labels.double().mean(), 0)
    assert found == pytest.approx(549.5)


def test_pictures_that_do_not_fill_a_batch_wait(start):
    seen = []
    run = start(loss=lambda net, batch, random: seen.append(len(batch)) or loss(net, batch, random),
                plan=Plan(epochs=1, batch_size=30, lr=1e-2))  # fmt: skip
    assert run.train() and seen[:13] == [30] * 13 and len(run.losses) == 13


def test_compile_is_for_the_steps_alone_with_one_size_of_batch(start, monkeypatch):
    """So that a run that goes on, and is first asked for a test loss or a picture, compiles the same."""
    compiled, asked = [], []

    def compile(model, dynamic):
        assert dynamic is False and not compiled.append(model)
        return lambda x: asked.append((model.training, len(x))) or model(x)

    monkeypatch.setattr(torch, "compile", compile)
    start("plain").train()
    assert not compiled
    run = start("compiled", compiled=True)
    assert run.train() and compiled == [run.model] and asked == [(True, 40)] * 30
    assert run.losses == start("plain").losses


def test_test_pictures_are_drawn_from_all_and_always_the_same(digits):
    found = training.some(digits, 100)
    assert torch.equal(found.images, training.some(digits, 100).images) and len(found) == 100
    where = [(digits.images == x).flatten(1).all(1).nonzero()[0].item() for x in found.images]
    assert len(set(where)) == 100 and max(where) > 400 and min(where) < 100
    assert len(training.some(digits, 10**6)) == len(digits)


def test_a_checkpoint_is_never_half_written(start, monkeypatch):
    start().train()
    before = (path := start().checkpoint).read_bytes()

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says of a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt: unexpected pos"):
        start().save()
    assert path.read_bytes() == before and not list(path.parent.glob("*.tmp"))


def test_other_settings_do_not_continue_a_run(start, tmp_path):
    start().train()
    with pytest.raises(ValueError, match=r"of a run by the plan .*'lr': 0.01.*, not .*'lr': 0.5.*another --out"):
        start(plan=Plan(3, 40, 0.5, 0.1))
    with pytest.raises(ValueError, match="of a run from the seed 0, not "):
        start(seed=1)
    with pytest.raises(ValueError, match="of a run training , not pure-noise"):
        start(what="pure-noise")
    with pytest.raises(ValueError, match="of another network"):
        start(net=nn.Conv2d(1, 1, 1))


def test_bad_input_is_told(start, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size must lie in 1\.\.400, the pictures there are, got 500"):
        start(plan=Plan(1, 500, 1e-3))
    for numbers_of in ((0, 1, 1e-3), (1, 0, 1e-3), (1, 1, float("nan")), (1, 1, -1.0), (1, 1, 1e-3, 0.0)):
        with pytest.raises(ValueError, match="need epochs and batch_size of at least 1, lr of at least 0"):
            Plan(*numbers_of)
    (tmp_path / "file").write_text("")
    files = [b"", b"PK\3\4 half", b"nonsense", b"a castle"]
    for foreign in ({"a": 1}, [1], torch.zeros(()), 3):
        torch.save(foreign, tmp_path / "foreign")
        files.append((tmp_path / "foreign").read_bytes())
    for i, broken in enumerate(files):
        (tmp_path / f"b{i}").mkdir()
        (tmp_path / f"b{i}" / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="is no checkpoint of a run; pass another --out"):
            start(f"b{i}")
    with pytest.raises(ValueError, match="cannot write to .*file.*pass another --out"):
        start("file/run")
    with pytest.raises(ValueError, match="no device 'tpu9'; choose from auto, cpu"):
        cli.device_of("tpu9")


def test_float32_needs_no_autocast():
    """Not every torch has one for every device."""
    assert not isinstance(training.precision(torch.device("mps"), torch.float32), torch.autocast)
    with training.precision(torch.device("cpu"), torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_fastest_way_is_measured_and_leaves_the_model_alone(digits, capsys):
    """A loss that works harder in bfloat16, and in the contiguous layout."""
    net = nn.Sequential(nn.Conv2d(3, 1, 1), *model())
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def uneven(trial, batch, generator):
        x = torch.ones(1000, 1000)
        for _ in range(100 * (torch.is_autocast_enabled("cpu") + (batch.images.stride(1) != 1))):
            x = x + 1
        return loss(trial, batch, generator)

    images = digits.images[:40].repeat(1, 3, 1, 1)  # with one channel both layouts are the same
    found = training.measure(net, uneven, Digits(images, digits.labels[:40]))
    assert found == ("float32", "channels_last")
    assert "float32 channels_last" in (shown := capsys.readouterr().out) and "training in float32" in shown
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_of_ways_that_are_nearly_as_fast_the_first_is_chosen_every_time():
    ways = list(itertools.product(training.DTYPES, training.LAYOUTS))
    assert ways[0] == ("float32", "channels_last") and ways[2] == ("bfloat16", "channels_last")

    def chosen(*seconds):
        return training.fastest(dict(zip(ways, seconds)))

    assert chosen(1.0, 1.0, 1.0, 1.0) == chosen(1.1, 1.0, 1.3, 1.2) == ways[0]
    assert chosen(2.0, 2.0, 1.01, 1.0) == chosen(2.0, 2.0, 1.0, 1.01) == ways[2]  # two measurements of one machine
    assert chosen(2.0, 1.6, 1.2, 1.0) == ways[3] and chosen(1.2, 1.0, 2.0, 2.0) == ways[1]


def test_the_way_that_was_chosen_is_kept_on_resuming(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure", lambda *args: ("float32", "channels_last"))
    Run(model(), loss, digits[:400], digits[400:], PLAN, tmp_path / "run")
    monkeypatch.setattr(training, "measure", lambda *args: pytest.fail("measured again"))
    run = Run(model(), loss, digits[:400], digits[400:], PLAN, tmp_path / "run")
    assert run.layout is torch.channels_last and run.dtype is torch.float32


def test_networks_are_written_in_half_precision_and_read_back(tmp_path):
    net = model()
    with torch.no_grad():
        net[1].running_var.fill_(1e-9)  # float16 would make it 0
    networks.write(tmp_path / "n", net, {"kind": "flow", "more": 3}, {"extra": torch.ones(2, 2)})
    config, tensors = networks.read(tmp_path / "n", "flow")
    assert config == {"kind": "flow", "more": 3} and torch.equal(tensors.pop("extra"), torch.ones(2, 2))
    assert tensors["1.running_var"].tolist() == [pytest.approx(1e-9)] * 4
    assert torch.equal(tensors["0.weight"], net[0].weight.half().float())
    net.load_state_dict(tensors)


def test_missing_and_wrong_networks_are_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"no trained ddpm in .*none; train one with `python -m minidiff.mnist.train_diff"
    ):
        networks.read(tmp_path / "none", "ddpm")
    networks.write(tmp_path / "n", model(), {"kind": "flow"})
    with pytest.raises(
        ValueError, match="holds a flow, not a judge; pass another folder, or train one with .*judge train`$"
    ):
        networks.read(tmp_path / "n", "judge")
    with pytest.raises(ValueError, match="do not fit each other"):
        networks.fill(nn.Conv2d(1, 1, 1), networks.read(tmp_path / "n", "flow")[1], tmp_path / "n")
    for unet in ({}, {"unet": {"hidden": -3}}, {"unet": {"modulate": "film"}}, {"unet": {"depth": 3}}):
        networks.write(tmp_path / "n", model(), {"kind": "flow"} | unet)
        with pytest.raises(ValueError, match="n.config.json describes no network of digits"):
            drawing.load(tmp_path / "n", "flow", torch.device("cpu"))
    (tmp_path / "n" / "config.json").write_bytes(b"\xec\x00")
    with pytest.raises(ValueError, match="n cannot be read .*utf-8.*train one with"):
        networks.read(tmp_path / "n", "flow")
    (tmp_path / "n" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a None, not a flow"):
        networks.read(tmp_path / "n", "flow")
    (tmp_path / "n" / "model.fp16.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="n cannot be read .*train one with"):
        networks.read(tmp_path / "n", "flow")
