"""Protocol-buffer text, as much of it as a server's config.pbtxt needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Word(str):
    """A value written without quotes: the name of an enumeration's member."""


def dumps(message: Mapping[str, Any]) -> str:
    """``message`` as text: a mapping is a message, a list of mappings a repeated one, another list repeated values.

    A dict under a key that ends in "{}" is a map field: ``{"parameters{}": {"steps": {...}}}``.
    """
    return "".join(line + "\n" for line in _fields(message))


def _fields(message: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, value in message.items():
        if name.endswith("{}"):
            for key, entry in value.items():
                lines += _field(name[:-2], {"key": key, "value": entry})
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for entry in value:
                lines += _field(name, entry)
        else:
            lines += _field(name, value)
    return lines


def _field(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        inner = ["  " + line for line in _fields(value)]
        return [f"{name} {{", *inner, "}"] if inner else [f"{name} {{ }}"]
    if isinstance(value, list):
        return [f"{name}: [ {', '.join(map(_scalar, value))} ]"]
    return [f"{name}: {_scalar(value)}"]


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, Word)):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"no text form for {value!r}")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
