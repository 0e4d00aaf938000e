"""How often do 95 % intervals of a judge's scores hold the truth? Ways of resampling against each other.

`python bench/judging_coverage.py [studies] [draws]`; the defaults, 200 and 400, take about 10 minutes on 2 cores.

Each study is the real plan with verdicts drawn from the model: position .3, a tie term, 3 % failures, and effects of
terms and scenarios on every configuration, so that verdicts on one prompt hang together. The truth is what endless
terms would give. A way is good if its share is near 95 %, in the designs that the profiles use.
"""

import sys

import numpy as np
import pandas as pd

from telco_nb.judge import bradley_terry
from telco_nb.judge.design import plan_comparisons

DESIGNS = {  # prompts, prompts per term, SD of term effects, SD of scenario effects
    "paper: 156 prompts, 52 terms": (156, 3, 0.3, 0.4),
    "paper, strong terms": (156, 3, 0.6, 0.3),
    "paper, independent verdicts": (156, 3, 0.0, 0.0),
    "laptop: 40 prompts, 40 terms": (40, 1, 0.3, 0.4),
    "laptop, independent verdicts": (40, 1, 0.0, 0.0),
}
WAYS = {
    "single verdicts": ([], False),
    "terms, then scenarios": (["term_id", "scenario_id"], False),
    "terms": (["term_id"], False),
    "terms, expanded": (["term_id"], True),
}


def plan(n_prompts: int, per_term: int, configs: list[str]) -> pd.DataFrame:
    ids = {"prompt_id": [f"p{i:03d}" for i in range(n_prompts)], "scenario_id": [f"s{i:03d}" for i in range(n_prompts)]}
    prompts = pd.DataFrame(ids | {"term_id": [f"t{i // per_term:02d}" for i in range(n_prompts)]})
    shares = {"swap_share": 0.25, "retest_share": 0.0, "anchor_share": 0.0}
    return plan_comparisons(prompts, configs, matchings_per_prompt=2, **shares, seed=1)


def draw(plan: pd.DataFrame, abilities: np.ndarray, term_sd: float, scenario_sd: float, seed: int) -> pd.DataFrame:
    """The plan with a verdict in every row but 3 %. An exchanged question is about the same two answers."""
    rng = np.random.default_rng(seed)
    first, second = (plan[f"config_{seat}"].str[1:].astype(int).to_numpy() - 1 for seat in ("first", "second"))
    scenario, term = (pd.factorize(plan[name])[0] for name in ("scenario_id", "term_id"))
    local = rng.normal(0, scenario_sd, (scenario.max() + 1, len(abilities)))[scenario]
    local = local + rng.normal(0, term_sd, (term.max() + 1, len(abilities)))[term]
    here, rows = abilities + local, np.arange(len(plan))
    eta = here[rows, first] - here[rows, second] + 0.3
    shares = np.exp(np.stack([eta / 2, np.full(len(plan), -0.7), -eta / 2], axis=1))
    drawn = (rng.random((len(plan), 1)) > np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)).sum(1)
    return plan.assign(verdict=np.array(bradley_terry.VERDICTS)[drawn])[rng.random(len(plan)) >= 0.03]


def coverage(name: str, studies: int, draws: int) -> dict[str, float]:
    n_prompts, per_term, term_sd, scenario_sd = DESIGNS[name]
    configs = [f"c{i:02d}" for i in range(1, 17)]
    abilities = np.linspace(-1.2, 1.2, 16) ** 3
    design = plan(n_prompts, per_term, configs)
    many = 60_000 // n_prompts
    endless = pd.concat([draw(design, abilities, term_sd, scenario_sd, 10_000 + i) for i in range(many)])
    truth = bradley_terry.fit_bradley_terry(endless, configs).abilities
    hits: dict[str, list[float]] = {way: [] for way in WAYS}
    for study in range(studies):
        seen = draw(design, abilities, term_sd, scenario_sd, study)
        fitted = bradley_terry.fit_bradley_terry(seen, configs)
        for way, (by, expanded) in WAYS.items():
            drawn = bradley_terry.bootstrap_fit(seen, fitted, draws=draws, seed=study, by=by)
            levels = bradley_terry.interval_levels(len(drawn.units)) if expanded else (0.025, 0.975)
            low, high = np.quantile(drawn.abilities, levels, axis=0)
            hits[way].append(float(((low <= truth) & (truth <= high)).mean()))
    return {way: float(np.mean(found)) for way, found in hits.items()}


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    studies, draws = (*given, *(200, 400)[len(given) :])
    print(f"share of 95 % intervals that hold the truth; {studies} studies, {draws} draws, 16 configurations each")
    for name in DESIGNS:
        found = coverage(name, studies, draws)
        print(f"{name}: " + ", ".join(f"{way} {share:.3f}" for way, share in found.items()), flush=True)
