"""The training loop: it follows its plan, resumes to the last bit, stops at a NaN, and keeps its settings."""

import itertools
import math
import signal

import pytest
import torch
from torch import nn

from minidiff import charts, images, training
from minidiff.training import Plan, read_rows, run

PLAN = Plan(steps=30, save_every=10, lr=lambda step: 1e-2 * 0.1 ** (step / 30))
SETTINGS = {"kind": "toy", "lr": 0.01, "seed": 0}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 1, 3, 1, 1))


def batch_at(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(8, 1, 6, 6, generator=generator), torch.randn(8, 1, 6, 6, generator=generator)


def loss(net, batch):
    x, noise = batch
    return (net(x + 0.5 * noise) - x).square().mean()


@pytest.fixture
def train(tmp_path):
    """Runs to the end; the last record, the model and the folder."""

    def train(name="run", net=None, loss=loss, plan=PLAN, settings=SETTINGS, each=lambda record: None, **more):
        net, record = net or model(), None
        more = {"dtype": "float32"} | more
        optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
        for record in run(net, loss, batch_at, optimizer, plan, tmp_path / name, settings, **more):
            each(record)
        return record, net, tmp_path / name

    return train


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def accident(step, what):
    """The loss, and in that step, counted from 1, an accident."""
    steps = itertools.count(1)

    def accidental(net, batch):
        return what(net, loss(net, batch)) if next(steps) == step else loss(net, batch)

    return accidental


def interrupt(net, value):
    signal.raise_signal(signal.SIGINT)
    return value


def kill(net, value):
    raise MemoryError("killed")


def test_it_learns_writes_down_every_step_and_says_where_it_is(train):
    records = []
    last, net, folder = train(each=records.append, held_out=lambda: 0.25, levels={"nothing": 0.3})
    rows = read_rows(folder / "loss.csv")
    assert [step for step, _ in rows] == list(range(1, 31)) and rows[-1][1] < 0.5 * rows[0][1]
    assert [r.step for r in records] == [10, 20, 30]
    assert read_rows(folder / "test.csv") == [(step, 0.25) for step in (10, 20, 30)]
    for record in records:
        mean = sum(value for step, value in rows[record.step - 10 : record.step]) / 10
        assert record.loss == pytest.approx(mean)
    assert str(last).startswith(f"step 30 of 30: loss {last.loss:.5f}, on held-out images 0.25000, ")
    assert not net.training and not last.stopped and not list(folder.glob("*.tmp*"))


def test_every_step_has_the_learning_rate_of_the_plan(tmp_path):
    rates, net = [], model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    list(run(net, loss, batch_at, optimizer, PLAN, tmp_path, SETTINGS))
    assert rates == [PLAN.lr(step) for step in range(30)]


def test_a_row_is_the_mean_of_its_steps(train):
    """By hand from the rows of single steps."""
    folders = [train(name, plan=Plan(9, 9, PLAN.lr, every))[2] for name, every in (("a", 1), ("b", 4))]
    single, rows = (read_rows(folder / "loss.csv") for folder in folders)
    assert [step for step, _ in rows] == [4, 8]
    for i, (_, mean) in enumerate(rows):
        assert mean == pytest.approx(sum(value for _, value in single[4 * i : 4 * i + 4]) / 4, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(
    ("at", "how", "kept"), [(17, kill, 10), (3, kill, 0), (14, interrupt, 14), (10, interrupt, 10)]
)
def test_a_run_that_is_stopped_anywhere_ends_in_the_same_numbers(train, dtype, ema, at, how, kept):
    """Killed, it makes the steps since the last checkpoint again; Ctrl-C saves at once."""
    plan = Plan(30, 10, PLAN.lr, 4, ema)
    _, _, whole = train("whole", plan=plan, dtype=dtype, held_out=lambda: 0.5)
    before = signal.getsignal(signal.SIGINT)
    try:
        record, *_ = train("parts", loss=accident(at, how), plan=plan, dtype=dtype, held_out=lambda: 0.5)
        assert record.stopped and record.step == at and "the same command goes on from here" in str(record)
    except MemoryError:
        assert how is kill
    assert signal.getsignal(signal.SIGINT) is before and state(whole.with_name("parts"))["step"] == kept
    torch.manual_seed(99)
    _, net, parts = train("parts", plan=plan, dtype="auto", held_out=lambda: 0.5)
    a, b = state(whole), state(parts)
    assert equal(a["model"], b["model"]) and equal(a["ema"], b["ema"]) and b["dtype"] == dtype
    for name in ("loss.csv", "test.csv"):
        assert (whole / name).read_text() == (parts / name).read_text()


def test_the_model_holds_its_average_at_a_record_and_trains_on_with_its_own_weights(train):
    """With an average the training is the same as without, and what the trainer sees is the average."""
    drawn, net = [], model()
    plan = Plan(20, 10, PLAN.lr, ema_decay=0.8)

    def note(record):
        drawn.append({key: value.clone() for key, value in net.state_dict().items()})

    _, _, folder = train("with", net, plan=plan, each=note)
    plain = train("without", plan=Plan(20, 10, PLAN.lr))[1].state_dict()
    kept = state(folder)
    assert equal(kept["model"], plain) and all(torch.equal(kept["ema"][k], drawn[1][k]) for k in kept["ema"])
    assert equal(drawn[1], net.state_dict()) and not torch.equal(drawn[1]["0.weight"], plain["0.weight"])
    assert set(plain) - set(kept["ema"]) == {"1.num_batches_tracked"}  # the only one that is no number to average


def test_the_average_is_the_closed_form():
    """From 0, weights 1, 2, 3: 0.1 * 0 + 0.9 * 1 = 0.9; 2/11 * 0.9 + 9/11 * 2 = 1.8; 0.25 * 1.8 + 0.75 * 3 = 2.7.
    With a decay of 0 it is the weights themselves."""
    module = nn.Linear(1, 1, bias=False)
    ema = {"weight": torch.zeros(1, 1)}
    for step, (value, expected) in enumerate([(1.0, 0.9), (2.0, 1.8), (3.0, 2.7)]):
        nn.init.constant_(module.weight, value)
        training.update_average(ema, module, step, 0.9995)
        assert ema["weight"].item() == pytest.approx(expected)
    training.update_average(ema, module, 1000, 0.0)
    assert ema["weight"].item() == 3.0


def test_a_finished_run_trains_no_further_and_shows_its_end_again(train):
    train()
    record, net, folder = train(loss=lambda *_: pytest.fail("a step was made"))
    assert record.step == 30 and math.isnan(record.loss) and equal(net.state_dict(), state(folder)["model"])
    assert str(record) == "step 30 of 30: no new step, 0 steps/s"


def test_a_run_does_not_go_on_beyond_its_end(train):
    """A checkpoint at step 30 never meets the end of a plan of 20: it would train without end, at rates below 0."""
    _, _, folder = train()
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="is at step 30 already, and the run is to end at 20; pass more --steps"):
        train(plan=Plan(steps=20, save_every=10, lr=lambda step: 1e-2), each=lambda _: pytest.fail("a step was made"))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_after_a_kill_at_a_record_the_record_comes_again(train):
    def die(record):
        raise MemoryError("killed")

    with pytest.raises(MemoryError):
        train(each=die)
    records = []
    train(each=records.append)
    assert [record.step for record in records] == [10, 20, 30]


def test_a_nan_stops_with_its_step_and_the_last_good_checkpoint(train):
    message = r"loss or its gradient is nan at step 14; the last good .*checkpoint\.pt"
    with pytest.raises(FloatingPointError, match=message):
        train(loss=accident(14, lambda net, value: value * torch.nan))
    assert train(each=lambda record: None, plan=Plan(10, 10, PLAN.lr))[0].step == 10


def test_a_gradient_that_is_not_finite_stops_too(train):
    """A root of 0 has a finite value and an infinite slope. Clipping sees it at once, else the weights show it."""
    exploding = accident(14, lambda net, value: value + (net[0].weight * 0).sqrt().sum())
    with pytest.raises(FloatingPointError, match="its gradient is nan at step 14;"):
        train(loss=exploding, plan=Plan(30, 10, PLAN.lr, clip=1.0))
    exploding = accident(20, lambda net, value: value + (net[0].weight * 0).sqrt().sum())
    with pytest.raises(FloatingPointError, match="weights that are not finite after step 20; the last good checkpoint"):
        train("other", loss=exploding)
    with pytest.raises(FloatingPointError, match="loss on held-out images is inf after step 10"):
        train("third", held_out=lambda: math.inf)
    assert state(train("third")[2])["step"] == 30


def test_a_gradient_is_clipped_to_the_plans_norm(train):
    """Plain descent with a rate of 1 moves the weights by at most the norm."""
    net = model()
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    folder = train("x", plan=Plan(1, 1, PLAN.lr))[2].with_name("y")
    list(run(net, lambda *a: 1e6 * loss(*a), batch_at, optimizer, Plan(1, 1, lambda step: 1.0, clip=0.5), folder, {}))
    moved = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_the_precision_is_written_down_before_the_first_step(train, monkeypatch):
    """The machine says bfloat16; killed in its first step, the run goes on in it where the machine says otherwise."""
    monkeypatch.setattr(training, "fast_dtype", lambda device: "bfloat16")
    with pytest.raises(MemoryError):
        train(loss=accident(1, kill), dtype="auto")
    monkeypatch.setattr(training, "fast_dtype", lambda device: "float32")
    inside = []
    record, *_ = train(loss=lambda *a: inside.append(torch.is_autocast_enabled("cpu")) or loss(*a), dtype="auto")
    assert record.dtype == "bfloat16" and all(inside)
    assert train("named", dtype="bfloat16")[0].dtype == "bfloat16"
    assert train("automatic", dtype="auto")[0].dtype == "float32"


def test_one_machine_always_gets_the_same_precision(monkeypatch):
    """A processor with AVX-512's bfloat16 and no float16 arithmetic draws in float32 and trains in bfloat16."""
    halves = ((torch.float16, False, "bfloat16"), (torch.float32, False, "float32"), (torch.float32, True, "bfloat16"))
    for half, avx512_bf16, expected in halves:
        monkeypatch.setattr(training.checkpoint, "default_dtype", lambda device, half=half: half)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda yes=avx512_bf16: yes, raising=False)
        assert training.fast_dtype(torch.device("cpu")) == expected
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert training.fast_dtype(torch.device("cuda")) == expected
    assert not isinstance(training.precision(torch.device("mps"), "float32"), torch.autocast)  # which may have none
    with training.precision(torch.device("cpu"), "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_other_settings_networks_and_files_do_not_continue_a_run(train, tmp_path):
    _, _, folder = train()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of a run with lr 0.01, not 0.5; pass .*another --out"):
        train(settings=SETTINGS | {"lr": 0.5})
    with pytest.raises(ValueError, match="of another network; pass another --out"):
        train(net=nn.Conv2d(1, 1, 1))
    for broken in (b"", b"PK\3\4 half", b"nonsense"):
        (folder / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="is no checkpoint of a run; pass another --out"):
            train()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*file.*; pass another --out"):
        train("file/run")


def test_a_checkpoint_is_never_half_written(train, monkeypatch):
    _, _, folder = train(plan=Plan(10, 10, PLAN.lr))
    before = (folder / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says of a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt: unexpected pos"):
        train(plan=Plan(20, 10, PLAN.lr))
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.tmp*"))


def test_the_curves_show_the_whole_run_its_first_and_its_last_part(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "chart", lambda *args: drawn.append(args))
    monkeypatch.setattr(images, "save", lambda *args: None)
    training.add_rows(tmp_path / "loss.csv", ("step", "loss"), [(s, 6.0 - s) for s in range(1, 6)])
    training.add_rows(tmp_path / "test.csv", ("step", "loss"), [(2, 4.5), (4, 2.5)])
    for part in (2, 5):
        training.plot(tmp_path, part, {"mean image": 0.067251})
    whole = {"training": [(s, 6.0 - s) for s in range(1, 6)], "held-out images": [(2, 4.5), (4, 2.5)]}
    first, last = {"training": [(1, 5.0), (2, 4.0)]}, {"training": [(5, 1.0)]}
    panels = [("whole run", whole), ("steps 1 to 2", first), ("steps 5 to 5", last)]
    assert drawn[0] == (panels, {"mean image: 0.0673": 0.067251})
    assert drawn[1][0] == [("whole run", whole)]
