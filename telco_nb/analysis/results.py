"""The results of a study as tables and objects: one row per configuration, one object per judge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from telco_nb.analysis.statistics import (
    MISSING,
    Interval,
    Luck,
    cluster_weights,
    percentile_interval,
    ratio_draws,
    tau_rows,
)
from telco_nb.judge.best import MANY, compare_with_best
from telco_nb.judge.cases import degenerate_answer
from telco_nb.judge.gate import gate_counts, outcome
from telco_nb.study.params import Claims, split_run

PARAMETER_COLUMNS = ("target_modules", "rank", "lora_alpha", "epochs", "learning_rate", "seed")
SET_LOSSES = (  # of the gold answers on the three test sets, from 04: nats per token, and perplexity
    "test_loss", "test_perplexity", "noisy_loss", "noisy_perplexity", "unseen_loss", "unseen_perplexity",
)  # fmt: skip
ENERGY_COLUMNS = (
    "train_energy_wh", "train_energy_low_wh", "train_energy_high_wh", "train_net_energy_wh", "energy_kind",
    "energy_source",
    "train_joules_per_token", "train_joules_per_supervised_token", "train_mean_w",
)  # fmt: skip
JUDGE_PARTS = ("score", "low", "high", "rank", "rank_low", "rank_high", "gate")
T = TypeVar("T")
JudgeFiles = Callable[[str], Callable[[str], Path]]  # by a judge's name: the path of a file of its 05_judge
PROXY_KINDS = ("checklist", "embedding")
RETEST_PAIRS = 500  # of drawn runs: the mean of their taus is then known to about .01


@dataclass(frozen=True)
class JudgeResults:
    """The results of 05 for one judge. `ranking` is indexed by configuration, `draws` is (draws, configurations).

    `runs`, `run_draws`, `luck` and `error_draws` are known where configurations were trained again
    (`seeds.merge_runs`): score and draws of every run, the variance between seeds, and draws like `draws` with as much
    luck as was estimated: those have the covariance of the scores' errors, while `draws` have the width of t intervals.
    """

    name: str
    kind: str | None
    gate_passed: bool | None
    coverage: float | None
    headline_blocks: tuple[str, ...]
    ranking: pd.DataFrame
    draws: pd.DataFrame
    model: str | None = None
    controls: tuple[Mapping[str, Any], ...] = ()  # of the validity gate: control, value, rule, threshold, n, passed
    runs: pd.Series | None = None
    run_draws: pd.DataFrame | None = None
    luck: Luck | None = None
    error_draws: pd.DataFrame | None = None
    _compared: dict[tuple[Any, ...], pd.DataFrame] = field(init=False, default_factory=dict, repr=False, compare=False)

    @cached_property
    def scores(self) -> pd.Series:
        """Bradley-Terry ability (log-odds) of the ranked configurations, anchors left out."""
        return self.ranking.loc[~self.ranking["is_anchor"].astype(bool), "score"].dropna()

    @property
    def first_scores(self) -> pd.Series:
        """Like `scores`, of the first run of each configuration: comparable with single repeats."""
        return self.scores if self.runs is None else self.runs[self.scores.index]

    def terms(self, *configs: str) -> int | None:
        """The least number of terms in which the configurations were compared; None if the ranking does not say."""
        if "n_terms" not in self.ranking:
            return None
        return int(self.ranking["n_terms"].reindex(list(configs)).fillna(0).min())

    def counted_terms(self, *configs: str) -> int | None:
        """Like `terms`, for the `n` of a finding: None as well where so many are given that they stand for no count."""
        terms = self.terms(*configs)
        return None if terms is None or terms >= MANY else terms

    def compared(self, configs: Sequence[str] | None, level: float) -> pd.DataFrame:
        """`compare_with_best` of these configurations, None for all ranked ones; computed once: 200 take seconds."""
        scores = self.scores if configs is None else self.scores[self.scores.index.isin(list(configs))]
        asked = (level, *scores.index)
        if asked not in self._compared:
            drawn = self.draws[list(scores.index)].dropna()
            self._compared[asked] = compare_with_best(scores, drawn, self.judged_terms, level)
        return self._compared[asked]

    @property
    def judged_terms(self) -> pd.Series | None:
        """The number of terms in which each configuration was compared; None if the ranking does not say."""
        if "n_terms" not in self.ranking:
            return None
        return self.ranking["n_terms"].reindex(self.scores.index).fillna(0).astype(int)

    @property
    def failed_controls(self) -> list[str]:
        return [control["control"] for control in self.controls if outcome(control) == "FAILED"]

    @property
    def gate_text(self) -> str:
        """How many planted controls it passed, in words (`gate.gate_counts`)."""
        return gate_counts(self.controls)

    @property
    def is_proxy(self) -> bool:
        return (self.kind or self.name) in PROXY_KINDS

    @property
    def label(self) -> str:
        """The name; an offline judge is marked as a proxy."""
        return f"{self.name} (offline proxy)" if self.is_proxy else self.name

    @property
    def blocks(self) -> list[str]:
        """The reasons from 05_judge why this judge's ranking may not carry a headline; empty if it may."""
        return [f"judge {self.name}: {block}" for block in self.headline_blocks]


@dataclass(frozen=True)
class StudyResults:
    """Everything the statistics need. `results` is indexed by configuration, `loss_draws` is (draws, configurations);
    `repeats` has one row per seed repeat: config, seed, val_loss, train_energy_wh. `invalid_energy` names the
    configurations whose energy window was too short or has no reading. `checks` holds what the checklist found in each
    answer (`judge.checklist.checks_table`), `faults` the counts of `answers_table`; None where there are none.
    `set_draws` are draws like `loss_draws` by the name of a test set's loss; `train_losses` are those at the end of
    training, `n_scenarios` how many scenarios the draws of the loss resample. `claims` was written down before the run;
    None: the shipped file.
    """

    results: pd.DataFrame
    loss_draws: pd.DataFrame
    judges: Sequence[JudgeResults]
    repeats: pd.DataFrame
    invalid_energy: tuple[str, ...] = ()
    checks: pd.DataFrame | None = None
    faults: pd.DataFrame | None = None
    set_draws: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    train_losses: pd.Series | None = None
    claims: Claims | None = None
    n_scenarios: int | None = None
    _kept: dict[Hashable, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        refuse_infinite(self.results)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed once for this study and key: tables and findings ask for the same."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    @cached_property
    def answer_means(self) -> pd.DataFrame | None:
        """Mean coverage and unsafe share of the answers of each configuration and anchor; None if nobody read them."""
        return None if self.checks is None else self.checks.groupby("config")[["coverage", "unsafe"]].mean()

    @property
    def losses(self) -> pd.Series:
        return self.results["val_loss"].dropna().astype(float)

    @property
    def passed(self) -> list[JudgeResults]:
        return [judge for judge in self.judges if not judge.blocks]

    @property
    def energy(self) -> pd.Series:
        return self.results["train_energy_wh"].dropna().astype(float)

    @property
    def energy_kinds(self) -> list[str]:
        return sorted(self.results.loc[self.energy.index, "energy_kind"].dropna().unique())

    @property
    def energy_blocks(self) -> list[str]:
        """The reasons why the training energies may not be compared; empty if they may."""
        blocks = []
        if unknown := int(self.results.loc[self.energy.index, "energy_kind"].isna().sum()):
            blocks.append(f"the kind of {unknown} of {len(self.energy)} energies is not known")
        if len(self.energy_kinds) > 1:
            blocks.append(f"energies of different kinds ({self.energy_word}) do not stand on one ranking")
        if self.invalid_energy:
            short, n = len(self.invalid_energy), len(self.results)
            named = self.invalid_energy[0] + (" ..." if short > 1 else "")
            blocks.append(f"energy windows too short to trust: {short} of {n} ({named})")
        return blocks

    @property
    def energy_word(self) -> str:
        """`estimated`, `measured`, ...: stands beside every energy value."""
        return " and ".join(self.energy_kinds) or "not metered"


def refuse_infinite(results: pd.DataFrame) -> None:
    """Refuse a loss that is not finite: training diverged, and no rank or mean can hold it.

    Args:
        results: indexed by configuration; losses that are missing are fine.

    Raises:
        ValueError: names the configuration, the loss and the ways out.
    """
    for column in ("val_loss", *SET_LOSSES):
        values = results[column].astype(float) if column in results else pd.Series(dtype=float)
        for config in values.index[np.isinf(values)]:
            raise ValueError(
                f"{config} has a {column} of {values[config]}: its training diverged. Lower its learning_rate and "
                f"train it again, or take {config} out of `configs`."
            )


def read_judge(name: str, path: Callable[[str], Path]) -> JudgeResults:
    """Read the results of one judge from the files of 05; `path` gives the path of a file of that step."""
    metrics = json.loads(path("metrics.json").read_text(encoding="utf-8"))
    validity = json.loads(path("artefacts/validity.json").read_text(encoding="utf-8"))
    draws = pd.read_parquet(path("tables/score_draws.parquet"))
    return JudgeResults(
        name=name,
        kind=metrics.get("judge_kind"),
        gate_passed=validity.get("passed"),
        coverage=metrics.get("coverage"),
        headline_blocks=tuple(validity.get("headline_blocks", ["its result is not complete"])),
        ranking=pd.read_parquet(path("tables/ranking.parquet")).set_index("config"),
        draws=draws.pivot(index="draw", columns="config", values="score"),
        model=metrics.get("judge_model"),
        controls=tuple(validity.get("controls", [])),
    )


def gate_table(judges: Sequence[JudgeResults]) -> pd.DataFrame:
    """One row per planted control: the required value, and each judge's value with passed, FAILED or not asked."""
    rows: dict[str, dict[str, str]] = {}
    for judge in judges:
        for control in judge.controls:
            threshold = control["threshold"]
            required = "-" if threshold is None else f"{control.get('rule', '')} {threshold:.3g}".strip()
            row = rows.setdefault(control["control"], {"required": required})
            value = "no verdict: " if control["passed"] is False else ""
            value = value if control["value"] is None else f"{control['value']:.3f} (n = {control['n']}) "
            row[judge.label] = f"{value}{outcome(control)}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("control").reset_index()


def answers_table(answers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Count the answers of 04 that cannot help a customer, per configuration.

    Args:
        answers: by configuration, the table of answers with columns answer, n_tokens and finish_reason.

    Returns:
        One row per configuration: answers, empty and looping ones (the rule by which 05 lets an answer lose), those cut
        off at the token limit, broken ones (with any of these faults), and the median number of tokens.
    """
    rows = []
    for config, table in answers.items():
        faults = table["answer"].map(degenerate_answer)
        counts = {"empty": (faults == "empty").sum(), "looping": (faults == "looping").sum()}
        counts["cut off"] = (table["finish_reason"] == "length").sum()
        counts["broken"] = (faults.notna() | (table["finish_reason"] == "length")).sum()
        rows.append({"config": config, "answers": len(table), **counts, "median tokens": table["n_tokens"].median()})
    return pd.DataFrame(rows)


def repeats_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per seed repeat from the metrics of 03, keyed by scope `<config>-seed<seed>`."""
    rows = [
        (*split_run(scope), values.get("val_loss"), values.get("train_energy_wh")) for scope, values in metrics.items()
    ]
    frame = pd.DataFrame(rows, columns=["config", "seed", "val_loss", "train_energy_wh"])
    return frame.astype({"seed": int, "val_loss": float, "train_energy_wh": float})


def result_columns(judges: Iterable[str]) -> list[str]:
    """The columns of results.csv, in order."""
    return [
        "config", *PARAMETER_COLUMNS, "train_tokens", "val_loss", "val_loss_low", "val_loss_high",
        *SET_LOSSES, *ENERGY_COLUMNS, "answer_energy_wh", "train_started_at", "train_seconds", "tokens_per_second",
        *(f"{judge}_{part}" for judge in judges for part in JUDGE_PARTS),
    ]  # fmt: skip


def results_table(
    training: Mapping[str, Mapping[str, Any]],
    answering: Mapping[str, Mapping[str, Any]],
    loss_intervals: Mapping[str, Interval],
    judges: Sequence[JudgeResults] = (),
) -> pd.DataFrame:
    """Build results.csv: one row per configuration. An unknown value is left empty, never 0.

    Args:
        training: metrics of 03 by configuration.
        answering: metrics of 04 by configuration.
        loss_intervals: validation loss with its interval by configuration, nats per supervised token.
        judges: the judges whose scores become columns.
    """
    columns = result_columns(judge.name for judge in judges)
    table = pd.DataFrame.from_dict(dict(training), orient="index").reindex(columns=columns).rename_axis("config")
    for name in (*SET_LOSSES, "answer_energy_wh"):
        table[name] = pd.Series({c: answering.get(c, {}).get(name) for c in training}, dtype=float)
    for config, interval in loss_intervals.items():
        table.loc[config, ["val_loss", "val_loss_low", "val_loss_high"]] = list(interval)
    for judge in judges:
        for part in JUDGE_PARTS[:-1]:
            values = judge.ranking[part].reindex(table.index).astype(float)
            table[f"{judge.name}_{part}"] = values.round() if "rank" in part else values
        table[f"{judge.name}_gate"] = {True: "passed", False: "failed"}.get(judge.gate_passed)
    refuse_infinite(table)
    whole = [f"{judge.name}_{part}" for judge in judges for part in JUDGE_PARTS if "rank" in part]
    whole += ["rank", "lora_alpha", "epochs", "seed", "train_tokens"]
    return table.drop(columns="config").astype(dict.fromkeys(whole, "Int64")).reset_index()


def val_loss_draws(val_losses: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> pd.DataFrame:
    """Bootstrap draws of the validation loss.

    Whole scenarios are drawn with replacement, because the conversations of one scenario are not independent. Every
    configuration sees the same draws, so that differences between configurations are paired.

    Args:
        val_losses: by configuration, columns scenario_id, loss_sum_after (nats) and n_tokens per conversation.
        n_draws, seed: of the bootstrap.

    Returns:
        (draws, configurations), in nats per supervised token.
    """
    sums = {c: frame.groupby("scenario_id")[["loss_sum_after", "n_tokens"]].sum() for c, frame in val_losses.items()}
    scenarios = sorted(set().union(*(frame.index for frame in sums.values())))
    weights = cluster_weights(len(scenarios), n_draws, seed)
    draws = {}
    for config, frame in sums.items():
        draws[config] = ratio_draws(weights, *frame.reindex(scenarios, fill_value=0).to_numpy(float).T)
    return pd.DataFrame(draws)


def val_loss_interval(val_losses: pd.DataFrame, draws: pd.Series | np.ndarray) -> Interval:
    """Token-weighted validation loss of one configuration with its scenario-bootstrap interval."""
    value = val_losses["loss_sum_after"].sum() / val_losses["n_tokens"].sum()
    return percentile_interval(value, draws, val_losses["scenario_id"].nunique())


def set_loss_draws(reference_losses: Mapping[str, pd.DataFrame], n_draws: int, seed: int) -> dict[str, pd.DataFrame]:
    """Bootstrap draws of the loss on each test set, whole terms drawn with replacement.

    Args:
        reference_losses: by configuration, columns test_set, term_id, loss_sum (nats) and n_tokens per prompt.
        n_draws, seed: of the bootstrap.

    Returns:
        By `test_loss`, `noisy_loss`, ...: (draws, configurations), in nats per token.
    """
    renamed = {"term_id": "scenario_id", "loss_sum": "loss_sum_after"}
    tables = {config: table.rename(columns=renamed) for config, table in reference_losses.items()}
    names = sorted(set().union(*(table["test_set"] for table in tables.values())))
    return {
        f"{name}_loss": val_loss_draws({c: t[t["test_set"] == name] for c, t in tables.items()}, n_draws, seed)
        for name in names
    }


def curve_ends(curves: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The training loss at the start and at the end, by configuration: means of the first and last tenth of the steps.

    Args:
        curves: by configuration, a row per step with column train_loss (nats per token).

    Returns:
        Columns start and end, indexed by configuration.
    """
    ends = {
        config: [part.mean() for part in (steps.head(max(1, len(steps) // 10)), steps.tail(max(1, len(steps) // 10)))]
        for config, steps in ((config, curve["train_loss"]) for config, curve in curves.items())
    }
    return pd.DataFrame.from_dict(ends, orient="index", columns=["start", "end"], dtype=float)


def paired_draws(study: StudyResults, judge: JudgeResults) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draws of loss and score over the configurations that have both, cut to the same number of draws.

    The two bootstraps resample different things (validation scenarios, test prompts), so pairing by number is as good
    as any other pairing.
    """
    configs = [c for c in study.losses.index if c in judge.scores.index and c in judge.draws]
    n_draws = min(len(study.loss_draws), len(judge.draws))
    return study.loss_draws[configs].iloc[:n_draws], judge.draws[configs].iloc[:n_draws]


def retest_reliability(judge: JudgeResults) -> float:
    """Test-retest reliability: the tau-b that the scores of two runs of the study would on average have.

    Two runs share the true scores and differ in their errors. The scores of one run spread more than true ones, by
    their errors, so they are first drawn together by that share; then errors of draws are added, of two runs each.
    Errors are those of `error_draws` where there are some: `draws` are wider, to make t intervals.

    Returns:
        NaN without draws.
    """
    names, drawn = list(judge.scores.index), judge.draws if judge.error_draws is None else judge.error_draws
    errors = drawn[names].dropna().to_numpy()[: 2 * RETEST_PAIRS]
    if len(errors) < 2 or len(names) < 2:
        return math.nan
    errors = errors - errors.mean(axis=0)
    centred = errors - errors.mean(axis=1, keepdims=True)  # what all scores share reorders nothing
    noise = float((centred**2).sum()) / (len(errors) - 1) / (len(names) - 1)
    spread = float(judge.scores.var())
    kept = math.sqrt(max(0.0, 1 - noise / spread)) if spread > 0 else 0.0
    runs = kept * judge.scores.to_numpy() + errors
    half = len(runs) // 2
    taus = tau_rows(runs[:half], runs[half : 2 * half])
    return float(np.nanmean(taus)) if np.isfinite(taus).any() else math.nan


def own_answers(
    kind: str | None, model: str | None, base_model: str | None, generator_model: str | None, configs: Sequence[str]
) -> set[str]:
    """The names in the ranking whose answers count as a judge's own: those that its own model has written.

    Args:
        kind, model: of the judge. The gold answers (`reference`) are the judge `embedding`'s own as well.
        base_model: the model that is trained.
        generator_model: the model that wrote the conversations, None for the grammar.
        configs: the configurations.
    """
    own = {"reference"} if kind == "embedding" or (model and model == generator_model) else set()
    return own | ({*configs, "untuned"} if model and model == base_model else set())


def self_preference(
    judgements: pd.DataFrame, others: Sequence[pd.DataFrame], own: set[str], n_draws: int, seed: int
) -> tuple[Interval, int]:
    """The surplus with which a judge prefers its own answers, compared with the other judges.

    Counts the pairs of one own and one foreign answer that this judge and at least one other have decided: mean share
    for the own side, a tie as a half, minus the mean of the other judges' shares on the same pair.

    Args:
        judgements: of this judge, columns as in `cohen_kappa`.
        others: judgements of the other judges.
        own: see `own_answers`.
        n_draws, seed: of the bootstrap over scenarios.

    Returns:
        The difference of the shares with its interval, NaN if there is nothing to compare; and the number of pairs.
    """
    shares, other_shares = _own_shares(judgements, own), [_own_shares(table, own) for table in others]
    if shares.empty or all(table.empty for table in other_shares):
        return MISSING, 0
    consensus = pd.concat(other_shares).groupby(["prompt_id", "pair"])["share"].mean().rename("consensus")
    both = shares.merge(consensus.reset_index(), on=["prompt_id", "pair"])
    if both.empty:
        return MISSING, 0
    both["gap"] = both["share"] - both["consensus"]
    sums = both.groupby("scenario_id")["gap"].agg(["sum", "size"]).to_numpy(float)
    drawn = ratio_draws(cluster_weights(len(sums), n_draws, seed), *sums.T)
    return percentile_interval(both["gap"].mean(), drawn, len(sums)), len(both)


def _own_shares(judgements: pd.DataFrame, own: set[str]) -> pd.DataFrame:
    """Share (1, 0.5 for a tie, 0) of the own side in every first comparison of an own with a foreign answer."""
    rows = judgements[judgements["purpose"].isin(("ranking", "anchor"))]
    rows = rows[rows["config_first"].isin(own) != rows["config_second"].isin(own)]
    share = np.where(rows["winner"] == "tie", 0.5, rows["winner"].isin(own).astype(float))
    pair = ["|".join(sorted(seats)) for seats in zip(rows["config_first"], rows["config_second"], strict=True)]
    by_pair = rows[["prompt_id", "scenario_id"]].assign(pair=pair, share=share)
    return by_pair.groupby(["prompt_id", "scenario_id", "pair"], as_index=False)["share"].mean()
