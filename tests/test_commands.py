"""Every command runs, writes the image and a sheet with its settings, keeps its promises, and explains bad input."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff.cascade
from minidiff import anagram, cli, encode, generate, images, upscale, weights
from minidiff.cascade import Cascade
from minidiff.deepfloyd import stages, text
from minidiff.deepfloyd.unet import UNetConfig
from tests.tiny import write_cascade

PROMPT = "a red castle"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def sheets(monkeypatch):
    """Every sheet that a command makes, as (rows, labels)."""
    made, real = [], images.sheet

    def sheet(rows, labels, title=""):
        made.append(([[x.clone() for x in row] for row in rows], labels))
        return real(rows, labels, title)

    monkeypatch.setattr(images, "sheet", sheet)
    return made


def make(cascade, out, *flags, prompt=PROMPT, stage2=True):
    """generate with the tiny cascade and four steps; the image, (1, 3, 256, 256)."""
    one, two = map(str, cascade)
    generate.main([prompt, "--model", one, "--stage2", two if stage2 else "none", "--quick", "--out", str(out),
                   "--dtype", "float32", *map(str, flags)])  # fmt: skip
    return images.load(out) if out.exists() else None


def fails(capsys, main, *argv):
    """Exit status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def same(a, b, other):
    """Equal up to rounding, beside the image of another seed.

    At t = 999 a rounding of 1e-6 in eps is 0.02 in the estimate (times 1 / sqrt(alpha_bar) = 20291), and four steps of
    a random network pass that on; so the means are compared, and beside them those of two different seeds.
    """
    assert (a - b).abs().mean() < 0.05 * (a - other).abs().mean()


# --- what is written --------------------------------------------------------------------------------------------------


def test_generate_writes_the_bare_image_a_sheet_and_its_settings(cascade, tmp_path, capsys, sheets):
    """The image at its size, its pixels the sheet's; both sizes on the sheet; what was used in the metadata."""
    image = make(cascade, tmp_path / "g.png", "--seed", "5", "--sampler", "ddim")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g-sheet.png", "g.png"]
    ((rows, labels),) = sheets
    assert image.shape == (1, 3, 256, 256) and (rows[0][1] - image[0]).abs().max() < 1 / 255 + 1e-6
    assert labels == [["64 px, seed 5", "256 px"]] and rows[0][0].shape == (3, 64, 64)
    with Image.open(tmp_path / "g-sheet.png") as sheet:
        assert sheet.width > 2 * 256
    for name in ("g.png", "g-sheet.png"):
        written = images.read_metadata(tmp_path / name)
        assert written["prompt"] == PROMPT and written["seed"] == "5" and written["sampler"] == "ddim"
        assert written["Software"].startswith("minidiff ") and written["command"] == "python -m minidiff.generate"
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'g.png'}\nwrote {tmp_path / 'g-sheet.png'}\n" in printed
    assert re.search(r"^[\d.]+ s, peak memory [\d.]+ GiB", printed, re.MULTILINE) and "about" not in printed


def settings_of(path):
    keys = ("steps", "guidance_scale", "stage2", "stage2_steps", "stage2_guidance_scale", "sampler", "noise_level")
    return {key: value for key, value in images.read_metadata(path).items() if key in keys}


def test_the_metadata_are_the_settings_really_used(cascade, tmp_path):
    """Not those of a flag that --quick overrules, nor of a stage that there is not."""
    one, two = map(str, cascade)
    out = tmp_path / "g.png"
    make(cascade, out, "--steps", 9, "--stage2-guidance-scale", 2)
    assert settings_of(out) == {"steps": "4", "guidance_scale": "7.0", "sampler": "ddpm", "stage2": two,
                                "stage2_steps": "4", "stage2_guidance_scale": "2.0"}  # fmt: skip
    make(cascade, out, "--guidance-scale", 3, stage2=False)
    assert settings_of(out) == {"steps": "4", "guidance_scale": "3.0", "sampler": "ddpm", "stage2": "none"}
    make(cascade, tmp_path / "s.png", "--guidance-scale", 1, 3, stage2=False)
    assert settings_of(tmp_path / "s-sheet.png")["guidance_scale"] == "[1.0, 3.0]"
    assert [settings_of(tmp_path / f"s-{i}.png")["guidance_scale"] for i in (0, 1)] == ["1.0", "3.0"]
    upscale.main([str(out), PROMPT, "--model", two, "--text-model", one, "--steps", "9", "--quick",
                  "--out", str(tmp_path / "u.png")])  # fmt: skip
    assert settings_of(tmp_path / "u.png") == {"stage2": two, "stage2_steps": "4", "stage2_guidance_scale": "4.0",
                                               "sampler": "ddpm", "noise_level": "250"}  # fmt: skip


def test_a_list_of_seeds_is_an_image_of_each(cascade, tmp_path):
    """OUT-0, OUT-1, ... are what each seed alone gives, whatever is drawn with it and however the batch is split."""
    make(cascade, tmp_path / "a.png", "--seed", 3, 9, 5, stage2=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png", "a-sheet.png"]
    several = [images.load(tmp_path / f"a-{i}.png") for i in range(3)]
    names = ("a-0.png", "a-1.png", "a-2.png", "a-sheet.png")
    assert [images.read_metadata(tmp_path / name)["seed"] for name in names] == ["3", "9", "5", "[3, 9, 5]"]
    alone = make(cascade, tmp_path / "b.png", "--seed", 5, stage2=False)
    split = make(cascade, tmp_path / "c.png", "--seed", 5, "--split-batch", stage2=False)
    same(several[2], alone, several[0])
    same(several[2], split, several[1])


def test_num_images_counts_the_seed_up(cascade, tmp_path, sheets):
    make(cascade, tmp_path / "a.png", "--seed", 3, "--num-images", 3, stage2=False)
    alone = make(cascade, tmp_path / "b.png", "--seed", 5, stage2=False)
    same(images.load(tmp_path / "a-2.png"), alone, images.load(tmp_path / "a-0.png"))
    assert sheets[0][1] == [["seed 3", "seed 4", "seed 5"]]
    third = images.read_metadata(tmp_path / "a-2.png")
    assert third["seed"] == "5" and "num_images" not in third


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--seed", "1", "2", "--num-images", "2"], "several --seed are one image each; leave out --num-images"),
     (["--seed", "-1"], "a seed must lie in 0..2^32 - 1, got -1"),
     (["--seed", "4294967296"], "a seed must lie in 0..2^32 - 1, got 4294967296"),
     (["--seed", "4294967295", "--num-images", "2"], "a seed must lie in 0..2^32 - 1, got 4294967296")],
)  # fmt: skip
def test_seeds_that_are_none(cascade, capsys, tmp_path, flags, message):
    assert message in fails(capsys, generate.main, PROMPT, "--model", cascade[0], "--out", tmp_path / "g.png", *flags)


def test_several_steps_make_a_comparison(cascade, tmp_path, sheets):
    """Each count of steps is a whole image: stage 2 takes as many, and what is compared stands below it."""
    one, two = map(str, cascade)
    flags = ["--model", one, "--stage2", two, "--dtype", "float32", "--out", str(tmp_path / "g.png")]
    generate.main([PROMPT, "--steps", "2", "1,1,1", *flags])
    assert sheets[0][1] == [["2 steps, seed 0", "1,1,1 steps, seed 0"]]
    generate.main([PROMPT, "--steps", "2", "--stage2-steps", "2", "1", *flags])
    assert sheets[1][1] == [["stage 2: 2 steps, seed 0", "stage 2: 1 steps, seed 0"]]
    assert torch.equal(sheets[1][0][0][0], sheets[0][0][0][0])
    assert not torch.equal(sheets[1][0][0][1], sheets[1][0][0][0])


def test_several_prompts_are_a_row_each(cascade, tmp_path, sheets):
    generate.main([PROMPT, "a dog", "--model", str(cascade[0]), "--steps", "1", "2", "--seed", "0", "4",
                   "--out", str(tmp_path / "g.png")])  # fmt: skip
    assert sheets[0][1] == [[f"{prompt}, {steps} steps, seed {seed}" for seed in (0, 4)]
                            for prompt in (PROMPT, "a dog") for steps in (1, 2)]  # fmt: skip
    written = [images.read_metadata(tmp_path / f"g-{i}.png") for i in range(8)]  # each names its own settings
    wanted = [(prompt, steps, seed) for prompt in (PROMPT, "a dog") for steps in "12" for seed in "04"]
    assert [(one["prompt"], one["steps"], one["seed"]) for one in written] == wanted
    assert not any("prompts" in one for one in written)
    assert images.read_metadata(tmp_path / "g-sheet.png")["prompts"] == f"['{PROMPT}', 'a dog']"
    generate.main([PROMPT, "", "--model", str(cascade[0]), "--steps", "1", "--out", str(tmp_path / "e.png")])
    assert sheets[1][1] == [[f"{PROMPT}, seed 0", "(empty prompt), seed 0"]]


def test_stage2_none_stops_at_64_pixels(cascade, tmp_path, sheets):
    image = make(cascade, tmp_path / "g.png", stage2=False)
    assert image.shape == (1, 3, 64, 64) and sheets[0][1] == [["seed 0"]]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_encoded_prompts_give_the_same_image(cascade, tmp_path):
    one, _ = cascade
    encode.main([PROMPT, "--model", str(one), "--dtype", "float32", "--out", str(tmp_path / "e.safetensors")])
    direct = make(cascade, tmp_path / "a.png", stage2=False)
    from_file = make(cascade, tmp_path / "b.png", "--prompt-embeds", tmp_path / "e.safetensors", stage2=False)
    streamed = make(cascade, tmp_path / "c.png", "--text-encoder", "streamed", stage2=False)
    torch.testing.assert_close(direct, from_file, rtol=0, atol=0.02)
    torch.testing.assert_close(direct, streamed, rtol=0, atol=0.02)


def test_the_prompt_and_the_negative_prompt_matter(cascade, tmp_path, capsys):
    a = make(cascade, tmp_path / "a.png", "--guidance-scale", "20", stage2=False)
    b = make(cascade, tmp_path / "b.png", "--guidance-scale", "20", "--negative-prompt", "a photo", stage2=False)
    assert (a - b).abs().max() > 0.01
    assert "--negative-prompt" not in capsys.readouterr().err


def test_at_guidance_0_two_prompts_are_one_image(cascade, tmp_path):
    flags = ["--guidance-scale", "0"]
    a = make(cascade, tmp_path / "a.png", *flags, stage2=False)
    b = make(cascade, tmp_path / "b.png", *flags, prompt="a dog", stage2=False)
    assert torch.equal(a, b)


def test_a_long_prompt_warns_and_still_makes_an_image(cascade, tmp_path, capsys):
    make(cascade, tmp_path / "g.png", prompt="castle " * 100, stage2=False)
    assert "warning: the prompt has" in capsys.readouterr().err


def test_names_that_are_no_unicode_are_written_down_readably(cascade, tmp_path):
    """A file name of bytes that are no UTF-8, as Linux allows, reaches Python as lone surrogates."""
    make(cascade, tmp_path / "g.png", prompt=b"caf\xe9".decode("utf-8", "surrogateescape"), stage2=False)
    assert images.read_metadata(tmp_path / "g.png")["prompt"] == r"caf\udce9"


def test_upscale_takes_any_image(cascade, tmp_path, capsys):
    one, two = map(str, cascade)
    Image.new("RGBA", (90, 70), (255, 0, 0, 128)).save(tmp_path / "in.png")
    upscale.main([str(tmp_path / "in.png"), PROMPT, "--model", two, "--text-model", one, "--quick",
                  "--guidance-scale", "1", "--negative-prompt", "a", "--out", str(tmp_path / "u.png")])  # fmt: skip
    assert "warning: --negative-prompt does nothing at --guidance-scale 1" in capsys.readouterr().err
    assert images.load(tmp_path / "u.png").shape == (1, 3, 256, 256)


# --- the embedded cascade ---------------------------------------------------------------------------------------------


def test_the_embedded_cascade_makes_an_image_offline(tmp_path):
    """As a user runs it, in a process of its own, with the hub switched off and unreachable."""
    out = tmp_path / "village.png"
    result = subprocess.run(
        [sys.executable, "-m", "minidiff.generate", "a snowy mountain village", "--quick", "--out", str(out)],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"wrote {out}" in result.stdout
    image = images.load(out)
    assert image.shape == (1, 3, 256, 256) and image.std() > 0.1


def test_the_embedded_weights_stay_small_and_fit_their_architecture():
    folders = [weights.WEIGHTS / name for name in weights.MINI.values()]
    assert all(weights.check(folder, lambda line: None) for folder in folders)
    size = sum(p.stat().st_size for f in folders for p in f.rglob("*") if p.is_file() and "training" not in p.parts)
    assert size < 40e6


def test_weights_readme_names_every_file_with_its_size_and_sha256():
    text = (weights.WEIGHTS / "README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", text, re.MULTILINE)
    on_disk = {
        p.relative_to(weights.WEIGHTS).as_posix(): p
        for name in (*weights.MINI.values(), "mnist", "judge")
        for p in (weights.WEIGHTS / name).rglob("*")
        if p.is_file() and "training" not in p.parts
    }
    assert {name for name, _, _ in rows} == set(on_disk)
    for name, size, digest in rows:
        content = (weights.WEIGHTS / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size.replace(",", "")), digest), name


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Whatever would read a network or encode a prompt fails the test."""
    monkeypatch.setattr(stages, "fill", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(text, "load_text_encoder", lambda *_: pytest.fail("encoding began"))


def test_output_that_cannot_be_written_fails_before_the_work(cascade, tmp_path, capsys, no_work):
    one = cascade[0]
    assert "must end in one of" in fails(capsys, generate.main, PROMPT, "--model", one, "--out", tmp_path / "g.xyz")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "g.png"
    assert "cannot write to" in fails(capsys, generate.main, PROMPT, "--model", one, "--out", out)
    assert "must end in one of .safetensors" in fails(capsys, encode.main, PROMPT, "--out", tmp_path / "e.png")
    assert "error: g must end in one of" in fails(capsys, generate.main, PROMPT, "--model", one, "--out", "g")
    (tmp_path / "folder.png").mkdir()
    for main, folder in ((generate.main, tmp_path / "folder.png"), (generate.main, "."), (anagram.main, "")):
        message = fails(capsys, main, PROMPT, PROMPT, "--model", one, "--stage2", "none", "--out", folder)
        assert "is a folder; pass a file name, such as" in message and "image.png" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "cannot take 0 steps out of 1000; choose 1 to 1000"),
        (["--steps", "quick"], "steps must be a count, a list like '10,10,3' or one of fast27"),
        (["--stage2-steps", "0"], "cannot take 0 steps out of 1000; choose 1 to 1000"),
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--device", "tpu9"], "no device 'tpu9'; choose from auto, cpu"),
        (["--model", "IF-IV"], "no model 'IF-IV'"),
        (["--stage2", "IF-I-M-v1.0"], "stage"),
        (["--sampler", "euler"], "invalid choice: 'euler'"),
        (["--prompt-embeds", "nowhere.safetensors"], "no file of encoded prompts at nowhere.safetensors"),
    ],
)
def test_wrong_flags_have_one_line(cascade, tmp_path, capsys, flags, message):
    one, two = cascade
    argv = [PROMPT, "--model", one, "--stage2", two, "--out", tmp_path / "g.png", *flags]
    assert message in fails(capsys, generate.main, *argv)
    assert not (tmp_path / "g.png").exists()


def test_stages_in_the_wrong_place_are_named(cascade, tmp_path, capsys):
    one, two = cascade
    message = fails(capsys, generate.main, PROMPT, "--model", two, "--stage2", one, "--out", tmp_path / "g.png")
    assert "stage 2" in message
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    message = fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, "--model", one, "--out", tmp_path / "u.png")
    assert "stage 1" in message


def test_stages_of_different_text_encoders_fail_before_the_work(cascade, tmp_path, capsys, no_work):
    argv = [PROMPT, "--model", cascade[0], "--stage2", "mini", "--out", tmp_path / "g.png"]
    assert "one of width 32, mini-IF-II of width 192" in fails(capsys, generate.main, *argv)


def test_a_noise_level_out_of_range_and_a_missing_image(cascade, tmp_path, capsys):
    one, two = cascade
    flags = ["--model", two, "--text-model", one, "--quick", "--out", tmp_path / "u.png"]
    assert "in.png" in fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, *flags)
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    message = fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, *flags, "--noise-level", "1000")
    assert "--noise-level must be a whole number from 0 to 999, got 1000" in message


def test_a_broken_model_fails_before_the_prompts_are_encoded(cascade, tmp_path, capsys, no_work):
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(cascade[0], one)
    shutil.copytree(cascade[1], two)
    (two / "scheduler" / "scheduler_config.json").write_text("{")
    flags = ["--out", tmp_path / "x.png", "--quick"]
    message = fails(capsys, generate.main, PROMPT, "--model", one, "--stage2", two, *flags)
    assert "scheduler_config.json is not valid JSON" in message
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    message = fails(capsys, upscale.main, tmp_path / "a.png", "--model", two, "--text-model", one, *flags)
    assert "scheduler_config.json is not valid JSON" in message
    file = next((one / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    message = fails(capsys, generate.main, PROMPT, "--model", one, "--stage2", "none", *flags)
    assert "cut short" in message


def test_without_a_text_model_a_stage_2_reads_minis_text_or_the_released_one(cascade, monkeypatch):
    """By its width: only the released T5's states are as wide as `UNetConfig` says, here the tiny cascade's."""
    models = []

    resolve = weights.resolve

    def resolved(model, stage, parts, *rest):
        if parts == ("text_encoder",):
            models.append(model)
            return None
        return resolve(model, stage, parts, *rest)

    monkeypatch.setattr(weights, "resolve", resolved)
    monkeypatch.setattr(UNetConfig, "encoder_hid_dim", 32)
    for stage2 in ("mini", weights.MINI[2], weights.WEIGHTS / weights.MINI[2], cascade[1]):
        Cascade.load("none", str(stage2))
    assert models == ["mini", "mini", "mini", "IF-I-XL-v1.0"]


# --- how a command ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "ask for less at once"),
     (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, "ask for less at once"),
     (RuntimeError("MPS backend out of memory"), 2, "ask for less at once"), (KeyboardInterrupt(), 130, "stopped"),
     (ValueError("no such thing"), 2, "error: no such thing")],
)  # fmt: skip
def test_lack_of_memory_and_ctrl_c_end_a_command_without_a_traceback(error, status, message, capsys):
    @cli.command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status and message in capsys.readouterr().err


def test_other_runtime_errors_are_not_hidden():
    @cli.command
    def main(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [(["minidiff"], ""), (["minidiff"], "1"), (["minidiff.anagram", "--check", "flip"], ""),
     (["minidiff.generate", "a castle", "--quick", "--stage2", "none", "--out", "OUT"], "1")],
)  # fmt: skip
def test_a_pipe_that_closes_ends_a_command_quietly(argv, unbuffered, tmp_path):
    """As before `| head -0`: the reader is gone before the first line, which is written at once or at the end."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", *(str(tmp_path / "g.png") if a == "OUT" else a for a in argv)]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write_end)
    assert result.returncode == 0 and not re.search("Error|Traceback|Errno", result.stderr), result.stderr


def test_ctrl_c_while_a_command_starts_leaves_no_traceback(tmp_path):
    """Before main begins, while torch is imported: a slow import stands in for it. 130 is what a shell expects."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(minidiff.__file__).parents[1]}"}
    command = [sys.executable, "-m", "minidiff.generate", "a castle"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "importing\n"
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130 and run.stderr.read() == ""


def test_the_seconds_of_a_command_include_its_imports():
    """A process that sleeps before it imports anything: the sleep is in the seconds, too (where the system tells)."""
    code = "import time; time.sleep(1.5); from minidiff import cli; print(cli.seconds_of_process(), cli.cost())"
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, printed = float(run.stdout.split()[0]), float(run.stdout.split()[1])
    assert printed == pytest.approx(seconds, abs=0.3)
    if Path("/proc/self/stat").is_file():
        assert 1.5 < seconds < time.perf_counter() - start + 0.2
