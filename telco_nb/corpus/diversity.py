"""How varied texts are: distinct n-grams, compression, self-BLEU within a cell of the grid."""

from __future__ import annotations

import gzip
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pandas as pd

from telco_nb.corpus.glossary import words
from telco_nb.corpus.scenarios import AXES, keyed

SAMPLE = 2000  # distinct-n and compression depend on how much text is measured, so they are taken on as many texts
CELL_TEXTS = 20  # self-BLEU of a cell: at most as many of its texts, drawn by keyed hash
BLEU_ORDER = 4


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all (distinct-n, Li et al. 2016), 0 to 1."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / max(1, len(grams))


def compression(texts: Sequence[str]) -> float:
    """Raw bytes over gzipped bytes (Shaib et al. 2024): higher means more repetition.

    Level 6; another zlib may give another last digit.
    """
    raw = "\n".join(texts).encode()
    return len(raw) / len(gzip.compress(raw, compresslevel=6, mtime=0))


def bleu(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a tokenised text against references, 0 to 1 (Papineni et al. 2002), no smoothing."""
    log_precision = 0.0
    for n in range(1, BLEU_ORDER + 1):
        own = Counter(_grams(candidate, n))
        best: Counter = Counter()
        for reference in references:
            best |= Counter(_grams(reference, n))
        matched = sum((own & best).values())
        if not matched:
            return 0.0
        log_precision += math.log(matched / own.total()) / BLEU_ORDER
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return math.exp(log_precision + min(0.0, 1 - closest / len(candidate)))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018), 0 to 1, lower is more varied."""
    tokens = [words(text) for text in texts]
    if len(tokens) < 2:
        return None
    return sum(bleu(own, tokens[:i] + tokens[i + 1 :]) for i, own in enumerate(tokens)) / len(tokens)


def table(texts: dict[str, Sequence[str]]) -> pd.DataFrame:
    """One row per named list of texts: texts, distinct_1 to distinct_3, gzip_ratio."""
    rows = [
        {"text": name, "texts": len(found)}
        | {f"distinct_{n}": round(distinct(found, n), 4) for n in (1, 2, 3)}
        | {"gzip_ratio": round(compression(found), 3)}
        for name, found in texts.items()
    ]
    return pd.DataFrame(rows)


def drawn(rows: Sequence[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` conversations (or all), drawn by keyed hash."""
    return sorted(rows, key=lambda row: keyed(seed, "diversity", row["conversation_id"]))[:n]


def per_cell(rows: Sequence[dict[str, Any]], parts: dict[str, Any], cells: int, seed: int) -> pd.DataFrame:
    """Self-BLEU within scenarios: columns scenario_id, the axes, texts, and self_bleu_<part> for each of `parts`.

    `cells` scenarios are drawn by keyed hash; of each, at most CELL_TEXTS conversations. `parts` maps a name to a
    function from a conversation to its text.
    """
    by_scenario = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario_id"]].append(row)
    chosen = sorted(by_scenario, key=lambda name: keyed(seed, "diversity", name))[:cells]
    found = []
    for name in chosen:
        texts = drawn(by_scenario[name], CELL_TEXTS, seed)
        values = {f"self_bleu_{part}": self_bleu([get(row) for row in texts]) for part, get in parts.items()}
        head = {key: texts[0][key] for key in ("scenario_id", "term_id", *AXES)}
        found.append(head | {"texts": len(texts)} | values)
    return pd.DataFrame(found)
