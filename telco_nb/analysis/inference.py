"""Inference that respects the design: relabelled factors, ties within levels, Lenth's error, lack of fit.

Configurations of a factorial design are not exchangeable. If one factor drives both loss and quality, the two rankings
agree or disagree strongly whatever loss knows about answers. So loss is tested against the same design with its levels
relabelled, and effects against the noise of runs, not of shuffled rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import linalg

from telco_nb.analysis.statistics import tau_rows

MOST_RELABELLINGS = 5_000  # of the levels; beyond that a seeded sample of them
_ROUNDING = 1e-9  # of a rank correlation: values this near are equal
FEWEST_CONTRASTS = 7  # of an 8-run design: with fewer, the median of Lenth's method rests on nothing


def relabellings(levels: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """The reorderings of the configurations that a renaming of levels within factors can bring about.

    A renaming counts if it maps the set of configurations onto itself: for the 16-run array these are 32 of the 192
    renamings, and they form a group. Factors are not exchanged with each other: where one factor is the strongest on
    both sides, that would call every relation unusual (false positives .22 instead of .05 in simulation).

    Args:
        levels: one column per factor, one row per configuration.
        seed: of the sample, if there are more than MOST_RELABELLINGS renamings.

    Returns:
        (relabellings, configurations): positions, the first row is the identity. The identity alone if two
        configurations have the same levels.
    """
    codes = np.column_stack([pd.factorize(levels[name], use_na_sentinel=False)[0] for name in levels])
    sizes = codes.max(axis=0) + 1
    weights = np.concatenate([[1], np.cumprod(sizes[:-1])])
    own = codes @ weights
    order = np.argsort(own)
    identity = np.arange(len(codes))[None, :]
    if (np.diff(own[order]) == 0).any():
        return identity
    renamed = sum(
        names[:, code] * weight for names, code, weight in zip(_renamings(sizes, seed), codes.T, weights, strict=True)
    )
    place = np.searchsorted(own[order], renamed).clip(max=len(own) - 1)
    onto = (own[order][place] == renamed).all(axis=1)
    found = np.unique(order[place[onto]], axis=0)
    return np.concatenate([identity, found[(found != identity).any(axis=1)]])


def _renamings(sizes: np.ndarray, seed: int) -> list[np.ndarray]:
    """New names of every factor's levels, (renamings, levels) each: all combinations, or a sample of them."""
    if math.prod(math.factorial(size) for size in sizes) > MOST_RELABELLINGS:
        rng = np.random.default_rng(seed)
        return [rng.permuted(np.tile(np.arange(size), (MOST_RELABELLINGS, 1)), axis=1) for size in sizes]
    combined = list(product(*(permutations(range(size)) for size in sizes)))
    return [np.array([names[j] for names in combined]) for j in range(len(sizes))]


def relabelled_values(
    statistic: Callable[..., np.ndarray],
    relabelled: np.ndarray,
    sides: Sequence[pd.Series | np.ndarray],
    moved: Sequence[bool],
) -> np.ndarray:
    """A statistic under every relabelling, (relabellings,); the first value is the observed one.

    Args:
        statistic: takes the sides as (relabellings, configurations) or (1, configurations); gives one value per row.
        relabelled: from `relabellings`.
        sides: scores by configuration.
        moved: which sides are relabelled, together; the others stay.
    """
    values = [np.asarray(side, dtype=float) for side in sides]
    rows = [side[relabelled if moves else relabelled[:1]] for side, moves in zip(values, moved, strict=True)]
    return statistic(*rows)


def relabelling_p(values: np.ndarray) -> float:
    """The share of relabellings under which a statistic is at least as far from 0 as it is observed.

    It is exact for whatever function of the factors the sides are, if the directions of their effects are unrelated.
    No value below 1 / (number of relabellings) is possible.

    Args:
        values: from `relabelled_values`.
    """
    sizes = np.abs(values)
    return float((sizes >= sizes[0] - _ROUNDING).mean()) if math.isfinite(sizes[0]) else math.nan


def step_down_p(values: np.ndarray) -> np.ndarray:
    """p of several statistics, adjusted so that the family-wise error rate holds: any false claim in at most 5 %.

    This is Holm's step-down, with the joint distribution under relabelling instead of Bonferroni's bound (Westfall and
    Young 1993, Resampling-Based Multiple Testing, algorithm 4.1, maxT): the largest of the statistics is compared with
    the largest under every relabelling, then the second with the largest of the rest. Bonferroni's bound would multiply
    the least possible p, 1 / (number of relabellings), by the number of statistics: with 32 relabellings and five of
    them nothing could be shown, whatever the data.

    Args:
        values: from `relabelled_values` over the same relabellings, (statistics, relabellings).

    Returns:
        (statistics,). Each statistic is measured by its own size over the relabellings.
    """
    sizes = np.abs(np.nan_to_num(values))
    scale = np.sqrt((sizes**2).mean(axis=1, keepdims=True))
    sizes = np.divide(sizes, scale, out=np.zeros_like(sizes), where=scale > 0)
    order = np.argsort(-sizes[:, 0], kind="stable")
    largest = np.maximum.accumulate(sizes[order][::-1], axis=0)[::-1]  # of each statistic and all that follow it
    p = (largest >= sizes[order, :1] - _ROUNDING).mean(axis=1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(p)
    return adjusted


def taus_within(levels: pd.DataFrame, a: pd.Series, b: pd.Series) -> dict[str, float]:
    """tau-b over the pairs of configurations that are alike in a factor, by factor: what is left without it.

    Args:
        levels: one column per factor; a factor with one level is left out.
        a, b: two scores with the same index.
    """
    first, second = np.triu_indices(len(a), 1)
    signs = [np.sign(values[first] - values[second]) for values in (a.to_numpy(float), b.to_numpy(float))]
    taus = {}
    for name in (name for name in levels if levels[name].nunique(dropna=False) > 1):
        code = pd.factorize(levels[name], use_na_sentinel=False)[0]
        x, y = (sign[code[first] == code[second]] for sign in signs)
        untied = math.sqrt(np.abs(x).sum() * np.abs(y).sum())
        taus[str(name)] = float((x * y).sum() / untied) if untied else math.nan
    return taus


def taus_by_level(levels: pd.Series, a: pd.Series, b: pd.Series) -> dict[Any, float]:
    """tau-b of two scores among the configurations of each level of a factor; NaN with fewer than three."""
    groups = a.groupby(levels).groups
    return {
        level: float(tau_rows(a[index], b[index])[0]) if len(index) > 2 else math.nan for level, index in groups.items()
    }


def partial_tau_rows(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Kendall's partial tau of a and b at equal `given`, row by row (Kendall 1942)."""
    ab, ag, bg = tau_rows(a, b), tau_rows(a, given), tau_rows(b, given)
    with np.errstate(invalid="ignore", divide="ignore"):
        partial = (ab - ag * bg) / np.sqrt((1 - ag**2) * (1 - bg**2))
    return np.where(np.isfinite(partial), partial, np.nan)


class Error(NamedTuple):
    """The standard deviation of one run, its degrees of freedom, and in words where it comes from."""

    sd: float
    df: float
    source: str


def saturated_contrasts(levels: pd.DataFrame) -> np.ndarray:
    """Orthonormal contrasts that use up a design: main effects first, then interactions of two factors, of three, ...

    A column that earlier ones already span is left out, so aliased interactions count once. Levels are coded by
    Hadamard columns if their number is a power of 2, else by Helmert's.

    Returns:
        (configurations, contrasts), at most one contrast fewer than configurations.
    """
    n = len(levels)
    coded = [_coding(pd.factorize(levels[name], sort=True, use_na_sentinel=False)[0]) for name in levels]
    basis = np.full((1, n), 1 / math.sqrt(n))
    for column in _products(coded):
        if len(basis) == n:
            break
        for _ in range(2):  # Gram-Schmidt; twice is enough against rounding
            column = column - basis.T @ (basis @ column)
        if np.linalg.norm(column) > 1e-6:
            basis = np.vstack([basis, column / np.linalg.norm(column)])
    return basis[1:].T


def _products(coded: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The columns of single factors, then the products of the columns of two, of three, ..."""
    for size in range(1, len(coded) + 1):
        for factors in combinations(coded, size):
            for columns in product(*(factor.T for factor in factors)):
                yield np.prod(columns, axis=0)


def _coding(code: np.ndarray) -> np.ndarray:
    """Contrast columns of one factor, (configurations, levels - 1)."""
    size = int(code.max()) + 1
    whole = linalg.hadamard(size) if size & (size - 1) == 0 else linalg.helmert(size, full=True).T * math.sqrt(size)
    return whole[code, 1:].astype(float)


def lenth_error(levels: pd.DataFrame, y: pd.Series) -> Error | None:
    """The error of one run from an unreplicated design by Lenth's method (1989, Technometrics 31:469).

    Most contrasts are taken to be noise: 1.5 times the median of those that do not stand out, with a third of their
    number as degrees of freedom. Many strong interactions make it larger, not smaller.

    Args:
        levels: one column per factor.
        y: the response, with the same index.

    Returns:
        None with fewer than FEWEST_CONTRASTS contrasts, or if the response hardly varies.
    """
    sizes = np.abs(saturated_contrasts(levels).T @ y.to_numpy(float))
    if len(sizes) < FEWEST_CONTRASTS:
        return None
    first = 1.5 * float(np.median(sizes))
    if first <= 1e-12 * max(1.0, float(np.abs(y).max())):
        return None
    kept = sizes[sizes < 2.5 * first]
    df = len(sizes) / 3
    return Error(1.5 * float(np.median(kept)), df, f"Lenth's pseudo standard error, {len(sizes)} contrasts")


def pure_error(runs: pd.Series) -> Error | None:
    """The error between runs of the same configuration.

    Args:
        runs: values indexed by configuration, one row per run.

    Returns:
        None if no configuration has two runs, or if their runs do not differ.
    """
    groups = runs.dropna().groupby(level=0).agg(["var", "count"])
    df = int((groups["count"] - 1).sum())
    total = float((groups["var"] * (groups["count"] - 1)).sum())
    if df < 1 or total <= 0:
        return None
    return Error(math.sqrt(total / df), df, f"runs repeated with other seeds, {df} degrees of freedom")


class LackOfFit(NamedTuple):
    """F test of a model against the means of the configurations. NaN where repeats are missing."""

    f: float = math.nan
    p: float = math.nan
    df: int = 0
    df_error: int = 0


def lack_of_fit(x: pd.DataFrame, runs: pd.Series) -> LackOfFit:
    """Does a model describe the configurations as well as the noise between their runs allows?

    Args:
        x: the model matrix, one row per configuration.
        runs: values indexed by configuration, one row per run, repeats included.
    """
    from statsmodels.regression.linear_model import OLS
    from statsmodels.tools.sm_exceptions import SingularMatrixWarning

    if pure_error(runs) is None:
        return LackOfFit()
    means = pd.get_dummies(pd.Series(runs.index), dtype=float).set_axis(runs.index)
    with warnings.catch_warnings(category=SingularMatrixWarning, action="ignore"):  # the fit is the same
        model, full = OLS(runs, x.loc[runs.index]).fit(), OLS(runs, means).fit()
    if model.df_resid <= full.df_resid:
        return LackOfFit()
    f, p, df = full.compare_f_test(model)
    return LackOfFit(float(f), float(p), int(df), int(full.df_resid))
