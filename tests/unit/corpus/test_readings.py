"""What readers who had written none of the gold conversations found in them, as data.

`blind_scores.jsonl`: 60 at random, scored on the seven points of WRITING.md by readers who saw card and conversation;
`second_reading` holds the scores that the same texts had before, in the order of the points. `read_labels.jsonl`: all
1,560, by nine readers, for what no rule can tell. `text_sha256` is of the messages that were read, `agent_sha256` of
the agent's alone, so that a text which was mended afterwards is known.
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
FILES = ("blind_scores", "read_labels")
SCORES, LABELS = ([value for _, value in read_lines(DATA / f"{name}.jsonl")] for name in FILES)
# By their cards these acts protect and need no proof of identity: bar services, void a lost card, hold a move.
PROTECTIVE = {
    "top_up.credit_gone.depended_on",
    "sim_swap.posted_sim_not_here.away",
    "number_portability.stop_or_reschedule.depended_on",
}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict[str, str]]]:
    return {row["id"]: row["messages"] for term in gold.terms() for row in gold.conversations(term)}


def sha256(value: list) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def agent_is_as_read(row: dict, texts: dict[str, list[dict[str, str]]]) -> bool:
    said = [message["content"] for message in texts[row["id"]] if message["role"] == "assistant"]
    return sha256(said) == row["agent_sha256"]


@pytest.fixture(scope="module")
def as_read(texts) -> list[dict]:
    """The labels of the conversations that stand as they were read: nearly all."""
    found = [row for row in LABELS if sha256(texts[row["id"]]) == row["text_sha256"]]
    assert {row["id"] for row in LABELS} == set(texts) and len(found) > 0.95 * len(texts), "read what was changed again"
    return found


def test_blind_scores_of_sixty_were_high_and_near_those_of_the_second_readers():
    blind = np.array([[row[point] for point in POINTS] for row in SCORES])
    second = np.array([row["second_reading"] for row in SCORES])
    assert len({row["id"] for row in SCORES}) == 60
    assert blind.mean() >= 4.5 and abs(blind.mean() - second.mean()) <= 0.5
    assert blind.min() >= 3 and blind.mean(0).min() >= 4.0  # "right" is the lowest: a step of the card left out


def test_the_data_set_s_card_tells_the_figures_of_the_blind_reading():
    points = {point: np.mean([row[point] for row in SCORES]) for point in POINTS}
    second = np.mean([row["second_reading"] for row in SCORES])
    told = {"conversations": len(SCORES), "mean": np.mean([*points.values()]), "second_reading_of_the_same": second}
    assert {name: round(float((told | points)[name]), 2) for name in BLIND_READING} == BLIND_READING


def test_where_a_blind_reader_gave_a_3_the_agent_says_something_else_now(texts):
    low = [row for row in SCORES if min(row[p] for p in POINTS) < 4]
    assert [row["id"] for row in low if agent_is_as_read(row, texts)] == []


def test_later_messages_of_the_agent_react_in_at_least_95_percent(as_read):
    later = [reacts for row in as_read for reacts in row["later"]]
    assert len(later) > 1200 and np.mean(later) >= 0.95


@pytest.mark.parametrize("label", ["identity", "care"])
def test_where_a_reader_missed_an_identity_check_or_help_the_agent_says_something_else_now(label, texts):
    missed = {row["id"]: row for row in LABELS if row[label] == "violated"}
    assert sum(row[label] != "none" for row in LABELS) > {"identity": 900, "care": 70}[label]
    assert {key for key, row in missed.items() if agent_is_as_read(row, texts)} == PROTECTIVE & set(missed)
    assert label == "care" or set(missed) >= PROTECTIVE, "an exception that nothing needs"


def test_wrong_beliefs_and_secrets_are_as_frequent_as_planned(as_read):
    assert np.mean([row["belief"] for row in as_read]) >= 1 / 12
    assert np.mean([row["secret"] for row in as_read]) >= 1 / 20
