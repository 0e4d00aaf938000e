"""The ranking model: Bradley-Terry with Davidson's ties and a first-seat term, and its bootstrap.

In a comparison of i (first seat) with j (second seat), with abilities theta, first-seat term delta, tie term tau, an
optional length term lambda, and eta = theta_i - theta_j + delta + lambda * log(words_i / words_j):

    P(i wins) : P(tie) : P(j wins)  =  exp(eta / 2) : exp(tau) : exp(-eta / 2)

This is Davidson's (1970) tie model with the order effect of Davidson and Beaver (1977), written in log-odds. How clear
a win was is not used. The log-likelihood is concave; Newton steps maximise it minus ridge / 2 times the sum of squared
parameters. The ridge keeps the fit finite if one configuration won all its comparisons; the
bounds that only the ridge limits are named by `separation`. Abilities have mean 0.

All computation is on counts (per ordered pair, if there is no length term), so thousands of bootstrap fits are a few
matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

from telco_nb.judge import separation

VERDICTS = ("A", "tie", "B")  # first seat wins, tie, second seat wins
RIDGE = 1e-2
CLUSTERS = ("term_id",)  # the bootstrap resamples whole terms
_CHUNK = 4_000_000  # numbers in the largest array of a batched fit


@dataclass(frozen=True)
class Outcomes:
    """The possible verdicts, from first seat to second: `half` is the factor of eta, `tied` that of tau."""

    half: np.ndarray
    tied: np.ndarray

    def shares(self, eta: np.ndarray, tie: np.ndarray | float) -> np.ndarray:
        """The probabilities (..., outcomes); `tie` broadcasts against `eta`."""
        logits = eta[..., None] * self.half + np.asarray(tie)[..., None] * self.tied
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        return logits / logits.sum(-1, keepdims=True)


def _outcomes(ties: bool) -> Outcomes:
    half = np.array([0.5, 0.0, -0.5] if ties else [0.5, -0.5])
    return Outcomes(half, (half == 0).astype(float))


def interval_levels(n_units: int) -> tuple[float, float]:
    """The quantiles of the draws that form a 95 % interval if `n_units` clusters are resampled.

    The percentiles of few clusters are too narrow, because the bootstrap divides by n instead of n - 1 and has thinner
    tails than t. The expanded percentile interval (Hesterberg 2015, The American Statistician 69:371) corrects both.
    """
    if n_units < 2:
        return (0.0, 1.0)
    tail = float(stats.norm.cdf(math.sqrt(n_units / (n_units - 1)) * stats.t.ppf(0.025, n_units - 1)))
    return (tail, 1 - tail)


class RankingError(ValueError):
    """The verdicts cannot be ranked; the message names the configurations and the reason."""


@dataclass(frozen=True)
class Fit:
    """One fit: `abilities` (n,) in log-odds with mean 0, and the other terms, None if not fitted."""

    configs: tuple[str, ...]
    abilities: np.ndarray
    position: float | None
    tie: float | None
    length: float | None
    log_likelihood: float

    @property
    def is_missing(self) -> bool:
        """True if the verdicts could not be ranked; all numbers are then NaN."""
        return bool(np.isnan(self.abilities).all())

    def probabilities(self, first: str, second: str) -> dict[str, float]:
        """The fitted probabilities of the three verdicts at equal length.

        Args:
            first: the configuration in the first seat.
            second: the configuration in the second seat.
        """
        theta = dict(zip(self.configs, self.abilities, strict=True))
        shares = self.shares(np.array(theta[first] - theta[second] + (self.position or 0.0)))
        return dict(zip(VERDICTS, map(float, shares), strict=True))

    def shares(self, eta: np.ndarray) -> np.ndarray:
        """The probabilities (..., 3) of first wins, tie and second wins; `eta` has the position term in it."""
        outcomes = _outcomes(self.tie is not None)
        found = outcomes.shares(eta, self.tie or 0.0)
        sides = [outcomes.half > 0, outcomes.half == 0, outcomes.half < 0]
        return np.stack([found[..., side].sum(-1) for side in sides], axis=-1)


@dataclass(frozen=True)
class Draws:
    """Bootstrap fits: `abilities` (draws, n), and position, tie and length terms (draws,), 0 if not fitted.

    `weights` (draws, units) holds how often each of the `units` was drawn, `limited` (draws, n, n) which configuration
    limits the lead of which other one (`separation.limited`), `compared` (n,) in how many units each was compared, and
    `cut` (n,) on how many units an unlimited lead rests (`separation.cut_units`).
    """

    abilities: np.ndarray
    position: np.ndarray
    tie: np.ndarray
    length: np.ndarray
    weights: np.ndarray
    units: pd.Index
    limited: np.ndarray
    compared: np.ndarray
    cut: np.ndarray


def fit_bradley_terry(
    verdicts: pd.DataFrame,
    configs: Sequence[str] | None = None,
    *,
    ties: bool = True,
    position: bool = True,
    length: bool = False,
    ridge: float = RIDGE,
) -> Fit:
    """Fits the model by ridge-penalised maximum likelihood.

    Args:
        verdicts: one row per verdict: config_first, config_second, verdict (A = the first seat wins, B or tie), and for
            `length` also words_first and words_second.
        configs: the configurations, in the order of the abilities; None for those of the verdicts, sorted.
        ties: fit a tie term; without it a tie counts as half a win for each side.
        position: fit a first-seat term.
        length: fit a length term.
        ridge: the strength of the penalty.

    Raises:
        RankingError: the comparisons do not connect all configurations.
    """
    configs = tuple(configs or sorted(set(verdicts["config_first"]) | set(verdicts["config_second"])))
    cells = _cells(verdicts, configs, length, ties)
    _refuse_disconnected(verdicts, configs, strongly=ridge == 0)
    counts = cells.counts(np.ones((1, len(verdicts))), np.arange(len(verdicts)))
    free = _free(len(configs), position, length, ties)
    parameters = _newton(counts, cells, np.zeros(len(free)), ridge, free)
    log_likelihood = float(_log_likelihood(parameters, counts, cells)[0])
    terms = [float(p) if used else None for p, used in zip(parameters[0, -3:], free[-3:], strict=True)]
    return Fit(configs, parameters[0, :-3], terms[0], terms[2], terms[1], log_likelihood)


def _free(n: int, position: bool, length: bool, tie: bool) -> np.ndarray:
    """Which parameters are fitted: abilities, position, length, tie."""
    return np.array([True] * n + [position, length, tie])


def missing_fit(configs: Sequence[str], *, length: bool = False) -> Fit:
    """The fit of verdicts that cannot be ranked: every number is NaN, so that all results are missing and none is 0."""
    abilities = np.full(len(configs), np.nan)
    return Fit(tuple(configs), abilities, np.nan, np.nan, np.nan if length else None, np.nan)


def unrankable_reason(verdicts: pd.DataFrame, configs: Sequence[str]) -> str | None:
    """The reason why the verdicts cannot rank the configurations (none, or not all connected), or None."""
    if verdicts.empty:
        return "there are no verdicts"
    try:
        _refuse_disconnected(verdicts, tuple(configs), strongly=False)
    except RankingError as error:
        return str(error)
    return None


def bootstrap_fit(verdicts: pd.DataFrame, fitted: Fit, *, draws: int, seed: int, by: Sequence[str] = CLUSTERS) -> Draws:
    """Refits the model on resamples of whole clusters. A resample is a set of weights, never a copy of rows.

    Verdicts on one scenario share its prompt and answers, and scenarios of one term share its card, so verdicts are not
    independent: whole terms are resampled. Resampling scenarios within each drawn term (`by` with both) counts their
    noise twice (Davison and Hinkley 1997, section 3.8); with three scenarios a term the intervals are then far too
    wide, see `bench/judging_coverage.py`.

    Args:
        verdicts: the verdicts of the fit.
        fitted: the fit.
        draws: the number of resamples.
        seed: the seed of the resampling.
        by: the columns of the nested clusters, outer first; empty to resample single verdicts.
    """
    if fitted.is_missing:
        missing, n = np.full(draws, np.nan), len(fitted.configs)
        abilities, units = np.full((draws, n), np.nan), pd.Index([], name=CLUSTERS[-1])
        terms = dict.fromkeys(("position", "tie", "length"), missing)
        none = {"limited": np.zeros((draws, n, n), bool), "compared": np.zeros(n, int), "cut": np.zeros(n, int)}
        return Draws(abilities, **terms, weights=np.zeros((draws, 0)), units=units, **none)
    units, unit_of_row, weights = cluster_weights(verdicts, by, draws, seed)
    terms = [fitted.position, fitted.length, fitted.tie]
    fits = [term is not None for term in terms]
    cells = _cells(verdicts, fitted.configs, fits[1], ties=fits[2])
    start = np.append(fitted.abilities, [term or 0.0 for term in terms])
    size = max(1, _CHUNK // (len(cells.outcomes.half) * len(cells.design)))
    fit = partial(_newton, cells=cells, start=start, ridge=RIDGE, free=_free(len(fitted.configs), *fits))
    drawn = np.concatenate([fit(cells.counts(weights[i : i + size], unit_of_row)) for i in range(0, draws, size)])
    position, length, tie = drawn[:, -3:].T
    limits = partial(separation.limited, verdicts, fitted.configs, unit_of_row=unit_of_row)
    everything = limits(weights=np.ones((1, len(units))))[0]
    counts = separation.cluster_counts(verdicts, fitted.configs, everything, unit_of_row)
    return Draws(drawn[:, :-3], position, tie, length, weights, units, limits(weights=weights), *counts)


def cluster_weights(
    rows: pd.DataFrame, by: Sequence[str], draws: int, seed: int
) -> tuple[pd.Index, np.ndarray, np.ndarray]:
    """The resamples of `bootstrap_fit` as weights, in one or two stages.

    Returns:
        The units (distinct values of the innermost column), the unit number of every row, and integer weights (draws,
        units). A term drawn k times, with its s scenarios resampled each time, is a multinomial of k * s draws.
    """
    rng = np.random.default_rng(seed)
    if not by:
        return rows.index, np.arange(len(rows)), rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
    outer, inner = by[0], by[-1]
    levels = list(dict.fromkeys([outer, inner]))
    nested = rows[levels].drop_duplicates().sort_values(levels).to_numpy()
    units = pd.Index(nested[:, -1], name=inner)
    if not units.is_unique:
        raise RankingError(f"a {inner} belongs to more than one {outer}")
    names, sizes = np.unique(nested[:, 0].astype(str), return_counts=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = np.concatenate([rng.multinomial(drawn[:, t] * s, np.full(s, 1 / s)) for t, s in enumerate(sizes)], axis=1)
    return units, units.get_indexer(rows[inner]), weights


@dataclass(frozen=True)
class _Cells:
    """The verdicts as counts per cell and outcome, which are all that the likelihood needs.

    A cell is an ordered pair of configurations. With a length term it is a single verdict, because lengths differ.
    `design` (cells, n + 2) is d eta / d (abilities, position, length), `squares` the outer product of each row with
    itself. Verdict r counts `share[r]` (1, or a half of a tie that is no outcome) for outcome `outcome[r]` of its cell.
    """

    design: np.ndarray
    squares: np.ndarray
    outcomes: Outcomes
    row: np.ndarray
    outcome: np.ndarray
    share: np.ndarray

    def counts(self, weights: np.ndarray, unit_of_row: np.ndarray) -> np.ndarray:
        """(draws, cells, outcomes) weighted counts from (draws, units) weights."""
        kinds = len(self.outcomes.half)
        places, shape = (unit_of_row[self.row], self.outcome), (weights.shape[1], kinds * len(self.design))
        per_unit = sparse.coo_array((self.share, places), shape=shape).tocsr()
        return (per_unit.T @ weights.T).T.reshape(len(weights), len(self.design), kinds)


def _cells(verdicts: pd.DataFrame, configs: tuple[str, ...], length: bool, ties: bool) -> _Cells:
    index, n = pd.Index(configs), len(configs)
    first, second = index.get_indexer(verdicts["config_first"]), index.get_indexer(verdicts["config_second"])
    verdict = pd.Index(VERDICTS).get_indexer(verdicts["verdict"])
    if len(verdicts) == 0 or min(first.min(), second.min(), verdict.min()) < 0:
        raise RankingError("verdicts must not be empty, name only the given configurations, and be A, B or tie")
    if length:
        words = verdicts[["words_first", "words_second"]].to_numpy(dtype=float) + 1  # an empty answer has a logarithm
        log_ratio, cell = np.log(words[:, 0] / words[:, 1]), np.arange(len(first))
    else:
        pairs, cell = np.unique(first * n + second, return_inverse=True)
        first, second, log_ratio = pairs // n, pairs % n, np.zeros(len(pairs))
    rows, design = np.arange(len(first)), np.zeros((len(first), n + 2))
    design[rows, first] += 1
    design[rows, second] -= 1
    design[:, n], design[:, n + 1] = 1, log_ratio
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(first), -1)
    return _Cells(design, squares, *_counted(cell, verdict, _outcomes(ties)))


def _counted(
    cell: np.ndarray, verdict: np.ndarray, outcomes: Outcomes
) -> tuple[Outcomes, np.ndarray, np.ndarray, np.ndarray]:
    """The last four fields of `_Cells`; a tie that is no outcome counts as half a win for each side."""
    half = (1 - verdict) * 0.5
    row, share = np.arange(len(half)), np.ones(len(half))
    if 0 not in outcomes.half:
        tied = np.flatnonzero(half == 0)
        row, share = np.append(row, tied), np.append(np.where(half == 0, 0.5, 1.0), np.full(len(tied), 0.5))
        half = np.append(np.where(half == 0, 0.5, half), np.full(len(tied), -0.5))
    kind = (half[:, None] == outcomes.half).argmax(1)
    return outcomes, row, len(outcomes.half) * cell[row] + kind, share


def _refuse_disconnected(verdicts: pd.DataFrame, configs: tuple[str, ...], strongly: bool) -> None:
    """Raises RankingError for groups without a common scale: never compared, or without a ridge never beaten."""
    index = pd.Index(configs)
    a, b = index.get_indexer(verdicts["config_first"]), index.get_indexer(verdicts["config_second"])
    won, lost = (verdicts["verdict"] != "B").to_numpy(), (verdicts["verdict"] != "A").to_numpy()
    source, target = np.append(a[won], b[lost]), np.append(b[won], a[lost])
    shape = (len(configs), len(configs))
    graph = sparse.coo_array((np.ones(len(source)), (source, target)), shape=shape).tocsr()
    n_groups, group = connected_components(graph, directed=True, connection="strong" if strongly else "weak")
    if n_groups > 1:
        groups = [", ".join(index[group == g]) for g in range(n_groups)]
        event = "win against each other in both directions" if strongly else "meet in any comparison"
        raise RankingError(f"these groups of configurations never {event}: {' | '.join(groups)}")


def _expected(parameters: np.ndarray, cells: _Cells) -> np.ndarray:
    """The probabilities (draws, cells, outcomes)."""
    return cells.outcomes.shares(parameters[:, :-1] @ cells.design.T, parameters[:, [-1]])


def _log_likelihood(parameters: np.ndarray, counts: np.ndarray, cells: _Cells) -> np.ndarray:
    """The log-likelihood (draws,) of counts (draws, cells, outcomes)."""
    logs = np.log(np.maximum(_expected(parameters, cells), 1e-300))
    return (counts * logs).sum((1, 2))


def _newton(counts: np.ndarray, cells: _Cells, start: np.ndarray, ridge: float, free: np.ndarray) -> np.ndarray:
    """Maximises the penalised log-likelihood for all draws at once.

    Parameters (draws, n + 3) are abilities, position, length and tie; those that are not `free` stay 0.
    """

    def objective(p: np.ndarray) -> np.ndarray:
        return _log_likelihood(p, counts, cells) - ridge / 2 * (p[:, free] ** 2).sum(1)

    parameters = np.tile(start * free, (len(counts), 1))
    value = objective(parameters)
    for _ in range(200):
        gradient, hessian = _derivatives(parameters, counts, cells, ridge, free)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(1)
        step *= np.minimum(1.0, 4.0 / np.maximum(size, 1e-300))[:, None]  # at most 4 far from the maximum
        trial = objective(parameters + step)
        for _ in range(30):  # halve steps that overshoot; near the maximum only rounding is left
            worse = trial < value - 1e-9 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
            trial = objective(parameters + step)
        parameters, value = parameters + step, trial
        if size.max() < 1e-10:
            return parameters
    raise RankingError(f"no maximum after 200 Newton steps in {(size >= 1e-10).sum()} of {len(counts)} fits")


def _derivatives(
    parameters: np.ndarray, counts: np.ndarray, cells: _Cells, ridge: float, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient (draws, p) and negative Hessian (draws, p, p) of the penalised log-likelihood.

    The sufficient statistics of a verdict are the factors of eta and tau in its outcome. The gradient is
    observed minus expected values, the negative Hessian their covariance.
    """
    draws, n, outcomes = len(parameters), len(free) - 3, cells.outcomes
    shares, total = _expected(parameters, cells), counts.sum(-1)
    missed = counts - total[..., None] * shares
    mean, tied = shares @ outcomes.half, shares @ outcomes.tied
    gradient = np.column_stack([(missed @ outcomes.half) @ cells.design, (missed @ outcomes.tied).sum(1)])
    gradient -= ridge * parameters
    hessian = np.zeros((draws, n + 3, n + 3))
    variance = total * (shares @ outcomes.half**2 - mean**2)
    hessian[:, :-1, :-1] = (variance @ cells.squares).reshape(draws, n + 2, n + 2)
    hessian[:, :-1, -1] = hessian[:, -1, :-1] = -(total * mean * tied) @ cells.design  # a tie's factor of eta is 0
    hessian[:, -1, -1] = (total * tied * (1 - tied)).sum(1)  # its factor of tau is 1, so its own square
    hessian += ridge * np.eye(n + 3)
    hessian[:, :n, :n] += 1.0  # fixes the mean of the abilities at 0, which the likelihood leaves open
    gradient[:, ~free], hessian[:, ~free, :], hessian[:, :, ~free] = 0.0, 0.0, 0.0
    hessian[:, ~free, ~free] = 1.0
    return gradient, hessian


def place_anchor(verdicts: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> tuple[float, np.ndarray]:
    """The score of an anchor on the scale of a finished fit, and its bootstrap (draws,); see `ranking.anchor_row`.

    All other parameters are held fixed, so an anchor cannot change the ranking. Each draw has its own parameters and
    weights; the score is NaN in a draw without any of the anchor's clusters.
    """
    index = pd.Index(fitted.configs)
    seated_first = (verdicts["config_first"] == anchor).to_numpy()
    opponent = index.get_indexer(verdicts["config_second"].where(seated_first, verdicts["config_first"]))
    if len(opponent) == 0 or opponent.min() < 0:
        raise RankingError(f"anchor {anchor!r} has no comparison with a ranked configuration")
    outcomes = _outcomes(fitted.tie is not None)
    won = (1 - pd.Index(VERDICTS).get_indexer(verdicts["verdict"])) * 0.5
    side = np.where(seated_first, 1.0, -1.0)
    # The first row is the fit, the others are the draws.
    others = np.vstack([fitted.abilities, draws.abilities])[:, opponent]
    pairs = ((fitted.position, draws.position), (fitted.tie, draws.tie))
    position, tie = (np.append(value or 0.0, drawn)[:, None] for value, drawn in pairs)
    weights = np.vstack([np.ones(len(verdicts)), draws.weights[:, draws.units.get_indexer(verdicts[draws.units.name])]])
    ability = np.zeros(len(weights))
    for _ in range(200):  # Newton steps as in `_newton`, for one parameter
        shares = outcomes.shares(side * (ability[:, None] - others) + position, tie)
        mean = shares @ outcomes.half
        gradient = (weights * (won - mean) * side).sum(1) - RIDGE * ability
        variance = shares @ outcomes.half**2 - mean**2
        step = np.clip(gradient / ((weights * variance).sum(1) + RIDGE), -1.0, 1.0)
        ability = ability + step
        if np.abs(step).max() < 1e-9:
            return float(ability[0]), np.where(weights[1:].sum(1) > 0, ability[1:], np.nan)
    raise RankingError(f"the score of anchor {anchor!r} did not converge")
