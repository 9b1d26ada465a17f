"""The pages for students: every command is taken by its parser, every name exists, the notebook's cells run."""

import ast
import importlib
import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import minidiff
from minidiff import sampling, weights
from minidiff.cascade import Cascade
from minidiff.mnist import models, trainer
from tests.deepfloyd.test_unet import RELEASED
from tests.mnist import real

ROOT = Path(minidiff.__file__).parents[1]
COURSE, REAL, NOTEBOOK, DIGITS = "course.md", "19-real-weights.md", "course.ipynb", "course-b.ipynb"
TEXTS = {name: (ROOT / "walkthrough" / name).read_text(encoding="utf-8") for name in (COURSE, REAL)}
CELLS = {name: json.loads((ROOT / "walkthrough" / name).read_text(encoding="utf-8")) for name in (NOTEBOOK, DIGITS)}


def commands(name: str) -> list[str]:
    """All `python -m minidiff.NAME ...` of a page, in tables and in blocks."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", TEXTS[name], re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return re.findall(r"`(python -m minidiff\.[^`]+)`", TEXTS[name]) + [x for x in lines if "-m minidiff." in x]


WORK = ("cascade.Cascade.stage", "cascade.Cascade.encode", "deepfloyd.text.load_text_encoder", "anagram.report",
        "weights._list", "weights.check", "mnist.trainer.digits", "mnist.train_flow.kept_pairs",
        "mnist.models.draw", "mnist.models.walk", "mnist.judge.score", "charts.compared")  # fmt: skip


class Accepted(Exception):
    """Work would begin here: parser and checks have let the command through."""


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """Whatever computes or fetches raises Accepted. Released models, and networks not yet trained, are the embedded."""

    def stop(*_, **__):
        raise Accepted

    load_cascade, load_digits = Cascade.load.__func__, models.load
    for name in WORK:
        monkeypatch.setattr(f"minidiff.{name}", stop)
    monkeypatch.setattr(Cascade, "load", classmethod(
        lambda cls, model, stage2, **_: load_cascade(cls, *("none" if n == "none" else "mini" for n in (model, stage2)))
    ))  # fmt: skip

    def digits(folder, device, *kinds):
        here = (folder / "config.json").is_file()
        return load_digits(folder if here else weights.WEIGHTS / "mnist" / kinds[0], device, *kinds)

    monkeypatch.setattr(models, "load", digits)
    monkeypatch.chdir(tmp_path)
    for name in ("walkthrough", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "out").mkdir()
    shutil.copy(ROOT / "walkthrough" / "village.png", tmp_path / "out" / "photo-0.png")  # of an earlier command


@pytest.mark.parametrize("line", [line for name in TEXTS for line in commands(name)])
def test_every_command_is_taken(line, no_work, monkeypatch, capsys):
    """Up to the first work: all flags, counts, boxes, views, numbers of prompts and files are right."""
    _, _, module, *argv = shlex.split(line, comments=True)
    if module in ("minidiff.weights", "minidiff.encode"):  # others check the folders of their models
        monkeypatch.setattr(weights, "resolve", weights._list)
        monkeypatch.setattr(weights, "snapshots", lambda name: [ROOT])
    with pytest.raises(Accepted):
        try:
            importlib.import_module(module).main(argv)
        except SystemExit:
            pytest.fail(capsys.readouterr().err)


def test_a_wrong_flag_is_not_taken(no_work, capsys):
    """So that the test above can fail: each of these is wrong in another way."""
    for line in ("minidiff.generate a --colour", "minidiff.anagram a b --view identity",
                 "minidiff.sdedit walkthrough/drawing.png a --i-start 33", "minidiff.hybrid a",
                 "minidiff.mnist.train_flow --sample-epochs 11", "minidiff.mnist.sample --kind flow --sampler ddim",
                 "minidiff.generate a --steps coarse"):  # fmt: skip
        module, *argv = line.split()
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(argv)
        assert capsys.readouterr().err


def test_no_command_replaces_the_images_of_another():
    """All commands of the course page can run one after the other: each that draws has an --out of its own."""
    drawn = [line for line in commands(COURSE) if ".train_" not in line and "--check" not in line]
    files = [re.findall(r" --out (\S+)", line) or line.split()[2] for line in drawn]
    assert len(files) >= 20 and [file for file in files if files.count(file) > 1] == []


@pytest.mark.parametrize(("name", "least"), [(COURSE, 25), (REAL, 10)])
def test_there_are_commands_to_test(name, least):
    assert len(commands(name)) >= least


@pytest.mark.parametrize("name", TEXTS)
def test_every_python_name_exists(name):
    """`file.py::name` or `file.py::Class.name`, of the package or of the tests."""
    found = re.findall(r"`([\w/]+)\.py::([\w.]+)`", TEXTS[name])
    for file, path in found:
        package = "" if file.startswith("tests/") else "minidiff."
        place = importlib.import_module(package + file.replace("/", "."))
        for part in path.split("."):
            assert hasattr(place, part), f"{file}.py::{path}"
            place = getattr(place, part)
    assert len(found) >= (40 if name == COURSE else 5)


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_in_the_prose_exists(name):
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "minidiff").rglob("*.py"))
    known = set(re.findall(r'"(--[a-z][\w-]*)"', sources))
    known |= {"--" + f.name.replace("_", "-") for f in fields(trainer.Plan)}
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    flags = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", prose))
    assert flags and flags <= known, flags - known


@pytest.mark.parametrize("part", [*"0", *(f"1.{i}" for i in range(1, 10)), "1.7.1", "1.7.2", "1.7.3"])
def test_every_part_of_a_has_a_row(part):
    assert re.search(rf"^\| A {re.escape(part)}[ ,]", TEXTS[COURSE], re.MULTILINE)


@pytest.mark.parametrize(("form", "parts"), [
    (2024, ["1.1", "1.2", "1.2.1", "1.2.2", "2.1", "2.2", "2.3", "2.4", "2.5"]),
    (2025, ["1.1", "1.2", "1.2.1", "1.2.2", "1.2.3", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6"]),
])  # fmt: skip
def test_every_part_of_b_has_a_row(form, parts):
    table = TEXTS[COURSE].split(f"## The form of {form}")[1].split("\n## ")[0]
    missing = [part for part in parts if not re.search(rf"^\| B {re.escape(part)} ", table, re.MULTILINE)]
    assert not missing


def test_the_python_of_the_course_page_runs(monkeypatch, few_calls, tmp_path):
    """In one namespace, from the repository root."""
    monkeypatch.chdir(ROOT)
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", TEXTS[COURSE], re.DOTALL):
        exec(code.replace("out/", f"{tmp_path}/"), namespace)
    assert namespace


def test_your_loop_beside_ours(monkeypatch, tmp_path):
    """The page's own `mine`, for three steps and four of Euler: the same to rounding. A wrong one stands out."""
    monkeypatch.chdir(ROOT)
    names = """from minidiff import images
from minidiff.cascade import Cascade
from minidiff.factorized import Part
image = images.load("walkthrough/village.png", 64)
"""
    section = TEXTS[COURSE].split("## Your loop beside ours")[1]
    code = names + "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)).replace("out/", f"{tmp_path}/")
    code = code.replace("[], 10\n", "[], 30\n").replace("count, x = 50", "count, x = 4")
    for right, wrong in (("null, 7)", "null, 7)"), ("null, 7)", "null, 6)"), ("5 * (cond", "4 * (cond")):
        namespace, bad = {}, right != wrong
        exec(code.replace(right, wrong), namespace)
        assert len(namespace["record"]) == 3 and (tmp_path / "flow.gif").is_file()
        assert (namespace["apart"] > 1e-3) == (bad and "null" in right)
        assert (namespace["flow_apart"] > 1e-3) == (bad and "cond" in right)


# --- the notebook -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_calls(monkeypatch):
    """Every walk visits all its times, and asks the network at the first only: the answer serves for all of them."""
    walk = sampling.denoise

    def denoise(predict, *args, **options):
        answers = []

        def once(x_t, t):
            answers[:] = answers or [predict(x_t, t)]
            return answers[0]

        return walk(once, *args, **options)

    monkeypatch.setattr(sampling, "denoise", denoise)


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_the_notebook_is_one(cells):
    """nbformat 4.5: kinds, ids, lines that end where they should; nothing stored that a run made."""
    assert cells["nbformat"] == 4 and cells["nbformat_minor"] == 5 and cells["metadata"]["kernelspec"]
    ids = [cell["id"] for cell in cells["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in cells["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"outputs", "execution_count"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == keys and all(line.endswith("\n") for line in cell["source"][:-1])


def run(code: str, namespace: dict) -> object:
    """Run a cell. Returns the value of its last line, as a notebook shows it, or None if that is no expression."""
    *body, last = ast.parse(code).body
    exec(compile(ast.Module(body, []), NOTEBOOK, "exec"), namespace)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), NOTEBOOK, "eval"), namespace)
    exec(compile(ast.Module([last], []), NOTEBOOK, "exec"), namespace)


def test_the_cells_of_the_notebook_run(monkeypatch, few_calls):
    """All in one namespace. What a cell shows is the value of its last line."""
    monkeypatch.chdir(ROOT)
    namespace, sheets = {}, 0
    for cell in CELLS[NOTEBOOK]["cells"]:
        if cell["cell_type"] == "code":
            shown = run("".join(cell["source"]), namespace)
            sheets += isinstance(shown, Image.Image) and shown.width > 200
    assert sheets == 9
    assert namespace["walked"].shape == (1, 3, 64, 64)
    assert [step.t for step in namespace["record"][::5]] == [690, 540, 390, 240, 90]


def test_the_cells_of_the_notebook_of_digits_run(tmp_path):
    """All in one namespace, on few digits and in few steps. The networks have the course's numbers of weights."""
    namespace, counts, sheets = {}, None, 0
    short = {'ROOT / "data"': repr(str(real.write_folder(tmp_path))), 'ROOT / "out': f'Path("{tmp_path}") / "out',
             "COUNT, D = 3200, 16": "COUNT, D = 128, 4", '50, "euler"': '2, "euler"', '300, "ddpm"': '2, "ddpm"',
             "(60, 120)": "(1, 2)"}  # fmt: skip
    for cell in CELLS[DIGITS]["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for long, quick in short.items():
                code = code.replace(long, quick)
            shown = run(code, namespace)
            sheets += isinstance(shown, Image.Image) and shown.width > 200
            counts = shown if cell["id"] == "unet" else counts
    assert counts == ["7,891,073", "1,975,361", "1,996,417", "2,019,201"]
    assert sheets == 12 and len(namespace["curve"]) == 2 and (tmp_path / "out/flow-notebook.gif").is_file()


def test_one_line_of_the_notebook_names_the_model():
    code = ["".join(cell["source"]) for cell in CELLS[NOTEBOOK]["cells"] if cell["cell_type"] == "code"]
    lines = [line for line in "\n".join(code).splitlines() if "mini" in re.findall(r'"([^"]*)"', line)]
    assert lines == ['MODEL = "mini"']


# --- the chapter on the real weights ----------------------------------------------------------------------------------


def test_sizes_in_the_chapter():
    """Two bytes of each parameter, in decimal GB; the parameters are those of the released shapes."""
    for name, (_, parameters, _) in RELEASED.items():
        stage, size = weights.RELEASED[f"{name}-v1.0"]
        assert size == f"{2 * parameters / 1e9:.2f} GB"
        assert f"| `{name}-v1.0` | {stage} | {parameters:,} | {size} | {4 * parameters / 1e9:.2f} GB |" in TEXTS[REAL]


@pytest.mark.parametrize(("status", "has_token"), [(401, False), (401, True), (403, True)])
def test_messages_in_the_chapter(status, has_token):
    """What `weights.explain` says is what the chapter shows: the reason, and the step that differs."""
    refused = OSError()
    refused.response = type("Response", (), {"status_code": status})
    reason, *_ = weights.explain(refused, "DeepFloyd/IF-I-L-v1.0", has_token).splitlines()
    assert reason in " ".join(TEXTS[REAL].split())
