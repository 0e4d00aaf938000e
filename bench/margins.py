"""Do margins make a ranking better? The fit with margins against the fit without, for judges of four kinds.

`python bench/margins.py [studies]` prints, per kind of judge and spread of abilities, Kendall's tau with the planted
truth without and with margins. The default, 200 studies, takes a minute on 2 cores.

Kinds: `adjacent` draws from the model itself; `cumulative` has one latent lead cut at four points, another model in
which margins tell as much; with `uninformative` a clear win is a coin toss; with `by seat` it depends on the seat.
16 configurations, 48 prompts, the sparse plan with its exchanged seats, effects of prompts of SD .4.
"""

import sys

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from telco_nb.judge import bradley_terry
from telco_nb.judge.design import plan_comparisons

CONFIGS, PROMPTS = [f"c{i:02d}" for i in range(16)], 48
KINDS = ("adjacent", "cumulative", "uninformative", "by seat")
POSITION, PROMPT_SD = 0.3, 0.4


def plan() -> pd.DataFrame:
    names = [f"p{i:02d}" for i in range(PROMPTS)]
    prompts = pd.DataFrame({"prompt_id": names, "scenario_id": names, "term_id": names})
    shares = {"swap_share": 0.25, "retest_share": 0.0, "anchor_share": 0.0}
    return plan_comparisons(prompts, CONFIGS, matchings_per_prompt=2, **shares, seed=1)


def judged(plan: pd.DataFrame, kind: str, truth: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """The plan with a verdict and a margin in every row."""
    first, second = (plan[f"config_{seat}"].str[1:].astype(int).to_numpy() for seat in ("first", "second"))
    here, prompt = truth + rng.normal(0, PROMPT_SD, (PROMPTS, 16)), plan["prompt_id"].str[1:].astype(int).to_numpy()
    lead = here[prompt, first] - here[prompt, second] + POSITION
    if kind == "cumulative":
        seen = lead + rng.logistic(size=len(lead))
        verdict = np.where(seen > 0.5, "A", np.where(seen < -0.5, "B", "tie"))
        return plan.assign(verdict=verdict, margin=np.where(verdict == "tie", 0, 1 + (np.abs(seen) > 1.8)))
    clear = -0.5 if kind == "adjacent" else -np.inf
    odds = np.exp(lead[:, None] * np.array([1, 0.5, 0, -0.5, -1]) + np.array([clear, 0, -0.7, 0, clear]))
    drawn = (rng.random((len(lead), 1)) > (odds / odds.sum(1, keepdims=True)).cumsum(1)).sum(1)
    verdict, margin = np.array(["A", "A", "tie", "B", "B"])[drawn], np.array([2, 1, 0, 1, 2])[drawn]
    if kind != "adjacent":
        share = 0.5 if kind == "uninformative" else np.where(verdict == "A", 0.2, 0.8)
        margin = np.where(verdict == "tie", 0, 1 + (rng.random(len(lead)) < share))
    return plan.assign(verdict=verdict, margin=margin)


def taus(kind: str, spread: float, studies: int) -> np.ndarray:
    """(studies, 2): tau without and with margins."""
    found, design = [], plan()
    for study in range(studies):
        rng = np.random.default_rng(study)
        truth = rng.normal(0, spread, 16)
        seen = judged(design, kind, truth, rng)
        fits = (bradley_terry.fit_bradley_terry(seen, CONFIGS, margins=use) for use in (False, True))
        found.append([kendalltau(fit.abilities, truth).statistic for fit in fits])
    return np.array(found)


if __name__ == "__main__":
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for kind in KINDS:
        for spread in (0.3, 0.8):
            found = taus(kind, spread, studies)
            gain = found[:, 1] - found[:, 0]
            without, used = found.mean(0)
            text = f"{kind}, SD {spread}: tau {without:.3f} without, {used:.3f} with margins"
            print(f"{text}; gain {gain.mean():+.4f} (SE {gain.std() / len(gain) ** 0.5:.4f})", flush=True)
