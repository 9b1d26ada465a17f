"""`python -m minidiff`: the commands, those that draw first, one line each."""

import ast
import os
import re
import sys
from pathlib import Path

import minidiff

FIRST = {f"python -m minidiff.{name}" for name in ("generate", "denoise", "sdedit", "inpaint", "anagram", "hybrid",
                                                   "upscale")}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(command, first line of its docstring) of every module that has a main: FIRST, then in reading order."""
    here, found = Path(__file__).parent, []
    for name in re.findall(r"^    ([\w/]+)\.py ", minidiff.__doc__, re.MULTILINE):
        tree = ast.parse((here / f"{name}.py").read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found.append((f"python -m minidiff.{name.replace('/', '.')}", ast.get_docstring(tree).splitlines()[0]))
    return sorted(found, key=lambda row: row[0] not in FIRST)


def main() -> None:
    lines = ["minidiff: DeepFloyd IF you can read in an afternoon. Commands (each has --help):\n"]
    width = max(len(command) for command, _ in commands())
    lines += [f"  {command:{width}}   {line}" for command, line in commands()]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # head has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
