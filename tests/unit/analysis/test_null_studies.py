"""Where nothing differs, nothing is claimed: 200 studies of equal configurations, through everything that 06 says."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from functools import cache
from itertools import combinations

import fake_study
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from telco_nb.analysis import findings, results, statistics
from telco_nb.analysis.claims import primary_finding
from telco_nb.analysis.drift import drift_findings
from telco_nb.analysis.parting import Measure, parting_findings
from telco_nb.analysis.power import power_findings
from telco_nb.analysis.recommendation import Recommendation
from telco_nb.analysis.results import JudgeResults, StudyResults
from telco_nb.analysis.seeds import luck_findings, merge_runs, with_loss_luck, with_scores
from telco_nb.analysis.serving import Rates, million_answers, serving_finding
from telco_nb.analysis.strengths import strength_findings, strength_table
from telco_nb.analysis.taught import taught_finding, taught_table
from telco_nb.judge.anchors import FLOORS, GOLD
from telco_nb.judge.cases import CRITERIA

STUDIES, TERMS, DRAWS = 200, 24, 200
DESIGN = fake_study.design()
CONFIGS = list(DESIGN.index)
REPEATS = [f"{config}-seed1" for config in CONFIGS[:8]]
RUNS = [*CONFIGS, *REPEATS]
LUCK, NOISE = 0.3, 0.15  # of a run's score and of judging, log-odds
TRUE = {  # what holds where all are equal, so that `supported` is right
    "primary": "the lowest loss answers as well as the best one",
    "equivalence": "the best two are equivalent",
}


def judged(rng: np.random.Generator, name: str, anchors: float) -> JudgeResults:
    """Runs that differ by the luck of training and by the terms that were drawn, and anchors that lie apart."""
    everyone = [*RUNS, *FLOORS]
    level = np.where(np.isin(everyone, FLOORS), anchors, 0.0) + rng.normal(0, LUCK, len(everyone))
    values = level + rng.normal(0, NOISE * np.sqrt(TERMS), (TERMS, len(everyone)))
    weights = rng.multinomial(TERMS, np.full(TERMS, 1 / TERMS), DRAWS) / TERMS
    made = fake_study.make_judge(pd.Series(values.mean(0), everyone), name=name)
    draws = pd.DataFrame(weights @ values, columns=everyone)
    bounds = dict(zip(("low", "high"), np.quantile(draws, (0.025, 0.975), axis=0), strict=True))
    table = made.ranking.assign(n_terms=TERMS, is_anchor=made.ranking.index.isin(FLOORS), p_best=0.1, **bounds)
    return merge_runs(dataclasses.replace(made, ranking=table, draws=draws))


def drawn(rng: np.random.Generator, values: np.ndarray, noise: float) -> pd.DataFrame:
    return pd.DataFrame(values + rng.normal(0, noise, (DRAWS, len(values))), columns=CONFIGS[: len(values)])


def checks_of(rng: np.random.Generator) -> pd.DataFrame:
    """What the checklist finds in answers that are all alike, whoever wrote them."""
    everyone = [*CONFIGS, *FLOORS, GOLD]
    rows = pd.DataFrame([(c, f"p{t}", f"t{t}") for c in everyone for t in range(TERMS)])
    rows = rows.set_axis(["config", "prompt_id", "term_id"], axis=1).assign(flags="", asks_for_secret=False)
    for column in ("coverage", "content", "style"):
        rows[column] = rng.uniform(0.4, 0.8, len(rows))
    taught = rows["term_id"].str[1:].astype(int) < TERMS * 2 // 3
    return rows.assign(unsafe=False, taught=taught.astype("boolean"))


def null_study(rng: np.random.Generator) -> StudyResults:
    """A study in which losses, scores, energies and answers differ by chance alone."""
    n, losses = len(CONFIGS), {}
    panel = [judged(rng, "checklist", -4.0)]
    for name in ("val_loss", "test_loss", "noisy_loss", "unseen_loss"):
        losses[name] = 0.5 + rng.normal(0, 0.01, n)
    energy = np.exp(rng.normal(0, 0.05, n))
    ends = {"train_energy_low_wh": energy * 0.9, "train_energy_high_wh": energy * 1.1}
    study = fake_study.make_study(n, panel, **losses, train_energy_wh=energy, **ends)
    repeats = pd.DataFrame({"config": CONFIGS[: len(REPEATS)], "seed": 1})
    repeats["val_loss"] = 0.5 + rng.normal(0, 0.01, len(REPEATS))
    repeats["train_energy_wh"] = np.exp(rng.normal(0, 0.05, len(REPEATS)))
    study = dataclasses.replace(
        study,
        loss_draws=drawn(rng, losses["val_loss"], 0.005),
        repeats=with_scores(repeats, panel),
        checks=checks_of(rng),
        faults=pd.DataFrame({"config": [*CONFIGS, "untuned"], "answers": TERMS, "broken": 0}),
        set_draws={name: drawn(rng, values, 0.005) for name, values in losses.items() if name != "val_loss"},
        train_losses=pd.Series(0.4 + rng.normal(0, 0.01, n), CONFIGS),
        n_scenarios=TERMS,
    )
    return with_loss_luck(study, int(rng.integers(1 << 30)))


def measures_of(rng: np.random.Generator) -> dict[str, Measure]:
    found = {}
    for name in ("card_choice", "forgetting"):
        values = rng.normal(0.5, 0.1, len(CONFIGS))
        table = pd.DataFrame({"value": values, "low": values - 0.1, "high": values + 0.1, "n": 30}, index=CONFIGS)
        found[name] = Measure(table, drawn(rng, values, 0.05))
    return found


def strengths(rng: np.random.Generator) -> list[findings.Finding]:
    """Four strengths that change nothing but the noise of each answer."""
    rows = [(s, f"p{t}", f"t{t}", 20, 20 * rng.normal(2, 0.1)) for s in (0.5, 0.75, 1.0, 1.25) for t in range(TERMS)]
    table = pd.DataFrame(rows, columns=["strength", "prompt_id", "term_id", "n_tokens", "loss_sum"])
    return strength_findings(strength_table({"c01": table}, roles := {"c01": "front-runner"}, DRAWS, 1), roles)


def between_judges(rng: np.random.Generator, panel: list[JudgeResults]) -> list[findings.Finding]:
    """Two judges that decide and rate by lot: kappa, alpha, and a preference for a judge's own answers."""
    tables, n = [], 240
    first, second = rng.integers(len(CONFIGS), size=(2, n))
    keep = first != second
    ids = pd.DataFrame({"prompt_id": [f"p{i % TERMS}" for i in range(n)], "purpose": "ranking"})
    ids = ids.assign(scenario_id=ids["prompt_id"].str.replace("p", "s"))
    ids["config_first"], ids["config_second"] = np.array(CONFIGS)[first], np.array(CONFIGS)[second]
    for _ in panel:
        winner = np.where(rng.random(n) < 0.5, ids["config_first"], ids["config_second"])
        tables.append(ids.assign(winner=winner)[keep].drop_duplicates(["prompt_id", "config_first", "config_second"]))
    said = [findings.kappa_finding(a, b, *statistics.cohen_kappa(*tables, DRAWS, 1)) for a, b in combinations(panel, 2)]
    rated = (
        ids[["prompt_id", "scenario_id"]].assign(config=ids["config_first"]).drop_duplicates(["prompt_id", "config"])
    )
    ratings = pd.concat(
        [rated.assign(rater=judge.name, **{c: rng.integers(1, 6, len(rated)) for c in CRITERIA}) for judge in panel]
    )
    gap, compared = results.self_preference(tables[0], tables[1:], set(own := CONFIGS[:3]), DRAWS, 1)
    said.append(findings.self_preference_finding(panel[0], set(own), gap, compared))
    return said + findings.rubric_findings(panel, ratings, DRAWS, 1)


def energy(rng: np.random.Generator) -> list[findings.Finding]:
    """The machine's drift, and what a million answers take."""
    runs = [
        {"train_energy_wh": wh, "energy_kind": "measured", "energy_valid": True, "train_seconds": 9.0, "val_loss": 0.5,
         "train_started_at": f"2026-01-01T1{k}:00:00+00:00"} for k, wh in enumerate(np.exp(rng.normal(0, 0.05, 2)))
    ]  # fmt: skip
    one = {"energy_kind": "measured"} | {f"answer_energy{end}_per_answer_wh": 0.02 for end in ("", "_low", "_high")}
    rates = Rates(0.25, 436.0, "a grid")
    costs = million_answers({"c01": one}, {"c01": runs[0]}, rates)
    return [*drift_findings({"c01": runs[0]}, {"c01-drift": runs[1]}), serving_finding(costs, "c01", rates)]


def told(seed: int) -> list[findings.Finding]:
    """Every finding of one study, as 06 makes them."""
    rng = np.random.default_rng(seed)
    study = null_study(rng)
    said = [primary_finding(study), taught_finding(taught_table(study.checks, CONFIGS, DRAWS, seed))]
    said += [one for one in findings.all_findings(study, seed) if kind_of(one.id) != "gain"]
    said += [*luck_findings(study), *power_findings(study, 48)]
    said += [*parting_findings(study, measures_of(rng), seed), *strengths(rng)]
    other, equal = judged(rng, "other", 0.0), judged(rng, "equal", 0.0)  # here the untuned model is as good
    said += findings._gains(dataclasses.replace(study, judges=[equal]), Recommendation(None, [], "", []))
    said.append(findings._agreement(study, study.judges[0], other, seed))
    return [*said, *between_judges(rng, [study.judges[0], other]), *energy(rng)]


def kind_of(id: str) -> str:
    """The kind of a finding; the reasons of `parting` and the responses of `effect` are kinds of their own."""
    parts = id.split(".")
    return ".".join(parts[:2]) if parts[0] in ("parting", "effect") else parts[0]


@cache
def claims() -> dict[str, np.ndarray]:
    """By kind, in which studies a finding of the kind is supported (one of a family of several is enough)."""
    found: dict[str, list[bool]] = defaultdict(list)
    for seed in range(STUDIES):
        kinds: dict[str, bool] = defaultdict(bool)
        for one in told(seed):
            kinds[kind_of(one.id)] |= one.verdict == "supported"
        for kind, supported in kinds.items():
            found[kind].append(supported)
    return {kind: np.array(values) for kind, values in found.items()}


def test_one_study_goes_through_every_kind_of_finding():
    assert {"regret", "strength", "alpha", "gain", "parting.all"} <= {kind_of(one.id) for one in told(0)}


@pytest.mark.nightly  # three minutes of a core
def test_a_finding_of_any_kind_is_supported_in_at_most_5_percent_of_studies_within_binomial_error():
    most = stats.binom.ppf(0.99, STUDIES, 0.05)
    counts = {kind: int(found.sum()) for kind, found in claims().items() if kind not in TRUE}
    assert {kind: count for kind, count in counts.items() if count > most} == {}, (most, counts)


@pytest.mark.nightly  # three minutes of a core
def test_every_kind_of_finding_that_can_be_supported_was_looked_at_in_every_study():
    assert {len(found) for found in claims().values()} == {STUDIES}
    assert set(TRUE) < set(claims())
    assert len(claims()) >= 35 and {"regret", "strength", "alpha", "gain", "parting.all"} <= set(claims())


def test_a_lead_over_the_choice_of_loss_that_is_there_is_supported():
    score = pd.Series(0.0, CONFIGS)
    score["c05"] = 2.0
    losses = np.linspace(0.5, 0.6, len(CONFIGS))
    study = fake_study.make_study(len(CONFIGS), [fake_study.make_judge(score, 0.2)], val_loss=losses)
    regret = next(one for one in findings.all_findings(study) if one.id == "regret.checklist")
    assert regret.verdict == "supported" and 0 < regret.low < regret.value == 2 < regret.high
    assert "bounds that hold for all at once: that another one answers better is shown" in regret.statement
