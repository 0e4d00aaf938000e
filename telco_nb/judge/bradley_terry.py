"""From verdicts to a ranking: Bradley-Terry with Davidson's ties and a first-seat term, and how sure it is.

In a comparison of i (first seat) with j (second seat), with abilities theta, first-seat term delta, tie term tau,
(where asked for) length term lambda, and eta = theta_i - theta_j + delta + lambda * log(words_i / words_j):

    P(i wins) : P(tie) : P(j wins)  =  exp(eta / 2) : exp(tau) : exp(-eta / 2)

This is Davidson's (1970) tie model with the order effect of Davidson and Beaver (1977), written in log-odds. Its
log-likelihood is concave; `fit` maximises it minus ridge / 2 times the sum of squared parameters, by Newton steps. The
ridge keeps the fit finite where one configuration won all its comparisons. Abilities have mean 0.

Everything works on counts (per ordered pair, where there is no length term), so that thousands of bootstrap fits are a
few matrix products."""

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
CLUSTERS = ("term_id",)  # what the intervals resample, whole
_CHUNK = 4_000_000  # numbers in the largest array of a batched fit


def interval_levels(n_units: int) -> tuple[float, float]:
    """Quantiles of the draws that make a 95 % interval when `n_units` clusters are resampled.

    Percentiles of few clusters are too narrow: the bootstrap divides by n instead of n - 1 and has thinner tails than
    t. The expanded percentile interval (Hesterberg 2015, The American Statistician 69:371) makes up for both.
    """
    if n_units < 2:
        return (0.0, 1.0)
    tail = float(stats.norm.cdf(math.sqrt(n_units / (n_units - 1)) * stats.t.ppf(0.025, n_units - 1)))
    return (tail, 1 - tail)


class RankingError(ValueError):
    """The verdicts cannot be ranked; the message says which configurations and why."""


@dataclass(frozen=True)
class Fit:
    """One fit: `abilities` (n,) in log-odds with mean 0, first-seat term and tie term (None where left out)."""

    configs: tuple[str, ...]
    abilities: np.ndarray
    position: float | None
    tie: float | None
    length: float | None
    log_likelihood: float
    n_verdicts: int
    covariance: np.ndarray | None = None  # (n + 3, n + 3): abilities, position, length, tie; 0 where left out

    @property
    def is_missing(self) -> bool:
        """Whether nothing could be fitted; all numbers are then NaN."""
        return bool(np.isnan(self.abilities).all())

    def contrast(self, config: str, reference: str) -> tuple[float, float]:
        """Ability of `config` minus that of `reference`, and its standard error from the observed information.

        The error takes single verdicts as independent; with verdicts that share prompts it is too small (`bootstrap`).
        """
        a, b = self.configs.index(config), self.configs.index(reference)
        if self.covariance is None:
            raise RankingError("this fit has no covariance")
        variance = self.covariance[a, a] + self.covariance[b, b] - 2 * self.covariance[a, b]
        return float(self.abilities[a] - self.abilities[b]), float(np.sqrt(variance))

    def probabilities(self, first: str, second: str) -> dict[str, float]:
        """Fitted probabilities of the three verdicts when `first` sits in the first seat, at equal length."""
        theta = dict(zip(self.configs, self.abilities, strict=True))
        eta = np.array([theta[first] - theta[second] + (self.position or 0.0)])
        share = _shares(eta, np.array(-np.inf if self.tie is None else self.tie))
        return dict(zip(VERDICTS, (float(s[0]) for s in share), strict=True))


@dataclass(frozen=True)
class Draws:
    """Bootstrap fits: `abilities` (draws, n); position, tie and length terms (draws,), 0 where left out of the fit;
    and the weights (draws, units) used."""

    configs: tuple[str, ...]
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
    """Maximum (ridge-penalised) likelihood abilities.

    `verdicts` has columns config_first, config_second, verdict (A = first seat wins, B, tie), for `length` also
    words_first and words_second. With `ties=False` a tie counts as half a win for each side. Raises RankingError if
    the comparisons do not connect all configurations.
    """
    configs = tuple(configs or sorted(set(verdicts["config_first"]) | set(verdicts["config_second"])))
    cells = _cells(verdicts, configs, length)
    _refuse_disconnected(verdicts, configs, strongly=ridge == 0)
    counts = cells.counts(np.ones((1, len(verdicts))), np.arange(len(verdicts)))
    free = _free(len(configs), position, length, ties)
    parameters = _newton(counts, cells, np.zeros(len(free)), ridge, free)[0]
    value = float(_log_likelihood(parameters[None], counts, cells, ties)[0])
    covariance = _covariance(_derivatives(parameters[None], counts, cells, ridge, free)[1][0], len(configs), free)
    extra = [float(p) if used else None for p, used in zip(parameters[-3:], free[-3:], strict=True)]
    return Fit(configs, parameters[:-3], extra[0], extra[2], extra[1], value, len(verdicts), covariance)


def missing_fit(configs: Sequence[str], *, length: bool = False) -> Fit:
    """The fit of verdicts that cannot be ranked: every number is NaN, so that nothing is made of nothing."""
    nothing = np.full(len(configs), np.nan)
    return Fit(tuple(configs), nothing, np.nan, np.nan, np.nan if length else None, np.nan, 0)


def unrankable_reason(verdicts: pd.DataFrame, configs: Sequence[str]) -> str | None:
    """Why these verdicts cannot rank the configurations, or None: there are none, or they do not connect all."""
    if verdicts.empty:
        return "there are no verdicts"
    try:
        _refuse_disconnected(verdicts, tuple(configs), strongly=False)
    except RankingError as error:
        return str(error)
    return None


def _covariance(information: np.ndarray, n: int, free: np.ndarray) -> np.ndarray:
    """Inverse of the information on the plane of abilities with mean 0.

    `information` holds a one more in every cell of abilities, for the mean that the likelihood leaves open; its
    inverse has 1 / n^2 there that belongs to that mean. Parameters that are not fitted get 0.
    """
    inverse = np.linalg.inv(information)
    inverse[:n, :n] -= 1 / n**2
    inverse[~free], inverse[:, ~free] = 0.0, 0.0
    return inverse


def bootstrap_fit(
    verdicts: pd.DataFrame, fitted: Fit, *, draws: int, seed: int, by: Sequence[str] = CLUSTERS, ridge: float = RIDGE
) -> Draws:
    """Refit on `draws` resamples. `by` lists the nested clusters, outer first; empty = resample single verdicts.

    Verdicts on one scenario share its prompt and answers, and scenarios of one term its card, so they are not
    independent: whole terms are resampled. Drawing scenarios anew within each drawn term (`by` with both) counts the
    noise of the scenarios twice (Davison and Hinkley 1997, section 3.8); with three scenarios a term that is far too
    wide, see `bench/judging_coverage.py`. A resample is a set of weights, never a copy of rows.
    """
    if fitted.is_missing:
        return _missing_draws(fitted, draws)
    if by:
        units, unit_of_row, weights = cluster_weights(verdicts, by, draws, seed)
    else:
        units, unit_of_row = verdicts.index, np.arange(len(verdicts))
        weights = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), draws)
    terms = [fitted.position, fitted.length, fitted.tie]
    cells = _cells(verdicts, fitted.configs, fitted.length is not None)
    free = _free(len(fitted.configs), *(term is not None for term in terms))
    start = np.append(fitted.abilities, [term or 0.0 for term in terms])
    size = max(1, _CHUNK // (3 * cells.n_cells))
    chunks = [weights[i : i + size] for i in range(0, draws, size)]
    found = np.concatenate([_newton(cells.counts(w, unit_of_row), cells, start, ridge, free) for w in chunks])
    abilities, (position, length, tie) = found[:, :-3], found[:, -3:].T
    return Draws(fitted.configs, abilities, position, tie, length, weights, pd.Index(units))


def _missing_draws(fitted: Fit, draws: int) -> Draws:
    nothing = np.full(draws, np.nan)
    none = pd.Index([], name=CLUSTERS[-1])
    abilities = np.full((draws, len(fitted.configs)), np.nan)
    return Draws(fitted.configs, abilities, nothing, nothing, nothing, np.zeros((draws, 0)), none)


def cluster_weights(
    rows: pd.DataFrame, by: Sequence[str], draws: int, seed: int
) -> tuple[pd.Index, np.ndarray, np.ndarray]:
    """Two-stage (or one-stage) cluster bootstrap as weights.

    Returns the units (distinct values of the innermost column), the unit number of every row, and integer weights
    (draws, units). Drawing a term k times and its s scenarios anew each time is a multinomial of k * s draws.
    """
    outer, inner = by[0], by[-1]
    levels = list(dict.fromkeys([outer, inner]))
    nested = rows[levels].drop_duplicates().sort_values(levels).to_numpy()
    units = pd.Index(nested[:, -1], name=inner)
    if not units.is_unique:
        raise RankingError(f"a {inner} belongs to more than one {outer}")
    rng = np.random.default_rng(seed)
    names, sizes = np.unique(nested[:, 0].astype(str), return_counts=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = np.concatenate([rng.multinomial(drawn[:, t] * s, np.full(s, 1 / s)) for t, s in enumerate(sizes)], axis=1)
    return units, units.get_indexer(rows[inner]), weights


def _free(n: int, position: bool, length: bool, ties: bool) -> np.ndarray:
    """Which of the parameters (n abilities, position, length, tie) are fitted; the others stay 0."""
    return np.array([True] * n + [position, length, ties])


class _Cells:
    """The verdicts as counts per (cell, outcome), all that the likelihood needs. A cell is an ordered pair; with a
    length term it is a single verdict, because lengths differ from prompt to prompt."""

    def __init__(self, first: np.ndarray, second: np.ndarray, log_ratio: np.ndarray, cell: np.ndarray, n: int):
        self.first, self.second, self.log_ratio, self.cell, self.n = first, second, log_ratio, cell, n
        self.n_cells = len(first)
        ones = np.ones(self.n_cells)
        # d eta / d (abilities, position, length): four entries a row, and the outer product of each row with itself.
        columns = np.stack([first, second, np.full_like(first, n), np.full_like(first, n + 1)], axis=1)
        values = np.stack([ones, -ones, ones, log_ratio], axis=1)
        self.design = self._sparse(values, columns, n + 2)
        squares = values[:, :, None] * values[:, None, :]
        places = columns[:, :, None] * (n + 2) + columns[:, None, :]
        self.squares = self._sparse(squares, places, (n + 2) ** 2)

    def _sparse(self, values: np.ndarray, columns: np.ndarray, width: int) -> sparse.csr_array:
        flat = values.reshape(self.n_cells, -1)
        rows = np.repeat(np.arange(self.n_cells), flat.shape[1])
        return sparse.csr_array((flat.ravel(), (rows, columns.ravel())), shape=(self.n_cells, width))

    def counts(self, weights: np.ndarray, unit_of_row: np.ndarray) -> np.ndarray:
        """(draws, cells, 3) weighted counts from (draws, units) weights."""
        shape = (weights.shape[1], 3 * self.n_cells)
        per_unit = sparse.coo_array((np.ones(len(self.cell)), (unit_of_row, self.cell)), shape=shape).tocsr()
        return (per_unit.T @ weights.T).T.reshape(len(weights), self.n_cells, 3)


def _cells(verdicts: pd.DataFrame, configs: tuple[str, ...], length: bool) -> _Cells:
    index, n = pd.Index(configs), len(configs)
    first, second = index.get_indexer(verdicts["config_first"]), index.get_indexer(verdicts["config_second"])
    outcome = pd.Index(VERDICTS).get_indexer(verdicts["verdict"])
    if len(verdicts) == 0 or min(first.min(), second.min(), outcome.min()) < 0:
        raise RankingError("verdicts must not be empty, name only the given configurations, and be A, B or tie")
    if length:
        words = verdicts[["words_first", "words_second"]].to_numpy(dtype=float) + 1  # an empty answer has a logarithm
        return _Cells(first, second, np.log(words[:, 0] / words[:, 1]), np.arange(len(first)) * 3 + outcome, n)
    code, pair = np.unique(first * n + second, return_inverse=True)
    return _Cells(code // n, code % n, np.zeros(len(code)), pair * 3 + outcome, n)


def _refuse_disconnected(verdicts: pd.DataFrame, configs: tuple[str, ...], strongly: bool) -> None:
    """Abilities of two groups that never met have no common scale; without a ridge, nor have never-beaten groups."""
    index = pd.Index(configs)
    a, b = index.get_indexer(verdicts["config_first"]), index.get_indexer(verdicts["config_second"])
    won, lost = (verdicts["verdict"] != "B").to_numpy(), (verdicts["verdict"] != "A").to_numpy()
    source, target = np.append(a[won], b[lost]), np.append(b[won], a[lost])
    shape = (len(configs), len(configs))
    graph = sparse.coo_array((np.ones(len(source)), (source, target)), shape=shape).tocsr()
    n_groups, group = connected_components(graph, directed=True, connection="strong" if strongly else "weak")
    if n_groups > 1:
        groups = [", ".join(index[group == g]) for g in range(n_groups)]
        why = "win against each other in both directions" if strongly else "meet in any comparison"
        raise RankingError(f"these groups of configurations never {why}: {' | '.join(groups)}")


def _shares(eta: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of first wins, tie, second wins; `tau` broadcasts against `eta`."""
    top = np.maximum(np.abs(eta) / 2, tau)
    first, tie, second = np.exp(eta / 2 - top), np.exp(tau - top), np.exp(-eta / 2 - top)
    total = first + tie + second
    return first / total, tie / total, second / total


def _eta_tau(parameters: np.ndarray, cells: _Cells, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    eta = parameters[:, cells.first] - parameters[:, cells.second] + parameters[:, [-3]]
    eta += parameters[:, [-2]] * cells.log_ratio
    tau = parameters[:, [-1]] if ties else np.full((len(parameters), 1), -np.inf)
    return eta, tau


def _log_likelihood(parameters: np.ndarray, counts: np.ndarray, cells: _Cells, ties: bool) -> np.ndarray:
    """(draws,) log-likelihood of (draws, cells, 3) counts."""
    eta, tau = _eta_tau(parameters, cells, ties)
    top = np.maximum(np.abs(eta) / 2, tau)
    log_total = top + np.log(np.exp(eta / 2 - top) + np.exp(tau - top) + np.exp(-eta / 2 - top))
    score = (counts[..., 0] - counts[..., 2]) * eta / 2 - counts.sum(-1) * log_total
    return score.sum(1) + (counts[..., 1].sum(1) * tau[:, 0] if ties else 0.0)


def _newton(
    counts: np.ndarray,
    cells: _Cells,
    start: np.ndarray,
    ridge: float,
    free: np.ndarray,
    tolerance: float = 1e-10,
    limit: int = 200,
) -> np.ndarray:
    """Maximise the penalised log-likelihood for every draw at once: (draws, n + 3) parameters in the order of _free."""
    ties = bool(free[-1])

    def objective(p: np.ndarray) -> np.ndarray:
        return _log_likelihood(p, counts, cells, ties) - ridge / 2 * (p[:, free] ** 2).sum(1)

    parameters = np.tile(start * free, (len(counts), 1))
    value = objective(parameters)
    for _ in range(limit):
        gradient, hessian = _derivatives(parameters, counts, cells, ridge, free)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(1)
        step *= np.minimum(1.0, 4.0 / np.maximum(size, 1e-300))[:, None]  # far from the maximum, not further than 4
        trial = objective(parameters + step)
        for _ in range(30):  # halve where a step overshoots; near the maximum only rounding is left
            worse = trial < value - 1e-9 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
            trial = objective(parameters + step)
        parameters, value = parameters + step, trial
        if size.max() < tolerance:
            return parameters
    raise RankingError(f"no maximum after {limit} Newton steps in {(size >= tolerance).sum()} of {len(counts)} fits")


def _derivatives(
    parameters: np.ndarray, counts: np.ndarray, cells: _Cells, ridge: float, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (draws, p) and negative Hessian (draws, p, p) of the penalised log-likelihood.

    The sufficient statistics of one verdict are s = +1/2, 0, -1/2 (for eta) and t = 1 if tied (for tau); the
    gradient is observed minus expected, the negative Hessian their covariance.
    """
    draws, n = len(parameters), cells.n
    ties = bool(free[-1])
    eta, tau = _eta_tau(parameters, cells, ties)
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
    hessian[:, :n, :n] += 1.0  # fixes the mean of the abilities, which the likelihood leaves open, at 0
    gradient[:, ~free], hessian[:, ~free, :], hessian[:, :, ~free] = 0.0, 0.0, 0.0
    hessian[:, ~free, ~free] = 1.0
    return gradient, hessian


def place_anchor(verdicts: pd.DataFrame, anchor: str, fitted: Fit, draws: Draws) -> tuple[float, np.ndarray]:
    """Score of an anchor on the scale of a finished fit, and its bootstrap draws.

    `verdicts` are the anchor's comparisons with configurations of the fit. Abilities, first-seat and tie term are held
    fixed (each draw at its own values), so an anchor cannot move the ranking. The draws use the weights of the fit's
    bootstrap; a draw that contains none of the anchor's scenarios is NaN.
    """
    index = pd.Index(fitted.configs)
    seated_first = (verdicts["config_first"] == anchor).to_numpy()
    opponent = index.get_indexer(verdicts["config_second"].where(seated_first, verdicts["config_first"]))
    if len(opponent) == 0 or opponent.min() < 0:
        raise RankingError(f"anchor {anchor!r} has no comparison with a ranked configuration")
    outcome = pd.Index(VERDICTS).get_indexer(verdicts["verdict"])
    unit = draws.units.get_indexer(verdicts[draws.units.name])
    ones = np.ones((1, len(verdicts)))
    point = [fitted.abilities[None], np.array([fitted.position or 0.0]), np.array([fitted.tie or 0.0])]
    ties = fitted.tie is not None
    side = np.where(seated_first, 1.0, -1.0)
    score = _anchor_newton(side, opponent, outcome, ones, point, ties)[0]
    spread = [draws.abilities, draws.position, draws.tie]
    weights = draws.weights[:, unit].astype(float)
    drawn = _anchor_newton(side, opponent, outcome, weights, spread, ties)
    return float(score), np.where(weights.sum(1) > 0, drawn, np.nan)


def _anchor_newton(
    side: np.ndarray, opponent: np.ndarray, outcome: np.ndarray, weights: np.ndarray, held: list[np.ndarray], ties: bool
) -> np.ndarray:
    """One-parameter version of `_newton`: (draws,) abilities of the anchor, everything in `held` fixed."""
    abilities, position, tie = held
    tau = tie[:, None] if ties else np.full((len(tie), 1), -np.inf)
    observed = weights * np.array([0.5, 0.0, -0.5])[outcome]
    ability = np.zeros(len(abilities))
    for _ in range(200):
        eta = side * (ability[:, None] - abilities[:, opponent]) + position[:, None]
        first, _, second = _shares(eta, tau)
        mean = (first - second) / 2
        gradient = ((observed - weights * mean) * side).sum(1) - RIDGE * ability
        curvature = (weights * ((first + second) / 4 - mean**2)).sum(1) + RIDGE
        step = np.clip(gradient / curvature, -1.0, 1.0)
        ability = ability + step
        if np.abs(step).max() < 1e-9:
            return ability
    raise RankingError("an anchor's score did not settle")
