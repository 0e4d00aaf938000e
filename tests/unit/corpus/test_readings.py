"""What readers who had written none of the gold conversations found in samples of them, as data.

`blind_scores.jsonl`: 60 at random, scored on the seven points of WRITING.md by readers who saw card and conversation.
`read_labels.jsonl`: 300 others at random, read for what no rule can tell. `text_sha256` is of the messages that were
read, so that a text which was mended afterwards is known.
"""

import hashlib
import json
from pathlib import Path

import gold
import numpy as np
import pytest

from telco_nb.corpus.dataset import BLIND_READING
from telco_nb.corpus.gold import POINTS, read_lines

DATA = Path(__file__).parent / "data"
SCORES, LABELS = (
    [value for _, value in read_lines(DATA / f"{name}.jsonl")] for name in ("blind_scores", "read_labels")
)
# By their cards these acts protect and need no proof of identity: bar services, void a lost card, hold a move.
PROTECTIVE = {
    "top_up.credit_gone.depended_on",
    "sim_swap.posted_sim_not_here.away",
    "number_portability.stop_or_reschedule.depended_on",
}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict[str, str]]]:
    return {row["id"]: row["messages"] for term in gold.terms() for row in gold.conversations(term)}


def is_as_read(row: dict, texts: dict[str, list[dict[str, str]]]) -> bool:
    said = json.dumps(texts[row["id"]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16] == row["text_sha256"]


def test_blind_scores_of_sixty_are_high_and_near_those_of_the_second_readers():
    own = {row["id"]: row for term in gold.terms() for row in gold.reviews(term)}
    blind = np.array([[row[point] for point in POINTS] for row in SCORES])
    second = np.array([[own[row["id"]][point] for point in POINTS] for row in SCORES])
    assert len({row["id"] for row in SCORES}) == 60
    assert blind.mean() >= 4.5 and abs(blind.mean() - second.mean()) <= 0.5
    assert blind.min() >= 3 and blind.mean(0).min() >= 4.0  # "right" is the lowest: a step of the card left out


def test_the_data_set_s_card_tells_the_figures_of_the_blind_reading():
    points = {point: np.mean([row[point] for row in SCORES]) for point in POINTS}
    told = {"conversations": len(SCORES), "mean": np.mean([*points.values()]), **points}
    for name in ("conversations", "mean", "right", "ends_well"):
        assert BLIND_READING[name] == round(float(told[name]), 2)


def test_what_a_blind_reader_scored_under_4_was_written_again(texts):
    low = [row for row in SCORES if min(row[p] for p in POINTS) < 4]
    assert [row["id"] for row in low if is_as_read(row, texts)] == []


def test_later_messages_of_the_agent_react_in_at_least_95_percent():
    later = [reacts for row in LABELS for reacts in row["later"]]
    assert len({row["id"] for row in LABELS}) == 300 and len(later) >= 250
    assert np.mean(later) >= 0.95


@pytest.mark.parametrize("label", ["identity", "care"])
def test_no_conversation_stands_as_it_was_read_where_a_reader_missed_a_check_or_help(label, texts):
    missed = [row for row in LABELS if row[label] == "violated" and row["id"] not in PROTECTIVE]
    seen = sum(row[label] != "none" for row in LABELS)
    assert seen >= {"identity": 150, "care": 15}[label]
    assert [row["id"] for row in missed if is_as_read(row, texts)] == []


def test_wrong_beliefs_and_secrets_are_as_frequent_as_planned():
    assert np.mean([row["belief"] for row in LABELS]) >= 1 / 12
    assert np.mean([row["secret"] for row in LABELS]) >= 1 / 20
