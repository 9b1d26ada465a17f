"""`python -m minidiff`: the commands, those that draw first, one line each."""

import ast

from minidiff.equations import HERE, ORDER, columns, show

FIRST = {f"python -m minidiff.{name}" for name in ("generate", "denoise", "sdedit", "inpaint", "anagram", "hybrid",
                                                   "upscale")}  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(command, first line of its docstring) of every module that has a main: FIRST, then in reading order."""
    found = []
    for name in ORDER:
        tree = ast.parse((HERE / f"{name}.py").read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found.append((f"python -m minidiff.{name.replace('/', '.')}", ast.get_docstring(tree).splitlines()[0]))
    return sorted(found, key=lambda row: row[0] not in FIRST)


def main() -> None:
    rows = [(f"  {command} ", line) for command, line in commands()]
    show(f"minidiff: DeepFloyd IF to read, to run and to be sure of. Commands (each has --help):\n\n{columns(rows)}")


if __name__ == "__main__":
    main()
