"""Texts that say the same: equal after normalising, nearly equal (Jaccard), or of much the same words (TF-IDF)."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from telco_nb.glossary import words

NEAR_DUPLICATE = 0.8  # Jaccard similarity of word 5-shingles
SHINGLE = 5
SIMILAR = 0.92  # TF-IDF cosine of two exchanges of the same term in different splits
ROUNDING = 1e-4  # single precision proposes pairs this much below the threshold, double precision decides

Pair = tuple[int, int, float]


def normalised(text: str) -> str:
    """Lower-cased words with single spaces: what counts as the same text."""
    return " ".join(words(text))


def digest(text: str) -> str:
    """sha256 of the normalised text."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


# --- near-duplicates ---------------------------------------------------------------------------------


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number for each different pair (first[i], second[i]); exact, no hashing."""
    return pd.factorize(first * (second.max(initial=0) + 1) + second)[0]


def shingle_sets(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The word 5-shingles of each text, rarest first: (shingles, starts, frequency).

    Text i has the different shingles `shingles[starts[i]:starts[i + 1]]`; a shingle's number is its rank from rare to
    frequent, and `frequency[number]` is how many texts hold it. A text of fewer words is one shingle.
    """
    vocabulary: dict[str, int] = {"": 0}  # 0 fills up short texts
    tokens: list[int] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        found = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
        found += [0] * (SHINGLE - len(found))
        tokens += found
        lengths[i] = len(found)
    word = np.array(tokens, dtype=np.int64)
    del tokens
    two = _paired(word[:-1], word[1:])
    four = _paired(two[:-2], two[2:])
    five = _paired(four[:-1], word[SHINGLE - 1 :])
    owner = np.repeat(np.arange(len(texts)), lengths)
    inside = owner[: len(five)] == owner[SHINGLE - 1 :]  # windows that do not cross into the next text
    return _ranked(owner[: len(five)][inside], five[inside], len(texts))


def _ranked(owner: np.ndarray, shingle: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    different = np.unique(owner * (shingle.max(initial=0) + 1) + shingle)  # each shingle once a text
    owner, shingle = np.divmod(different, shingle.max(initial=0) + 1)
    frequency = np.bincount(shingle)
    order = np.argsort(frequency, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    by_text = np.lexsort((rank[shingle], owner))
    starts = np.searchsorted(owner[by_text], np.arange(n + 1))
    return rank[shingle[by_text]].astype(np.int32), starts, frequency[order]


def _neighbours(texts: Sequence[str], threshold: float, greedy: bool) -> Iterator[Pair]:
    """Pairs (earlier, later, Jaccard) of texts at or above the threshold; exact.

    Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): two sets this similar share one of their rarest
    n - ceil(threshold n) + 1 elements, so only texts that share such an element are compared. `greedy`: a text that
    has an earlier neighbour yields to the first such, and is itself no neighbour of later ones.
    """
    if not texts:
        return
    shingles, starts, frequency = shingle_sets(texts)
    sizes = np.diff(starts).tolist()
    index: dict[int, list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        own = shingles[starts[i] : starts[i + 1]]
        prefix = own[: size - math.ceil(threshold * size) + 1]
        prefix = prefix[frequency[prefix] > 1].tolist()  # what no other text holds finds nothing
        candidates = {other for number in prefix for other in index.get(number, ())}
        found, mine = False, set(own.tolist()) if candidates else set()
        for j in sorted(candidates):
            if not threshold * size <= sizes[j] <= size / threshold:
                continue
            shared = len(mine.intersection(shingles[starts[j] : starts[j + 1]].tolist()))
            jaccard = shared / (size + sizes[j] - shared)
            if jaccard >= threshold:
                found = True
                yield j, i, jaccard
                if greedy:
                    break
        if not (greedy and found):
            for number in prefix:
                index[number].append(i)


def near_duplicates(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[Pair]:
    """All pairs (i, j, Jaccard), i < j, of texts with Jaccard similarity of word 5-shingles >= threshold. Exact."""
    return sorted(_neighbours(texts, threshold, greedy=False))


def yielding(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> dict[int, tuple[int, float]]:
    """{position: (earlier position, Jaccard)} of texts that must go so that no near-duplicates stay.

    Earlier texts have the higher claim; a text yields only to one that stays.
    """
    return {i: (j, jaccard) for j, i, jaccard in _neighbours(texts, threshold, greedy=True)}


# --- similar exchanges across splits -----------------------------------------------------------------


def similar(texts: Sequence[str], group: Sequence[str], claim: Sequence[int], threshold: float) -> list[Pair]:
    """Pairs (i, j, cosine) of texts of one group with TF-IDF cosine >= threshold and claim[i] < claim[j].

    Texts of different groups are not compared. Within a group all pairs of different claim are multiplied as dense
    single-precision blocks, which is fast; the few near the threshold are decided in double precision.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer=words, dtype=np.float64).fit_transform(texts)
    claims = np.asarray(claim)
    members: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(group):
        members[name].append(i)
    pairs = []
    for found in members.values():
        rows = np.array(found)
        used = np.unique(vectors[rows].indices)
        dense = vectors[rows][:, used].toarray().astype(np.float32)
        for level in np.unique(claims[rows])[:-1]:
            here, later = np.flatnonzero(claims[rows] == level), np.flatnonzero(claims[rows] > level)
            hits = np.argwhere(dense[here] @ dense[later].T >= threshold - ROUNDING)
            for i, j in ((rows[here[a]], rows[later[b]]) for a, b in hits):
                cosine = round(float(vectors[i].multiply(vectors[j]).sum()), 6)
                if cosine >= threshold:
                    pairs.append((int(i), int(j), cosine))
    return sorted(pairs)
