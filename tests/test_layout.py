"""The package stays readable from top to bottom: import order, equation tags, the commands, the allowed libraries."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import minidiff
from minidiff.__main__ import commands

ROOT = Path(minidiff.__file__).parent
ORDER = re.findall(r"^    ([\w/]+)\.py ", minidiff.__doc__, re.MULTILINE)
FILES = {name: ROOT / f"{name}.py" for name in ORDER}
EXPERIMENTS = {"denoise", "encode", "generate", "sdedit", "inpaint", "anagram", "hybrid", "upscale"}
ALLOWED = {"torch", "torchvision", "huggingface_hub", "safetensors", "sentencepiece", "numpy", "PIL", "tqdm"}
TAG = re.compile(r"\b([A-Za-z]+) Eq\. (\d+)")


def imported(path: Path) -> set[str]:
    """Dotted names this file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(names: set[str]) -> set[str]:
    """Those that are modules of the reading order, as they are called there."""
    return {n.removeprefix("minidiff.").replace(".", "/") for n in names} & set(ORDER)


def test_the_reading_order_lists_every_module():
    on_disk = {str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.rglob("*.py") if not p.stem.startswith("__")}
    assert on_disk == set(ORDER)


def test_imports_inside_functions_are_found(tmp_path):
    """The reading order allows no way around it."""
    code = "def check():\n    from minidiff.deepfloyd import t5\n    import minidiff.cli\n"
    (tmp_path / "circle.py").write_text(code)
    assert inside(imported(tmp_path / "circle.py")) == {"deepfloyd/t5", "cli"}


def test_modules_import_only_from_lines_above_them():
    later = {name: inside(imported(FILES[name])) - set(ORDER[:i]) for i, name in enumerate(ORDER)}
    wrong = {name: names for name, names in later.items() if names}
    assert not wrong, f"imports of files that come later: {wrong}"


def test_the_rooms_do_not_import_each_other_and_nothing_imports_an_experiment():
    for name in ORDER:
        used = inside(imported(FILES[name]))
        assert not used & EXPERIMENTS, name
        room = name.split("/")[0] if "/" in name else None
        other = {"deepfloyd": "mnist/", "mnist": "deepfloyd/"}.get(room)
        assert not other or not any(u.startswith(other) for u in used), name


def test_only_the_declared_libraries_are_imported():
    for name, path in FILES.items():
        outside = {n.split(".")[0] for n in imported(path)} - set(sys.stdlib_module_names) - {"minidiff"}
        assert outside <= ALLOWED, f"{name}: {outside - ALLOWED}"


def test_every_equation_tag_in_the_code_has_a_test():
    in_code = {tag for path in FILES.values() for tag in TAG.findall(path.read_text())}
    in_tests = set()
    for path in (Path(__file__).parent).rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                in_tests |= set(TAG.findall(ast.get_docstring(node) or ""))
    assert in_code - in_tests == set(), f"without a test: {sorted(in_code - in_tests)}"
    assert len(in_code) >= 10


def test_python_m_minidiff_lists_the_commands_in_reading_order():
    shown = subprocess.run([sys.executable, "-m", "minidiff"], capture_output=True, text=True, check=True).stdout
    positions = [shown.index(command + " ") for command, _ in commands()]
    assert positions == sorted(positions) and len(positions) >= 5
    for _, line in commands():
        assert line in shown


def test_importing_the_package_prints_nothing_and_touches_no_file(tmp_path):
    code = "import " + ", ".join("minidiff." + name.replace("/", ".") for name in ORDER)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout == "" and list(tmp_path.iterdir()) == []
