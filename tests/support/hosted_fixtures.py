"""What tests of hosted models share: planted keys, model ids, a good answer and its schema, and a quick retry policy.

Not a test. A test module that imports `keys` has the planted API keys in its environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from telco_nb.hosted import api, throttle

MODELS = {
    "anthropic": "claude-sonnet-4-5", "openai": "gpt-5.2", "google": "gemini-2.5-flash", "openai-compatible": "own",
}  # fmt: skip
SECRET = "sk-planted-secret"
GOOD = '{"verdict":"A","margin":1}'
QUICK = throttle.RetryPolicy(first_wait_s=0.01, longest_wait_s=0.05)
STOPS = {"401", "404", "quota"}  # faults after which no other request can succeed


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    verdict: Literal["A", "B", "tie"]
    margin: int


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """Set an API key for every kind of provider."""
    for names in api.KEY_VARIABLES.values():
        monkeypatch.setenv(names[0], SECRET)
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)


def lines(path: Path) -> list[dict]:
    """The attempts of a store."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
