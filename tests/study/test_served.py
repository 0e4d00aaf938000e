"""A real language model behind a real OpenAI-compatible server: `transformers serve` with the packaged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from ports import free_port

from telco_nb import DATA_DIR
from telco_nb.corpus import llm_writer, scenarios
from telco_nb.corpus.cards import load_cards
from telco_nb.hosted import attempts, prices, throttle
from telco_nb.hosted.api import ApiClient, HostedModel
from telco_nb.hosted.session import Session
from telco_nb.judge import asking, gate
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.store import VerdictStore, judged_rows
from telco_nb.lora import base_model

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Base URL of the server and the name of its model; the server is stopped afterwards."""
    folder = base_model.resolve_model(base_model.PACKAGED_MODEL)
    port = free_port()
    path = tmp_path_factory.mktemp("serve") / "log.txt"
    log = path.open("w")
    program = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [*program, "--port", str(port), "--device", "cpu"], env=env, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, path.read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.mark.nightly  # the judge below asks the same server in every run
def test_what_a_small_model_writes_is_asked_for_again_then_counted_and_never_made_up(served, tmp_path):
    url, name = served
    cards, contexts = load_cards(DATA_DIR / "cards"), scenarios.load_contexts(DATA_DIR / "contexts.yaml")
    planned = llm_writer.plan_calls(cards, scenarios.build_scenarios(cards, contexts, [])[:1], contexts, range(1, 2))
    source = HostedModel("openai-compatible", name, url, max_tokens=64, structured="prompted", timeout_s=600.0)
    session = Session(
        ApiClient(source), attempts.AttemptStore(tmp_path / "a.jsonl"), prices.Prices(source, 0.0, 0.0),
        prices.Budget(1.0), max_in_flight=1, retry_policy=throttle.RetryPolicy(limits={"parse_error": 2}),
    )  # fmt: skip
    session.run(llm_writer.call_chains(planned, session))
    facts = llm_writer.generator_facts(planned, session.store, source)
    written = list(llm_writer.stored_conversations(planned, session.store, source))
    assert facts["calls_planned"] == 1 and sum(facts["attempts"].values()) == sum(session.store.attempts.values()) >= 1
    # 135 million parameters do not write a chat as valid JSON; if they ever do, the conversations are there.
    assert len(written) == facts["calls_answered"]
    assert set(facts["attempts"]) <= {"ok", "parse_error", "truncated"}
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(line["raw"] and line["tokens_in"] > 100 and line["tokens_out"] > 0 for line in lines)
    assert {line["model_asked"] for line in lines} == {name} and {line["usd"] for line in lines} == {0.0}


def test_a_small_model_as_judge_fails_the_gate_and_what_it_does_not_say_never_becomes_a_verdict(served, tmp_path):
    url, name = served
    cards = {card.id: card for card in load_cards(DATA_DIR / "cards")}
    rows = [
        {
            "prompt_id": f"p{i}", "scenario_id": f"s{i}", "term_id": card.id, "problem_id": card.problems[0].id,
            "messages": [{"role": "user", "content": f"What does {card.term} mean for me?"}],
            "reference": f"{card.definition} {card.facts[0].text}",
        }
        for i, card in enumerate(list(cards.values())[:2])
    ]  # fmt: skip
    prompts = pd.DataFrame(rows)
    given = {("c01", row["prompt_id"]): f"It has to do with {row['term_id']}." for row in rows}
    given |= {("reference", row["prompt_id"]): row["reference"] for row in rows}
    planted, texts = gate.planted_controls(prompts, given, cards, ["c01"], seed=1)
    planted = planted.head(2)  # a processor reads 1,500 tokens in half a minute
    source = HostedModel("openai-compatible", name, url, max_tokens=32, structured="prompted", timeout_s=600.0)
    judge = LanguageModelJudge("small", source, prices.Prices(source, 0.0, 0.0), prices.Budget(None), max_in_flight=1)
    store = VerdictStore(tmp_path / "v.jsonl")
    cases = asking.build_cases(planted, prompts, given | texts, cards)
    planted = asking.with_judgement_ids(judge, planted, cases)
    store.plan("controls", planted)
    retry_policy = throttle.RetryPolicy(limits={"parse_error": 2})
    questions = asking.answer_by_rule(judge, asking.build_questions(planted, cases), store)
    judge.ask_all(questions, store, retry_policy=retry_policy)
    judged = judged_rows(planted, store)
    validity = gate.gate_result("small", judge.kind, judged)
    assert not validity["passed"]
    assert sum(store.attempts.values()) == sum(store.statuses.values()) >= len(planted)
    assert len(judged) == store.statuses["ok"] and set(store.statuses) <= {"ok", "parse_error", "truncated"}
