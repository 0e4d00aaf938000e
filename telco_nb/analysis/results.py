"""The results of a study as tables and objects: one row a configuration, one object a judge."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from telco_nb.analysis.statistics import Interval, kendall_tau, percentile_interval
from telco_nb.judge.ranking import tied_top

PARAMETER_COLUMNS = ("target_modules", "rank", "lora_alpha", "epochs", "learning_rate", "seed")
TRAINING_COLUMNS = (
    "train_energy_wh", "train_energy_low_wh", "train_energy_high_wh", "energy_kind", "energy_source",
)  # fmt: skip
PROXY_KINDS = ("checklist", "reference")


@dataclass(frozen=True)
class JudgeResults:
    """What 05 says about one judge. `ranking` is indexed by configuration, `draws` is (draws, configurations)."""

    name: str
    kind: str | None
    gate_passed: bool | None
    failed_controls: tuple[str, ...]
    coverage: float | None
    headline_blocks: tuple[str, ...]
    ranking: pd.DataFrame
    draws: pd.DataFrame
    model: str | None = None
    controls: tuple[Mapping[str, Any], ...] = ()  # of the validity gate: control, value, rule, threshold, n, passed

    @property
    def scores(self) -> pd.Series:
        """Bradley-Terry ability (log-odds) of the ranked configurations, anchors left out."""
        return self.ranking.loc[~self.ranking["is_anchor"].astype(bool), "score"].dropna()

    @property
    def is_proxy(self) -> bool:
        return (self.kind or self.name) in PROXY_KINDS

    @property
    def label(self) -> str:
        """The name; offline judges are proxies and are called so wherever they appear."""
        return f"{self.name} (offline proxy)" if self.is_proxy else self.name

    @property
    def blocks(self) -> list[str]:
        """Why this judge's ranking may not carry a headline, as 05_judge found it; empty if it may."""
        return [f"judge {self.name}: {block}" for block in self.headline_blocks]


@dataclass(frozen=True)
class StudyResults:
    """Everything the statistics need. `results` is indexed by configuration, `loss_draws` is (draws, configurations);
    `repeats` has one row per seed repeat: config, seed, val_loss, train_energy_wh. `invalid_energy` names the
    configurations whose energy window was too short or read nothing.
    """

    results: pd.DataFrame
    loss_draws: pd.DataFrame
    judges: Sequence[JudgeResults]
    repeats: pd.DataFrame
    invalid_energy: tuple[str, ...] = ()

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
        """Why the training energies may not be compared; empty if they may."""
        found = []
        if len(self.energy_kinds) > 1:
            found.append(f"energies of different kinds ({self.energy_word}) do not stand on one ranking")
        if self.invalid_energy:
            n = len(self.invalid_energy)
            found.append(
                f"{n} of {len(self.results)} energy windows are too short to trust ({self.invalid_energy[0]} ...)"
            )
        return found

    @property
    def energy_word(self) -> str:
        """`estimated`, `measured`, ...: belongs beside every energy figure."""
        return " and ".join(self.energy_kinds) or "not metered"


def read_judge(name: str, path: Callable[[str], Path]) -> JudgeResults:
    """The judge's result from 05's files; `path` maps a file name of that step to where it lies."""
    metrics = json.loads(path("metrics.json").read_text(encoding="utf-8"))
    validity = json.loads(path("artefacts/validity.json").read_text(encoding="utf-8"))
    draws = pd.read_parquet(path("tables/score_draws.parquet"))
    return JudgeResults(
        name=name,
        kind=metrics.get("judge_kind"),
        gate_passed=validity.get("passed"),
        failed_controls=tuple(c["control"] for c in validity.get("controls", []) if c["passed"] is not True),
        coverage=metrics.get("coverage"),
        headline_blocks=tuple(validity.get("headline_blocks", ["its result is not complete"])),
        ranking=pd.read_parquet(path("tables/ranking.parquet")).set_index("config"),
        draws=draws.pivot(index="draw", columns="config", values="score"),
        model=metrics.get("judge_model"),
        controls=tuple(validity.get("controls", [])),
    )


def gate_table(judges: Sequence[JudgeResults]) -> pd.DataFrame:
    """One row per planted control: what is required, and each judge's value with passed or FAILED."""
    rows: dict[str, dict[str, str]] = {}
    for judge in judges:
        for found in judge.controls:
            required = f"{found.get('rule', '')} {found['threshold']:g}".strip()
            row = rows.setdefault(found["control"], {"required": required})
            value = "no verdict" if found["value"] is None else f"{found['value']:.3f} (n = {found['n']})"
            row[judge.label] = f"{value} {'passed' if found['passed'] else 'FAILED'}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("control").reset_index()


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
    judges: Sequence[JudgeResults] = (),
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


def _judge_columns(judge: JudgeResults, config: str) -> dict[str, Any]:
    gate = {True: "passed", False: "failed"}.get(judge.gate_passed)
    if config not in judge.ranking.index:
        return {f"{judge.name}_gate": gate}
    row = judge.ranking.loc[config]
    parts = {part: row[part] for part in ("score", "low", "high", "rank", "rank_low", "rank_high")}
    whole = {p: None if pd.isna(v) else round(v) if "rank" in p else float(v) for p, v in parts.items()}
    return {f"{judge.name}_{part}": value for part, value in whole.items()} | {f"{judge.name}_gate": gate}


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


def paired_draws(study: StudyResults, judge: JudgeResults) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draws of loss and score over the configurations that have both, cut to the same number of draws.

    The two bootstraps resample different things (validation scenarios, test prompts), so pairing by number is as good
    as any other pairing.
    """
    configs = [c for c in study.losses.index if c in judge.scores.index and c in judge.draws]
    n_draws = min(len(study.loss_draws), len(judge.draws))
    return study.loss_draws[configs].iloc[:n_draws], judge.draws[configs].iloc[:n_draws]


def noise_ceiling(judge: JudgeResults) -> float:
    """The |tau| that even a perfect predictor would show against this judge: mean tau of its draws with its scores."""
    scores = judge.scores
    draws = judge.draws[list(scores.index)].to_numpy()[:500]
    return float(np.nanmean([kendall_tau(scores.to_numpy(), row) for row in draws]))


def expected_win_share(log_odds: float) -> float:
    """Share of decided comparisons that a lead of `log_odds` wins (Bradley-Terry)."""
    return float(1 / (1 + math.exp(-log_odds)))


def tied_top_set(judge: JudgeResults) -> list[str]:
    """Configurations not distinguishable from the judge's best one, best first (`ranking.tied_top`)."""
    return tied_top(judge.scores, judge.draws)


def own_answers(
    kind: str | None, model: str | None, base_model: str | None, generator_model: str | None, configs: Sequence[str]
) -> set[str]:
    """Whose answers count as a judge's own: written by its own model, or (judge `reference`) its own yardstick."""
    own = {"reference"} if kind == "reference" or (model and model == generator_model) else set()
    return own | ({*configs, "untuned"} if model and model == base_model else set())


def self_preference(
    votes: pd.DataFrame, others: Sequence[pd.DataFrame], own: set[str], n_draws: int, seed: int
) -> tuple[Interval, int]:
    """How much more often a judge prefers its own answers than the other judges do, and over how many comparisons.

    Over the pairs of one own and one foreign answer that this judge and at least one other have decided (`votes` and
    `others` are judgements as in `cohen_kappa`): mean share for the own side, a tie as a half, minus the mean of the
    other judges' shares on the same pair. The interval draws scenarios. NaN where there is nothing to compare.
    """
    mine, theirs = _own_shares(votes, own), pd.concat([_own_shares(v, own) for v in others]) if others else None
    if theirs is None or mine.empty or theirs.empty:
        return Interval(math.nan, math.nan, math.nan), 0
    consensus = theirs.groupby(["prompt_id", "pair"])["share"].mean().rename("consensus").reset_index()
    both = mine.merge(consensus, on=["prompt_id", "pair"])
    if both.empty:
        return Interval(math.nan, math.nan, math.nan), 0
    both["gap"] = both["share"] - both["consensus"]
    sums = both.groupby("scenario_id")["gap"].agg(["sum", "size"]).to_numpy(float)
    weights = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), n_draws)
    drawn = weights @ sums
    return percentile_interval(both["gap"].mean(), drawn[:, 0] / drawn[:, 1]), len(both)


def _own_shares(votes: pd.DataFrame, own: set[str]) -> pd.DataFrame:
    """Share (1, 0.5 for a tie, 0) of the own side in every first asking of an own against a foreign answer."""
    asked = votes[votes["purpose"].isin(("ranking", "anchor"))]
    first, second = asked["config_first"].isin(own), asked["config_second"].isin(own)
    kept = asked[first != second]
    share = np.where(kept["winner"] == "tie", 0.5, kept["winner"].isin(own).astype(float))
    pair = ["|".join(sorted(p)) for p in zip(kept["config_first"], kept["config_second"], strict=True)]
    found = kept[["prompt_id", "scenario_id"]].assign(pair=pair, share=share)
    return found.groupby(["prompt_id", "scenario_id", "pair"], as_index=False)["share"].mean()


def energy_ratio(results: pd.DataFrame, most: str, least: str) -> Interval:
    """Energy of `most` over that of `least`. Low and high assume that both share one error (watts per core, calibration
    of one meter): errors that differ from run to run are not in it.
    """
    columns = ("train_energy_wh", "train_energy_low_wh", "train_energy_high_wh")
    ratios = [float(results.loc[most, c]) / float(results.loc[least, c]) for c in columns]
    return Interval(ratios[0], float(np.nanmin(ratios)), float(np.nanmax(ratios)))
