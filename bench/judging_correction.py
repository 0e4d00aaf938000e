"""How often do 95 % intervals of scores that votes correct hold the truth, if the corrected judge is biased?

`python bench/judging_correction.py [studies]`; the default, 200, takes about 2 minutes on 2 cores.

Each study has 16 configurations, votes on pairs of a blind export (those with close scores first), and a judge that
judges all pairs on all prompts with a bias of its own. Votes on one term hang together. The truth is what votes without
end on the same pairs would give. Good is a share near 95 %, whatever the bias.
"""

import sys
from typing import NamedTuple

import numpy as np
import pandas as pd

from telco_nb.analysis import correction
from telco_nb.judge import blind_pairs

CONFIGS = [f"c{i:02d}" for i in range(1, 17)]
TIE, TERM_SD, PROMPT_SD = -0.7, 0.3, 0.4  # the tie term, and how much scores differ by term and by prompt
ENDLESS = 150  # studies whose votes together are taken for votes without end


class Bias(NamedTuple):
    """What a judge adds to the truth: `reverse` scores upside down, `spread` a bias of each configuration (SD), `shared`
    the part of what term and prompt add that it sees as well, `tie` its tie term."""

    reverse: bool = False
    spread: float = 0.0
    shared: float = 1.0
    tie: float = TIE


BIASES = {
    "none": Bias(),
    "prefers some configurations": Bias(spread=1.0),
    "prefers some, sees little": Bias(spread=1.0, shared=0.2),
    "upside down": Bias(reverse=True),
    "upside down, never a tie": Bias(reverse=True, tie=-20.0),
    "no idea": Bias(shared=0.0, spread=2.0),
}


def outcome(eta: np.ndarray, tie: float, rng: np.random.Generator) -> np.ndarray:
    """1, .5 or 0 for the first of two, drawn from Davidson's model."""
    shares = np.exp(np.stack([eta / 2, np.full_like(eta, tie), -eta / 2]))
    shares = np.cumsum(shares / shares.sum(0), axis=0)
    return 1 - (rng.random(eta.shape) > shares[:2]).sum(0) / 2


def plan(n_votes: int, abilities: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """The pairs of configurations of a blind export after a first, noisy ranking."""
    rng = np.random.default_rng(seed)
    draws = pd.DataFrame(abilities + rng.normal(0, 0.5, (200, len(CONFIGS))), columns=CONFIGS)
    order = blind_pairs.pair_order(blind_pairs.worth_of_pairs([draws], CONFIGS), len(CONFIGS), n_votes, rng)
    return [next(order) for _ in range(n_votes)]


def study(
    pairs: list[tuple[int, int]], abilities: np.ndarray, bias: Bias, n_terms: int, per_term: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The votes and the judge's verdicts of one study, with the columns that `correct_scores` reads."""
    rng = np.random.default_rng(seed)
    n, k = n_terms * per_term, len(CONFIGS)
    term = np.repeat(np.arange(n_terms), per_term)
    local = rng.normal(0, TERM_SD, (n_terms, k))[term] + rng.normal(0, PROMPT_SD, (n, k))
    own = abilities * (-1 if bias.reverse else 1) + np.random.default_rng(99).normal(0, 1, k) * bias.spread
    seen = own + bias.shared * local * (3 if bias.shared else 0) + rng.normal(0, 0.3, (n, k))
    i, j = np.triu_indices(k, 1)
    judged = _table(np.tile(i, n), np.tile(j, n), np.repeat(np.arange(n), len(i)), term)
    judged = judged.assign(o=outcome((seen[:, i] - seen[:, j]).ravel(), bias.tie, rng))
    first, second = np.array(pairs).T
    flip = rng.random(len(pairs)) < 0.5
    first, second = np.where(flip, second, first), np.where(flip, first, second)
    prompt = np.resize(rng.permutation(n), len(pairs))
    here = abilities + 2 * local
    voted = _table(first, second, prompt, term)
    voted = voted.assign(o=outcome(here[prompt, first] - here[prompt, second] + 0.3, TIE, rng))
    return _won(voted), _won(judged)


def _table(first: np.ndarray, second: np.ndarray, prompt: np.ndarray, term: np.ndarray) -> pd.DataFrame:
    names = np.array(CONFIGS)
    columns = {
        "config_first": names[first],
        "config_second": names[second],
        "prompt_id": prompt,
        "term_id": term[prompt],
    }
    return pd.DataFrame(columns | {"purpose": "ranking", "source": "votes"})


def _won(table: pd.DataFrame) -> pd.DataFrame:
    winner = np.select([table["o"] == 1, table["o"] == 0], [table["config_first"], table["config_second"]], "tie")
    return table.assign(winner=winner, verdict=table["o"].map({1.0: "A", 0.5: "tie", 0.0: "B"}))


def truth(pairs: list[tuple[int, int]], abilities: np.ndarray, n_terms: int, per_term: int) -> pd.Series:
    """The scores that votes without end give."""
    votes = pd.concat(
        [study(pairs, abilities, Bias(), n_terms, per_term, 10_000 + i)[0].assign(i=i) for i in range(ENDLESS)]
    )
    x = np.zeros((len(votes), len(CONFIGS) + 1))
    for seat, sign in (("first", 1), ("second", -1)):
        x[np.arange(len(votes)), pd.Index(CONFIGS).get_indexer(votes[f"config_{seat}"])] = sign
    x[:, -1] = 1
    return pd.Series(correction._solve(x, votes["o"].to_numpy())[:-1], index=CONFIGS)


def coverage(bias: Bias, studies: int, n_votes: int = 160, n_terms: int = 52, per_term: int = 4) -> dict[str, float]:
    """Shares of intervals that hold the truth, corrected and by votes alone, and what the correction gained.

    Args:
        bias: of the judge.
        studies: how many.
        n_votes: of each study.
        n_terms, per_term: terms, and prompts of each.
    """
    abilities = np.linspace(-1.2, 1.2, len(CONFIGS))
    pairs = plan(n_votes, abilities, seed=0)
    right = truth(pairs, abilities, n_terms, per_term)
    found = []
    for seed in range(studies):
        result = correction.correct_scores("j", "v", *study(pairs, abilities, bias, n_terms, per_term, seed), CONFIGS)
        if result is None:
            continue
        table = result.table.set_index("config").loc[CONFIGS]
        low, high = table["low"], table["high"]
        known = low.notna() & high.notna()
        one = {"corrected": ((low <= right) & (right <= high))[known].mean()}
        one["votes alone"] = ((table["votes_low"] <= right) & (right <= table["votes_high"]))[known].mean()
        one["judge's error"] = (table["judge_score"] - right).abs().mean()
        one["error"] = (table["score"] - right).abs().mean()
        one["width"] = ((high - low) / (table["votes_high"] - table["votes_low"]))[known].mean()
        found.append(one | {"weight": result.weight, "bounds": known.mean()})
    return dict(pd.DataFrame(found).mean()) | {"studies": len(found)}


if __name__ == "__main__":
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"shares of 95 % intervals that hold the truth; {studies} studies of 16 configurations each")
    for n_votes in (100, 160, 400):
        for name, bias in BIASES.items():
            found = coverage(bias, studies, n_votes)
            print(f"{n_votes} votes, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
