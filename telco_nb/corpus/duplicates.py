"""Find exact duplicates (after normalisation), near-duplicates (Jaccard) and similar texts (TF-IDF cosine)."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from telco_nb.corpus.text_measures import words

NEAR_DUPLICATE = 0.8  # Jaccard similarity of word 5-shingles
SHINGLE = 5
SIMILAR = 0.92  # TF-IDF cosine of two exchanges of the same term in different splits
SHARED = 3  # rare shingles that two near-duplicates must share; more candidates with 1 or 2, longer prefixes with 4
BLOCK = 4000  # texts compared with all others at a time
ROUNDING = 1e-4  # single precision proposes pairs this much below the threshold, double precision decides

Pair = tuple[int, int, float]


def text_hash(text: str) -> str:
    """Return the sha256 of the normalised text: its lower-cased words with single spaces."""
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()


# --- near-duplicates ---------------------------------------------------------------------------------


def _number_distinct(values: np.ndarray) -> np.ndarray:
    """Give equal values equal numbers from 0; exact, without collisions."""
    return pd.factorize(values)[0].astype(np.int64)


def _word_numbers(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (word numbers of all texts, concatenated; words per text). A short text is padded with 0."""
    vocabulary: dict[str, int] = {"": 0}
    numbers = array("q")
    lengths = np.empty(len(texts), dtype=np.int64)
    for i, text in enumerate(texts):
        own = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
        own += [0] * (SHINGLE - len(own))
        numbers.extend(own)
        lengths[i] = len(own)
    return np.frombuffer(numbers, dtype=np.int64), lengths


def shingle_sets(texts: Sequence[str]) -> csr_matrix:
    """Return the word 5-shingles of the texts as a binary matrix, texts x shingles, rare shingles first.

    A text of fewer than 5 words is one shingle.
    """
    word, lengths = _word_numbers(texts)
    owner = np.repeat(np.arange(len(texts)), lengths)
    two = _number_distinct(word[:-1] * (word.max() + 1) + word[1:])
    four = _number_distinct(two[:-2] * (two.max() + 1) + two[2:])
    five = _number_distinct(four[:-1] * (word.max() + 1) + word[SHINGLE - 1 :])
    inside = owner[: len(five)] == owner[SHINGLE - 1 :]  # windows that do not cross into the next text
    owner, five = owner[: len(five)][inside], five[inside]
    frequency = np.bincount(five)
    rank = np.empty(len(frequency), dtype=np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
    row, column = np.divmod(np.unique(owner * len(frequency) + rank[five]), len(frequency))  # rarest first
    starts = np.searchsorted(row, np.arange(len(texts) + 1))
    return csr_matrix((np.ones(len(row), dtype=np.int32), column, starts), shape=(len(texts), len(frequency)))


def _prefixes(sets: csr_matrix, threshold: float) -> tuple[csr_matrix, np.ndarray]:
    """Return (the rarest shingles of each text, how many of them a similar text shares)."""
    sizes = np.diff(sets.indptr)
    least = np.ceil(threshold * sizes).astype(np.int64)  # the smallest overlap with a set of this similarity
    length = np.minimum(sizes, sizes - least + SHARED)
    place = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
    frequency = np.bincount(sets.indices, minlength=sets.shape[1])
    # A shingle that one text alone holds finds no pair.
    chosen = (place < np.repeat(length, sizes)) & (frequency[sets.indices] > 1)
    starts = np.concatenate(([0], np.cumsum(chosen)))[sets.indptr]
    prefixes = csr_matrix((sets.data[chosen], sets.indices[chosen], starts), shape=sets.shape)
    return prefixes, np.minimum(SHARED, least)


def _pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of all pairs (i, j, Jaccard), j < i, at or above the threshold.

    Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007; with several shared elements, Wang et al. 2012): two
    sets this similar share `SHARED` of their rarest n - ceil(threshold n) + SHARED elements, so that only such pairs
    are compared. A sparse matrix product counts the shared elements, in blocks to bound the memory.
    """
    sets = shingle_sets(texts)
    sizes = np.diff(sets.indptr)
    prefixes, needed = _prefixes(sets, threshold)
    columns = prefixes.T.tocsr()
    for start in range(0, len(texts), BLOCK):
        shared = (prefixes[start : start + BLOCK] @ columns).tocoo()
        i, j = shared.row.astype(np.int64) + start, shared.col.astype(np.int64)
        few, many = np.minimum(sizes[i], sizes[j]), np.maximum(sizes[i], sizes[j])
        fit = (j < i) & (shared.data >= np.minimum(needed[i], needed[j])) & (few >= threshold * many)
        i, j = i[fit], j[fit]
        overlap = np.asarray(sets[i].multiply(sets[j]).sum(axis=1)).ravel()
        jaccard = overlap / (sizes[i] + sizes[j] - overlap)
        similar = jaccard >= threshold
        yield i[similar], j[similar], jaccard[similar]


def near_duplicates(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[Pair]:
    """Return all pairs (i, j, Jaccard), i < j, whose word 5-shingles have Jaccard similarity >= threshold. Exact."""
    if not texts:
        return []
    blocks = _pairs(texts, threshold)
    return sorted((int(j), int(i), float(value)) for block in blocks for i, j, value in zip(*block, strict=True))


def near_duplicates_to_drop(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> dict[int, tuple[int, float]]:
    """Return {position: (earlier position, Jaccard)} of the texts to drop so that no near-duplicates stay.

    Earlier texts have priority; a text is dropped only for an earlier one that stays.
    """
    dropped: dict[int, tuple[int, float]] = {}
    for earlier, later, value in sorted(near_duplicates(texts, threshold), key=lambda pair: (pair[1], pair[0])):
        if earlier not in dropped and later not in dropped:
            dropped[later] = (earlier, value)
    return dropped


# --- similar exchanges across splits -----------------------------------------------------------------


def similar_pairs(texts: Sequence[str], group: Sequence[str], priority: Sequence[int], threshold: float) -> list[Pair]:
    """Return all pairs (i, j, cosine) of one group with TF-IDF cosine >= threshold and priority[i] < priority[j].

    `group` and `priority` have one entry per text. All pairs of a group are multiplied as dense single-precision
    blocks, which is fast. Double precision decides the few near the threshold.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = csr_matrix(TfidfVectorizer(analyzer=words, dtype=np.float64).fit_transform(texts))
    priorities = np.asarray(priority)
    members: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(group):
        members[name].append(i)
    pairs = []
    for rows in map(np.array, members.values()):
        used = np.unique(vectors[rows].indices)
        dense = vectors[rows][:, used].toarray().astype(np.float32)
        for level in np.unique(priorities[rows])[:-1]:
            here, lower = np.flatnonzero(priorities[rows] == level), np.flatnonzero(priorities[rows] > level)
            candidates = np.argwhere(dense[here] @ dense[lower].T >= threshold - ROUNDING)
            for i, j in ((rows[here[a]], rows[lower[b]]) for a, b in candidates):
                cosine = round(float(vectors[i].multiply(vectors[j]).sum()), 6)
                if cosine >= threshold:
                    pairs.append((int(i), int(j), cosine))
    return sorted(pairs)
