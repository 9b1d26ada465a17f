"""`python -m minidiff`: the commands in reading order, one line each."""

import ast
import os
import re
import sys
from pathlib import Path

import minidiff


def commands() -> list[tuple[str, str]]:
    """(command, first line of its docstring) of every module in the reading order that has a main."""
    here, found = Path(__file__).parent, []
    for name in re.findall(r"^    ([\w/]+)\.py ", minidiff.__doc__, re.MULTILINE):
        tree = ast.parse((here / f"{name}.py").read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found.append((f"python -m minidiff.{name.replace('/', '.')}", ast.get_docstring(tree).splitlines()[0]))
    return found


def main() -> None:
    lines = ["minidiff: DeepFloyd IF you can read in an afternoon. Commands, in reading order (each has --help):\n"]
    width = max(len(command) for command, _ in commands())
    lines += [f"  {command:{width}}   {line}" for command, line in commands()]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # head has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
