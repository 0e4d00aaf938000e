"""The one reader of input files: what is read however it was saved, and what is refused with its place."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from telco_nb import ROOT
from telco_nb.study import input_files
from telco_nb.study.input_files import InputFileError, read_json, read_json_lines, read_text, read_yaml

BOM = b"\xef\xbb\xbf"
WAYS = {
    "plain": lambda data: data,
    "byte order mark": lambda data: BOM + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "byte order mark and CRLF": lambda data: BOM + data.replace(b"\n", b"\r\n"),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "blank lines at the end": lambda data: data + b"\n\n",
}


def file(tmp_path: Path, content: bytes | str, name: str = "odd.yaml") -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


@pytest.mark.parametrize("save", WAYS.values(), ids=WAYS)
def test_a_file_has_the_same_content_however_an_editor_saved_it(tmp_path, save):
    value = {"term": "Café", "weight": 0.5, "rank": 8, "says": ["a", "b\u2028c"], "none": None, "yes": True}
    document = save((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
    lines = save(((json.dumps(value, ensure_ascii=False) + "\n") * 2).encode())
    assert read_yaml(file(tmp_path, document)) == read_json(file(tmp_path, document)) == value
    assert list(read_json_lines(file(tmp_path, lines))) == [(1, value), (2, value)]


def lines_of(path: Path) -> list:
    return list(read_json_lines(path))


YAML_FAULTS = [
    ("a: 1\nb: [1", 3, "not readable as YAML"),
    ("a: 1\nb: &x [1]", 2, "aliases"),
    ("a: 1\nb: *x", 2, "aliases"),
    ("a: !!python/object/apply:os.getcwd []", 1, "tags"),
    ("a: !!int five", 1, "tags"),
    ("a:\n  b: 1\n  b: 2", 2, "'b' stands twice"),
    ("a: 1\n5: 2", 2, "a key must be a text. Quote it"),
    ("a: 1\nyes: 2", 2, "a key must be a text. Quote it"),
    ("? [1, 2]\n: 3", 1, "a key must be a text"),
    ("- " * 40 + "x", 1, "nested more than 30 deep"),
    ("a: 1\n---\nb: 2", 2, "another document"),
    ("a: .inf", None, "a: inf is no finite number"),
    ("a: [1, {b: .nan}]", None, "a.1.b: nan is no finite number"),
    ("a: 1" + "0" * 19, None, "a: an integer of 64 bits at most"),
    ("a: 1" + "0" * 5000, None, "integer"),
    ("a: 1.0e+999", None, "a: inf is no finite number"),
    ('a: "x\\e[2J"', None, "a: the text holds the control character"),
    ('a: "x\\0"', None, "a: the text holds the control character"),
    ("a: \x07", None, "control characters"),
    ("a: \x00", None, "not a text in UTF-8"),
    (b"a: 1\nb: caf\xe9", 2, "not a text in UTF-8. Save the file as UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "fault"), YAML_FAULTS, ids=range(len(YAML_FAULTS)))
def test_odd_yaml_is_refused_with_file_line_and_fault(tmp_path, text, line, fault):
    with pytest.raises(InputFileError, match=re.escape(fault)) as error:
        read_yaml(file(tmp_path, text))
    assert f"odd.yaml{'' if line is None else f', line {line}'}: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


JSON_FAULTS = [
    ("{", "not JSON"),
    ("", "not JSON"),
    ('{"a": 1, "a": 2}', "not JSON: 'a' is given twice"),
    ('{"a": NaN}', "a: nan is no finite number"),
    ('{"a": [0, -Infinity]}', "a.1: -inf is no finite number"),
    ('{"a": 1e999}', "a: inf is no finite number"),
    ('{"a": 1' + "0" * 30 + "}", "a: an integer of 64 bits"),
    ("9" * 5000, "not JSON"),
    ("[" * 40 + "]" * 40, "0.0.0.0.0.0.0.0: nested more than 30 deep"),
    ("[" * 100_000, "not JSON: nested too deeply"),
    ('{"a": "\\ud83d"}', "a: the text holds half a character"),
    ('{"\\u0000": 1}', "(key): the text holds the control character"),
]


@pytest.mark.parametrize(("text", "fault"), JSON_FAULTS, ids=range(len(JSON_FAULTS)))
def test_odd_json_is_refused_with_file_line_and_fault(tmp_path, text, fault):
    with pytest.raises(InputFileError, match=rf"odd\.json: {re.escape(fault)}"):
        read_json(file(tmp_path, text, "odd.json"))
    if text:
        with pytest.raises(InputFileError, match=rf"odd\.jsonl, line 2: {re.escape(fault)}"):
            list(read_json_lines(file(tmp_path, f'{{"a": 1}}\n{text}\n', "odd.jsonl")))


def test_a_text_that_this_program_wrote_may_hold_control_characters_and_nothing_else_that_is_odd(tmp_path):
    assert read_json(file(tmp_path, '"\\u001b"'), control_characters=True) == "\x1b"
    with pytest.raises(InputFileError, match="half a character"):
        read_json(file(tmp_path, '"\\ud800"'), control_characters=True)
    with pytest.raises(InputFileError, match="no finite number"):
        read_json(file(tmp_path, "[NaN]"), control_characters=True)


@pytest.mark.parametrize("read", [read_text, read_yaml, read_json, lambda path: list(read_json_lines(path))])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, read):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    missing = "no such file"
    faults = {
        "none": missing,
        ".": "a folder",
        "loop": missing,
        "pipe": "no plain file",
        "x" * 300: missing,
        "a\0b": missing,
    }
    for name, fault in faults.items():
        with pytest.raises(InputFileError, match=fault):
            read(tmp_path / name)


def test_a_file_beyond_the_limit_is_refused_with_the_limit(tmp_path):
    with pytest.raises(InputFileError, match=r"odd\.yaml: the file is larger than 1 MiB"):
        read_yaml(file(tmp_path, "a: " + "x" * input_files.MOST_YAML_BYTES))


OTHER_BASES = ["010", "-017", "0x1F", "0b11", "9:30", "1:9:9.5", "1" + ":9" * 500_000, "2026-01-01", "<<", "1e5"]


@pytest.mark.parametrize("written", OTHER_BASES, ids=range(len(OTHER_BASES)))
def test_a_plain_scalar_is_a_decimal_number_or_the_text_that_a_person_sees(tmp_path, written):
    """Otherwise 9:30 is 570, 010 is 8, and a long number in base 60 takes a minute for each megabyte."""
    assert read_yaml(file(tmp_path, f"a: {written}")) == {"a": written}


ZEROS, LISTS = "[" + "0, " * 200 + "0]", "[" + "[], " * 200 + "0]"
MANY_VALUES = [(read_json, ZEROS), (read_json, LISTS), (read_yaml, ZEROS), (read_yaml, LISTS), (lines_of, "0\n" * 201)]


@pytest.mark.parametrize(("read", "text"), MANY_VALUES, ids=range(len(MANY_VALUES)))
def test_a_file_of_many_small_values_is_refused_by_their_number(tmp_path, read, text, monkeypatch):
    monkeypatch.setattr(input_files, "BYTES_A_VALUE", input_files.MOST_BYTES // 200)
    monkeypatch.setattr(input_files, "MOST_YAML_VALUES", 200)
    with pytest.raises(InputFileError, match="more than 200 values"):
        read(file(tmp_path, text))
    assert read(file(tmp_path, text.replace("0, " * 20, "").replace("[], " * 20, "").replace("0\n" * 20, "")))


LAUGHS = "a: &a [x]\n" + "".join(f"{name}: &{name} [{'*a, ' * 9}]\n" for name in "bcdefghij")


@pytest.mark.parametrize("text", [LAUGHS, *(start * 150_000 for start in ("a: [", "[", "{", "? ", "- "))], ids=range(6))
def test_a_small_file_that_would_become_large_is_refused_in_time(tmp_path, text):
    start = time.process_time()
    with pytest.raises(InputFileError):
        read_yaml(file(tmp_path, text))
    assert time.process_time() - start < 1.0


def test_every_shipped_file_is_within_the_limits():
    for path in [*(ROOT / "params").rglob("*.yaml"), *(ROOT / "telco_nb" / "data").rglob("*.yaml")]:
        assert read_yaml(path), path
    for path in (ROOT / "telco_nb" / "data").rglob("*.jsonl"):
        assert list(read_json_lines(path)), path
