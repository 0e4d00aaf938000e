"""What a call to a judge buys, design against design, and how long the statistics take.

`python bench/judging_design.py [studies]` prints (1) Kendall's tau of the ranking with the planted truth at several
numbers of calls, for the sparse round robin, all pairs on few prompts, and a common opponent; (2) seconds of fit and
bootstrap for 16 and 200 configurations, and of the whole study (2 judges, 2,000 draws).

A simulated judge: 16 configurations with abilities of SD 0.5, effects of prompts on every configuration of SD 0.4, a
first-seat term of 0.3, a tie term of -0.7.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from telco_nb.judge import bradley_terry, design

CONFIGS = [f"c{i:02d}" for i in range(1, 17)]
PROMPTS = 156
ABILITY_SD, PROMPT_SD, POSITION, TIE, UNTUNED = 0.5, 0.4, 0.3, -0.7, -2.0
Score = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def prompts(n: int = PROMPTS) -> pd.DataFrame:
    names = [f"p{i:03d}" for i in range(n)]
    return pd.DataFrame({"prompt_id": names, "scenario_id": names, "term_id": [f"t{i // 3:02d}" for i in range(n)]})


def judged(plan: pd.DataFrame, here: np.ndarray, names: list[str], rng: np.random.Generator) -> pd.DataFrame:
    """A verdict for every row of a plan of pairs; `here` is (prompts, names), the abilities on each prompt."""
    index = pd.Index(names)
    first, second = (index.get_indexer(plan[f"config_{seat}"]) for seat in ("first", "second"))
    prompt = plan["prompt_id"].str[1:].astype(int).to_numpy()
    eta = here[prompt, first] - here[prompt, second] + POSITION
    shares = np.exp(np.stack([eta / 2, np.full(len(plan), TIE), -eta / 2], axis=1))
    drawn = (rng.random((len(plan), 1)) > np.cumsum(shares / shares.sum(1, keepdims=True), axis=1)).sum(1)
    return plan.assign(verdict=np.array(bradley_terry.VERDICTS)[drawn])


def sparse(matchings: int) -> tuple[int, Score]:
    shares = {"swap_share": 0.0, "retest_share": 0.0, "anchor_share": 0.0}
    plan = design.plan_comparisons(prompts(), CONFIGS, matchings_per_prompt=matchings, **shares, seed=1)
    return len(
        plan
    ), lambda here, rng: bradley_terry.fit_bradley_terry(judged(plan, here[:, :16], CONFIGS, rng), CONFIGS).abilities


def all_pairs(n_prompts: int) -> tuple[int, Score]:
    shares = {"swap_share": 0.0, "retest_share": 0.0, "anchor_share": 0.0}
    plan = design.plan_comparisons(prompts(n_prompts), CONFIGS, matchings_per_prompt=15, **shares, seed=1)
    return len(
        plan
    ), lambda here, rng: bradley_terry.fit_bradley_terry(judged(plan, here[:, :16], CONFIGS, rng), CONFIGS).abilities


def common(opponent: str, calls: int) -> tuple[int, Score]:
    """Everybody against one configuration; prompts are used again, seats exchanged, when they run out."""
    others = [c for c in CONFIGS if c != opponent]
    rows = []
    for k in range(calls // len(others)):
        for i, config in enumerate(others):
            sides = (config, opponent) if (i + k + k // PROMPTS) % 2 else (opponent, config)
            rows.append((f"p{k % PROMPTS:03d}", *sides))
    plan = pd.DataFrame(rows, columns=["prompt_id", "config_first", "config_second"])
    names = [*CONFIGS, "untuned"]

    def score(here: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return bradley_terry.fit_bradley_terry(
            judged(plan, here, names, rng), names if opponent == "untuned" else CONFIGS
        ).abilities[:16]

    return len(plan), score


def designs() -> dict[str, list[tuple[int, Score]]]:
    budgets = (1200, 2400, 4800)
    return {
        "sparse round robin": [sparse(m) for m in (1, 2, 4)],
        "all pairs, few prompts": [all_pairs(n) for n in (10, 20, 40)],
        "common opponent, of middle ability": [common("c08", n) for n in budgets],
        "common opponent, the untuned model": [common("untuned", n) for n in budgets],
    }


def tau(score: Score, studies: int) -> float:
    found = []
    for study in range(studies):
        rng = np.random.default_rng(study)
        truth = np.sort(rng.normal(0, ABILITY_SD, 16))  # c08 is in the middle
        here = np.append(truth, UNTUNED) + rng.normal(0, PROMPT_SD, (PROMPTS, 17))
        found.append(kendalltau(score(here, rng), truth).statistic)
    return float(np.mean(found))


def seconds(n_configs: int, judges: int = 1, draws: int = 2000) -> tuple[int, float, float]:
    """(verdicts, seconds of fits, seconds of bootstraps by terms), with the swapped sample of the protocol."""
    configs = [f"c{i:03d}" for i in range(n_configs)]
    shares = {"swap_share": 0.25, "retest_share": 0.0, "anchor_share": 0.0}
    plan = design.plan_comparisons(prompts(), configs, matchings_per_prompt=2, **shares, seed=1)
    rng = np.random.default_rng(0)
    here = rng.normal(0, ABILITY_SD, n_configs) + rng.normal(0, PROMPT_SD, (PROMPTS, n_configs))
    seen = [judged(plan, here, configs, rng) for _ in range(judges)]
    start = time.perf_counter()
    fits = [bradley_terry.fit_bradley_terry(rows, configs) for rows in seen]
    between = time.perf_counter()
    for rows, fitted in zip(seen, fits, strict=True):
        bradley_terry.bootstrap_fit(rows, fitted, draws=draws, seed=0)
    return judges * len(plan), between - start, time.perf_counter() - between


if __name__ == "__main__":
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    print(f"mean tau with the truth over {studies} studies (calls), and tau per 1,000 calls")
    for name, steps in designs().items():
        told = [(calls, tau(score, studies)) for calls, score in steps]
        text = ", ".join(f"{found:.3f} ({calls}; {1000 * found / calls:.2f})" for calls, found in told)
        print(f"  {name}: {text}", flush=True)
    for n, judges, draws in ((16, 1, 2000), (16, 2, 2000), (200, 1, 100)):
        verdicts, fit, drawn = seconds(n, judges, draws)
        print(
            f"{n} configurations, {judges} judge(s), {verdicts} verdicts: fit {fit:.2f} s, {draws} draws {drawn:.1f} s"
        )
