"""Is this what a function can work with? If not, one line says what to pass. Skim this file."""

import math
from collections.abc import Mapping

from torch import Tensor


def short(value: object) -> str:
    """What a message shows of any value: its beginning, on one line."""
    return f"{' '.join(repr(value).split()):.60}"


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> None:
    """Raises ValueError unless value is a finite number, or a whole one, from low to high."""
    kind = "a whole number" if whole else "a finite number"
    try:
        good = not isinstance(value, str | bytes | bool) and math.isfinite(value) and low <= value <= high
        good = good and (not whole or value == value.__index__())
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a list, None, an array of several numbers
        good = False
    if not good:
        reach = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of {low:g} or more" * math.isfinite(low)
        raise ValueError(f"{name} must be {kind}{reach}, got {short(value)}")


def chosen(what: str, name: object, table: Mapping[str, object]) -> object:
    """What a name stands for in a table. Raises ValueError that lists the names."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"no {what} {short(name)}; choose from {', '.join(table)}")
    return table[name]


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError if shapes differ: (B, H, W) beside (B, 1, H, W) would become (B, B, H, W) without a word."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must agree, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
