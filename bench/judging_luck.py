"""Do intervals with the luck of training hold the truth? Judged studies with planted luck, from verdicts to ranks.

`python bench/judging_luck.py [studies] [luck]`; the defaults, 200 and .3, take about 2 minutes on 2 cores.

Each study has 8 configurations, 6 of them trained with a second seed, and all pairs of runs on 24 prompts. Every run
has its luck, every prompt its own effect on every run. The verdicts are fitted and resampled as in 05_judge; then the
runs of a configuration are merged as in 06_analysis. `first runs alone` is what a study without the repeats would say:
the verdicts on pairs of first runs, fitted anew.
"""

import sys

import numpy as np
import pandas as pd

from telco_nb.analysis import seeds
from telco_nb.analysis.results import JudgeResults
from telco_nb.judge import bradley_terry, ranking

CONFIGS = [f"c{i}" for i in range(1, 9)]
RUNS = [*CONFIGS, *(f"{config}-seed1" for config in CONFIGS[:6])]
PLAN = pd.DataFrame(
    [
        (f"p{k:02d}", f"t{k:02d}", f"s{k:02d}", *((a, b) if (i + j + k) % 2 else (b, a)), "ranking")
        for k in range(24)
        for i, a in enumerate(RUNS)
        for j, b in enumerate(RUNS[:i])
    ],
    columns=["prompt_id", "term_id", "scenario_id", "config_first", "config_second", "purpose"],
)


def judged_verdicts(rng: np.random.Generator, truth: pd.Series, luck: float) -> pd.DataFrame:
    """Verdicts on all pairs of runs, with planted luck of every run and effects of every prompt."""
    ability = np.array([truth[seeds.config_of(run)] for run in RUNS]) + rng.normal(0, luck, len(RUNS))
    here = ability + rng.normal(0, 0.4, (24, len(RUNS)))
    first, second = (pd.Index(RUNS).get_indexer(PLAN[f"config_{seat}"]) for seat in ("first", "second"))
    prompt = PLAN["prompt_id"].str[1:].astype(int).to_numpy()
    eta = here[prompt, first] - here[prompt, second]
    odds = np.exp(np.stack([eta / 2, np.full(len(eta), -0.7), -eta / 2], axis=1))
    drawn = (rng.random((len(eta), 1)) > np.cumsum(odds / odds.sum(1, keepdims=True), axis=1)).sum(1)
    return PLAN.assign(verdict=np.array(bradley_terry.VERDICTS)[drawn])


def ranked(verdicts: pd.DataFrame, runs: list[str], draws: int = 200) -> JudgeResults:
    """The verdicts on pairs of the given runs as 05_judge ranks them: whatever it knows of others stays out."""
    verdicts = verdicts[verdicts["config_first"].isin(runs) & verdicts["config_second"].isin(runs)]
    fitted = bradley_terry.fit_bradley_terry(verdicts, runs)
    found = bradley_terry.bootstrap_fit(verdicts, fitted, draws=draws, seed=1)
    table = ranking.ranking_table(verdicts, fitted, found).set_index("config")
    scores = pd.DataFrame(found.abilities, columns=fitted.configs)
    return JudgeResults("checklist", "checklist", True, 1.0, (), table, scores)


def covered(table: pd.DataFrame, truth: pd.Series) -> tuple[float, float]:
    """The shares of intervals of score and of rank that hold the truth."""
    table, centred = table.loc[CONFIGS], truth - truth.mean()
    place = truth.rank(ascending=False)
    in_score = (table["low"] <= centred) & (centred <= table["high"])
    return float(in_score.mean()), float(((table["rank_low"] <= place) & (place <= table["rank_high"])).mean())


if __name__ == "__main__":
    given = [float(argument) for argument in sys.argv[1:]]
    studies, luck = (*given, *(200, 0.3)[len(given) :])
    rng, held, alone, found = np.random.default_rng(5), [], [], []
    for study in range(int(studies)):
        truth = pd.Series(rng.normal(0, 0.6, 8), CONFIGS)
        verdicts = judged_verdicts(rng, truth, luck)
        merged = seeds.merge_runs(ranked(verdicts, RUNS), study)
        held.append(covered(merged.ranking, truth))
        found.append(merged.luck.sd.value if merged.luck else np.nan)
        alone.append(covered(ranked(verdicts, CONFIGS).ranking, truth))
    for name, shares in (("with the luck of training", held), ("first runs alone", alone)):
        score, rank = np.mean(shares, axis=0)
        print(f"{name}: {score:.3f} of the intervals of scores and {rank:.3f} of those of ranks hold the truth")
    print(f"planted luck {luck:g}, found on average {np.nanmean(found):.3f}")
