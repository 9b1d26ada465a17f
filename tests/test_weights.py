"""weights.py: models found, fetched, listed and checked, and clear words where that fails. No network beyond this
machine."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from minidiff import weights
from minidiff.checkpoint import WeightsError
from tests.folders import FULL, HALF, T5, UNET, make_unet, write_model, write_part, write_scheduler

# ---------------------------------------------------------------------------------------------- finding


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A `weights/` folder with the two embedded models, and an empty Hugging Face cache."""
    for stage, channels in ((1, 3), (2, 6)):
        parts = {"unet": {**UNET, "in_channels": channels}}
        write_part(tmp_path / "weights" / weights.MINI[stage], "unet", {HALF: {"a": torch.ones(1)}}, parts["unet"])
        write_scheduler(tmp_path / "weights" / weights.MINI[stage])
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(weights, "snapshots", lambda name: [])
    monkeypatch.setattr(weights, "_download", lambda repo, parts, say: pytest.fail("must not download"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def test_resolve_finds_mini_paths_and_names(here):
    assert weights.resolve("mini", 1) == here / "mini-IF-I"
    assert weights.resolve("mini", 2) == here / "mini-IF-II"
    assert weights.resolve("mini-IF-I", 1) == here / "mini-IF-I"
    assert weights.resolve("weights/mini-IF-II", 2) == Path("weights/mini-IF-II")
    assert weights.embedded() == ["mini-IF-I", "mini-IF-II"]
    (here / "mini-IF-I").rename(here / "IF-I-M-v1.0")
    assert weights.resolve("IF-I-M-v1.0", 1) == weights.resolve("DeepFloyd/IF-I-M-v1.0", 1) == here / "IF-I-M-v1.0"


def test_one_model_has_one_name_but_a_folder_keeps_its_own(here):
    assert weights.short_name("mini-IF-I", 1) == weights.short_name("mini", 1) == "mini"
    assert weights.short_name("DeepFloyd/IF-I-M-v1.0", 1) == "IF-I-M-v1.0"
    for name in ("mini-IF-I", "DeepFloyd/IF-I-M-v1.0"):  # as `hf download --local-dir`, or a training, leaves it
        Path(name).mkdir(parents=True)
        assert weights.short_name(name, 1) == name


def test_resolve_takes_the_shared_text_encoder_of_another_model(here):
    write_part(here / "IF-I-XL-v1.0", "text_encoder", {"model.safetensors": {"a": torch.ones(1)}})
    (here / "IF-I-XL-v1.0" / "tokenizer").mkdir()
    (here / "IF-I-XL-v1.0" / "tokenizer" / "spiece.model").write_bytes(b"x")
    assert weights.resolve("IF-II-M-v1.0", 2, ("text_encoder",)) == here / "IF-I-XL-v1.0"


def test_resolve_says_what_is_wrong(here):
    known = r"embedded \(mini, mini-IF-I, mini-IF-II\), nor released \(IF-I-M-v1.0, .*, IF-II-L-v1.0\)"
    with pytest.raises(WeightsError, match="no model 'IF-9': neither a folder, nor " + known):
        weights.resolve("IF-9", 1)
    first, second = r"stage 1 \(text to 64x64\)", r"stage 2 \(64x64 to 256x256\)"
    choices = "is needed: mini, IF-I-M-v1.0, IF-I-L-v1.0, IF-I-XL-v1.0$"
    with pytest.raises(WeightsError, match=f"^IF-II-M-v1.0 is a model of {second}, but one of {first} {choices}"):
        weights.resolve("IF-II-M-v1.0", 1)
    words = f"mini-IF-I is a model of {first}, but one of {second} is needed: mini, IF-II-M-v1.0"
    with pytest.raises(WeightsError, match=words):
        weights.resolve("mini-IF-I", 2)
    with pytest.raises(WeightsError, match=r"no model 'weights/.*config.json': neither a folder, nor embedded"):
        weights.resolve("weights/mini-IF-I/unet/config.json", 1)
    with pytest.raises(WeightsError, match=r"weights lacks unet/config.json and scheduler.*, which the unet needs"):
        weights.resolve("weights", 1)
    with pytest.raises(WeightsError, match=r"mini-IF-I lacks text_encoder/config.json and tokenizer/spiece.model, "):
        weights.resolve("mini", 1, ("unet", "text_encoder"))
    write_part(here / "mini-IF-I", "text_encoder", {"model.safetensors": {}})
    with pytest.raises(WeightsError, match=r"mini-IF-I lacks tokenizer/spiece.model, which the text encoder needs"):
        weights.resolve("mini-IF-I", 1, ("text_encoder",))


# ---------------------------------------------------------------------------------------------- downloading

FILES = {
    "unet/config.json": json.dumps({**UNET, "in_channels": 6}).encode(),
    "unet/" + FULL: b"full",
    "unet/" + HALF: b"half",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "scheduler/scheduler_config.json": b"{}",
    "image_noising_scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": json.dumps(T5).encode(),
    "text_encoder/model.fp16-00001-of-00002.safetensors": b"shard 1",
    "text_encoder/model.fp16-00002-of-00002.safetensors": b"shard 2",
    "text_encoder/model.safetensors.index.fp16.json": b"{}",
    "text_encoder/pytorch_model-00001-of-00002.bin": b"pickle",
    "tokenizer/spiece.model": b"pieces",
    "model_index.json": b"{}",
}
COMMIT = "0123456789" * 4


def size_of(count: int) -> str:
    return tqdm.format_sizeof(count, "B")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that a download meets: I-M is gated, II-M open."""

    def do_GET(self):
        name = self.path.split("DeepFloyd/")[-1].split("/")[0].split("?")[0]
        token = self.headers.get("Authorization", "")
        if token == "Bearer hf_expired":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b'{"error":"Invalid"}')
        elif "/tree/" in self.path:
            files = [{"type": "file", "path": f, "size": len(FILES[f]), "oid": "0"} for f in FILES]
            self.answer(200, {}, json.dumps(files).encode())
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": f, "size": len(FILES[f]), "blobId": "0"} for f in FILES]
            info = {"_id": "0", "id": f"DeepFloyd/{name}", "sha": COMMIT, "siblings": siblings, "gated": "auto"}
            info |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
            self.answer(200, {}, json.dumps(info).encode())
        elif name == "IF-II-M-v1.0":
            content = FILES[self.path.split("/resolve/")[1].split("/", 1)[1].split("?")[0]]
            self.answer(200, {"ETag": f'"{content.hex():0<40.40}{len(content)}"', "X-Repo-Commit": COMMIT}, content)
        elif token:
            self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"")
        else:
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"")

    do_HEAD = do_GET

    def answer(self, status, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body)

    def log_message(self, *args):
        pass


SCRIPT = """
import json, os, sys
from pathlib import Path
from minidiff import weights
weights.WEIGHTS = Path(os.environ["HF_HOME"]) / "none"
answers = []
for question in json.loads(sys.argv[1]):
    if question is None:
        print("STOP", flush=True)  # the server goes away here
        sys.stdin.readline()
        continue
    model, stage, parts, token = question
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    said = []
    try:
        found = str(weights.resolve(model, stage, parts, said.append))
    except weights.WeightsError as error:
        found = "WeightsError: " + str(error)
    answers.append([found, said])
print(json.dumps(answers))
"""
BOTH = ["unet", "text_encoder"]
QUESTIONS = {
    "401": ["IF-I-M-v1.0", 1, ["unet"], None],
    "403": ["IF-I-M-v1.0", 1, ["unet"], "hf_good"],
    "bad token": ["IF-I-M-v1.0", 1, ["unet"], "hf_expired"],
    "unet": ["IF-II-M-v1.0", 2, ["unet"], None],
    "both": ["IF-II-M-v1.0", 2, BOTH, None],
    "": None,
    "offline, cached": ["IF-II-M-v1.0", 2, BOTH, None],
    "offline, other text encoder": ["IF-I-XL-v1.0", 1, ["text_encoder"], None],
    "offline": ["IF-I-M-v1.0", 1, ["unet"], None],
}


def snapshot(home: Path, commit: str, seconds: int, leave_out: str = "") -> Path:
    """A copy of IF-II-M-v1.0 in the cache, but for the files whose name contains `leave_out`."""
    folder = home / "models--DeepFloyd--IF-II-M-v1.0" / "snapshots" / commit
    for name, content in FILES.items():
        if not (leave_out and leave_out in name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    os.utime(folder, (seconds, seconds))
    return folder


def test_of_the_cache_the_newest_copy_that_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "none")
    whole, older = snapshot(tmp_path, COMMIT, 20), snapshot(tmp_path, "1" * 40, 10)
    partial = snapshot(tmp_path, "2" * 40, 30, leave_out="fp16-00002")
    assert weights.resolve("IF-II-M-v1.0", 2, BOTH) == whole  # the newest that is whole
    assert weights.resolve("IF-II-M-v1.0", 2) == partial  # whose unet is
    assert weights.resolve("IF-I-XL-v1.0", 1, ("text_encoder",)) == whole == weights.encoder_here("IF-I-L-v1.0")
    shutil.rmtree(whole)
    assert weights.resolve("IF-II-M-v1.0", 2, BOTH) == older


def test_what_an_incomplete_cache_lacks_is_named_offline_and_in_the_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "none")
    folder = snapshot(tmp_path, COMMIT, 10, leave_out="unet/diffusion")
    with pytest.raises(WeightsError, match=r"(?s)hub is unreachable.*The cache has a part: ") as e:
        weights.resolve("IF-II-M-v1.0", 2)
    assert f": {folder}/unet: expected a file like model.fp16.safetensors, found nothing" in str(e.value)
    assert status("list") == 0
    assert f"IF-II-M-v1.0   stage 2   0.92 GB incomplete: {folder}/unet: expected a file" in capsys.readouterr().out
    assert status("check", "IF-II-M-v1.0") == 1  # what is there is checked


def test_a_hub_that_accepts_and_never_answers_is_given_up(tmp_path, monkeypatch):
    ended = threading.Event()

    class Silent(Hub):
        def do_GET(self):
            ended.wait(60)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "none")
    monkeypatch.setattr(weights, "PATIENCE", 0.5)
    begun = time.monotonic()
    silent = r"(?s)the hub is unreachable or this machine offline \(.*\n  1\. with"
    with pytest.raises(WeightsError, match=silent):
        weights.resolve("IF-II-M-v1.0", 2)
    assert time.monotonic() - begun < 30
    ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What resolve answers, and what it said, with a hub and then without; in a process of its own, because the hub's
    library reads its settings when imported."""
    home = tmp_path_factory.mktemp("home")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
    env = {key: value for key, value in env.items() if "proxy" not in key.lower()}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    env["PYTHONPATH"] = os.pathsep.join([str(Path(weights.__file__).parent.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(QUESTIONS.values()))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "STOP\n"
        server.shutdown()
        server.server_close()
        output = process.communicate("\n", timeout=120)[0]
    return {"home": home, **dict(zip((name for name in QUESTIONS if name), json.loads(output)))}


LICENCE = "log in at https://huggingface.co and accept the licence at https://huggingface.co/DeepFloyd/IF-I-XL-v1.0"
MINI = "\nOr use --model mini, which is embedded and needs none of this."


def test_401_says_log_in(answers):
    text = answers["401"][0]
    assert text.startswith("WeightsError: DeepFloyd/IF-I-M-v1.0 is licensed, and you are not logged in (401).\n")
    assert f"\n  1. {LICENCE}, once for all models\n" in text
    assert "\n  2. run `hf auth login`, or set HF_TOKEN, with a token of that account that may read gated" in text
    assert "\n  3. run the same command again\n" in text
    assert text.endswith(MINI)


def test_403_says_accept_the_licence(answers):
    text = answers["403"][0]
    assert "IF-I-M-v1.0 is licensed: you are logged in, but this account has not accepted the licence (403).\n" in text
    assert f"\n  1. {LICENCE}" in text
    assert "\n  2. run `hf auth login`, or set HF_TOKEN, with a token of that account that may read gated" in text
    assert "\n  3. run the same command again\n" in text
    assert text.endswith(MINI)


def test_401_with_a_token_says_it_is_not_valid(answers):
    text = answers["bad token"][0]
    assert "IF-I-M-v1.0 was refused: your token is not valid (401).\n" in text
    assert "\n  2. run `hf auth login`, or set HF_TOKEN, with a token of that account" in text


def test_only_the_needed_files_are_downloaded_after_saying_how_much(answers):
    (unet, said), (both, said_later) = answers["unet"], answers["both"]
    folder = Path(unet)
    assert both == unet
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {
        name: FILES[name]
        for name in FILES
        if name != "model_index.json" and not name.endswith(".bin") and name != f"unet/{FULL}" and ".index." not in name
    }
    first = [f for f in found if f.startswith(("unet/", "scheduler/", "image_"))]
    size = size_of(sum(len(FILES[f]) for f in first))
    where = answers["home"] / "hub"
    assert said == [f"downloading DeepFloyd/IF-II-M-v1.0 (unet): 4 files, {size}, to {where}"]
    rest = sum(len(FILES[f]) for f in found if f not in first)
    assert said_later == [
        f"downloading DeepFloyd/IF-II-M-v1.0 (unet, text_encoder): 4 files, {size_of(rest)}, to {where}"
    ]


def test_the_cache_needs_no_network(answers):
    folder = answers["both"][0]
    assert answers["offline, cached"] == [folder, []]
    assert answers["offline, other text encoder"] == [folder, []]  # all models share one


def test_offline_says_how_to_bring_the_files(answers):
    text = answers["offline"][0]
    assert "DeepFloyd/IF-I-M-v1.0 cannot be downloaded: the hub is unreachable or this machine offline (" in text
    assert f"\n  1. with a connection: {LICENCE}, once for all models; run `hf auth login`, or set HF_TOKEN" in text
    assert "\n  2. run `python -m minidiff.weights download IF-I-M-v1.0`, here or on another machine\n" in text
    assert "\n  3. if on another: copy the folder it prints, and pass it here as --model PATH\n" in text
    assert text.endswith(MINI)


def test_other_answers_of_the_hub_are_told_by_number():
    class Response:
        status_code = 503

    inner = RuntimeError("inner")
    inner.response = Response()
    outer = OSError("outer")
    outer.__cause__ = inner
    text = weights.explain(outer, "DeepFloyd/IF-I-M-v1.0", has_token=True)
    assert text.startswith("DeepFloyd/IF-I-M-v1.0 cannot be downloaded: the hub answers with an error (503).\n  1. ")


# ---------------------------------------------------------------------------------------------- commands


def status(*command: str) -> int:
    """The exit status of a command."""
    try:
        weights.main(list(command))
        return 0
    except SystemExit as end:
        return end.code


def test_check_describes_and_compares_each_part(tmp_path, capsys):
    write_model(tmp_path)
    assert status("check", str(tmp_path)) == 0
    text, unet = capsys.readouterr().out, make_unet()
    count, n = sum(p.numel() for p in unet.parameters()), len(unet.state_dict())
    assert f"  unet: {count:,} parameters in {n} tensors, float16\n  unet: every key and shape fits, every" in text
    assert f"  unet/{HALF}: {size_of((tmp_path / 'unet' / HALF).stat().st_size)}\n" in text
    assert "  text_encoder: every key and shape fits, every number is finite\n  this model" in text
    (tmp_path / "nothing").mkdir()
    assert status("check", str(tmp_path / "nothing")) == 1
    assert "has none of unet, text_encoder" in capsys.readouterr().out
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "text" / "text_encoder")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "text" / "tokenizer")
    assert status("check", str(tmp_path / "text")) == 0
    assert "\n  the text encoder is whole; there is no unet to draw with\n" in capsys.readouterr().out
    assert status("check", "mini") == 0
    text = capsys.readouterr().out
    assert "mini-IF-I\n" in text and "mini-IF-II\n" in text and text.count("this model is whole") == 2


def test_list_and_download_and_unknown_models(here, capsys):
    assert status("list") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"mini           embedded        {here}\n")
    assert f"\nmini-IF-I      embedded        {here / 'mini-IF-I'}\n" in text
    assert "IF-I-XL-v1.0   stage 1   8.61 GB not on this machine\n" in text
    assert status("check", "mini-IF-I") == 1  # its one tensor is no UNet
    assert status("check", "nowhere") == 2
    assert "nowhere is neither a folder, nor in" in capsys.readouterr().err
    assert status("check", "~nosuchuser/x") == 2
    assert "~nosuchuser/x is neither a folder, nor in" in capsys.readouterr().err
    write_part(here / "IF-II-M-v1.0", "unet", {HALF: {}}, {**UNET, "in_channels": 6})
    (here / "mini-IF-I" / "unet" / HALF).unlink()
    assert status("list") == 0
    text = capsys.readouterr().out
    assert f"mini           incomplete: {here / 'mini-IF-I' / 'unet'}: expected a file like" in text
    assert f"0.92 GB incomplete: {here / 'IF-II-M-v1.0'} lacks scheduler/scheduler_config.json, which the unet" in text
    write_scheduler(here / "IF-II-M-v1.0")
    assert status("download", "IF-II-M-v1.0") == 0
    assert capsys.readouterr().out == f"{here / 'IF-II-M-v1.0'}\n"


def test_a_wheel_has_every_package_and_every_embedded_file():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(p.parent.relative_to(root).parts) for p in (root / "minidiff").rglob("__init__.py")}
    assert set(settings["packages"]) == packages | {"minidiff.weights_data"}
    folder = root / settings["package-dir"]["minidiff.weights_data"]
    packed = {p for pattern in settings["package-data"]["minidiff.weights_data"] for p in folder.glob(pattern)}
    names = ("judge", "mini-IF-I", "mini-IF-II", "mnist")
    kept = [p for name in names for p in (folder / name).rglob("*") if p.is_file()]
    assert packed == {folder / "NOTICE", folder / "README.md", *(p for p in kept if "training" not in p.parts)}
    assert weights.WEIGHTS == folder
