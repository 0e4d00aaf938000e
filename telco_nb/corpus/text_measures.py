"""Text tools and measures: words, sentences, diversity (distinct-n, compression, self-BLEU), reading ease."""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

BLEU_ORDER = 4
STOP_WORDS = frozenset(
    """
a about after all also am an and any are as at be because been before but by can could did do does for from had has
have how i if in into is it its me more my no not of on once one only or other our out over so some such than that the
their them then there these they this those to too up us very was we were what when where which while who why will with
would you your
""".split()  # noqa: SIM905
)

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?:[^laeiouy]es?|[^aeiouytd]ed)$")  # bite, takes, asked; but table, glasses, started


def words(text: str) -> list[str]:
    """Return the lower-cased words; hyphens, dots and apostrophes inside a word are kept (eSIM, Wi-Fi, Mbit/s)."""
    return re.findall(r"[a-z0-9]+(?:['’\-./][a-z0-9]+)*", text.lower())


def stem(word: str) -> str:
    """Cut the commonest endings of an English word: a crude stem, the same for all forms of most words."""
    word = re.sub(r"['’]s$", "", word)
    for ending in ("ing", "ies", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


@lru_cache(maxsize=65536)
def content_stems(text: str) -> tuple[str, ...]:
    """Return the stems of the words that are not stop words, in their order."""
    return tuple(stem(word) for word in words(text) if word not in STOP_WORDS)


def sentences(text: str) -> list[str]:
    """Split a card text where a full stop, ? or ! is followed by a space and a capital or digit."""
    return re.split(r"(?<=[.?!])\s+(?=[A-Z0-9“\"]|e[A-Z])", text.strip())


def count_words(text: str) -> int:
    return len(text.split())


def capitalised(text: str) -> str:
    """Start with a capital, unless the first word has a spelling of its own (eSIM)."""
    first, *_ = text.split(maxsplit=1) or [""]
    return text if any(c.isupper() for c in first) else text[:1].upper() + text[1:]


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of `n` tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all (distinct-n, Li et al. 2016), 0 to 1."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / max(1, len(grams))


def compression_ratio(texts: Sequence[str]) -> float:
    """Raw bytes over gzipped bytes (Shaib et al. 2024): higher means more repetition.

    The gzip level is 6. Another version of zlib may change the last digit.
    """
    raw = "\n".join(texts).encode()
    return len(raw) / len(gzip.compress(raw, compresslevel=6, mtime=0))


def bleu(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a tokenised text against references, 0 to 1 (Papineni et al. 2002), no smoothing."""
    log_precision = 0.0
    for n in range(1, BLEU_ORDER + 1):
        own = Counter(ngrams(candidate, n))
        largest: Counter = Counter()
        for reference in references:
            largest |= Counter(ngrams(reference, n))
        matched = (own & largest).total()
        if not matched:
            return 0.0
        log_precision += math.log(matched / own.total()) / BLEU_ORDER
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return math.exp(log_precision + min(0.0, 1 - closest / len(candidate)))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018), 0 to 1; lower is more varied.

    Returns None for fewer than two texts.
    """
    tokens = [words(text) for text in texts]
    if len(tokens) < 2:
        return None
    return sum(bleu(own, tokens[:i] + tokens[i + 1 :]) for i, own in enumerate(tokens)) / len(tokens)


def syllables(word: str) -> int:
    """Estimate the syllables of an English word from its groups of vowels, without a silent ending.

    Abbreviations are read letter by letter (DNS: 3).
    """
    letters = re.sub(r"[^A-Za-z]", "", word)
    if letters.isupper() and len(letters) > 1:
        return len(letters) + 2 * letters.count("W")
    lower = letters.lower()
    groups = len(_VOWELS.findall(lower))
    sibilant = re.search(r"(?:s|x|z|ch|sh|c|g)es$", lower)  # this -es is spoken
    return max(1, groups - (1 if groups > 1 and _SILENT.search(lower) and not sibilant else 0))


def flesch_reading_ease(text: str) -> float:
    """Reading ease (Flesch 1948): 206.835 - 1.015 words per sentence - 84.6 syllables per word.

    60 and more is plain English, below 30 is for specialists. Raises ValueError for a text without words.
    """
    spoken = [word for word in text.split() if re.search(r"[A-Za-z]", word)]
    if not spoken:
        raise ValueError("a text without words has no reading ease")
    return 206.835 - 1.015 * len(spoken) / len(sentences(text)) - 84.6 * sum(map(syllables, spoken)) / len(spoken)
