"""Reads every file that people or other programs may have written: texts, YAML, JSON and lines of JSON.

Whatever the file holds, it is either read or refused in seconds: its size, its depth, the number of its values and its
integers have limits, YAML aliases and tags are no part of it, and every number is decimal and finite. What comes out is
plain: mappings with texts as keys, lists, texts, numbers, true, false and null.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_YAML_BYTES = 1 << 20  # the largest shipped card has 45 kB
MOST_BYTES = 32 << 20
MOST_RECORD_BYTES = 512 << 20  # manifest of 06 and seal: 3 and 9 kB a configuration
MOST_YAML_VALUES = 200_000  # keys included
BYTES_A_VALUE = 24  # of the largest JSON file: a file of many small values takes time by their number, not its size
MOST_DEPTH = 30  # of lists and mappings in one another
LARGEST_INTEGER = 2**63 - 1
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_NUMBERS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float")}
_TEXT = "tag:yaml.org,2002:str"
_NOT_DECIMAL = re.compile(r"[-+]?0[\w]|[^:]*:")  # octal, hexadecimal, binary; base 60, which takes quadratic time


class InputFileError(ValueError):
    """An input file cannot be used; the message names the file, the place in it, what is wrong and the fix."""


class NoTextError(InputFileError):
    """The bytes of a file are no text in UTF-8."""


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file, with line feeds alone as line ends.

    Read are UTF-8 with or without a byte order mark, and UTF-16 with one.

    Raises InputFileError for what is no file, cannot be read, is too large, or holds no text.
    """
    data = _read_bytes(path, most_bytes)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise NoTextError(f"{path}, line {line}: this is not a text in UTF-8. Save the file as UTF-8.") from None
    if "\0" in text:
        raise NoTextError(f"{path}: this is not a text in UTF-8. Save the file as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        found = "this is a folder" if os.path.isdir(path) else "this is no plain file"  # noqa: PTH112
        raise InputFileError(f"{path}: {found if os.path.exists(path) else 'no such file'}. Correct the name.")  # noqa: PTH110
    try:
        with path.open("rb") as stream:
            data = stream.read(most_bytes + 1)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(data) > most_bytes:
        raise InputFileError(f"{path}: the file is larger than {most_bytes >> 20} MiB. Divide it, or shorten it.")
    return data


# ---------------------------------------------------------------- YAML


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads plain scalars as null, true, false, decimal numbers or texts; every key is a text, and stands once.

    What YAML 1.1 reads as a number with another base, such as 010, 0x1F or 9:30, is a text, as a person means it.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        return _TEXT if tag in _NUMBERS and _NOT_DECIMAL.match(value) else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise _at(key, "a key must be a text. Quote it to mean text")
        counts = Counter(key.value for key, _ in node.value)
        for key, _ in node.value:
            if counts[key.value] > 1:
                raise _at(key, f"the key {key.value!r:.60} stands twice. Remove one of them")
        return super().construct_mapping(node, deep)


def _at(node: yaml.Node | yaml.Event, fault: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)


def read_yaml(path: Path, check: Callable[[yaml.Node], None] | None = None) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        check: looks at the same content as nodes, which know their lines and how each scalar is written.

    Raises:
        InputFileError: the file cannot be read, is no YAML, or holds something else than plain values.
    """
    text = read_text(path, MOST_YAML_BYTES)
    try:
        _refuse_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a number that Python cannot make
        raise InputFileError(_yaml_fault(path, error)) from None
    refuse_odd(value, str(path))
    if check and node:
        check(node)
    return value


def _refuse_events(text: str) -> None:
    """Refuse what would make a small file large, or run code, before anything is built of it."""
    depth = values = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _at(event, "aliases (&name, *name) are not used here. Write the value out")
        if getattr(event, "tag", None) is not None:
            raise _at(event, f"tags such as {event.tag!r:.40} are not used here. Remove it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise _at(event, f"nested more than {MOST_DEPTH} deep. Write it flat")
        values += isinstance(event, yaml.NodeEvent)
        if values > MOST_YAML_VALUES:
            raise _at(event, f"more than {MOST_YAML_VALUES:,} values. Divide the file, or shorten it")


def _yaml_fault(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark else str(path)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{where}: not readable as YAML: {problem:.200}."


# ---------------------------------------------------------------- JSON


def parse_json(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity are read as well.

    Raises ValueError for what is no JSON, or gives a key twice.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name!r:.60} is given twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def read_json(path: Path, control_characters: bool = False, most_bytes: int = MOST_BYTES) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        control_characters: allow them in texts, as names of files and outputs of notebooks may hold some.
        most_bytes: a larger file is refused.

    Raises:
        InputFileError: it cannot be read, or holds something else than JSON.
    """
    text = read_text(path, most_bytes)
    _refuse_many(text, path, most_bytes)
    return _json_value(text, str(path), control_characters)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of the filled lines of a JSONL file.

    Raises InputFileError if the file cannot be read, or a line holds something else than JSON.
    """
    name = str(path)
    for number, line in numbered_lines(path):
        yield number, _json_value(line, f"{name}, line {number}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the filled lines of a file; a JSON text may hold other line separators than \\n."""
    text = read_text(path)
    _refuse_many(text, path, MOST_BYTES)
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _refuse_many(text: str, path: Path, most_bytes: int) -> None:
    """Refuse more values than can be looked at in time; counted are the marks that divide values, also in texts."""
    most = most_bytes // BYTES_A_VALUE
    if sum(text.count(mark) for mark in ",:[{\n") > most:
        raise InputFileError(f"{path}: the file holds more than {most:,} values. Divide it, or shorten it.")


def _json_value(text: str, where: str, control_characters: bool = False) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputFileError(f"{where}: not JSON: {error!s:.200}.") from None
    refuse_odd(value, where, control_characters)
    return value


# ---------------------------------------------------------------- plain values


def refuse_odd(value: Any, where: str, control_characters: bool = False, place: tuple[str | int, ...] = ()) -> None:
    """Raise InputFileError, naming the key, for a value that is nested too deeply, no finite number or no clean text.

    Args:
        value: what YAML or JSON gave.
        where: the file, and the line where that is known.
        control_characters: texts may hold control characters.
        place: the keys that lead to the value.
    """
    if found := _first_fault(value, len(place), control_characters):
        raise InputFileError(f"{where}: {_place_text((*place, *found[1]))}{found[0]}")


def _first_fault(value: Any, depth: int, control_characters: bool) -> tuple[str, tuple[str | int, ...]] | None:
    """The first fault in a value and the keys that lead to it; None if there is none."""
    if fault := _fault(value, depth, control_characters):
        return fault, ()
    if isinstance(value, dict):
        for key, child in value.items():
            if found := _first_fault(key, depth + 1, control_characters):
                return found[0], ("(key)", *found[1])
            if found := _first_fault(child, depth + 1, control_characters):
                return found[0], (key, *found[1])
    elif isinstance(value, list):
        for i, child in enumerate(value):
            if found := _first_fault(child, depth + 1, control_characters):
                return found[0], (i, *found[1])
    return None


def _fault(node: Any, depth: int, control_characters: bool) -> str:
    if isinstance(node, str):
        return text_fault(node, control_characters)
    if isinstance(node, float):
        return "" if math.isfinite(node) else f"{node} is no finite number. Correct the value."
    if isinstance(node, int):
        return "" if abs(node) <= LARGEST_INTEGER else "an integer of 64 bits at most is expected. Correct the value."
    return f"nested more than {MOST_DEPTH} deep. Write it flat." if depth > MOST_DEPTH else ""


def text_fault(text: str, control_characters: bool = False) -> str:
    """What is wrong with a text in general, such as a control character in it, or ""."""
    if not control_characters and (found := _CONTROL.search(text)):
        return f"the text holds the control character {found[0]!r}. Remove it."
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return "the text holds half a character, which is no unicode text. Write it again."
    return ""


def _place_text(place: tuple[str | int, ...]) -> str:
    keys = [ascii(str(key)[:60])[1:-1] for key in place[:8]]
    return f"{'.'.join(keys)}: " if keys else ""
