"""Measures of texts: words and sentences, variety (distinct-n, compression, self-BLEU), reading ease."""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Sequence

import pandas as pd

SAMPLE_SIZE = 2000  # distinct-n and compression depend on how much text is measured, so they are taken on as many texts
CELL_TEXTS = 20  # self-BLEU of a cell: at most as many of its texts, drawn by keyed hash
BLEU_ORDER = 4


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all (distinct-n, Li et al. 2016), 0 to 1."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / max(1, len(grams))


def compression_ratio(texts: Sequence[str]) -> float:
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


def variety_table(texts: dict[str, Sequence[str]]) -> pd.DataFrame:
    """One row per named list of texts: texts, distinct_1 to distinct_3, gzip_ratio."""
    rows = [
        {"text": name, "texts": len(found)}
        | {f"distinct_{n}": round(distinct_n(found, n), 4) for n in (1, 2, 3)}
        | {"gzip_ratio": round(compression_ratio(found), 3)}
        for name, found in texts.items()
    ]
    return pd.DataFrame(rows)


def words(text: str) -> list[str]:
    """Lower-cased words; hyphens, dots and apostrophes inside a word are kept (eSIM, Wi-Fi, Mbit/s)."""
    return re.findall(r"[a-z0-9]+(?:['’\-./][a-z0-9]+)*", text.lower())


def sentences(text: str) -> list[str]:
    """Sentences of a card text, split where a full stop, ? or ! is followed by a space and a capital or digit."""
    return re.split(r"(?<=[.?!])\s+(?=[A-Z0-9“\"]|e[A-Z])", text.strip())


def first_sentence(text: str) -> str:
    return sentences(text)[0]


_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?:[^laeiouy]es?|[^aeiouytd]ed)$")  # bite, takes, asked; but table, glasses, started


def syllables(word: str) -> int:
    """Syllables of an English word by its groups of vowels, a silent ending left out: a guess, right for most words.

    Abbreviations are read letter by letter (DNS: 3).
    """
    letters = re.sub(r"[^A-Za-z]", "", word)
    if letters.isupper() and len(letters) > 1:
        return len(letters) + 2 * letters.count("W")
    lower = letters.lower()
    groups = len(_VOWELS.findall(lower))
    hissing = re.search(r"(?:s|x|z|ch|sh|c|g)es$", lower)
    return max(1, groups - (1 if groups > 1 and _SILENT.search(lower) and not hissing else 0))


def flesch_reading_ease(text: str) -> float:
    """Reading ease (Flesch 1948): 206.835 - 1.015 words per sentence - 84.6 syllables per word.

    60 and more is plain English, below 30 is for specialists. Raises ValueError for a text without words.
    """
    spoken = [word for word in text.split() if re.search(r"[A-Za-z]", word)]
    if not spoken:
        raise ValueError("a text without words has no reading ease")
    return 206.835 - 1.015 * len(spoken) / len(sentences(text)) - 84.6 * sum(map(syllables, spoken)) / len(spoken)
