"""The commands of the three trainers: their figures, stopping and going on, and messages."""

import itertools
import json
import re
import shutil
import signal
from dataclasses import asdict, replace

import pytest
import torch

from minidiff import images, training
from minidiff.mnist import levels, models, sample, train_denoiser, train_diffusion, train_flow, trainer
from minidiff.mnist.trainer import Plan, Preset
from minidiff.mnist.unet import UNet, UNetConfig
from minidiff.sampling import draw_noise, seeded
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


@pytest.fixture
def titles(monkeypatch):
    """Of all strips that the denoiser's trainer saves, by name."""
    found, save = {}, train_denoiser.save_strip
    monkeypatch.setattr(
        train_denoiser, "save_strip", lambda *args: found.update({args[3].name: args[2]}) or save(*args)
    )
    return found


def test_train_denoiser_makes_its_figures(folder, tmp_path, capsys, titles):
    made = run(train_denoiser, tmp_path / "d", folder, "--four")
    assert titles["out-of-distribution.png"] == "Trained at sigma 0.5, tried at others (errors on 100 test digits)"
    assert titles["epoch-01.png"] == "epoch 1, sigma 0.5"
    assert made == ["noising.png", "out-of-distribution.png", "samples/epoch-01.png", "training/loss.png"]
    first = capsys.readouterr().out
    assert "loss on 100 test digits: 0." in first and "sigma 0.8: error 0." in first and "; linear optimum 0.0" in first
    run(train_denoiser, tmp_path / "d", folder, "--four")  # again: nothing is trained, all numbers come again
    again = capsys.readouterr().out
    assert "going on from step 25" in again and again.splitlines()[2:-1] == first.splitlines()[2:-1]
    assert "of a run with sigma 0.5, not None; pass" in fails(
        capsys, train_denoiser.main, "--quick", "--data", folder, "--out", tmp_path / "d", "--pure-noise"
    )
    assert images.read_metadata(tmp_path / "d" / "noising.png")["command"] == "python -m minidiff.mnist.train_denoiser"
    config, tensors = models.read(tmp_path / "d", "denoiser")
    UNet(UNetConfig(**config["unet"])).load_state_dict(tensors)
    assert run(train_denoiser, tmp_path / "p", folder, "--pure-noise", "--preset", "small") == [
        "mean-image.png", "noising.png", "samples/epoch-01.png", "training/loss.png",
    ]  # fmt: skip
    first = capsys.readouterr().out
    assert "outputs differ from the mean digit by 0." in first and titles["epoch-01.png"] == "epoch 1, noise alone"
    assert figures(train_denoiser, tmp_path / "d", tmp_path / "e", folder) == ["out-of-distribution.png"]
    capsys.readouterr()
    assert figures(train_denoiser, tmp_path / "p", tmp_path / "q", folder) == ["mean-image.png"]  # its config says so
    texts = first.splitlines() + capsys.readouterr().out.splitlines()
    lines = [line for line in texts if "outputs differ" in line]
    numbers = [[float(word) for word in line.split() if word[0].isdigit()] for line in lines]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)  # the network's, but for float16


@pytest.fixture
def scales(monkeypatch):
    """The guidance scales of all that is drawn, and how often the reference level withholds the class."""
    found, dropouts, guided, level = [], [], models.guided_unet, levels.of_task

    def note(unet, labels=None, scale=1.0):
        found.append(scale)
        return guided(unet, labels, scale)

    monkeypatch.setattr(models, "guided_unet", note)
    monkeypatch.setattr(train_flow, "guided_unet", note)
    monkeypatch.setattr(levels, "of_task", lambda task, x, p: dropouts.append(p) or level(task, x, p))
    return found, dropouts


def test_train_diffusion_makes_its_figures(folder, tmp_path, capsys, scales):
    made = run(train_diffusion, tmp_path / "d", folder, "--preset", "class", "--sampler", "dpm++")
    always = ["cleaned.png", "samples/epoch-01.png", "sampling.gif", "training/loss.png"]
    assert made == sorted([*always, "guidance.png", "unconditional.gif"])
    printed = capsys.readouterr().out
    assert "alpha_bar at the last of 300 times: 0.0481; 21.9%" in printed and "; training set known 0.0" in printed
    # samples, sampling.gif, unconditional.gif, guidance.png, cleaned.png
    assert scales[0] == [5.0, 5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert run(train_diffusion, tmp_path / "t", folder) == always and scales[1] == [0.1, 1.0]
    scales[0].clear()
    ends = ["cleaned.png", "guidance.png", "sampling.gif", "unconditional.gif"]
    assert figures(train_diffusion, tmp_path / "d", tmp_path / "e", folder) == ends
    assert images.read_metadata(tmp_path / "e" / "cleaned.png")["preset"] == "class"
    assert scales[0] == [5.0, 1.0, 0.0, 1.0, 5.0, 10.0, 1.0, 1.0]
    assert "nothing to guide; leave out --guidance-scale" in fails(
        capsys, train_diffusion.main, "--data", folder, "--out", tmp_path / "u", "--guidance-scale", 2
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_samples_of_ddpm_are_drawn_by_the_sampler_that_is_named(sampler, folder, tmp_path, monkeypatch):
    names, walk = [], models.walk
    monkeypatch.setattr(models, "walk", lambda *args: names.append(args[4]) or walk(*args))
    run(train_diffusion, tmp_path / "n", folder, "--sampler", sampler)
    assert set(names) == {sampler}


def test_train_flow_makes_its_figures(folder, tmp_path, scales):
    made = run(train_flow, tmp_path / "f", folder, "--preset", "class", "--guidance-scale", "3")
    # samples, .gif, guidance.png, solvers.png, straightness
    assert scales == ([3.0, 3.0, 0.0, 1.0, 5.0, 10.0, 3.0, 1.0], [0.1])
    assert made == ["guidance.png", "samples/epoch-01.png", "sampling.gif", "solvers.png", "training/loss.png"]
    edit_config(tmp_path / "f", dataset="fashion")
    ends = ["guidance.png", "sampling.gif", "solvers.png"]
    assert figures(train_flow, tmp_path / "f", tmp_path / "g", tmp_path / "no data") == ends
    assert images.read_metadata(tmp_path / "g" / "guidance.png")["dataset"] == "fashion"


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
    assert "reflow.png" in made and "; the teacher " in printed and "(0 is straight): the teacher" in printed
    (_, before), (config, after) = (models.read(path, "flow") for path in (teacher, tmp_path / "r"))
    assert config["dataset"] == "fashion" and config["teacher"] == str(teacher)
    assert all(torch.equal(after[k], v) for k, v in before.items() if "running" not in k and "num_" not in k)
    (tmp_path / "r" / "config.json").unlink()
    (tmp_path / "r" / "training" / "checkpoint.pt").unlink()
    flags = ["--quick", "--preset", "reflow", "--teacher", teacher]
    assert "holds pairs of another teacher or other settings" in fails(
        capsys, train_flow.main, *flags, "--out", tmp_path / "r", "--seed", "5"
    )
    few = ["--out", tmp_path / "few", "--pairs"]
    assert "--pairs 10 is too few: a tenth is kept" in fails(capsys, train_flow.main, *flags, *few, 10)


def test_reflow_names_its_two_networks_and_keeps_a_tenth_for_the_test(teacher, folder, tmp_path, monkeypatch, capsys):
    """Also where the teacher was moved meanwhile, and with --figures, whose config says who the teacher was."""
    named, split, fit = {}, [], trainer.fit
    monkeypatch.setattr(train_flow, "few_steps", lambda fields, x_0, _: named.update(fields) or ([x_0], ["x"]))
    monkeypatch.setattr(trainer, "fit", lambda *args: split.append(args[3:5]) or fit(*args))
    shutil.copytree(teacher, tmp_path / "moved")
    flags = ["--preset", "reflow", "--pairs", "200", "--teacher"]
    for place in (teacher, tmp_path / "moved"):
        run(train_flow, tmp_path / "q", folder, *flags, str(place))
    assert "going on from step 11" in capsys.readouterr().out
    x, time = draw_noise((10, 1, 28, 28), seeded(range(10))), torch.full((10,), 0.7)
    folders = {"the teacher": teacher, "this model": tmp_path / "q"}
    expected = {}
    for name, path in folders.items():
        unet = models.load(path, "flow", torch.device("cpu"))[0]
        expected[name] = models.velocity(models.guided_unet(unet, torch.arange(10)))(x, time)
    assert (expected["the teacher"] - expected["this model"]).abs().max() > 0.01
    for how in ("trained", "figures"):
        for name, value in expected.items():
            torch.testing.assert_close(named.pop(name)(x, time), value, rtol=0.01, atol=2e-3)
        if how == "trained":
            ends = ["guidance.png", "reflow.png", "sampling.gif", "solvers.png"]
            assert figures(train_flow, tmp_path / "q", tmp_path / "z", folder) == ends
    train, test = ({tuple(noise.flatten().tolist()) for noise in part.images[:, 1]} for part in split[0])
    assert (len(train), len(test)) == (180, 20) and not train & test
    edit_config(tmp_path / "q", teacher=str(tmp_path / "gone"))
    message = fails(capsys, train_flow.main, "--figures", tmp_path / "q", "--out", tmp_path / "z")
    assert f"there is no folder {tmp_path / 'gone'}, the teacher of reflow; pass the right one as --teacher" in message


def test_what_reflow_cannot_do_is_said_before_a_pair_is_drawn(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_flow, "kept_pairs", lambda *args: pytest.fail("pairs were drawn"))
    run(train_flow, tmp_path / "f", folder, "--preset", "class")
    flags, out = ["--quick", "--preset", "reflow"], ["--out", tmp_path / "x"]
    message = fails(capsys, train_flow.main, *flags, "--out", tmp_path / "f")
    assert "is of a run with preset class, not reflow; pass the settings of that run" in message
    assert "--teacher and --pairs are for --preset reflow" in fails(capsys, train_flow.main, "--pairs", "100", *out)
    without = UNet(UNetConfig(4, time=True))
    models.write(tmp_path / "t", without, {"kind": "flow", "unet": asdict(without.config)})
    message = fails(capsys, train_flow.main, *flags, "--teacher", tmp_path / "t", "--guidance-scale", 2, *out)
    assert "nothing to guide; leave out --guidance-scale" in message
    message = fails(capsys, train_flow.main, *flags, "--dataset", "fashion", *out)
    assert "draws mnist, which is what reflow learns; leave out --dataset" in message


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


@pytest.mark.parametrize(("module", "kind"), [(train_diffusion, "ddpm"), (train_flow, "flow")])
def test_animations_lead_from_the_noise_to_the_sample(module, kind, folder, tmp_path, monkeypatch):
    """With the class in the first, and in the second only zeros; the strip after the last epoch ends alike."""
    walks, samples, classes, forward = [], [], [], UNet.forward

    def kept(self, x, time=None, c=None):
        classes.append(c)
        return forward(self, x, time, c)

    monkeypatch.setattr(UNet, "forward", kept)

    def note(states, path):
        classes.clear()
        states = list(states)
        walks.append((path.name, states, torch.cat(classes)))

    monkeypatch.setattr(models, "save_animation", note)
    monkeypatch.setattr(models, "save_samples", lambda x, *_: samples.append(x))
    run(module, tmp_path / "n", folder, "--preset", "class")
    name, states, rows = walks[0]
    assert name == "sampling.gif" and rows.sum(1).max() == 1 and len(states) == {"ddpm": 7, "flow": 4}[kind]
    assert torch.equal(states[0], draw_noise((10, 1, 28, 28), seeded(range(10))))
    torch.testing.assert_close(states[-1], samples[-1][:10], rtol=0, atol=1e-4)
    if kind == "ddpm":
        assert walks[1][0] == "unconditional.gif" and not walks[1][2].any()
        assert torch.equal(walks[1][1][0], states[0]) and not torch.equal(walks[1][1][-1], states[-1])


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
    assert config["plan"] == {"epochs": 1, "batch_size": 16, "lr": 0.01, "lr_decay": 1.0}
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


def test_a_network_can_be_drawn_from_after_its_first_epoch(folder, tmp_path, monkeypatch):
    """Not before, and the run is not taken for one that never began."""

    def kill():
        raise KeyboardInterrupt

    out = tmp_path / "n"
    for step in (16, 41):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            at_step(patch, step, kill)
            run(train_flow, out, folder, "--preset", "class", "--epochs", "2")
        if step == 16:
            with pytest.raises(ValueError, match="no network in .* yet, only a run that has begun: it is written"):
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


def test_flags_out_of_range_are_refused(folder, tmp_path, capsys):
    for epochs in ([0], [2, 11]):
        message = fails(capsys, train_flow.main, "--out", tmp_path / "x", "--sample-epochs", *epochs)
        assert f"--sample-epochs must lie in 1..10, the epochs there are, got {epochs}" in message
    for flags in (["--seed", -1], ["--seed", 2**32], ["--ema", 1]):
        message = fails(capsys, train_flow.main, "--out", tmp_path / "x", *flags)
        assert "--seed must lie in 0..2^32 - 1 and --ema in [0, 1), got" in message
    flags = ["--quick", "--data", folder, "--out", tmp_path / "x", "--batch-size", 500]
    assert "batch_size must lie in 1..400, the digits there are, got 500" in fails(capsys, train_flow.main, *flags)


@pytest.mark.parametrize("module", [train_diffusion, train_flow])
def test_samples_are_drawn_after_the_epochs_that_are_named_and_the_last(module, folder, tmp_path):
    flags = ["--epochs", "5", "--batch-size", "200"]
    made = run(module, tmp_path / "a", folder, *flags, "--sample-epochs", "2", "3")
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (2, 3, 5)]
    made = run(module, tmp_path / "b", folder, *flags)
    assert [p for p in made if "samples" in p] == [f"samples/epoch-0{epoch}.png" for epoch in (1, 5)]


def test_samples_that_are_no_numbers_do_not_end_the_training(folder, tmp_path, capsys):
    """Guidance of 1e30 makes them so; the run comes to its end, and its network is there."""
    made = run(train_flow, tmp_path / "n", folder, "--preset", "class", "--guidance-scale", "1e30")
    assert "samples/epoch-01.png" in made and "solvers.png" in made
    message = "warning: 10 of the digits in .*epoch-01.png hold values that are not finite"
    assert re.search(message, capsys.readouterr().err)
    assert models.read(tmp_path / "n", "flow")[0]["trained"] == "1 of 1 epochs"


@pytest.mark.parametrize("module", [train_denoiser, train_diffusion, train_flow])
def test_every_preset_begins_a_run_and_stands_in_the_help(module, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    printed = capsys.readouterr().out
    for name, preset in module.PRESETS.items():
        assert f"{name:{max(map(len, module.PRESETS))}}  {preset.plan}" in printed
    if module is train_diffusion:
        assert "20 epochs, batches of 128, learning rate 0.001, falling to 0.000112; 64 channels" in printed
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
    assert flows["time"].unet.modulate == "mul" and diffusion["time"].unet.modulate == "add"
    assert flows["no-scheduler"].plan == Plan(15, 64, 5e-3) and flows["no-scheduler"].unet == flows["class"].unet
    assert flows["better"].plan == Plan(50, 64, 1e-2, 0.1)  # the course's 0.05 is worse: walkthrough, chapter 16
    assert flows["better"].unet == UNetConfig(128, time=True, modulate="mul")
    betas = 1 - models.course_schedule().alphas_cumprod[1:] / models.course_schedule().alphas_cumprod[:-1]
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 300, dtype=torch.float64)[1:])
    assert (models.FLOW_STEPS, models.DROPOUT, models.GUIDANCE_SCALE) == (50, 0.1, 5.0)
