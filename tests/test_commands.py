"""Every command runs, writes a labelled picture with its settings, keeps its promises, and explains bad input."""

import hashlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from minidiff import cascade as cascades
from minidiff import cli, encode, generate, images, upscale, weights
from tests.tiny import write_cascade

PROMPT = "a red castle"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    return write_cascade(tmp_path_factory.mktemp("cascade"))


def make(cascade, out, *flags, prompt=PROMPT):
    """generate with the tiny cascade and four steps; the strip as a tensor."""
    one, two = cascade
    generate.main([prompt, "--model", str(one), "--stage2", str(two), "--quick", "--out", str(out), *flags])
    return images.from_pil(Image.open(out).convert("RGB"))


def fails(capsys, main, *argv):
    """Exit status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_generate_writes_both_sizes_and_its_settings(cascade, tmp_path, capsys):
    make(cascade, tmp_path / "g.png", "--seed", "5")
    assert Image.open(tmp_path / "g.png").width > 2 * 256
    written = images.read_metadata(tmp_path / "g.png")
    assert written["prompt"] == PROMPT and written["seed"] == "5" and written["Software"].startswith("minidiff 0.")
    printed = capsys.readouterr().out
    assert "64 px: 4 UNet calls, 2 pictures in each, about" in printed and "GiB" in printed and "g.png" in printed


def test_the_same_seed_gives_the_same_picture_whatever_the_batch(cascade, tmp_path, monkeypatch):
    """Image 2 of three from seed 3 is image 0 of seed 5, in both stages, up to rounding.

    At t = 999 a rounding of 1e-6 in eps is 0.02 in the estimate (times 1 / sqrt(alpha_bar) = 20291), and four steps of
    a random network pass that on; so the means are compared, and beside them those of two different seeds.
    """
    shown = []
    monkeypatch.setattr(cli.images, "strip", lambda rows, labels, title: shown.append(rows) or Image.new("RGB", (8, 8)))
    make(cascade, tmp_path / "a.png", "--seed", "3", "--num-images", "3")
    make(cascade, tmp_path / "b.png", "--seed", "5")
    make(cascade, tmp_path / "c.png", "--seed", "5", "--split-batch")
    for size in (0, 1):
        different = (shown[0][0][size] - shown[0][1][size]).abs().mean()
        for other in shown[1:]:
            assert (shown[0][2][size] - other[0][size]).abs().mean() < 0.05 * different


def test_several_steps_make_a_comparison(cascade, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(cli.images, "strip", lambda *args: shown.append(args) or Image.new("RGB", (8, 8)))
    one, two = map(str, cascade)
    generate.main([PROMPT, "--model", one, "--stage2", two, "--steps", "2", "1,1,1", "--out", str(tmp_path / "g.png")])
    assert shown[0][1] == [["seed 0, 2 steps, 64 px", "256 px, 2 steps"],
                           ["seed 0, 1,1,1 steps, 64 px", "256 px, 1,1,1 steps"]]  # fmt: skip


def test_stage2_none_stops_at_64_pixels(cascade, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(cli.images, "strip", lambda rows, *args: shown.append(rows) or Image.new("RGB", (8, 8)))
    generate.main([PROMPT, "--model", str(cascade[0]), "--quick", "--out", str(tmp_path / "g.png")])
    assert [len(row) for row in shown[0]] == [1] and shown[0][0][0].shape == (3, 64, 64)


def test_encoded_prompts_give_the_same_picture(cascade, tmp_path):
    one, _ = cascade
    encode.main([PROMPT, "--model", str(one), "--dtype", "float32", "--out", str(tmp_path / "e.safetensors")])
    direct = make(cascade, tmp_path / "a.png", "--dtype", "float32")
    from_file = make(
        cascade, tmp_path / "b.png", "--dtype", "float32", "--prompt-embeds", str(tmp_path / "e.safetensors")
    )
    streamed = make(cascade, tmp_path / "c.png", "--dtype", "float32", "--text-encoder", "streamed")
    torch.testing.assert_close(direct, from_file, rtol=0, atol=0.02)
    torch.testing.assert_close(direct, streamed, rtol=0, atol=0.02)


def test_the_prompt_and_the_negative_prompt_matter(cascade, tmp_path, capsys):
    a = make(cascade, tmp_path / "a.png", "--guidance-scale", "20")
    b = make(cascade, tmp_path / "b.png", "--guidance-scale", "20", "--negative-prompt", "a photo")
    assert (a - b).abs().max() > 0.01
    assert "--negative-prompt" not in capsys.readouterr().err


def test_upscale_takes_any_picture(cascade, tmp_path, capsys):
    one, two = map(str, cascade)
    Image.new("RGBA", (90, 70), (255, 0, 0, 128)).save(tmp_path / "in.png")
    upscale.main([str(tmp_path / "in.png"), PROMPT, "--model", two, "--text-model", one, "--quick",
                  "--guidance-scale", "1", "--negative-prompt", "a", "--out", str(tmp_path / "u.png")])  # fmt: skip
    assert "warning: --negative-prompt does nothing at --guidance-scale 1" in capsys.readouterr().err
    assert Image.open(tmp_path / "u.png").width > 3 * 256
    assert images.read_metadata(tmp_path / "u.png")["noise_level"] == "250"


def test_the_embedded_cascade_makes_a_picture_offline(tmp_path):
    """As a user runs it, in a process of its own, with the hub switched off and unreachable."""
    out = tmp_path / "village.png"
    result = subprocess.run(
        [sys.executable, "-m", "minidiff.generate", "a snowy mountain village", "--quick", "--out", str(out)],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"wrote {out}" in result.stdout
    picture = images.from_pil(Image.open(out).convert("RGB"))
    assert picture.std() > 0.1


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
        for name in (*weights.MINI.values(), "mnist")
        for p in (weights.WEIGHTS / name).rglob("*")
        if p.is_file() and "training" not in p.parts
    }
    assert {name for name, _, _ in rows} == set(on_disk)
    for name, size, digest in rows:
        content = (weights.WEIGHTS / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(size.replace(",", "")), digest), name


def test_output_that_cannot_be_written_fails_before_the_work(cascade, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cascades.stages, "load_stage", lambda *args: pytest.fail("work began"))
    one = cascade[0]
    assert "must end in one of" in fails(capsys, generate.main, PROMPT, "--model", one, "--out", tmp_path / "g.xyz")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails(
        capsys, generate.main, PROMPT, "--model", one, "--out", tmp_path / "file" / "g.png"
    )
    assert "must end in one of .safetensors" in fails(capsys, encode.main, PROMPT, "--out", tmp_path / "e.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "cannot take 0 steps out of 1000; choose 1 to 1000"),
        (["--steps", "quick"], "steps must be a count, a list like '10,10,3' or one of fast27"),
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--device", "tpu9"], "no device 'tpu9'; choose from auto, cpu"),
        (["--model", "IF-IV"], "no model 'IF-IV'"),
        (["--stage2", "IF-I-M-v1.0"], "stage"),
        (["--prompt-embeds", "nowhere.safetensors"], "no file of encoded prompts at nowhere.safetensors"),
    ],
)
def test_wrong_flags_are_told_in_one_line(cascade, tmp_path, capsys, flags, message):
    argv = [
        PROMPT,
        "--model",
        str(cascade[0]),
        "--stage2",
        str(cascade[1]),
        "--quick",
        "--out",
        str(tmp_path / "g.png"),
    ]
    argv = [a for a in argv if a != "--quick"] if "--steps" in flags else argv
    assert message in fails(capsys, generate.main, *argv, *flags)


def test_stages_in_the_wrong_place_are_told(cascade, tmp_path, capsys):
    one, two = cascade
    message = fails(capsys, generate.main, PROMPT, "--model", two, "--stage2", one, "--out", tmp_path / "g.png")
    assert "stage 2" in message
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    message = fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, "--model", one, "--out", tmp_path / "u.png")
    assert "stage 1" in message


def test_stages_of_different_text_encoders_are_told_before_the_work(cascade, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cascades.stages, "load_stage", lambda *args: pytest.fail("work began"))
    monkeypatch.setattr(cascades, "encode", lambda *args: pytest.fail("encoding began"))
    message = fails(
        capsys, generate.main, PROMPT, "--model", cascade[0], "--stage2", "mini", "--out", tmp_path / "g.png"
    )
    assert "mini-IF-II reads text states of width 192, but one reads 32" in message


def test_a_noise_level_out_of_range_and_a_missing_picture_are_told(cascade, tmp_path, capsys):
    one, two = cascade
    flags = ["--model", two, "--text-model", one, "--quick", "--out", tmp_path / "u.png"]
    assert "in.png" in fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, *flags)
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    message = fails(capsys, upscale.main, tmp_path / "in.png", PROMPT, *flags, "--noise-level", "1000")
    assert "--noise-level must lie in 0..999, got 1000" in message


def test_a_long_prompt_warns_and_still_makes_a_picture(cascade, tmp_path, capsys):
    make(cascade, tmp_path / "g.png", prompt="castle " * 100)
    assert "warning: the prompt has" in capsys.readouterr().err


def test_a_broken_model_is_told_before_the_prompts_are_encoded(cascade, tmp_path, capsys, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(cascade[0], one)
    shutil.copytree(cascade[1], two)
    monkeypatch.setattr(cascades, "encode", lambda *args: pytest.fail("encoded"))
    monkeypatch.setattr(upscale, "encode", lambda *args: pytest.fail("encoded"))
    (two / "scheduler" / "scheduler_config.json").write_text("{")
    flags = ["--out", tmp_path / "x.png", "--quick"]
    said = fails(capsys, generate.main, PROMPT, "--model", one, "--stage2", two, *flags)
    assert "scheduler_config.json is not valid JSON" in said
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    said = fails(capsys, upscale.main, tmp_path / "a.png", "--model", two, "--text-model", one, *flags)
    assert "scheduler_config.json is not valid JSON" in said
    file = next((one / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    said = fails(capsys, generate.main, PROMPT, "--model", one, "--stage2", "none", *flags)
    assert "cut short" in said


def test_a_stage_2_of_minis_width_reads_minis_text_and_others_the_released_one(cascade, tmp_path):
    mini = weights.WEIGHTS / weights.MINI[2]
    assert upscale.text_model_of("mini") == upscale.text_model_of(str(mini)) == "mini"
    assert upscale.text_model_of(weights.MINI[2]) == "mini"  # a name in weights/
    assert upscale.text_model_of("IF-II-M-v1.0") == upscale.text_model_of(str(cascade[1])) == "IF-I-XL-v1.0"


def test_names_that_are_no_unicode_are_written_down_readably(cascade, tmp_path):
    """A file name of bytes that are no UTF-8, as Linux allows, reaches Python as lone surrogates."""
    make(cascade, tmp_path / "g.png", prompt=b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert images.read_metadata(tmp_path / "g.png")["prompt"] == "caf\\udce9"


NO_COMPILER = type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})("backend='inductor'")
NO_COMPILER.inner_exception = OSError("no C++ compiler\nand more")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(NO_COMPILER, 2, "torch.compile failed here (OSError: no C++ compiler); leave out --compile"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "ask for less at once"),
     (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, "ask for less at once"),
     (RuntimeError("MPS backend out of memory"), 2, "ask for less at once"), (KeyboardInterrupt(), 130, "stopped")],
)  # fmt: skip
def test_lack_of_memory_or_of_a_compiler_and_ctrl_c_end_a_command_without_a_traceback(error, status, said, capsys):
    @cli.command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status and said in capsys.readouterr().err


def test_other_runtime_errors_are_not_hidden():
    @cli.command
    def main(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()
