"""The trainer: it learns, resumes to the exact step, writes what the loader reads, and says what is wrong."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import charts, ddpm, images, training, weights
from minidiff.cascade import Cascade
from minidiff.ddpm import add_noise
from minidiff.deepfloyd import initial, stages, text, train
from minidiff.deepfloyd.dataset import CaptionedImages
from minidiff.deepfloyd.initial import initialise, pass_through
from minidiff.deepfloyd.t5 import T5Encoder
from minidiff.deepfloyd.unet import UNet
from minidiff.factorized import Part
from minidiff.schedule import squaredcos_cap_v2
from tests.tiny import CONFIGS, T5

DRAW_PREVIEW = train.preview
TINY = CONFIGS
TINY_T5 = replace(T5, vocab_size=60)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(initial, "MINI_1", TINY[1])
    monkeypatch.setattr(initial, "MINI_2", TINY[2])
    monkeypatch.setattr(initial, "MINI_T5", TINY_T5)
    monkeypatch.setattr(train, "PREVIEWS", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(initial, "CONTRASTIVE_STEPS", 2)
    monkeypatch.setattr(initial, "CONTRASTIVE_BATCH", 4)
    monkeypatch.setattr(train, "preview", lambda *_: None)  # slow, and looked at in one test only


@pytest.fixture
def captioned(tmp_path):
    """Two captioned images: a red and a blue square."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for name, colour, kind in (("red", (230, 20, 20), "png"), ("blue", (20, 20, 230), "PNG")):
        Image.new("RGB", (256, 256), colour).save(folder / f"{name}.{kind}")
        (folder / f"{name}.txt").write_text(f"a {name} square\na picture of a {name} square\n")
    return folder


def run(stage, captioned, out, steps, *extra):
    train.main([str(stage), str(captioned), "--out", str(out), "--steps", str(steps), "--batch-size", "4", *extra])


def fails(capsys, *argv):
    """What a run says on stderr that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def losses(out):
    with (out / "training" / "loss.csv").open() as f:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(f)]


def state(out):
    return torch.load(out / "training" / "checkpoint.pt", weights_only=True)


def test_both_stages_train_and_load_as_a_released_model_does(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "preview", DRAW_PREVIEW)
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, captioned, one, 3)
    run(2, captioned, two, 4, "--text-encoder", str(one))
    assert [step for step, _ in losses(one)] == [2] and [step for step, _ in losses(two)] == [2, 4]
    chart = images.load(two / "training" / "loss.png")
    assert chart.equal(images.from_pil(charts.chart([("whole run", {"training": losses(two)})], {})))
    encode = text.load_text_encoder(one, torch.float32)
    for stage, folder in ((1, one), (2, two)):
        loaded = stages.plan_stage(weights.resolve(str(folder), stage), torch.float32)[1]()
        ema = {k: v.half().float() for k, v in state(folder)["ema"].items() if k.startswith("unet.")}
        assert all(torch.equal(v, ema["unet." + k]) for k, v in loaded.unet.state_dict().items())
        assert (folder / "training" / "samples" / f"step-000000{stage + 2}.png").is_file()
    assert encode(["a red square"]).shape == (1, 77, 32)
    assert not (two / "text_encoder").exists()


def test_it_learns(captioned, tmp_path):
    run(1, captioned, tmp_path / "one", 60, "--lr", "2e-3", "--save-every", "1000")
    history = [loss for _, loss in losses(tmp_path / "one")]
    assert sum(history[-10:]) < 0.7 * sum(history[:10])  # 20 steps each


def test_a_stopped_run_resumes_exactly(captioned, tmp_path, monkeypatch, capsys):
    """Step 2 is between two rows of loss.csv, whose mean must not notice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(1, captioned, whole, 7)
    average = training.update_average

    def interrupted(ema, module, step, decay):  # between the optimizer's step and the count of it
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        average(ema, module, step, decay)

    monkeypatch.setattr(training, "update_average", interrupted)
    run(1, captioned, parts, 7)
    assert state(parts)["step"] == 3
    monkeypatch.setattr(training, "update_average", average)
    run(1, captioned, parts, 7)
    a, b = state(whole), state(parts)
    assert a["step"] == b["step"] == 7 and losses(whole) == losses(parts)
    assert all(torch.equal(a["model"][k], b["model"][k]) and torch.equal(a["ema"][k], b["ema"][k]) for k in a["model"])
    assert b["optimizer"]["param_groups"][0]["lr"] == train.learning_rate(6, 7, 5e-4)  # of the last step
    for flag, words in (("--lr", "lr 0.0005, not 0.1"), ("--seed", "seed 0, not 3"), ("--size", "size 64, not 32")):
        value = words.split()[-1]
        assert f"checkpoint.pt is of a run with {words}; pass" in fails(capsys, 1, captioned, parts, 7, flag, value)


def test_regression_the_losses_of_the_first_steps(captioned, tmp_path, monkeypatch):
    """Of both stages, as the trainer wrote them when stage 2 got its losses of areas and its offsets."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    run(1, captioned, tmp_path / "one", 4, "--dtype", "float32")
    run(2, captioned, tmp_path / "two", 4, "--dtype", "float32", "--text-encoder", str(tmp_path / "one"))
    rows = [loss for folder in ("one", "two") for _, loss in losses(tmp_path / folder)]
    expected = [1.069178, 1.516538, 0.853689, 0.527631, 2.814820, 3.254699, 2.480023, 1.408459]
    assert rows == pytest.approx(expected, rel=1e-4)


def test_training_goes_on_from_the_weights_of_a_folder(captioned, tmp_path, capsys):
    """With a learning rate of 0 they come out as they went in, tokenizer included."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, captioned, one, 2)
    run(1, captioned, two, 1, "--start-from", str(one), "--lr", "0")
    for part in ("unet", "text_encoder"):
        a, b = (weights.Checkpoint(folder, part).tensors() for folder in (one, two))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert (one / "tokenizer" / "spiece.model").read_bytes() == (two / "tokenizer" / "spiece.model").read_bytes()
    flags = ["--start-from", str(one), "--text-encoder", str(one)]
    assert "missing" in fails(capsys, 2, captioned, tmp_path / "three", 1, *flags)
    # A wrong path does not spoil the folder for the right one.
    assert "no tokenizer at nowhere" in fails(capsys, 1, captioned, tmp_path / "four", 1, "--start-from", "nowhere")
    run(1, captioned, tmp_path / "four", 1, "--start-from", str(one), "--lr", "0")
    (one / "training" / "checkpoint.pt").write_bytes(b"PK cut")
    assert "is no checkpoint of a run; pass another --out" in fails(capsys, 1, captioned, one, 2)


def test_what_learns_at_32_pixels_is_written_and_drawn_as_a_network_of_32_pixels(captioned, tmp_path):
    run(1, captioned, tmp_path / "small", 1, "--size", "32")
    assert json.loads((tmp_path / "small" / "unet" / "config.json").read_text())["sample_size"] == 32
    run(1, captioned, tmp_path / "large", 1, "--start-from", str(tmp_path / "small"))
    assert json.loads((tmp_path / "large" / "unet" / "config.json").read_text())["sample_size"] == 64
    for name, size in (("small", 32), ("large", 64)):
        cascade = Cascade.load(str(tmp_path / name), "none")
        x = cascade.draw([Part(*cascade.encode("a red square"))], [0], steps=2)
        assert x.shape == (1, 3, size, size)


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_a_nan_stops_with_the_last_good_checkpoint_named(captioned, tmp_path, monkeypatch, capsys, which):
    run(1, captioned, tmp_path / "one", 4, "--save-every", "4")
    before, original = state(tmp_path / "one")["model"], train.ddpm.loss

    def broken(*args):  # the root of 0 has an infinite slope, and infinity times 0 is nan
        found = original(*args)
        return found * torch.nan if which == "loss" else found + (0 * found).sqrt()

    monkeypatch.setattr(train.ddpm, "loss", broken)
    message = fails(capsys, 1, captioned, tmp_path / "one", 8)
    assert re.search(r"loss or its gradient is nan at step 5; the last good .*checkpoint\.pt.*smaller --lr", message)
    after = state(tmp_path / "one")["model"]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_steps_made_again_are_written_down_once(captioned, tmp_path):
    """The process was killed at step 5, after the checkpoint of step 2 and the row of step 4."""
    run(1, captioned, tmp_path / "one", 4)
    rows = losses(tmp_path / "one")
    kept = state(tmp_path / "one")
    torch.save(kept | {"step": 2}, tmp_path / "one" / "training" / "checkpoint.pt")
    run(1, captioned, tmp_path / "one", 4)
    assert [step for step, _ in losses(tmp_path / "one")] == [step for step, _ in rows] == [2, 4]


def test_two_processes_average_their_gradients(captioned, tmp_path):
    """torchrun with gloo: each sees noises of its own, half a batch, and all their weights stay the same."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, torch
from tests.deepfloyd import test_train as T
T.initial.MINI_1, T.initial.MINI_T5, T.train.preview = T.TINY[1], T.TINY_T5, lambda *_: None
T.initial.CONTRASTIVE_STEPS, T.initial.CONTRASTIVE_BATCH = 2, 4
noises, forward, step = [], T.train.Trainee.forward, T.training._step

def noted(self, x_start, ids, mask, random):
    noises.append(random["noise"])
    return forward(self, x_start, ids, mask, random)

def kept(model, *args):
    step(model, *args)
    torch.save((noises, model.state_dict()), r"{tmp_path}/rank-" + os.environ["RANK"] + ".pt")

T.train.Trainee.forward, T.training._step = noted, kept
T.run(1, r"{captioned}", T.Path(r"{tmp_path / "one"}"), 4)
""")
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, cwd=root, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert state(tmp_path / "one")["step"] == 4
    (seen, here), (others, there) = (torch.load(tmp_path / f"rank-{i}.pt", weights_only=True) for i in (0, 1))
    assert len(seen) == len(others) == 4 and all(len(noise) == 2 for noise in (*seen, *others))
    assert not any(torch.equal(a, b) for a, b in zip(seen, others))
    assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)


def test_stage_2_gets_offset_noise_and_stage_1_plain_noise():
    """The mean of 64 x 64 plain numbers has the deviation 1 / 64 = 0.0156; with 0.1 of one more number,
    sqrt(0.1^2 + 0.0156^2) = 0.1012. 600 means, to 5 standard errors of 3 %."""
    for stage, deviation in ((1, 0.0156), (2, 0.1012)):
        random = train.random_numbers(stage, 200, 64, squaredcos_cap_v2(), torch.Generator().manual_seed(0))
        means = random["noise"].mean((2, 3))
        assert means.std().item() == pytest.approx(deviation, rel=0.15)
        assert (random["noise"] - means[..., None, None]).std().item() == pytest.approx(1, rel=0.01)


def test_the_variance_is_learned_alike_at_every_time_up_to_the_cap():
    """Where the error of eps has the variance v, the bound is lowest at f = v (that place is nearly linear in one
    step), and weighed it is 0.02 (f - v)^2 / (4 ln 2) above that: the same at t = 10, 38 and 80. At t = 500 the bounds
    are 0.0026 apart and the cap holds."""
    schedule, v = squaredcos_cap_v2(), 0.2
    t = torch.tensor([10, 38, 80])
    noise = torch.randn(3, 1, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = noise + v**0.5 * torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)  # its square is v everywhere
    x_start = torch.zeros_like(noise)

    def weighed(f: float) -> torch.Tensor:
        pred_var = torch.full_like(noise, 2 * f - 1)
        return ddpm.bound(schedule, x_start, noise, t, eps, pred_var) * train.variance_weight(schedule, t)

    lowest = weighed(v)
    for f in (0.0, 0.6, 1.0):
        expected = torch.full((3,), train.VARIANCE_SHARE * (f - v) ** 2 / (4 * math.log(2)), dtype=torch.float64)
        torch.testing.assert_close(weighed(f) - lowest, expected, rtol=0.15, atol=0)
    assert train.variance_weight(schedule, torch.tensor([500])).tolist() == [train.MAX_BOUND_WEIGHT]


def test_packed_images_are_drawn_by_weight_and_as_they_are(tmp_path):
    """Not mirrored: a caption may say left, and letters have a side."""
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    pixels[1, :, :32] = 255
    np.save(tmp_path / "images_64.npy", pixels)
    (tmp_path / "captions.json").write_text(json.dumps([{"captions": ["never"], "weight": 0}, {"captions": ["half"]}]))
    x_start, texts = CaptionedImages(tmp_path, 64).draw(200, torch.Generator().manual_seed(0))
    assert set(texts) == {"half", "", "a high quality photo", "a high quality picture"}
    assert 8 <= 200 - texts.count("half") <= 58  # 12 + 4 % of 200, 5 sigma
    assert set(CaptionedImages(tmp_path, 64).draw(200, torch.Generator().manual_seed(0), dropout=0)[1]) == {"half"}
    left, right = x_start[:, 0, 0, 0], x_start[:, 0, 0, -1]
    assert left.eq(1).all() and right.eq(-1).all()
    mirrored = CaptionedImages(tmp_path, 64).draw(200, torch.Generator().manual_seed(0), mirror=True)[0][:, 0, 0, 0]
    assert set(mirrored.tolist()) == {-1, 1} and 65 <= mirrored.eq(-1).sum() <= 135  # 5 sigma


def test_a_landscape_is_called_a_photo_and_a_thing_only_loses_its_caption(tmp_path):
    np.save(tmp_path / "images_64.npy", np.zeros((2, 64, 64, 3), np.uint8))
    rows = [{"captions": ["a lake"], "kind": "full"}, {"captions": ["a dog"], "kind": "sprite", "weight": 9}]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    dataset = CaptionedImages(tmp_path, 64)
    found = [{dataset._text(i, 0.5, drop / 100, n / 3, 0.12) for drop in range(100) for n in range(3)} for i in (0, 1)]
    assert found == [{"a lake", "", "a high quality photo", "a high quality picture"}, {"a dog", ""}]
    texts = dataset.draw(10_000, torch.Generator().manual_seed(0))[1]
    assert abs(texts.count("") / 10_000 - 0.12) < 0.016  # 5 sigma
    assert abs(texts.count("a high quality photo") / 10_000 - 0.1 * 0.18 / 2) < 0.005


def test_held_out_rows_are_never_drawn(tmp_path):
    np.save(tmp_path / "images_64.npy", np.stack([np.full((64, 64, 3), v, np.uint8) for v in (0, 255)]))
    rows = [{"captions": ["dark", "black"], "split": "val"}, {"captions": ["light"], "split": "train"}]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    captioned = CaptionedImages(tmp_path, 64)
    x_start, texts = captioned.held_out()
    assert texts == ["dark"] and x_start.eq(-1).all() and x_start.shape == (1, 3, 64, 64)
    assert captioned.draw(50, torch.Generator().manual_seed(0))[0].eq(1).all()


@pytest.mark.parametrize(("rows", "expected"), [(3, [0, 1, 2]), (300, [i * 300 // 128 for i in range(128)])])
def test_held_out_images_are_spread_over_all_that_are_held_out(tmp_path, rows, expected):
    """All of them where there are fewer than 128, in their order: once each."""
    np.save(tmp_path / "images_64.npy", np.zeros((rows + 1, 64, 64, 3), np.uint8))
    captions = [*({"captions": [str(i)], "split": "val"} for i in range(rows)), {"captions": ["to train on"]}]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    assert CaptionedImages(tmp_path, 64).held_out()[1] == [str(i) for i in expected]


def test_the_stage_2_crop_lines_up_with_its_low_resolution_image():
    """At noise level 0 the crop of the enlarged small image is the crop of the image, up to blur."""
    ramp = torch.linspace(-1, 1, 256).view(1, 1, 1, 256).expand(2, 3, 256, 256).contiguous()
    model = train.Trainee(2, UNet(TINY[2]), T5Encoder(TINY_T5), squaredcos_cap_v2())
    random = {"noise": torch.zeros(2, 3, 64, 64), "low_noise": torch.zeros(2, 3, 256, 256),
              "level": torch.zeros(2).long(), "top": torch.tensor([3, 100]),
              "left": torch.tensor([20, 150])}  # fmt: skip
    x_start, low_res, level = model.crop(ramp, random)
    assert torch.equal(x_start[0], ramp[0, :, 3:67, 20:84]) and torch.equal(x_start[1], ramp[1, :, 100:164, 150:214])
    assert (x_start - low_res).abs().max() < 0.015 and level.tolist() == [0, 0]
    random["low_noise"], random["level"] = torch.randn(2, 3, 256, 256), torch.tensor([250, 250])
    noised = model.crop(ramp, random)[1]
    alpha_bar = model.schedule.alpha_bar(random["level"])
    clean = stages.upsample(torch.nn.functional.avg_pool2d(ramp, 4), (256, 256))
    expected = add_noise(clean, random["low_noise"], alpha_bar)
    torch.testing.assert_close(noised[1], expected[1, :, 100:164, 150:214])


def test_stage_2_ends_with_whole_images():
    """At 256 the crop is the image, and there is one place for it."""
    random = train.random_numbers(2, 3, 256, squaredcos_cap_v2(), torch.Generator().manual_seed(0))
    assert random["noise"].shape == (3, 3, 256, 256) and random["top"].tolist() == random["left"].tolist() == [0, 0, 0]
    x_start = torch.rand(3, 3, 256, 256)
    model = train.Trainee(2, UNet(TINY[2]), T5Encoder(TINY_T5), squaredcos_cap_v2())
    assert torch.equal(model.crop(x_start, random)[0], x_start)


@pytest.mark.parametrize(("stage", "size"), [(1, "256"), (2, "32")])
def test_a_size_that_the_stage_has_not_is_refused(captioned, tmp_path, capsys, stage, size):
    error = fails(capsys, stage, captioned, tmp_path / "out", 2, "--size", size, "--text-encoder", "t")
    assert f"--size of stage {stage} is one of {train.SIZES[stage]}, got {size}" in error


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_asks_the_network_as_sampling_does_and_weighs_what_it_answers(stage, monkeypatch):
    """Weights 1 / alpha_bar, at most 100: at t = 10 about 1, at t = 999 100. Stage 2 adds the loss of areas."""
    schedule, generator = squaredcos_cap_v2(), torch.Generator().manual_seed(0)
    model = train.Trainee(stage, UNet(TINY[stage]), T5Encoder(TINY_T5), schedule)
    size = 64 if stage == 1 else 256
    random = train.random_numbers(stage, 2, 64, schedule, generator) | {"t": torch.tensor([10, 999])}
    x_start = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    ids, mask = torch.ones(2, 77, dtype=torch.long), torch.ones(2, 77, dtype=torch.long)
    answer, asked = torch.randn(2, 6, 64, 64, generator=generator), []
    monkeypatch.setattr(model.unet, "forward", lambda *args: asked.append(args) or answer)
    found = model(x_start, ids, mask, random)
    (stacked, t, prompt_embeds, labels), expected_input, level = asked[0], [], None
    if stage == 2:
        x_start, low_res, level = model.crop(x_start, random)
        expected_input = [low_res]
    x_t = add_noise(x_start, random["noise"], schedule.alpha_bar(random["t"]))
    torch.testing.assert_close(stacked, torch.cat([x_t, *expected_input], dim=1))  # noisy first, as in stages.py
    assert t.tolist() == [10, 999] and prompt_embeds.shape == (2, 77, 32)
    assert labels is None if stage == 1 else torch.equal(labels, level)
    plain = train.ddpm.loss(schedule, x_start, random["noise"], random["t"], *answer.chunk(2, dim=1), torch.ones(2))
    weighed = train.ddpm.loss(schedule, x_start, random["noise"], random["t"], *answer.chunk(2, dim=1),
                              torch.tensor([1 / schedule.alphas_cumprod[10].float(), 100]),
                              train.variance_weight(schedule, random["t"]))  # fmt: skip
    if stage == 2:
        weight = torch.tensor([1 / schedule.alphas_cumprod[10].float(), 100])
        weighed += weight * train.coarse_loss(random["noise"] - answer[:, :3])
    torch.testing.assert_close(found, weighed)
    assert (found - plain)[1] > 100  # 99 times an error of about 2


def test_times_are_drawn_less_often_where_little_noise_is_left():
    """Min-SNR Sec. 3.4: weight 1 up to SNR 5 (t about 265 and above), 5 / SNR below, 0.4 from t = 169 down."""
    generator = torch.Generator().manual_seed(0)
    t = train.random_numbers(1, 40_000, 1, squaredcos_cap_v2(), generator)["t"]
    high = ((t >= 500) & (t < 550)).float().sum()
    for start in (0, 170, 200):
        alphas = squaredcos_cap_v2().alphas_cumprod[start : start + 50]
        expected = (5 * (1 - alphas) / alphas).clamp(0.4, 1).mean()
        found = ((t >= start) & (t < start + 50)).float().sum() / high
        assert abs(found - expected) < 5 * (expected / high) ** 0.5


@pytest.mark.parametrize(("steps", "expected"), [(12, 3), (2, 1), (40, 5)])
def test_captions_are_matched_for_a_quarter_of_the_steps(captioned, tmp_path, monkeypatch, steps, expected):
    """At least once, and never more often than CONTRASTIVE_STEPS, here 5."""
    drawn, draw = [], CaptionedImages.draw

    def counted(self, batch_size, generator, **options):
        drawn.append(options)
        return draw(self, batch_size, generator, **options)

    monkeypatch.setattr(initial, "CONTRASTIVE_STEPS", 5)
    monkeypatch.setattr(CaptionedImages, "draw", counted)
    monkeypatch.setattr(training, "run", lambda *_, **__: [])  # no diffusion
    run(1, captioned, tmp_path / "one", steps)
    assert drawn == [{"dropout": 0}] * expected


@pytest.mark.parametrize("stage", [1, 2])
def test_eps_begins_as_x_t_at_unit_variance(stage):
    """Also with a tint a hundred times smaller than the noise."""
    unet = UNet(TINY[stage])
    initialise(unet)
    pass_through(unet)
    x = 3 * torch.randn(2, TINY[stage].in_channels, 32, 32) + torch.tensor([0.03, -0.01]).view(2, 1, 1, 1)
    t = torch.tensor([999, 3])
    eps = unet(x, t, torch.randn(2, 77, 32), t if stage == 2 else None)[:, :3]
    expected = x[:, :3] / x[:, :3].square().mean((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-4)


def test_the_learning_rate_warms_up_stays_and_falls():
    assert [train.learning_rate(s, 5000, 1.0) for s in (0, 99, 199, 2000, 3500, 4997)] == pytest.approx(
        [0.005, 0.5, 1.0, 1.0, 0.5, 0.001]
    )


def test_blank_lines_and_a_byte_order_mark_are_no_captions(captioned, tmp_path):
    """Of 5 lines 2 are captions."""
    (captioned / "red.txt").write_bytes("\ufeffa red square\n\n  \nà rouge\r\n\n".encode())
    assert CaptionedImages(captioned, 64).captions[1] == ["a red square", "à rouge"]
    np.save(tmp_path / "images_64.npy", np.zeros((1, 64, 64, 3), np.uint8))
    (tmp_path / "captions.json").write_bytes("\ufeff".encode() + json.dumps([{"captions": ["a", "", " "]}]).encode())
    assert set(CaptionedImages(tmp_path, 64).draw(50, torch.Generator(), dropout=0)[1]) == {"a"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_captions_in_another_encoding_are_named_with_their_file(captioned, encoding):
    (captioned / "red.txt").write_bytes("a red square\nun carré rouge\n".encode(encoding))
    with pytest.raises(ValueError, match=r"red\.txt is not UTF-8 \(.*\); save it in that encoding"):
        CaptionedImages(captioned, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"there is no .*captions\.json"), ("[", r"captions\.json is not valid JSON"),
     ("[{}]", "row 0 has no caption"), ("[3]", "other things than rows"),
     ('[{"captions": ["a"]}, {"captions": [""]}]', "row 1 has no caption"),
     ('[{"captions": "a dog"}]', "holds other things than rows of captions"),  # letters
     ('[{"captions": ["a"], "split": "Val"}]', 'the split of row 0 must be "train" or "val", got \'Val\''),
     ('[{"captions": ["a"], "split": "val"}]', "one that is not held out above 0"),
     ('[{"captions": ["a"], "weight": -1}]', "each weight must be a number of 0 or more"),
     ('[{"captions": ["a"], "weight": NaN}]', "each weight must be a number of 0 or more"),
     ('[{"captions": ["a"]}, {"captions": ["b"]}]', "1 images, but captions of 2")],
)  # fmt: skip
def test_wrong_captions_of_packed_images_are_named(tmp_path, text, message):
    np.save(tmp_path / "images_64.npy", np.zeros((1, 64, 64, 3), np.uint8))
    if text is not None:
        (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionedImages(tmp_path, 64)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(np.zeros((1, 64, 64, 3)), "must hold .* got fl"), (np.zeros((1, 3, 64, 64), np.uint8), "must hold .* got uint8"),
     (np.zeros((1, 32, 32, 3), np.uint8), "must hold .* got uint8"), (b"", "is no array"), (b"no", "is no array")],
)  # fmt: skip
def test_packed_images_of_another_kind_are_named(tmp_path, pixels, message):
    """Of floats, of channels first and of another size training would have learned something else."""
    path = tmp_path / "images_64.npy"
    path.write_bytes(pixels) if isinstance(pixels, bytes) else np.save(path, pixels)
    (tmp_path / "captions.json").write_text('[{"captions": ["a"]}]')
    with pytest.raises(ValueError, match=f"images_64.npy {message}"):
        CaptionedImages(tmp_path, 64)


def test_images_without_captions_are_counted(captioned):
    (captioned / "red.txt").unlink()
    with pytest.warns(UserWarning, match="1 images in .* have no .txt of captions and are left out"):
        assert len(CaptionedImages(captioned, 64).captions) == 1


def test_a_new_run_does_not_replace_a_model(tmp_path, captioned, capsys):
    """Such as the embedded one: without its checkpoint it would be overwritten after the first steps."""
    (tmp_path / "one" / "unet").mkdir(parents=True)
    (tmp_path / "one" / "unet" / "config.json").write_text("{}")
    assert "one holds a trained network, which this would replace" in fails(capsys, 1, captioned, tmp_path / "one", 4)
    assert [p.name for p in (tmp_path / "one").rglob("*")] == ["unet", "config.json"]


def test_bad_input_is_told(tmp_path, captioned, capsys):
    (tmp_path / "empty").mkdir()
    said = fails(capsys, 1, tmp_path / "empty", tmp_path / "one", 4)
    assert "holds neither images_64.npy nor images with a .txt of captions" in said
    for flag in ("--save-every", "--batch-size"):
        assert f"{flag} must be at least 1, got 0" in fails(capsys, 1, captioned, tmp_path / "one", 4, flag, "0")
    for flag, value in (("--lr", "nan"), ("--lr", "-1"), ("--seed", "-1"), ("--seed", str(2**70))):
        assert "--lr must be 0 or more, --seed lie in" in fails(capsys, 1, captioned, tmp_path / "one", 4, flag, value)
    (captioned / "red.txt").write_text("")
    said = fails(capsys, 1, captioned, tmp_path / "one", 4)
    assert "red.txt is empty; write one caption or prompt on each line" in said
    assert "--text-encoder weights/mini-IF-I" in fails(capsys, 2, captioned, tmp_path / "two", 4)
