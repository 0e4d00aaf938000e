"""What the recommendation is worth, from verdicts on: how often it claims too much, and what it loses.

`python bench/choice.py [studies]`; the default, 200, takes a quarter of an hour on 2 cores. Each study is 16
configurations of the design, 48 prompts of as many terms, verdicts drawn from the model with effects of prompts, the
fit, its bootstrap and the rule with the shipped margin, at random energies. Printed: the share of studies in which the
choice is called supported (without any difference it must be at most 5 %), in which the data cannot tell, and in which
a candidate is further behind the best than the margin; and the mean regret in log-odds of the rule, of the highest
score, of the cheapest of those not told apart from the best, and of a random choice.
"""

import dataclasses
import sys

import numpy as np
import pandas as pd

from telco_nb import ROOT

sys.path.insert(0, str(ROOT / "tests" / "support"))
import fake_study

from telco_nb.analysis.recommendation import recommend
from telco_nb.judge import bradley_terry, ranking
from telco_nb.judge.design import plan_comparisons
from telco_nb.study.params import load_claims

DESIGN = fake_study.design()
CONFIGS, PROMPTS, PROMPT_SD, DRAWS = list(DESIGN.index), 48, 0.4, 400
WORLDS = {  # SD of the effect of a level, and of what the main effects leave over
    "no difference": (0.0, 0.0),
    "main effects": (0.25, 0.05),
    "main effects and interactions": (0.25, 0.15),
    "interactions only": (0.0, 0.4),
}


def plan(complete: bool) -> pd.DataFrame:
    names = [f"p{i:02d}" for i in range(PROMPTS)]
    prompts = pd.DataFrame({"prompt_id": names, "scenario_id": names, "term_id": names})
    shares = {"swap_share": 0.25, "retest_share": 0.0, "anchor_share": 0.0}
    return plan_comparisons(prompts, CONFIGS, matchings_per_prompt=15 if complete else 2, **shares, seed=1)


def planted(main: float, rest: float, rng: np.random.Generator) -> pd.Series:
    truth = pd.Series(rng.normal(0, rest, len(CONFIGS)), CONFIGS)
    for factor in ("target_modules", "rank", "epochs", "learning_rate"):
        truth += DESIGN[factor].map({level: rng.normal(0, main) for level in DESIGN[factor].unique()})
    return truth - truth.mean()


def judge(plan: pd.DataFrame, truth: pd.Series, rng: np.random.Generator, seed: int):
    """A judge with the ranking and the draws of its verdicts."""
    first, second = (pd.Index(CONFIGS).get_indexer(plan[f"config_{seat}"]) for seat in ("first", "second"))
    here = truth.to_numpy() + rng.normal(0, PROMPT_SD, (PROMPTS, len(CONFIGS)))
    prompt = plan["prompt_id"].str[1:].astype(int).to_numpy()
    lead = here[prompt, first] - here[prompt, second] + 0.3
    odds = np.exp(np.stack([lead / 2, np.full(len(lead), -0.7), -lead / 2], axis=1))
    drawn = (rng.random((len(lead), 1)) > (odds / odds.sum(1, keepdims=True)).cumsum(1)).sum(1)
    seen = plan.assign(verdict=np.array(bradley_terry.VERDICTS)[drawn])
    fitted = bradley_terry.fit_bradley_terry(seen, CONFIGS)
    draws = bradley_terry.bootstrap_fit(seen, fitted, draws=DRAWS, seed=seed)
    table = ranking.ranking_table(seen, fitted, draws).set_index("config")
    made = fake_study.make_judge(pd.Series(fitted.abilities, CONFIGS))
    return dataclasses.replace(made, ranking=table, draws=pd.DataFrame(draws.abilities, columns=CONFIGS))


def run(world: str, complete: bool, studies: int) -> str:
    design, margin, rows = plan(complete), load_claims().margin, []
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        truth = planted(*WORLDS[world], rng)
        one = judge(design, truth, rng, seed)
        energy = pd.Series(rng.uniform(1, 4, len(CONFIGS)), CONFIGS)
        choice = recommend(fake_study.make_study(16, [one], train_energy_wh=energy.to_numpy()))
        tied = ranking.tied_top(one.scores, one.draws, one.ranking["n_terms"])
        behind = truth.max() - truth
        wrong = any(behind[config] > margin for config in choice.candidates)
        lost = [behind[choice.config], behind[one.scores.idxmax()], behind[energy[tied].idxmin()], behind.mean()]
        rows.append([choice.is_supported, not choice.candidates, wrong, *lost])
    supported, cannot, wrong, *lost = np.mean(rows, axis=0)
    told = ", ".join(f"{name} {value:.3f}" for name, value in zip(("rule", "top", "tied", "random"), lost, strict=True))
    return f"supported {supported:.3f}, cannot tell {cannot:.3f}, wrong {wrong:.3f}; regret {told}"


if __name__ == "__main__":
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for complete in (True, False):
        for world in WORLDS:
            plan_name = "all pairs" if complete else "sparse plan"
            print(f"{plan_name}, {world}: {run(world, complete, studies)}", flush=True)
