"""The commands of the three trainers: their figures, stopping and going on, and messages."""

import itertools
import json
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minidiff import images, training
from minidiff.mnist import levels, models, sample, train_denoiser, train_diffusion, train_flow, trainer
from minidiff.mnist.trainer import Plan, Preset
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
from minidiff.weights import WEIGHTS
from tests.mnist.real import fails


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(module, out, folder, *flags):
    module.main(["--quick", "--data", str(folder), "--out", str(out), *flags])
    return sorted(str(p.relative_to(out)) for p in out.rglob("*.*") if p.suffix in (".png", ".gif"))


def figures(module, trained, out, folder, *flags):
    """What --figures makes of a trained network: figures alone, and nothing in the network's folder."""
    before = {p: p.read_bytes() for p in trained.rglob("*.*")}
    made = run(module, out, folder, "--figures", str(trained), *flags)
    assert {p: p.read_bytes() for p in trained.rglob("*.*")} == before
    assert sorted(p.name for p in out.rglob("*.*")) == sorted(made)
    return made


def test_train_denoiser_makes_its_figures(folder, tmp_path, capsys):
    made = run(train_denoiser, tmp_path / "d", folder)
    assert made == ["noising.png", "out-of-distribution.png", "samples/epoch-01.png", "training/loss.png"]
    first = capsys.readouterr().out
    assert "; held-out images: 100 test digits" in first and "loss on 100 test digits: 0." in first
    assert "; linear optimum (training digits) 0.0" in first and "sigma 0.8: error 0." in first
    assert "Error: on 100 test digits; best linear: on the training digits" in first and ", best linear 0.0" in first
    run(train_denoiser, tmp_path / "d", folder)  # again: nothing is trained, all numbers come again
    again = capsys.readouterr().out
    assert "step 25 of 25: no new step" in again and again.splitlines()[2:-1] == first.splitlines()[2:-1]
    assert "of a run with sigma 0.5, not None; pass" in fails(
        capsys, train_denoiser.main, "--quick", "--data", folder, "--out", tmp_path / "d", "--pure-noise"
    )
    assert images.read_metadata(tmp_path / "d" / "noising.png")["command"] == "python -m minidiff.mnist.train_denoiser"
    config, tensors = models.read(tmp_path / "d", "denoiser")
    UNet(UNetConfig(**config["unet"])).load_state_dict(tensors)
    assert run(train_denoiser, tmp_path / "p", folder, "--pure-noise", "--preset", "small") == [
        "mean-image.png", "noising.png", "samples/epoch-01.png", "training/loss.png",
    ]  # fmt: skip
    ends = ["noising.png", "out-of-distribution.png"]
    assert figures(train_denoiser, tmp_path / "d", tmp_path / "e", folder) == ends
    ends = ["mean-image.png", "noising.png"]
    assert figures(train_denoiser, tmp_path / "p", tmp_path / "q", folder) == ends  # its config says so


@pytest.fixture
def dropouts(monkeypatch):
    """How often each reference level withholds the class."""
    found, level = [], levels.of_task
    monkeypatch.setattr(levels, "of_task", lambda task, x, p: found.append(p) or level(task, x, p))
    return found


def test_train_diffusion_makes_its_figures(folder, tmp_path, capsys, dropouts):
    made = run(train_diffusion, tmp_path / "d", folder, "--preset", "class")
    always = ["cleaned.png", "samples/epoch-01.png", "sampling.gif", "training/loss.png"]
    assert made == sorted([*always, "guidance.png", "unconditional.gif"])
    assert "; training set known 0.0" in capsys.readouterr().out
    assert run(train_diffusion, tmp_path / "t", folder) == always and dropouts == [0.1, 1.0]
    ends = ["cleaned.png", "guidance.png", "sampling.gif", "unconditional.gif"]
    assert figures(train_diffusion, tmp_path / "d", tmp_path / "e", folder) == ends
    assert images.read_metadata(tmp_path / "e" / "cleaned.png")["preset"] == "class"


def test_train_flow_makes_its_figures(folder, tmp_path, dropouts):
    made = run(train_flow, tmp_path / "f", folder, "--preset", "class")
    assert made == ["guidance.png", "samples/epoch-01.png", "sampling.gif", "solvers.png", "training/loss.png"]
    edit_config(tmp_path / "f", dataset="fashion")
    ends = ["guidance.png", "sampling.gif", "solvers.png"]
    assert figures(train_flow, tmp_path / "f", tmp_path / "g", tmp_path / "no data") == ends
    about = images.read_metadata(tmp_path / "g" / "guidance.png")  # the command that draws it
    assert about["command"] == "python -m minidiff.mnist.sample" and about["model"] == str(tmp_path / "f")
    assert about["guidance_scale"] == "[0.0, 1.0, 5.0, 10.0]" and dropouts == [0.1]


@pytest.fixture
def teacher(folder, tmp_path):
    """A network of 4 channels that draws "fashion"."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, time=True, num_classes=10))
    config = {"kind": "flow", "dataset": "fashion", "unet": asdict(unet.config)}
    models.write(tmp_path / "f", unet, config)
    return tmp_path / "f"


def test_reflow_starts_from_its_teacher(teacher, folder, tmp_path, capsys):
    """With a learning rate of 0 it ends there, too."""
    made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow", "--teacher", str(teacher), "--lr", "0")
    printed = capsys.readouterr().out
    assert "loss on 4 pairs of the teacher: " in printed and "; the teacher " in printed
    assert "reflow.png" in made and "(0 is straight): the teacher" in printed
    (_, before), (config, after) = (models.read(path, "flow") for path in (teacher, tmp_path / "r"))
    assert config["dataset"] == "fashion" and config["teacher"] == str(teacher)
    assert all(torch.equal(after[k], v) for k, v in before.items() if "running" not in k and "num_" not in k)
    other = UNet(UNetConfig(4, time=True, num_classes=10))
    models.write(tmp_path / "o", other, {"kind": "flow", "dataset": "fashion", "unet": asdict(other.config)})
    flags = ["--quick", "--preset", "reflow", "--lr", "0", "--teacher", tmp_path / "o", "--out", tmp_path / "r"]
    assert "of a run with teacher_sha256" in fails(capsys, train_flow.main, *flags)


def test_reflow_names_its_two_networks_and_keeps_a_tenth_for_the_test(teacher, folder, tmp_path, monkeypatch, capsys):
    """Also where the teacher was moved meanwhile, and with --figures, whose config says who the teacher was."""
    figures_of, split, fit, draw = {}, [], trainer.fit, sample.run
    monkeypatch.setattr(trainer, "fit", lambda *args: split.append(args[3:5]) or fit(*args))

    def note(flags, judged):
        figures_of[Path(flags[flags.index("--out") + 1]).name] = flags
        draw(flags, judged)

    monkeypatch.setattr(sample, "run", note)
    shutil.copytree(teacher, tmp_path / "moved")
    flags = ["--preset", "reflow", "--pairs", "200", "--teacher"]
    for place in (teacher, tmp_path / "moved"):
        run(train_flow, tmp_path / "q", folder, *flags, str(place))
    assert "step 11 of 11: no new step" in capsys.readouterr().out  # nothing was left to train
    ends = ["guidance.png", "reflow.png", "sampling.gif", "solvers.png"]
    for how in ("trained", "figures"):
        flags_of = figures_of.pop("reflow.png")
        assert flags_of[:3] == ["--model", str(tmp_path / "moved"), str(tmp_path / "q")]
        assert "--guidance-scale 1 --steps 1 2 4 50" in " ".join(flags_of)
        if how == "trained":
            assert figures(train_flow, tmp_path / "q", tmp_path / "z", folder) == ends
    train, test = ({tuple(noise.flatten().tolist()) for noise in part.images[:, 1]} for part in split[0])
    assert (len(train), len(test)) == (180, 20) and not train & test
    edit_config(tmp_path / "q", teacher=str(tmp_path / "gone"))
    message = fails(capsys, train_flow.main, "--figures", tmp_path / "q", "--out", tmp_path / "z")
    assert f"no teacher in {tmp_path / 'gone'}; pass the folder of a flow network: --teacher FOLDER" in message


@pytest.mark.parametrize(
    "module, kind", [(train_denoiser, "denoiser"), (train_diffusion, "ddpm"), (train_flow, "flow")]
)
def test_a_run_may_start_from_a_trained_network(module, kind, folder, tmp_path, capsys):
    """With a learning rate of 0 it ends there, too. Preset and data set are the network's; the new config names it."""
    run(module, tmp_path / "first", folder, "--preset", "small")
    flags = ["--start-from", str(tmp_path / "first"), "--lr", "0"]
    run(module, tmp_path / "second", folder, *flags)
    (first, before), (second, after) = (models.read(tmp_path / name, kind) for name in ("first", "second"))
    assert all(torch.equal(after[k], v) for k, v in before.items() if "running" not in k and "num_" not in k)
    assert second["preset"] == "small" and second["unet"] == first["unet"] and second["plan"]["lr"] == 0
    assert "start_from" not in first and second["start_from"] == str(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "third")
    flags = ["--quick", "--lr", "0", "--out", tmp_path / "second", "--data", folder, "--start-from"]
    message = fails(capsys, module.main, *flags, tmp_path / "third")
    assert f"of a run with start_from {tmp_path / 'first'}, not" in message
    assert f"no trained {kind} in {tmp_path}" in fails(capsys, module.main, *flags, tmp_path)


def test_flags_that_do_not_fit_the_network_of_a_folder_are_refused(folder, tmp_path, capsys):
    run(train_diffusion, tmp_path / "n", folder, "--preset", "class")
    flags = ["--quick", "--data", folder, "--out", tmp_path / "m"]
    for how in ("--start-from", "--figures"):
        for name, value, own in (("preset", "better", "class"), ("dataset", "fashion", "mnist")):
            message = fails(capsys, train_diffusion.main, *flags, how, tmp_path / "n", f"--{name}", value)
            assert f"{tmp_path / 'n'} holds a network of {name} {own}, not {value}; leave out --{name}" in message
        message = fails(capsys, train_denoiser.main, *flags, how, WEIGHTS / "mnist" / "denoiser", "--pure-noise")
        assert "is of sigma 0.5; omit --pure-noise" in message
    for preset in ("huge", ["class"]):
        edit_config(tmp_path / "n", preset=preset)
        message = fails(capsys, train_diffusion.main, *flags, "--start-from", tmp_path / "n")
        assert "no preset " in message and "choose from time, class, small" in message


def test_reflow_does_not_go_on_with_another_run(folder, tmp_path, monkeypatch, capsys):
    """It says so before a pair is drawn."""
    monkeypatch.setattr(train_flow, "kept_pairs", lambda *args: pytest.fail("pairs were drawn"))
    run(train_flow, tmp_path / "f", folder, "--preset", "class")
    message = fails(capsys, train_flow.main, "--quick", "--preset", "reflow", "--out", tmp_path / "f")
    assert "is of a run with preset class, not reflow; pass the settings of that run" in message


def test_quick_reflow_of_the_embedded_teacher_is_quick(folder, tmp_path):
    """A bound on the work that is the same on every machine: images that go through the large network."""
    count, forward = [], UNet.forward

    def counted(self, x, *more):
        count.append(len(x))
        return forward(self, x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", counted)
        made = run(train_flow, tmp_path / "r", folder, "--preset", "reflow")
    assert "reflow.png" in made and "solvers.png" in made and sum(count) < 4000, sum(count)


def test_unconditional_gif_is_drawn_without_a_class(folder, tmp_path, monkeypatch):
    """From the same noise as sampling.gif, in which every digit has its class and none."""
    walks, calls, forward = {}, [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, time, c: calls.append((x, c)) or forward(self, x, time, c))

    def note(states, path):
        calls.clear()
        ends, (inputs, classes) = list(states), zip(*calls)
        walks[path.name] = len(ends), ends[-1], inputs[0], torch.cat(classes)

    monkeypatch.setattr(models, "save_animation", note)
    run(train_diffusion, tmp_path / "n", folder, "--preset", "class")
    (n, end, begin, rows), (_, other_end, other_begin, nothing) = walks["sampling.gif"], walks["unconditional.gif"]
    noise = draw_noise((10, 1, 28, 28), seeded(range(10)))
    assert n == 5 and torch.equal(begin, torch.cat([noise, noise])) and torch.equal(other_begin, noise)
    assert torch.equal(rows[:20].sum(1), torch.tensor([0.0] * 10 + [1.0] * 10)) and not nothing.any()
    assert not torch.equal(end, other_end)


def at_step(monkeypatch, step, act):
    """Something happens in a training step, counted from 1."""
    original, steps = training._step, itertools.count(1)
    monkeypatch.setattr(training, "_step", lambda *args: (act() if next(steps) == step else None, original(*args)))


@pytest.mark.parametrize(
    ("module", "kind"), [(train_denoiser, "denoiser"), (train_diffusion, "ddpm"), (train_flow, "flow")]
)
def test_a_run_that_is_stopped_leaves_its_network_and_goes_on_to_the_same_numbers(
    module, kind, fashion, tmp_path, monkeypatch, capsys
):
    flags = ["--dataset", "fashion", "--seed", "4", "--dtype", "float32"]
    run(module, tmp_path / "whole", fashion, *flags)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 10, lambda: signal.raise_signal(signal.SIGINT))
        run(module, tmp_path / "n", fashion, *flags)
    assert "stopped: the same command goes on from here" in capsys.readouterr().out
    config, tensors = models.read(tmp_path / "n", kind)
    assert config["trained"] == "0.4 of 1 epochs"  # 10 of 25 steps
    assert config["dataset"] == "fashion" and config["preset"] in ("course", "time") and config["seed"] == 4
    assert config["plan"] == {"epochs": 1, "batch_size": 16, "lr": 0.001, "lr_decay": 1.0}
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)["model"]
    assert torch.equal(tensors["down1.0.0.weight"], kept["down1.0.0.weight"].half().float())
    run(module, tmp_path / "n", fashion, *flags)
    whole, parts = (models.read(tmp_path / name, kind) for name in ("whole", "n"))
    assert whole[0] == parts[0] and all(torch.equal(whole[1][k], parts[1][k]) for k in whole[1])


def test_the_network_that_is_written_and_drawn_is_the_average(folder, tmp_path):
    run(train_flow, tmp_path / "n", folder, "--ema", "0.9")
    kept = torch.load(tmp_path / "n" / "training" / "checkpoint.pt", weights_only=True)
    tensors = models.read(tmp_path / "n", "flow")[1]
    average, plain = (kept[key]["down1.0.0.weight"].half().float() for key in ("ema", "model"))
    assert torch.equal(tensors["down1.0.0.weight"], average) and not torch.equal(average, plain)


def test_the_networks_of_chosen_epochs_stay_and_draw_from_one_noise(folder, tmp_path, capsys):
    """Killed in the second epoch, gone on with other epochs to keep: all ends as in a run that kept nothing."""
    flags = ["--preset", "class", "--epochs", "2", "--ema", "0.9", "--dtype", "float32"]
    out, (first, second) = tmp_path / "n", (tmp_path / "n" / "epochs" / name for name in ("01", "02"))

    def network(folder):
        return [(folder / name).read_bytes() for name in ("config.json", "model.fp16.safetensors")]

    def kill():
        raise KeyboardInterrupt

    run(train_diffusion, tmp_path / "whole", folder, *flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 30, kill)  # an epoch has 25
        run(train_diffusion, out, folder, *flags, "--keep-epochs", "1")
    early = network(out)
    assert network(first) == early and not second.exists()
    run(train_diffusion, out, folder, *flags, "--keep-epochs", "2", "1")
    assert network(first) == early and network(second) == network(out) == network(tmp_path / "whole") != early
    assert "too late" not in capsys.readouterr().out
    sample.main(["--quick", "--model", str(first), str(second), "--out", str(tmp_path / "s.png")])
    printed = capsys.readouterr().out
    assert "01, scale 5, by ddpm-twice, 4 steps, trained 1 of 2 epochs:" in printed
    assert ", trained 2 of 2 epochs:" in printed
    run(train_diffusion, tmp_path / "whole", folder, *flags, "--keep-epochs", "1", "2")
    assert "--keep-epochs comes too late for 1: the run is past that" in capsys.readouterr().out
    assert network(tmp_path / "whole" / "epochs" / "02") == network(out) and not (tmp_path / "whole/epochs/01").exists()


def test_a_network_can_be_drawn_from_after_its_first_epoch(folder, tmp_path, monkeypatch):

    def kill():
        raise KeyboardInterrupt

    out = tmp_path / "n"
    for step in (16, 41):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            at_step(patch, step, kill)
            run(train_flow, out, folder, "--preset", "class", "--epochs", "2")
        if step == 16:
            with pytest.raises(ValueError, match="no trained flow in .*, which writes it epoch by epoch"):
                models.read(out, "flow")
    assert models.read(out, "flow")[0]["trained"] == "1 of 2 epochs"


def test_a_trained_network_is_not_replaced_by_a_new_run(teacher, folder, capsys):
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", teacher)
    assert "holds a trained network, which this would replace; pass another --out" in message
    assert not (teacher / "training" / "checkpoint.pt").exists()


def test_one_kind_of_network_does_not_go_on_as_another(folder, tmp_path, capsys):
    """The same network, the same plan: only the loss would be another."""
    run(train_diffusion, tmp_path / "n", folder, "--preset", "class")
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--preset", "class", "--out", tmp_path / "n")
    assert "is of a run with kind ddpm, not flow; pass" in message
    assert models.read(tmp_path / "n", "ddpm")[0]["kind"] == "ddpm"


def test_the_home_folder_is_found_without_a_shell(folder, tmp_path, monkeypatch):
    """--out=~/n reaches a program as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train_flow.main(["--quick", "--data", str(folder), "--out=~/n"])
    models.read(tmp_path / "n", "flow")
    sample.main(["--quick", "--model=~/n", "--out=~/s.png"])
    assert (tmp_path / "s.png").is_file()


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_an_unusable_folder_is_named_before_the_work(module, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(levels, "spectrum", lambda x: pytest.fail("levels were computed"))
    flags = ["--quick", "--data", folder, "--out", tmp_path / "file" / "n"]
    assert "cannot write to" in fails(capsys, module.main, *flags)


@pytest.mark.parametrize("flags", [["--batch-size", 500], ["--batch-size", 0], ["--epochs", 0]])
def test_plans_that_no_run_can_have_are_refused(flags, folder, tmp_path, capsys):
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "x", *flags)
    assert "need 1 epoch or more, and batches of 1 to 400 digits, got " in message


@pytest.mark.parametrize(
    ("flag", "value"), [("lr", "nan"), ("lr", -1), ("lr-decay", -0.5), ("lr-decay", 0), ("ema", 1), ("ema", -1),
                        ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_rates_and_seeds_that_no_run_can_have_are_refused(flag, value, folder, tmp_path, capsys):
    """An average of decay -1 or 2 is a network that nobody trained; a negative factor gives complex rates."""
    message = fails(capsys, train_flow.main, "--quick", "--data", folder, "--out", tmp_path / "x", f"--{flag}", value)
    assert f"--{flag}" in message and "got" in message and "Traceback" not in message


@pytest.mark.parametrize(("epochs", "wrong"), [([1, 0], "got 0"), ([-1, 2, 4], "got -1, 4")])
def test_only_epochs_of_the_plan_can_be_kept(epochs, wrong, folder, tmp_path, capsys):
    flags = ["--quick", "--data", folder, "--out", tmp_path / "x", "--epochs", 3, "--keep-epochs", *epochs]
    assert f"--keep-epochs takes epochs from 1 to 3, the last one; {wrong}\n" in fails(capsys, train_flow.main, *flags)


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_samples_are_drawn_after_the_first_every_fifth_and_the_last_epoch(module, folder, tmp_path):
    made = run(module, tmp_path / "b", folder, "--epochs", "7", "--batch-size", "400")
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (1, 5, 7)]


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_every_preset_begins_a_run_and_stands_in_the_help(module, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    for name, preset in module.PRESETS.items():
        assert f"  {name:12}  {preset.plan}" in printed
    if module is train_diffusion:
        assert "epochs: 20, batch size 128, learning rate 0.001, falling to 0.000112; 64 channels" in printed
    begun = []
    monkeypatch.setattr(trainer, "fit", lambda args, model, *more: begun.append((args.preset, model.config)))
    for name in set(module.PRESETS) - {"reflow"}:
        module.main(["--quick", "--data", str(folder), "--out", str(tmp_path / name), "--preset", name])
        assert begun[-1] == (name, replace(module.PRESETS[name].unet, hidden=4))


def test_a_loss_that_explodes_ends_in_one_line(folder, tmp_path, capsys):
    flags = ["--quick", "--data", folder, "--out", tmp_path / "n", "--lr", "1e30", "--epochs", 2]
    assert re.search(r"error: the loss or its gradient is (nan|inf) at step", fails(capsys, train_flow.main, *flags))


def test_the_presets_are_the_courses():
    """Batch, epochs, rate and width of the course's pages, and its schedule."""
    denoiser, diffusion, flows = (module.PRESETS for module in (train_denoiser, train_diffusion, train_flow))
    assert denoiser["course"] == Preset(Plan(5, 256, 1e-4), UNetConfig(128)) and train_denoiser.SIGMA == 0.5
    for name, classes in (("time", 0), ("class", 10)):
        assert diffusion[name].plan == Plan(20, 128, 1e-3, 0.1) and flows[name].plan == Plan(10, 64, 1e-2, 0.1)
        for unet in (diffusion[name].unet, flows[name].unet):
            assert (unet.hidden, unet.time, unet.num_classes) == (64, True, classes)
    for name, classes in (("better", 10), ("better-time", 0)):
        assert diffusion[name] == Preset(Plan(40, 128, 1e-3, 0.01), UNetConfig(128, time=True, num_classes=classes))
    assert flows["time"].unet.modulate == "mul" and diffusion["time"].unet.modulate == "add"
    assert flows["no-scheduler"].plan == Plan(15, 64, 5e-3) and flows["no-scheduler"].unet == flows["class"].unet
    assert flows["better"].plan == Plan(50, 64, 1e-2, 0.1)  # the course's 0.05 is worse: walkthrough, chapter 16
    assert flows["better"].unet == UNetConfig(128, time=True, modulate="mul")
    betas = 1 - models.course_schedule().alphas_cumprod[1:] / models.course_schedule().alphas_cumprod[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 300, dtype=torch.float64)[1:])
    assert (models.FLOW_STEPS, models.DROPOUT, models.GUIDANCE_SCALE) == (50, 0.1, 5.0)
