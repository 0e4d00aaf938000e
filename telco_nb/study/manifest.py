"""The shape of manifest.json, and the seal with which a file names its own hash.

A manifest may be damaged in any way: what is not a whole, sealed manifest of its own folder is no proof of success.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from telco_nb.study.input_files import MOST_RECORD_BYTES, InputFileError, read_json

SCHEMA_VERSION = 1
SEAL = "seal"  # key of the hash over everything else in the same file


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise ValueError("must stay below the step's folder")
    return path


def _plain_name(name: str) -> str:
    if "/" in name or "\0" in name or name.startswith(".") or not name:
        raise ValueError("must be the name of a file")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
PlainName = Annotated[str, AfterValidator(_plain_name)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Shape):
    path: Inside
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class _KeyParts(_Shape):
    notebook: str = ""
    parameters: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    versions: dict[str, Any] = {}


class _Manifest(_Shape):
    schema_version: Literal[1]
    step: str
    scope: str
    key: str | None
    key_parts: _KeyParts
    executor: str
    status: Literal["ok"]
    headline: str
    parameters: dict[str, Any]
    inputs: list[_File]
    outputs: list[_File]
    exports: dict[PlainName, Inside]
    environment: dict[str, Any]
    device: dict[str, Any]
    started_at: str
    seconds: float = Field(ge=0, allow_inf_nan=False)
    notebook_sha256: str | None = None


def load_manifest(path: Path, scope: str | None = None, step: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """The manifest in a file, or None with the reason in words.

    Args:
        path: the file.
        scope, step: whose manifest it must be, if given.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        return None, "no result yet"
    try:
        manifest = read_json(path, control_characters=True, most_bytes=MOST_RECORD_BYTES)
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        return None, f"its manifest.json is damaged: {place}: {first['msg']}"
    except InputFileError as error:
        return None, f"its manifest.json cannot be read: {' '.join(str(error).split())}"
    if (scope or manifest["scope"], step or manifest["step"]) != (manifest["scope"], manifest["step"]):
        return None, f"its manifest.json is that of {manifest['scope']}/{manifest['step']}"
    if not is_sealed(manifest):
        return None, "its manifest.json was changed" if SEAL in manifest else "its manifest.json carries no seal"
    return manifest, ""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the hash over it under the key `seal`; an earlier seal does not count."""
    return {**content, SEAL: _digest(content)}


def is_sealed(content: Any) -> bool:
    """True if a file's content holds its own right hash."""
    try:
        return isinstance(content, dict) and content.get(SEAL) == _digest(content)
    except RecursionError:
        return False


def _digest(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def whole_number(value: Any) -> int:
    """A count from a manifest, from 1 up; 1 for everything else."""
    return value if type(value) is int and value > 0 else 1
