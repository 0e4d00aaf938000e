"""The cheap preview: lists of four answers instead of pairs, and a Plackett-Luce fit.

Who stands in a list with whom: sixteen configurations are the points of the affine plane of order 4. Its 20 lines of 4
points fall into 5 rounds; in a round everybody stands in one list, and over the rounds every two meet exactly once. 13
to 15 configurations leave points empty (a list with one name left is a bye). Other numbers have no such plane: rounds
of lists of nearly equal size, each the best of 200 random divisions, repeat as few meetings as that finds.

The model (Plackett 1975, Luce 1959): the best of a list is chosen with probability proportional to exp(ability), then
the best of the rest, and so on. A tied group counts as all its orders in equal parts, which for two is half a win
each. There is no seat term and no tie term, and the lists of a prompt share its answers: a preview, not the ranking.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from telco_nb.judge.ranking import RIDGE, Draws, Fit, RankingError

SIZE = 4
_CHUNK = 4_000_000  # numbers in the largest array of a batched fit

# The field of four elements 0, 1, w, w + 1 as bit pairs: addition is exclusive or, products by this table.
_TIMES = ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2))


def rounds(n: int, seed: int = 0) -> list[list[list[int]]]:
    """Rounds of lists (blocks of numbers below n, at most 4 each, at least 2); every round holds everybody once.

    13 to 16: the affine plane, in which every two meet once over the 5 rounds. Else: 5 rounds by search (seeded).
    """
    if n < 2:
        raise ValueError(f"a list needs at least two configurations, not {n}")
    if 13 <= n <= 16:
        return [[kept for block in lines if len(kept := [p for p in block if p < n]) > 1] for lines in affine_plane()]
    if n <= SIZE:
        return [[list(range(n))]]
    return _searched(n, np.random.default_rng(seed))


def affine_plane() -> list[list[list[int]]]:
    """The 5 classes of 4 parallel lines of the affine plane over the field of four; point (x, y) is 4 x + y."""
    slopes = [[[4 * x + (_TIMES[m][x] ^ b) for x in range(4)] for b in range(4)] for m in range(4)]
    return [[[4 * x + y for y in range(4)] for x in range(4)], *slopes]


def _searched(n: int, rng: np.random.Generator, tries: int = 200) -> list[list[list[int]]]:
    """Each round: of some random divisions into lists, the one that repeats fewest meetings."""
    met, found = np.zeros((n, n)), []
    for _ in range(5):
        divisions = [np.array_split(rng.permutation(n), -(-n // SIZE)) for _ in range(tries)]
        best = min(divisions, key=lambda blocks: sum((met[np.ix_(block, block)] ** 2).sum() for block in blocks))
        for block in best:
            met[np.ix_(block, block)] += 1
        found.append([[int(i) for i in block] for block in best])
    return found


def seat(block: Sequence[int], seated: np.ndarray, rng: np.random.Generator) -> list[int]:
    """The members of a list by seat, each where it has sat least; counts up `seated` (configurations, seats)."""
    costs = seated[np.ix_(block, range(len(block)))] + rng.uniform(0, 0.5, (len(block), len(block)))
    members, seats = linear_sum_assignment(costs)
    order = [block[m] for m in members[np.argsort(seats)]]
    seated[order, range(len(order))] += 1
    return order


# ---------------------------------------------------------------- the fit


class _Choices:
    """Lists as choices from sets, all that the likelihood needs: who was chosen from which set, by list."""

    def __init__(self, orders: Sequence[Sequence[Sequence[str]]], configs: Sequence[str]):
        index = {config: i for i, config in enumerate(configs)}
        sets: dict[tuple[int, ...], int] = {}
        entries = []  # (list, set, chosen, weight)
        for row, groups in enumerate(orders):
            for order, weight in _strict_orders([[index[c] for c in group] for group in groups]):
                for stage in range(len(order) - 1):
                    left = tuple(sorted(order[stage:]))
                    entries.append((row, sets.setdefault(left, len(sets)), order[stage], weight))
        rows, number, chosen, weight = (np.array(column) for column in zip(*entries, strict=True))
        self.n, self.n_sets, self.n_lists = len(configs), len(sets), len(orders)
        self.member = np.zeros((len(sets), self.n), bool)
        for left, place in sets.items():
            self.member[place, list(left)] = True
        width = self.n + len(sets)  # per list: wins of everybody, then how often each set was chosen from
        columns = np.concatenate([chosen, self.n + number])
        shape = (len(orders), width)
        self.per_list = coo_array((np.tile(weight, 2), (np.tile(rows, 2), columns)), shape=shape).tocsr()

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(draws, n) wins and (draws, sets) choices from (draws, lists) weights."""
        found = (self.per_list.T @ weights.T).T
        return found[:, : self.n], found[:, self.n :]


def _strict_orders(groups: list[list[int]]) -> list[tuple[list[int], float]]:
    """All orders without ties that agree with the groups, in equal parts."""
    parts = [list(itertools.permutations(group)) for group in groups]
    orders = [list(itertools.chain(*chosen)) for chosen in itertools.product(*parts)]
    return [(order, 1 / len(orders)) for order in orders]


def fit(orders: Sequence[Sequence[Sequence[str]]], configs: Sequence[str], *, ridge: float = RIDGE) -> Fit:
    """Plackett-Luce abilities (log-odds, mean 0) by maximum (ridge-penalised) likelihood.

    `orders` are lists of groups, best first; a group holds equally good configurations. Raises RankingError if nothing
    connects all configurations (without a ridge: in both directions).
    """
    configs = tuple(configs)
    if not orders:
        raise RankingError("there are no lists to rank by")
    _refuse_disconnected(orders, configs, strongly=ridge == 0)
    choices = _Choices(orders, configs)
    wins, chosen_from = choices.counts(np.ones((1, len(orders))))
    abilities = _newton(wins, chosen_from, choices.member, np.zeros(len(configs)), ridge)
    value = float(_log_likelihood(abilities, wins, chosen_from, choices.member)[0])
    return Fit(configs, abilities[0], None, None, None, value, len(orders))


def bootstrap(
    orders: Sequence[Sequence[Sequence[str]]],
    units: pd.Series,
    fitted: Fit,
    *,
    draws: int,
    seed: int,
    ridge: float = RIDGE,
) -> Draws:
    """Refit on `draws` resamples of whole clusters; `units` names the cluster (a term) of every list."""
    names, number = np.unique(units.to_numpy(str), return_inverse=True)
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    choices = _Choices(orders, fitted.configs)
    size = max(1, _CHUNK // (choices.n_sets * choices.n))
    found = []
    for i in range(0, draws, size):
        wins, chosen_from = choices.counts(weights[i : i + size, number].astype(float))
        found.append(_newton(wins, chosen_from, choices.member, fitted.abilities, ridge))
    nothing = np.zeros(draws)
    index = pd.Index(names, name=units.name)
    return Draws(fitted.configs, np.concatenate(found), nothing, nothing, nothing, weights, index)


def _refuse_disconnected(orders: Sequence[Sequence[Sequence[str]]], configs: tuple[str, ...], strongly: bool) -> None:
    index = {config: i for i, config in enumerate(configs)}
    edges = [
        (index[a], index[b])
        for groups in orders
        for i, group in enumerate(groups)
        for later in groups[i:]
        for a in group
        for b in later
        if a != b
    ]
    source, target = zip(*edges, strict=True) if edges else ((), ())
    graph = coo_array((np.ones(len(edges)), (source, target)), shape=(len(configs),) * 2).tocsr()
    n_groups, group = connected_components(graph, directed=True, connection="strong" if strongly else "weak")
    if n_groups > 1:
        named = [", ".join(c for c, g in zip(configs, group, strict=True) if g == k) for k in range(n_groups)]
        raise RankingError(f"no list connects these groups of configurations: {' | '.join(named)}")


def _chances(abilities: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(draws, sets, n) probability of everybody in every set, and (draws, sets) log of the sum of strengths."""
    masked = np.where(member, abilities[:, None, :], -np.inf)
    top = masked.max(-1, keepdims=True)
    strength = np.exp(masked - top)
    total = strength.sum(-1, keepdims=True)
    return strength / total, (top + np.log(total))[..., 0]


def _log_likelihood(abilities: np.ndarray, wins: np.ndarray, chosen_from: np.ndarray, member: np.ndarray) -> np.ndarray:
    return (wins * abilities).sum(1) - (chosen_from * _chances(abilities, member)[1]).sum(1)


def _newton(
    wins: np.ndarray, chosen_from: np.ndarray, member: np.ndarray, start: np.ndarray, ridge: float
) -> np.ndarray:
    """Maximise the penalised log-likelihood for every draw at once: (draws, n) abilities with mean 0."""
    n = len(start)

    def objective(a: np.ndarray) -> np.ndarray:
        return _log_likelihood(a, wins, chosen_from, member) - ridge / 2 * (a**2).sum(1)

    abilities = np.tile(start, (len(wins), 1))
    value = objective(abilities)
    for _ in range(200):
        chance, _ = _chances(abilities, member)
        expected = chosen_from[..., None] * chance
        gradient = wins - expected.sum(1) - ridge * abilities
        hessian = -np.matmul(chance.transpose(0, 2, 1), expected)
        hessian[:, range(n), range(n)] += expected.sum(1) + ridge
        hessian += 1.0  # fixes the mean, which the likelihood leaves open, at 0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(1)
        step *= np.minimum(1.0, 4.0 / np.maximum(size, 1e-300))[:, None]
        trial = objective(abilities + step)
        for _ in range(30):  # halve where a step overshoots
            worse = trial < value - 1e-9 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
            trial = objective(abilities + step)
        abilities, value = abilities + step, trial
        if size.max() < 1e-10:
            return abilities
    raise RankingError("no maximum of the Plackett-Luce likelihood after 200 Newton steps")
