"""Does validation loss pick the configuration that the judges prefer, and what does each choice cost in energy?

Pure functions over the tables of the other steps. Every statement becomes a finding with an interval, the number of
observations behind it, a verdict, and what blocks it. Missing stays missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

FACTORS = ("target_modules", "rank", "epochs", "learning_rate")
TARGET_ORDER = ("qv", "attention", "mlp", "all")  # by number of adapted layers
PARAMETER_COLUMNS = ("target_modules", "rank", "lora_alpha", "epochs", "learning_rate", "seed")
TRAINING_COLUMNS = (
    "train_energy_wh", "train_energy_low_wh", "train_energy_high_wh", "energy_kind", "energy_source",
)  # fmt: skip
PROXY_KINDS = ("checklist", "reference")
MIN_COVERAGE = 0.98
MISSING_P = 0.01
ENERGY_RESOLUTION = 0.03  # with one run per configuration, smaller relative differences are not distinguishable

# Published in arXiv:2606.05176: facts to set beside ours, not targets.
PAPER = {
    "n_configurations": 16,
    "best_loss": 0.5024,
    "best_loss_ranks": (6, 7),
    "worst_loss": 0.6807,
    "worst_loss_ranks": (1, 1),
    "energy_wh": (284.0, 1371.0),
}


class Interval(NamedTuple):
    """A value and its 95 % interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One statement of the study. `verdict`: supported, not distinguishable, described, not estimable, blocked."""

    id: str
    statement: str
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: str = "described"
    blocked_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Judge:
    """What 05 says about one judge. `ranking` is indexed by configuration, `draws` is (draws, configurations)."""

    name: str
    kind: str | None
    gate_passed: bool | None
    failed_controls: tuple[str, ...]
    coverage: float | None
    missing_p: float | None
    ranking: pd.DataFrame
    draws: pd.DataFrame

    @property
    def scores(self) -> pd.Series:
        """Bradley-Terry ability (log-odds) of the ranked configurations, anchors left out."""
        return self.ranking.loc[~self.ranking["is_anchor"].astype(bool), "score"].dropna()

    @property
    def is_proxy(self) -> bool:
        return (self.kind or self.name) in PROXY_KINDS

    @property
    def blocks(self) -> list[str]:
        """Why this judge's ranking may not carry a headline; empty if it may."""
        found = []
        if not self.gate_passed:
            what = ", ".join(self.failed_controls) or "no result"
            found.append(f"judge {self.name} failed its validity gate ({what})")
        if self.coverage is None or self.coverage < MIN_COVERAGE:
            share = "unknown" if self.coverage is None else f"{self.coverage:.1%}"
            found.append(f"judge {self.name}: coverage {share}, below {MIN_COVERAGE:.0%}")
        if self.missing_p is not None and self.missing_p < MISSING_P:
            found.append(f"judge {self.name}: missing verdicts depend on the configuration")
        return found


@dataclass(frozen=True)
class Study:
    """Everything the statistics need. `results` is indexed by configuration, `loss_draws` is (draws, configurations);
    `repeats` has one row per seed repeat: config, seed, val_loss, train_energy_wh."""

    results: pd.DataFrame
    loss_draws: pd.DataFrame
    judges: Sequence[Judge]
    repeats: pd.DataFrame

    @property
    def losses(self) -> pd.Series:
        return self.results["val_loss"].dropna().astype(float)

    @property
    def passed(self) -> list[Judge]:
        return [judge for judge in self.judges if not judge.blocks]

    @property
    def energy(self) -> pd.Series:
        return self.results["train_energy_wh"].dropna().astype(float)

    @property
    def energy_kinds(self) -> list[str]:
        return sorted(self.results.loc[self.energy.index, "energy_kind"].dropna().unique())

    @property
    def energy_word(self) -> str:
        """`estimated`, `measured`, ...: belongs beside every energy figure."""
        return " and ".join(self.energy_kinds) or "not metered"


# ---------------------------------------------------------------- reading


def read_judge(name: str, path: Callable[[str], Path]) -> Judge:
    """The judge's result from 05's files; `path` maps a file name of that step to where it lies."""
    metrics = json.loads(path("metrics.json").read_text(encoding="utf-8"))
    validity = json.loads(path("artefacts/validity.json").read_text(encoding="utf-8"))
    draws = pd.read_parquet(path("tables/score_draws.parquet"))
    return Judge(
        name=name,
        kind=metrics.get("judge_kind"),
        gate_passed=validity.get("passed"),
        failed_controls=tuple(c["control"] for c in validity.get("controls", []) if c["passed"] is not True),
        coverage=metrics.get("coverage"),
        missing_p=metrics.get("missingness_p"),
        ranking=pd.read_parquet(path("tables/ranking.parquet")).set_index("config"),
        draws=draws.pivot(index="draw", columns="config", values="score"),
    )


def repeats_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per seed repeat from the metrics of 03, keyed by scope `<config>-seed<seed>`."""
    rows = [
        {
            "config": scope.partition("-seed")[0],
            "seed": int(scope.partition("-seed")[2]),
            "val_loss": found.get("val_loss"),
            "train_energy_wh": found.get("train_energy_wh"),
        }
        for scope, found in metrics.items()
    ]
    frame = pd.DataFrame(rows, columns=["config", "seed", "val_loss", "train_energy_wh"])
    return frame.astype({"val_loss": float, "train_energy_wh": float})


# ---------------------------------------------------------------- results.csv


def result_columns(judges: Iterable[str]) -> list[str]:
    """The columns of results.csv, in order."""
    per_judge = ("score", "low", "high", "rank", "rank_low", "rank_high", "gate")
    return [
        "config", *PARAMETER_COLUMNS, "train_tokens", "val_loss", "val_loss_low", "val_loss_high",
        *TRAINING_COLUMNS, "answer_energy_wh", "train_seconds", "tokens_per_second",
        *(f"{judge}_{part}" for judge in judges for part in per_judge),
    ]  # fmt: skip


def results_table(
    training: Mapping[str, Mapping[str, Any]],
    answering: Mapping[str, Mapping[str, Any]],
    loss_intervals: Mapping[str, Interval],
    judges: Sequence[Judge] = (),
) -> pd.DataFrame:
    """One row per configuration with the columns of results.csv. A value that is not known is left empty, never 0.

    `training` and `answering` are the metrics of 03 and 04 by configuration.
    """
    columns = result_columns(judge.name for judge in judges)
    rows = []
    for config, metrics in training.items():
        row = {column: metrics.get(column) for column in columns} | {"config": config}
        row["answer_energy_wh"] = answering.get(config, {}).get("answer_energy_wh")
        if config in loss_intervals:
            row |= dict(zip(("val_loss", "val_loss_low", "val_loss_high"), loss_intervals[config], strict=True))
        for judge in judges:
            row |= _judge_columns(judge, config)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=columns)
    whole = [c for c in columns if re.search(r"_rank(_low|_high)?$", c)]
    whole += ["rank", "lora_alpha", "epochs", "seed", "train_tokens"]
    return frame.astype(dict.fromkeys(whole, "Int64"))


def _judge_columns(judge: Judge, config: str) -> dict[str, Any]:
    gate = {True: "passed", False: "failed"}.get(judge.gate_passed)
    if config not in judge.ranking.index:
        return {f"{judge.name}_gate": gate}
    row = judge.ranking.loc[config]
    parts = {part: row[part] for part in ("score", "low", "high", "rank", "rank_low", "rank_high")}
    whole = {p: None if pd.isna(v) else round(v) if "rank" in p else float(v) for p, v in parts.items()}
    return {f"{judge.name}_{part}": value for part, value in whole.items()} | {f"{judge.name}_gate": gate}


# ---------------------------------------------------------------- intervals


def percentile_interval(value: float, draws: np.ndarray) -> Interval:
    """95 % percentile interval of bootstrap draws around a value; draws that are NaN are left out."""
    kept = np.asarray(draws, dtype=float)
    kept = kept[np.isfinite(kept)]
    if kept.size == 0:
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def val_loss_draws(val_losses: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> pd.DataFrame:
    """Bootstrap draws of the validation loss, (draws, configurations), in nats per supervised token.

    Scenarios are drawn with replacement, whole, because the conversations of one scenario are not independent; every
    configuration sees the same draws, so that differences between configurations are paired.
    """
    per_config = {
        config: frame.groupby("scenario_id")[["loss_sum_after", "n_tokens"]].sum()
        for config, frame in val_losses.items()
    }
    scenarios = sorted(set().union(*(frame.index for frame in per_config.values())))
    n = len(scenarios)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws)
    draws = {}
    for config, frame in per_config.items():
        sums = frame.reindex(scenarios, fill_value=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws[config] = (weights @ sums["loss_sum_after"]) / (weights @ sums["n_tokens"])
    return pd.DataFrame(draws)


def val_loss_interval(val_losses: pd.DataFrame, draws: pd.Series | np.ndarray) -> Interval:
    """Token-weighted validation loss of one configuration with its scenario-bootstrap interval."""
    value = val_losses["loss_sum_after"].sum() / val_losses["n_tokens"].sum()
    return percentile_interval(value, np.asarray(draws))


# ---------------------------------------------------------------- does loss predict quality?


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b; NaN with fewer than two items or when one side is constant."""
    if len(a) < 2:
        return math.nan
    return float(stats.kendalltau(a, b, method="asymptotic").statistic)


def permutation_p(a: Sequence[float], b: Sequence[float], seed: int = 0, n_permutations: int = 9999) -> float:
    """Two-sided permutation p-value of tau-b: exact without ties, else Monte Carlo with (1+k)/(1+m).

    Permuting leaves the ties and so the denominator of tau-b alone: the numerator is enough.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = len(a)
    if n < 2:
        return math.nan
    if n <= 33 and len(np.unique(a)) == n and len(np.unique(b)) == n:
        return float(stats.kendalltau(a, b, method="exact").pvalue)
    sign_a, sign_b = (np.sign(x[:, None] - x[None, :]) for x in (a, b))
    observed = abs((sign_a * sign_b).sum())
    rng = np.random.default_rng(seed)
    orders = (rng.permutation(n) for _ in range(n_permutations))
    extreme = sum(abs((sign_a * sign_b[np.ix_(order, order)]).sum()) >= observed for order in orders)
    return (1 + extreme) / (1 + n_permutations)


def critical_tau(n: int, level: float = 0.05) -> float | None:
    """Smallest |tau| (no ties) whose two-sided exact p is below `level`; None if n items can never reach it.

    Counts permutations by inversions (Mahonian numbers).
    """
    probabilities = np.ones(1)
    for items in range(2, n + 1):
        probabilities = np.convolve(probabilities, np.full(items, 1 / items))
    pairs = n * (n - 1) // 2
    tails = np.minimum(1.0, 2 * np.cumsum(probabilities))
    reached = np.flatnonzero(tails[: pairs // 2 + 1] < level)
    return float(1 - 2 * reached[-1] / pairs) if reached.size else None


def paired_draws(study: Study, judge: Judge) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draws of loss and score over the configurations that have both, cut to the same number of draws.

    The two bootstraps resample different things (validation scenarios, test prompts), so pairing by number is as good
    as any other pairing.
    """
    configs = [c for c in study.losses.index if c in judge.scores.index and c in judge.draws]
    n_draws = min(len(study.loss_draws), len(judge.draws))
    return study.loss_draws[configs].iloc[:n_draws], judge.draws[configs].iloc[:n_draws]


def tau_interval(a: pd.Series, b: pd.Series, draws_a: pd.DataFrame, draws_b: pd.DataFrame) -> Interval:
    """tau-b of two scores over configurations with an interval from paired draws of both.

    Draws add the noise a second time, which pulls their tau towards 0. The interval is therefore the hull of the
    percentile interval and its mirror image about the estimate (the basic bootstrap). In simulation at n = 16 it covers
    91-98 % of true tau, where percentiles alone cover 73-96 %, while the noise stays under 40 % of the spread between
    configurations; with more noise and a strong true tau it is still too narrow (75-86 %).
    """
    configs = list(draws_a.columns)
    value = kendall_tau(a[configs], b[configs])
    rows = zip(draws_a.to_numpy(), draws_b.to_numpy(), strict=True)
    low, high = percentile_interval(value, np.array([kendall_tau(x, y) for x, y in rows]))[1:]
    return Interval(value, max(-1.0, min(low, 2 * value - high)), min(1.0, max(high, 2 * value - low)))


def noise_ceiling(judge: Judge) -> float:
    """The |tau| that even a perfect predictor would show against this judge: mean tau of its draws with its scores."""
    scores = judge.scores
    draws = judge.draws[list(scores.index)].to_numpy()[:500]
    return float(np.nanmean([kendall_tau(scores.to_numpy(), row) for row in draws]))


def rank_draws(draws: pd.DataFrame) -> pd.DataFrame:
    """Rank of every configuration in every draw, 1 = highest score, ties share the mean rank."""
    return draws.rank(axis=1, ascending=False)


def expected_win_share(log_odds: float) -> float:
    """Share of decided comparisons that a lead of `log_odds` wins (Bradley-Terry)."""
    return float(1 / (1 + math.exp(-log_odds)))


# ---------------------------------------------------------------- who is best, who is tied, at what energy


def tied_top_set(judge: Judge, level: float = 0.05) -> list[str]:
    """Configurations not distinguishable from the judge's best one, best first.

    Each is compared with the best by its paired difference over the draws (normal approximation), Holm-adjusted.
    """
    scores = judge.scores.sort_values(ascending=False)
    best, others = scores.index[0], scores.index[1:]
    draws = judge.draws
    z = [(scores[best] - scores[c]) / max((draws[best] - draws[c]).std(), 1e-12) for c in others]
    p = 2 * stats.norm.sf(np.array(z))
    return [best, *(c for c, adjusted in zip(others, holm(p), strict=True) if adjusted >= level)]


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values, in the order given."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted


def pareto_front(energy: pd.Series, score: pd.Series) -> list[str]:
    """Configurations that no other one beats on both energy and score (ties on both keep both), by rising energy."""
    frame = pd.DataFrame({"energy": energy, "score": score}).dropna()
    keep = [
        config
        for config, row in frame.iterrows()
        if not (
            (frame["energy"] <= row["energy"])
            & (frame["score"] >= row["score"])
            & ((frame["energy"] < row["energy"]) | (frame["score"] > row["score"]))
        ).any()
    ]
    return list(frame.loc[keep].sort_values("energy").index)


def pareto_shares(energy: pd.Series, draws: pd.DataFrame) -> pd.Series:
    """Share of the score draws in which each configuration is on the front (energies held at their value)."""
    order = [c for c in energy.dropna().sort_values().index if c in draws]
    scores = draws[order].to_numpy()
    before = np.maximum.accumulate(scores, axis=1)[:, :-1]
    on_front = np.column_stack([np.ones(len(scores), bool), scores[:, 1:] > before])
    return pd.Series(on_front.mean(axis=0), index=order)


@dataclass(frozen=True)
class Choice:
    """The recommended configuration and how it was found."""

    config: str | None
    candidates: list[str]
    reason: str
    blocked_by: list[str]
    agreed: bool = True


def choose(study: Study) -> Choice:
    """The configuration to deploy: among those in the tied top set of every judge that passed its gate, the one with
    the least training energy; energies closer than 3 % count as equal, then the higher mean score decides.
    """
    if not study.judges:
        return Choice(None, [], "", ["no judge has ranked the configurations"])
    if not study.passed:
        return Choice(None, [], "", [block for judge in study.judges for block in judge.blocks])
    sets = [tied_top_set(judge) for judge in study.passed]
    common = [config for config in sets[0] if all(config in other for other in sets[1:])]
    mean_score = _mean_score(study)
    if not common:
        best = mean_score.index[0]
        text = "no configuration is at the top with every judge; it has the highest mean standardised score"
        return Choice(best, [best], text, [], agreed=False)
    cheapest = _cheapest(study, common, mean_score)
    return Choice(cheapest, common, _reason(study, common, cheapest), [])


def _mean_score(study: Study) -> pd.Series:
    scores = pd.DataFrame({judge.name: judge.scores for judge in study.passed})
    return ((scores - scores.mean()) / scores.std()).mean(axis=1).sort_values(ascending=False)


def _cheapest(study: Study, configs: list[str], mean_score: pd.Series) -> str:
    ranked = [c for c in mean_score.index if c in configs]
    energy = study.energy.reindex(ranked)
    if len(study.energy_kinds) != 1 or energy.isna().any():
        return ranked[0]
    near = energy[energy <= energy.min() * (1 + ENERGY_RESOLUTION)]
    return near.index[0]


def _reason(study: Study, common: list[str], chosen: str) -> str:
    judges = name_list([judge.name for judge in study.passed])
    if len(common) == 1:
        return f"it is the only configuration at the top with {judges}"
    text = f"{len(common)} of {len(study.results)} configurations are tied at the top with {judges}"
    energy = study.energy.reindex(common)
    if len(study.energy_kinds) != 1 or energy.isna().any():
        return f"{text}, and it has the highest mean score (energies cannot be compared: {study.energy_word})"
    tied = (energy <= energy.min() * (1 + ENERGY_RESOLUTION)).sum() > 1
    least = "shares the least training energy of them and scores higher" if tied else "takes the least training energy"
    return f"{text}, and it {least}"


# ---------------------------------------------------------------- main effects


def factor_levels(configs: pd.DataFrame, factor: str) -> list[Any]:
    """The levels of a factor in the given set, lowest first."""
    levels = list(configs[factor].dropna().unique())
    if factor == "target_modules":
        known = [level for level in TARGET_ORDER if level in levels]
        return known + sorted(str(level) for level in levels if level not in known)
    return sorted(levels)


def design_matrix(configs: pd.DataFrame, factors: Sequence[str] = FACTORS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Model matrix with an intercept and one column per contrast with the lowest level, and a table of its columns."""
    columns, described = {"intercept": np.ones(len(configs))}, []
    for factor in factors:
        levels = factor_levels(configs, factor)
        for level in levels[1:]:
            contrast = f"{_level_text(levels[0])} -> {_level_text(level)}"
            columns[f"{factor}: {contrast}"] = (configs[factor] == level).to_numpy(dtype=float)
            described.append({"factor": factor, "contrast": contrast, "column": f"{factor}: {contrast}"})
    return pd.DataFrame(columns, index=configs.index), pd.DataFrame(
        described, columns=["factor", "contrast", "column"]
    )


def _level_text(level: Any) -> str:
    return f"{level:g}" if isinstance(level, (int, float, np.number)) else str(level)


def main_effects(configs: pd.DataFrame, response: pd.Series, log: bool = False) -> pd.DataFrame:
    """Effect of each factor's levels on a response: ordinary least squares with main effects only.

    The residual that all interactions and the noise share gives the intervals (t, `df_resid`). With `log` the effects
    are ratios. A contrast that the set of configurations cannot separate from others, or that leaves no residual, has
    no numbers and a `reason`.
    """
    kept = response.dropna().index.intersection(configs.index)
    x, table = design_matrix(configs.loc[kept])
    y = np.log(response[kept].astype(float)) if log else response[kept].astype(float)
    matrix = x.to_numpy()
    inverse = np.linalg.pinv(matrix)
    df_resid = len(kept) - np.linalg.matrix_rank(matrix) if len(kept) else 0
    beta = inverse @ y.to_numpy()
    residual = y.to_numpy() - matrix @ beta
    sigma2 = residual @ residual / df_resid if df_resid else math.nan
    row_space = inverse @ matrix  # e_j is estimable exactly if it lies in the row space of X
    rows = []
    for line in table.itertuples():
        j = list(x.columns).index(line.column)
        unit = np.eye(matrix.shape[1])[j]
        separable = np.allclose(row_space[j], unit, atol=1e-8)
        width = stats.t.ppf(0.975, df_resid) * math.sqrt(sigma2 * (inverse @ inverse.T)[j, j]) if df_resid else math.nan
        rows.append(_effect_row(line, beta[j], width, separable, df_resid, log))
    frame = pd.DataFrame(rows, columns=EFFECT_COLUMNS)
    return frame.assign(n=len(kept), df_resid=df_resid)


EFFECT_COLUMNS = ["factor", "contrast", "effect", "low", "high", "estimable", "reason"]


def _effect_row(line: Any, beta: float, width: float, separable: bool, df_resid: int, log: bool) -> dict[str, Any]:
    row = {"factor": line.factor, "contrast": line.contrast, "effect": math.nan, "low": math.nan, "high": math.nan}
    if not separable:
        return row | {"estimable": False, "reason": "cannot be separated from other factors in this set"}
    if df_resid < 1:
        return row | {"estimable": False, "reason": "no configuration is left over to estimate the noise"}
    scale = math.exp if log else float
    numbers = {"effect": scale(beta), "low": scale(beta - width), "high": scale(beta + width)}
    return row | numbers | {"estimable": True, "reason": ""}


def design_facts(configs: pd.DataFrame) -> pd.DataFrame:
    """What the given set of configurations can tell apart, per factor.

    Columns: factor, levels, varied, separable (from the other main effects), clear (no main effect of it is aliased
    with any two-factor interaction), leftover (residual degrees of freedom of the main-effects model).
    """
    x, table = design_matrix(configs)
    matrix = x.to_numpy()
    inverse = np.linalg.pinv(matrix)
    interactions = _interaction_columns(configs)
    row_space = inverse @ matrix
    # The alias matrix is exact for centred interaction columns; the intercept takes up their mean.
    alias = inverse @ (interactions - interactions.mean(axis=0)) if interactions.size else np.zeros((len(x.columns), 1))
    rows = []
    for factor in FACTORS:
        index = [list(x.columns).index(column) for column in table.loc[table["factor"] == factor, "column"]]
        varied = bool(index)
        separable = varied and np.allclose(row_space[index], np.eye(len(x.columns))[index], atol=1e-8)
        clear = separable and np.allclose(alias[index], 0, atol=1e-8)
        levels = ", ".join(_level_text(level) for level in factor_levels(configs, factor))
        rows.append((factor, levels, varied, separable, clear))
    frame = pd.DataFrame(rows, columns=["factor", "levels", "varied", "separable", "clear"])
    return frame.assign(leftover=len(configs) - int(np.linalg.matrix_rank(matrix)))


def _interaction_columns(configs: pd.DataFrame) -> np.ndarray:
    """Products of the centred contrast columns of every two factors, (configurations, products)."""
    coded = {}
    for factor in FACTORS:
        levels = factor_levels(configs, factor)
        one_hot = np.column_stack([(configs[factor] == level).to_numpy(float) for level in levels])
        coded[factor] = (one_hot - 1 / len(levels))[:, :-1]
    products = [
        a[:, [i]] * b[:, [j]]
        for k, a in enumerate(coded.values())
        for b in list(coded.values())[k + 1 :]
        for i in range(a.shape[1])
        for j in range(b.shape[1])
    ]
    return np.hstack(products) if products else np.empty((len(configs), 0))


# ---------------------------------------------------------------- noise floor


class Noise(NamedTuple):
    """Spread between seeds of one configuration and between configurations (standard deviations)."""

    between_seeds: Interval
    between_configs: float
    df: int
    n_runs: int

    @property
    def resolution(self) -> float:
        """Smallest difference of two single runs that exceeds seed noise (95 %, t)."""
        return float(stats.t.ppf(0.975, self.df) * math.sqrt(2) * self.between_seeds.value)


def noise_floor(results: pd.DataFrame, repeats: pd.DataFrame, column: str) -> Noise | None:
    """Pooled standard deviation between seeds of `column` with its chi-square interval; None without repeats.

    `results` is indexed by configuration; its run counts as one more seed of the repeated configurations.
    """
    values = results[column].dropna().astype(float)
    repeated = repeats.dropna(subset=[column])
    groups = [
        np.append(group[column].to_numpy(float), values[config])
        for config, group in repeated.groupby("config")
        if config in values.index
    ]
    df = sum(len(group) - 1 for group in groups)
    if df < 1:
        return None
    total = sum(((group - group.mean()) ** 2).sum() for group in groups)
    low, high = (math.sqrt(total / stats.chi2.ppf(q, df)) for q in (0.975, 0.025))
    seeds = Interval(math.sqrt(total / df), low, high)
    return Noise(seeds, float(values.std()), df, sum(map(len, groups)))


# ---------------------------------------------------------------- findings


def findings(study: Study, seed: int = 0) -> list[Finding]:
    """Every statement of the study, the decision first."""
    found = [*decision_findings(study), *_loss_findings(study, seed), *_agreement_findings(study)]
    found += [*_energy_findings(study), *_noise_findings(study), *_effect_findings(study)]
    return found


def findings_json(found: Sequence[Finding]) -> str:
    """findings.json as text: strict JSON, NaN as null."""
    rows = [{key: _plain(value) for key, value in asdict(finding).items()} for finding in found]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def findings_frame(found: Sequence[Finding]) -> pd.DataFrame:
    """The findings as a table; `value` is text because a decision's value is a configuration's name."""
    frame = pd.DataFrame([asdict(finding) for finding in found])
    frame["value"] = [None if _plain(v) is None else str(_plain(v)) for v in frame["value"]]
    frame["blocked_by"] = frame["blocked_by"].map("; ".join)
    return frame


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decision_findings(study: Study) -> list[Finding]:
    """What to deploy, what loss alone would have chosen, and how sure the difference is."""
    choice, n = choose(study), len(study.results)
    loss_pick = str(study.losses.idxmin()) if len(study.losses) else None
    found = [_deploy_finding(study, choice)]
    if loss_pick is None:
        blocked = ["no configuration has a validation loss"]
        return [*found, Finding("loss_choice", "Loss alone cannot choose.", n=n, verdict="blocked", blocked_by=blocked)]
    low, high = (float(x) for x in study.results.loc[loss_pick, ["val_loss_low", "val_loss_high"]])
    text = f"Loss alone would choose {loss_pick}: {study.losses[loss_pick]:.4f} nats per token [{low:.4f}, {high:.4f}]"
    energy = _energy_text(study, loss_pick)
    found.append(Finding("loss_choice", f"{text}{f', {energy}' if energy else ''}.", loss_pick, n=n))
    return [*found, _confidence_finding(study, choice, loss_pick), *_gain_findings(study, choice)]


def _deploy_finding(study: Study, choice: Choice) -> Finding:
    n = len(study.results)
    if choice.config is None:
        text = "No configuration can be recommended: " + "; ".join(choice.blocked_by) + "."
        return Finding("deploy", text, n=n, verdict="blocked", blocked_by=choice.blocked_by)
    energy = _energy_text(study, choice.config)
    text = f"Deploy {choice.config} ({describe(study.results.loc[choice.config])}): {choice.reason}"
    text += f"; {energy} to train." if energy else "; its training energy is not known."
    verdict = "supported" if choice.agreed else "not distinguishable"
    return Finding("deploy", text, choice.config, n=n, verdict=verdict)


def _energy_text(study: Study, config: str) -> str:
    """Training energy of a configuration with interval and kind; empty if it is missing."""
    row = study.results.loc[config]
    if pd.isna(row["train_energy_wh"]):
        return ""
    interval = ""
    if not pd.isna(row["train_energy_low_wh"]) and not pd.isna(row["train_energy_high_wh"]):
        interval = f" [{row['train_energy_low_wh']:.3g}, {row['train_energy_high_wh']:.3g}]"
    return f"{row['train_energy_wh']:.3g} Wh{interval} {row['energy_kind']}"


def describe(row: pd.Series) -> str:
    """The parameters of a configuration in words."""
    parts = [] if pd.isna(row["target_modules"]) else [f"LoRA on {row['target_modules']}"]
    parts += [] if pd.isna(row["rank"]) else [f"rank {row['rank']:g}"]
    parts += [] if pd.isna(row["epochs"]) else [f"{row['epochs']:g} epoch{'s' if row['epochs'] > 1 else ''}"]
    parts += [] if pd.isna(row["learning_rate"]) else [f"learning rate {row['learning_rate']:g}"]
    return ", ".join(parts)


def _confidence_finding(study: Study, choice: Choice, loss_pick: str) -> Finding:
    """How often the choice scores above loss's choice over the draws; the least sure judge counts."""
    if choice.config is None:
        text = "How sure: nothing can be said while no judge is valid."
        return Finding("confidence", text, verdict="blocked", blocked_by=choice.blocked_by)
    n = min(len(judge.draws) for judge in study.passed)
    if choice.config == loss_pick:
        text = f"Loss and judges choose the same configuration, {loss_pick}."
        return Finding("confidence", text, n=n)
    shares = {j.name: float((j.draws[choice.config] > j.draws[loss_pick]).mean()) for j in study.passed}
    told = "; ".join(f"{share:.0%} of the draws of {judge}" for judge, share in shares.items())
    sure = min(shares.values())
    text = f"{choice.config} scores above loss's choice, {loss_pick}, in {told}."
    verdict = "supported" if sure >= 0.975 else "not distinguishable"
    if verdict == "not distinguishable" and max(shares.values()) <= 0.025:
        text += " The judges prefer loss's choice; the recommendation costs less energy."
    return Finding("confidence", text, sure, n=n, verdict=verdict)


def _gain_findings(study: Study, choice: Choice) -> list[Finding]:
    found = []
    for judge in study.judges:
        config = choice.config or judge.scores.idxmax()
        if "untuned" not in judge.draws or "untuned" not in judge.ranking.index or config not in judge.draws:
            continue
        gain = judge.ranking.loc[config, "score"] - judge.ranking.loc["untuned", "score"]
        interval = percentile_interval(gain, (judge.draws[config] - judge.draws["untuned"]).to_numpy())
        share = expected_win_share(gain)
        text = f"Against the untuned model {config} wins {share:.0%} of decided comparisons with {judge.name} {logodds(interval)}."
        found.append(_judged(judge, f"gain.{judge.name}", text, interval, len(judge.draws), _sign(interval)))
    return found


def logodds(interval: Interval) -> str:
    """A log-odds interval, told as the share of decided comparisons won."""
    low, high = expected_win_share(interval.low), expected_win_share(interval.high)
    return f"[{low:.0%}, {high:.0%}]"


def _sign(interval: Interval) -> str:
    clear = interval.low > 0 or interval.high < 0
    return "supported" if clear else "not distinguishable"


def _judged(judge: Judge, id: str, text: str, interval: Interval, n: int, verdict: str) -> Finding:
    """A finding that rests on a judge: blocked if the judge is."""
    blocks = judge.blocks
    return Finding(id, text, *interval, n, "blocked" if blocks else verdict, blocks)


def _loss_findings(study: Study, seed: int) -> list[Finding]:
    found = []
    for judge in study.judges:
        losses, draws = paired_draws(study, judge)
        if losses.shape[1] < 2:
            text = f"Loss and {judge.name} share fewer than two configurations."
            found.append(Finding(f"tau.{judge.name}", text, n=losses.shape[1], verdict="not estimable",
                                 blocked_by=["fewer than two configurations"]))  # fmt: skip
            continue
        found += [_tau_finding(study, judge, losses, draws, seed), _regret_finding(study, judge, draws)]
        found += [_top3_finding(study, judge, losses, draws), *_rank_findings(study, judge, draws)]
    return found


def _tau_finding(study: Study, judge: Judge, losses: pd.DataFrame, draws: pd.DataFrame, seed: int) -> Finding:
    n = losses.shape[1]
    interval = tau_interval(study.losses, judge.scores, losses, draws)
    needed = critical_tau(n)
    if needed is None or not math.isfinite(interval.value):
        text = f"{n} configurations are too few to tell whether loss predicts {judge.name}."
        reason = [*judge.blocks, f"n = {n} is too small: no tau reaches p < .05"]
        return Finding(f"tau.{judge.name}", text, *interval, n, "not estimable", reason)
    p = permutation_p(study.losses[losses.columns], judge.scores[losses.columns], seed)
    text = (
        f"Lower loss and higher {judge.name} score: tau-b(loss, score) = {interval.value:+.2f} "
        f"[{interval.low:+.2f}, {interval.high:+.2f}], permutation p = {p:.2g}; |tau| must reach {needed:.3f} at n = {n}, "
        f"and this judge's noise caps it near {noise_ceiling(judge):.2f}. {_tau_words(interval.value, p)}"
    )
    verdict = "supported" if p < 0.05 else "not distinguishable"
    return _judged(judge, f"tau.{judge.name}", text, interval, n, verdict)


def _tau_words(tau: float, p: float) -> str:
    if p >= 0.05:
        return "No relation can be shown."
    return "Lower loss goes with better answers." if tau < 0 else "Lower loss goes with worse answers."


def _regret_finding(study: Study, judge: Judge, draws: pd.DataFrame) -> Finding:
    pick = str(study.losses[draws.columns].idxmin())
    best = str(judge.scores[draws.columns].idxmax())
    if pick == best:
        text = f"Choosing by loss loses nothing with {judge.name}: both choose {pick}."
        return _judged(judge, f"regret.{judge.name}", text, Interval(0.0, math.nan, math.nan), len(draws), "described")
    interval = percentile_interval(judge.scores[best] - judge.scores[pick], (draws[best] - draws[pick]).to_numpy())
    share = expected_win_share(interval.value)
    text = (
        f"Choosing by loss ({pick}) instead of by {judge.name} ({best}) costs {interval.value:.2f} log-odds "
        f"[{interval.low:.2f}, {interval.high:.2f}]: {best} wins {share:.0%} of their decided comparisons "
        "(the best of many is picked, so this is an upper estimate)."
    )
    return _judged(judge, f"regret.{judge.name}", text, interval, len(draws), _sign(interval))


def _top3_finding(study: Study, judge: Judge, losses: pd.DataFrame, draws: pd.DataFrame) -> Finding:
    n = losses.shape[1]
    if n <= 3:
        text = f"With {n} configurations every one is in the top 3 of {judge.name}."
        return Finding(f"top3.{judge.name}", text, n=n, verdict="not estimable", blocked_by=[f"n = {n} is too small"])
    picks = losses.to_numpy().argmin(axis=1)
    share = float((rank_draws(draws).to_numpy()[np.arange(len(draws)), picks] <= 3).mean())
    text = f"The lowest-loss configuration is in the top 3 of {judge.name} with probability {share:.0%} (chance: {3 / n:.0%})."
    return _judged(judge, f"top3.{judge.name}", text, Interval(share, math.nan, math.nan), len(draws), "described")


def _rank_findings(study: Study, judge: Judge, draws: pd.DataFrame) -> list[Finding]:
    """Ranks of the lowest- and highest-loss configuration, with the chance of such a rank if loss meant nothing."""
    found, n, ranks = [], draws.shape[1], rank_draws(draws)
    place = judge.scores[draws.columns].rank(ascending=False)
    for end, config in (
        ("best", study.losses[draws.columns].idxmin()),
        ("worst", study.losses[draws.columns].idxmax()),
    ):
        interval = percentile_interval(place[config], ranks[config].to_numpy())
        chance = (n - place[config] + 1) / n if end == "best" else place[config] / n
        word, tail = ("lowest", "this or lower") if end == "best" else ("highest", "this or higher")
        text = (
            f"The {word}-loss configuration, {config}, ranks {place[config]:g} of {n} with {judge.name} "
            f"[{interval.low:g}, {interval.high:g}]; if loss meant nothing, {tail} has p = {chance:.2f}."
        )
        found.append(_judged(judge, f"{end}_loss_rank.{judge.name}", text, interval, n, "described"))
    return found


def _agreement_findings(study: Study) -> list[Finding]:
    found = []
    for k, a in enumerate(study.judges):
        for b in study.judges[k + 1 :]:
            configs = [c for c in a.scores.index if c in b.scores.index]
            n_draws = min(len(a.draws), len(b.draws))
            pair = f"judges.{a.name}.{b.name}"
            if len(configs) < 2:
                continue
            interval = tau_interval(a.scores, b.scores, a.draws[configs].iloc[:n_draws], b.draws[configs].iloc[:n_draws])
            needed, blocks = critical_tau(len(configs)), [*a.blocks, *b.blocks]
            text = f"{a.name} and {b.name} rank alike: tau-b = {interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]."
            if needed is None:
                blocks.append(f"n = {len(configs)} is too small: no tau reaches p < .05")
            verdict = "blocked" if blocks else "supported" if interval.value >= needed else "not distinguishable"
            found.append(Finding(pair, text, *interval, len(configs), verdict, blocks))
    return found


def _energy_findings(study: Study) -> list[Finding]:
    energy = study.energy
    if len(energy) < 2:
        reason = f"{len(energy)} of {len(study.results)} configurations have a training energy"
        return [Finding("energy_ratio", f"Energies cannot be compared: {reason}.", n=len(energy),
                        verdict="not estimable", blocked_by=[reason])]  # fmt: skip
    if len(study.energy_kinds) != 1:
        reason = f"energies of different kinds ({study.energy_word}) do not stand on one ranking"
        return [Finding("energy_ratio", f"Energies cannot be compared: {reason}.", n=len(energy),
                        verdict="blocked", blocked_by=[reason])]  # fmt: skip
    least, most = energy.idxmin(), energy.idxmax()
    interval = energy_ratio(study.results, str(most), str(least))
    low, high = PAPER["energy_wh"]
    text = (
        f"Training energy ({study.energy_word}) runs from {energy[least]:.3g} Wh ({least}) to {energy[most]:.3g} Wh ({most}): "
        f"a factor of {interval.value:.1f}. The paper has {low:g}-{high:g} Wh, a factor of {high / low:.1f}."
    )
    if study.energy_word == "estimated":
        text += " Ranking by an estimate is ranking by processor time."
    return [Finding("energy_ratio", text, *interval, len(energy)), *_pareto_findings(study)]


def energy_ratio(results: pd.DataFrame, most: str, least: str) -> Interval:
    """Energy of `most` over that of `least`. Low and high assume that both share one error (watts per core, calibration
    of one meter): errors that differ from run to run are not in it.
    """
    columns = ("train_energy_wh", "train_energy_low_wh", "train_energy_high_wh")
    ratios = [float(results.loc[most, c]) / float(results.loc[least, c]) for c in columns]
    return Interval(ratios[0], min(ratios), max(ratios))


def _pareto_findings(study: Study) -> list[Finding]:
    found = []
    for judge in study.judges:
        front = pareto_front(study.energy, judge.scores)
        if not front:
            continue
        shares = pareto_shares(study.energy, judge.draws[list(judge.scores.index)])
        told = name_list([f"{config} ({shares[config]:.0%})" for config in front])
        text = f"On the energy-quality front with {judge.name}: {told}, with the share of draws in which each is on it."
        found.append(_judged(judge, f"pareto.{judge.name}", text, Interval(len(front), math.nan, math.nan),
                             len(study.energy), "described"))  # fmt: skip
    return found


def _noise_findings(study: Study) -> list[Finding]:
    noise = noise_floor(study.results, study.repeats, "val_loss")
    if noise is None:
        reason = "no configuration was repeated with another seed"
        return [Finding("noise_floor", f"The seed noise is not known: {reason}.", verdict="not estimable",
                        blocked_by=[reason])]  # fmt: skip
    seeds, losses = noise.between_seeds, study.losses.sort_values()
    near = [c for c in losses.index if losses[c] - losses.iloc[0] <= noise.resolution]
    text = (
        f"Another seed moves the validation loss by {seeds.value:.4f} (standard deviation, [{seeds.low:.4f}, {seeds.high:.4f}], "
        f"{noise.n_runs} runs); configurations differ by {noise.between_configs:.4f}. Two single runs closer than "
        f"{noise.resolution:.4f} are not distinguishable: {len(near)} of {len(losses)} are that close to the lowest."
    )
    verdict = "supported" if noise.between_configs > seeds.high else "not distinguishable"
    return [Finding("noise_floor", text, *seeds, noise.n_runs, verdict)]


def effect_tables(study: Study) -> pd.DataFrame:
    """Main effects on loss (difference), on each judge's score (difference, log-odds), on training energy (ratio)."""
    tables = [main_effects(study.results, study.losses).assign(response="val_loss", unit="nats per token")]
    for judge in study.judges:
        effects = main_effects(study.results, judge.scores)
        tables.append(effects.assign(response=f"{judge.name} score", unit="log-odds"))
    if len(study.energy_kinds) == 1:
        effects = main_effects(study.results, study.energy, log=True)
        tables.append(effects.assign(response=f"training energy ({study.energy_word})", unit="ratio"))
    return pd.concat(tables, ignore_index=True)[["response", "unit", *EFFECT_COLUMNS, "n", "df_resid"]]


def _effect_findings(study: Study) -> list[Finding]:
    found, blocks = [], {f"{judge.name} score": judge.blocks for judge in study.judges}
    for row in effect_tables(study).itertuples():
        id = f"effect.{row.response}.{row.factor}.{row.contrast}".replace(" ", "")
        name = f"{row.factor} {row.contrast} on {row.response}"
        if not row.estimable:
            text = f"The effect of {name} is not estimable: {row.reason}."
            found.append(Finding(id, text, n=row.n, verdict="not estimable", blocked_by=[row.reason]))
            continue
        neutral, digits = (1.0, ".2f") if row.unit == "ratio" else (0.0, "+.3f")
        numbers = ", ".join(format(x, digits) for x in (row.low, row.high))
        text = f"Effect of {name}: {row.effect:{digits}} {row.unit} [{numbers}]."
        blocked = blocks.get(row.response, [])
        verdict = "supported" if not row.low <= neutral <= row.high else "not distinguishable"
        found.append(Finding(id, text, row.effect, row.low, row.high, row.n, "blocked" if blocked else verdict, blocked))
    return found


# ---------------------------------------------------------------- beside the paper


def paper_table(study: Study, base_model: str | None = None) -> pd.DataFrame:
    """The paper's published facts beside ours: quantity, paper, this study."""
    losses, energy = study.losses, study.energy
    rows = [
        ("configurations", "16", f"{len(study.results)}"),
        ("base model", "Qwen2.5-3B", base_model or "-"),
        ("judges", "Claude Sonnet 4.5, GPT-5.2", name_list([judge_label(j) for j in study.judges]) or "-"),
        ("lowest validation loss", "0.5024", f"{losses.min():.4f} ({losses.idxmin()})" if len(losses) else "-"),
        ("its rank with the judges", "6th-7th", _rank_text(study, "min")),
        ("chance of rank 6 or lower if loss meant nothing", "11/16", "-"),
        ("highest validation loss", "0.6807", f"{losses.max():.4f} ({losses.idxmax()})" if len(losses) else "-"),
        ("its rank with the judges", "1st with both", _rank_text(study, "max")),
        ("chance of rank 1 if loss meant nothing", "1/16", f"1/{len(losses)}" if len(losses) else "-"),
        ("|tau| needed for p < .05", f"{critical_tau(16):.3f}", _needed_text(len(losses))),
        (
            "training energy per configuration",
            "284-1371 Wh (factor 4.8)",
            f"{energy.min():.3g}-{energy.max():.3g} Wh {study.energy_word} (factor {energy.max() / energy.min():.1f})"
            if len(energy) > 1
            else "-",
        ),
    ]
    n = len(losses)
    rows[5] = (rows[5][0], rows[5][1], f"{max(n - 5, 0)}/{n}" if n > 5 else "-")
    return pd.DataFrame(rows, columns=["quantity", "paper", "this study"])


def _needed_text(n: int) -> str:
    needed = critical_tau(n) if n >= 2 else None
    return "cannot be reached" if needed is None else f"{needed:.3f}"


def _rank_text(study: Study, end: str) -> str:
    told = []
    for judge in study.judges:
        losses, _ = paired_draws(study, judge)
        if losses.shape[1]:
            config = getattr(study.losses[losses.columns], f"idx{end}")()
            place = judge.scores[losses.columns].rank(ascending=False)[config]
            told.append(f"{place:g} of {losses.shape[1]} ({judge.name}{'' if not judge.blocks else ', not valid'})")
    return "; ".join(told) or "-"


def judge_label(judge: Judge) -> str:
    """The judge's name; offline judges are proxies and are called so wherever they appear."""
    return f"{judge.name} (offline proxy)" if judge.is_proxy else judge.name


def name_list(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
