"""The ranking model: Bradley-Terry with Davidson's ties and a first-seat term, and its bootstrap.

In a comparison of i (first seat) with j (second seat), with abilities theta, first-seat term delta, tie term tau, an
optional length term lambda, and eta = theta_i - theta_j + delta + lambda * log(words_i / words_j):

    P(i wins) : P(tie) : P(j wins)  =  exp(eta / 2) : exp(tau) : exp(-eta / 2)

This is Davidson's (1970) tie model with the order effect of Davidson and Beaver (1977), written in log-odds. Its
log-likelihood is concave; Newton steps maximise it minus ridge / 2 times the sum of squared parameters. The ridge keeps
the fit finite if one configuration won all its comparisons. Abilities have mean 0.

All computation is on counts (per ordered pair, if there is no length term), so thousands of bootstrap fits are a few
matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components

VERDICTS = ("A", "tie", "B")  # first seat wins, tie, second seat wins
RIDGE = 1e-2
CLUSTERS = ("term_id",)  # the bootstrap resamples whole terms
_CHUNK = 4_000_000  # numbers in the largest array of a batched fit


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
    """One fit: `abilities` (n,) in log-odds with mean 0, and the position, tie and length terms, None if not fitted."""

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
        eta = np.array(theta[first] - theta[second] + (self.position or 0.0))
        shares = _shares(eta, np.array(-np.inf if self.tie is None else self.tie))
        return dict(zip(VERDICTS, map(float, shares), strict=True))


@dataclass(frozen=True)
class Draws:
    """Bootstrap fits: `abilities` (draws, n), and position, tie and length terms (draws,), 0 if not fitted.

    `weights` (draws, units) holds how often each of the `units` was drawn.
    """

    abilities: np.ndarray
    position: np.ndarray
    tie: np.ndarray
    length: np.ndarray
    weights: np.ndarray
    units: pd.Index


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
    cells = _cells(verdicts, configs, length)
    _refuse_disconnected(verdicts, configs, strongly=ridge == 0)
    counts = cells.counts(np.ones((1, len(verdicts))), np.arange(len(verdicts)))
    free = np.array([True] * len(configs) + [position, length, ties])
    parameters = _newton(counts, cells, np.zeros(len(free)), ridge, free)
    log_likelihood = float(_log_likelihood(parameters, counts, cells, ties)[0])
    terms = [float(p) if used else None for p, used in zip(parameters[0, -3:], free[-3:], strict=True)]
    return Fit(configs, parameters[0, :-3], terms[0], terms[2], terms[1], log_likelihood)


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
        missing = np.full(draws, np.nan)
        abilities, units = np.full((draws, len(fitted.configs)), np.nan), pd.Index([], name=CLUSTERS[-1])
        return Draws(abilities, missing, missing, missing, np.zeros((draws, 0)), units)
    units, unit_of_row, weights = cluster_weights(verdicts, by, draws, seed)
    terms = [fitted.position, fitted.length, fitted.tie]
    cells = _cells(verdicts, fitted.configs, fitted.length is not None)
    free = np.array([True] * len(fitted.configs) + [term is not None for term in terms])
    start = np.append(fitted.abilities, [term or 0.0 for term in terms])
    size = max(1, _CHUNK // (3 * len(cells.design)))
    chunks = [weights[i : i + size] for i in range(0, draws, size)]
    drawn = np.concatenate([_newton(cells.counts(w, unit_of_row), cells, start, RIDGE, free) for w in chunks])
    position, length, tie = drawn[:, -3:].T
    return Draws(drawn[:, :-3], position, tie, length, weights, units)


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
    itself, and `outcome` the number 3 * cell + outcome of every verdict.
    """

    design: np.ndarray
    squares: np.ndarray
    outcome: np.ndarray

    def counts(self, weights: np.ndarray, unit_of_row: np.ndarray) -> np.ndarray:
        """(draws, cells, 3) weighted counts from (draws, units) weights."""
        places, shape = (unit_of_row, self.outcome), (weights.shape[1], 3 * len(self.design))
        per_unit = sparse.coo_array((np.ones(len(self.outcome)), places), shape=shape).tocsr()
        return (per_unit.T @ weights.T).T.reshape(len(weights), len(self.design), 3)


def _cells(verdicts: pd.DataFrame, configs: tuple[str, ...], length: bool) -> _Cells:
    index, n = pd.Index(configs), len(configs)
    first, second = index.get_indexer(verdicts["config_first"]), index.get_indexer(verdicts["config_second"])
    outcome = pd.Index(VERDICTS).get_indexer(verdicts["verdict"])
    if len(verdicts) == 0 or min(first.min(), second.min(), outcome.min()) < 0:
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
    return _Cells(design, squares, 3 * cell + outcome)


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


def _shares(eta: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The probabilities of first wins, tie and second wins; `tau` broadcasts against `eta`."""
    top = np.maximum(np.abs(eta) / 2, tau)
    first, tie, second = np.exp(eta / 2 - top), np.exp(tau - top), np.exp(-eta / 2 - top)
    total = first + tie + second
    return first / total, tie / total, second / total


def _eta_tau(parameters: np.ndarray, cells: _Cells, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    tau = parameters[:, [-1]] if ties else np.full((len(parameters), 1), -np.inf)
    return parameters[:, :-1] @ cells.design.T, tau


def _log_likelihood(parameters: np.ndarray, counts: np.ndarray, cells: _Cells, ties: bool) -> np.ndarray:
    """The log-likelihood (draws,) of counts (draws, cells, 3)."""
    eta, tau = _eta_tau(parameters, cells, ties)
    top = np.maximum(np.abs(eta) / 2, tau)
    log_total = top + np.log(np.exp(eta / 2 - top) + np.exp(tau - top) + np.exp(-eta / 2 - top))
    score = (counts[..., 0] - counts[..., 2]) * eta / 2 - counts.sum(-1) * log_total
    return score.sum(1) + (counts[..., 1].sum(1) * tau[:, 0] if ties else 0.0)


def _newton(counts: np.ndarray, cells: _Cells, start: np.ndarray, ridge: float, free: np.ndarray) -> np.ndarray:
    """Maximises the penalised log-likelihood for all draws at once.

    Parameters (draws, n + 3) are abilities, position, length and tie; those that are not `free` stay 0.
    """
    ties = bool(free[-1])

    def objective(p: np.ndarray) -> np.ndarray:
        return _log_likelihood(p, counts, cells, ties) - ridge / 2 * (p[:, free] ** 2).sum(1)

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

    The sufficient statistics of one verdict are s = +1/2, 0, -1/2 (for eta) and t = 1 if tied (for tau). The gradient
    is observed minus expected values, the negative Hessian their covariance.
    """
    draws, n = len(parameters), len(free) - 3
    eta, tau = _eta_tau(parameters, cells, bool(free[-1]))
    first, tie, second = _shares(eta, tau)
    total, mean = counts.sum(-1), (first - second) / 2
    gradient = np.empty((draws, n + 3))
    gradient[:, :-1] = ((counts[..., 0] - counts[..., 2]) / 2 - total * mean) @ cells.design
    gradient[:, -1] = (counts[..., 1] - total * tie).sum(1)
    gradient -= ridge * parameters
    hessian = np.zeros((draws, n + 3, n + 3))
    variance = total * ((first + second) / 4 - mean**2)
    hessian[:, :-1, :-1] = (variance @ cells.squares).reshape(draws, n + 2, n + 2)
    hessian[:, :-1, -1] = hessian[:, -1, :-1] = (-total * mean * tie) @ cells.design
    hessian[:, -1, -1] = (total * tie * (1 - tie)).sum(1)
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
    half_wins = np.array([0.5, 0.0, -0.5])[pd.Index(VERDICTS).get_indexer(verdicts["verdict"])]
    side = np.where(seated_first, 1.0, -1.0)
    # The first row is the fit, the others are the draws.
    others = np.vstack([fitted.abilities, draws.abilities])[:, opponent]
    position = np.append(fitted.position or 0.0, draws.position)[:, None]
    tau = np.append(fitted.tie, draws.tie)[:, None] if fitted.tie is not None else np.full_like(position, -np.inf)
    weights = np.vstack([np.ones(len(verdicts)), draws.weights[:, draws.units.get_indexer(verdicts[draws.units.name])]])
    ability = np.zeros(len(weights))
    for _ in range(200):  # Newton steps as in `_newton`, for one parameter
        first, _, second = _shares(side * (ability[:, None] - others) + position, tau)
        mean = (first - second) / 2
        gradient = (weights * (half_wins - mean) * side).sum(1) - RIDGE * ability
        step = np.clip(gradient / ((weights * ((first + second) / 4 - mean**2)).sum(1) + RIDGE), -1.0, 1.0)
        ability = ability + step
        if np.abs(step).max() < 1e-9:
            return float(ability[0]), np.where(weights[1:].sum(1) > 0, ability[1:], np.nan)
    raise RankingError(f"the score of anchor {anchor!r} did not converge")
