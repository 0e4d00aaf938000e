"""The LLM generator: exact plan, right labels, resumable, and honest about what it did not get."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hosted_fixtures import QUICK, keys  # noqa: F401
from provider_server import Server, killed_at_random

from telco_nb import ROOT
from telco_nb.corpus import cards, dataset, llm_writer, scenarios, variants
from telco_nb.hosted import attempts, prices
from telco_nb.hosted.api import ApiClient, HostedModel
from telco_nb.hosted.session import Session

SEED = 7
CARDS = cards.load_cards(ROOT / "telco_nb/data/glossary.yaml")
AXES = scenarios.load_axes(ROOT / "telco_nb/data/axes.yaml")
GRID = scenarios.build_scenarios(CARDS, AXES, SEED)


def few(n: int = 4, seeds: int = 20) -> list[list[llm_writer.WriterCall]]:
    return llm_writer.plan_calls(CARDS, GRID[:: len(GRID) // n][:n], AXES, seeds)


def said_by_grammar(body: dict) -> dict:
    """What a good model would answer: the offline grammar writes what the prompt asks for."""
    prompt = body["messages"][-1]["content"]
    by_reading = {s.reading: s for s in GRID}
    scenario = by_reading[re.search(r"<scenario>\n(.*)\n</scenario>", prompt, re.DOTALL)[1]]
    card = next(c for c in CARDS if c.id == scenario.term_id)
    found = []
    for mood, messages in re.findall(r"mood `(\w+)`, (\d) messages", prompt):
        number = next(n for n in range(500) if variants.turn_pairs(scenario, n, AXES) * 2 == int(messages))
        written = variants.write_conversation(
            card, scenario, number, AXES, SEED, attempt=len(found) + prompt.count("\n- ")
        )
        found.append({"mood": mood, "messages": written["messages"]})
    return {"conversations": found}


def good(body: dict, n: int) -> str:
    return json.dumps(said_by_grammar(body))


def session(server: Server, path, planned, **more) -> Session:
    source = HostedModel("openai-compatible", "own", server.url, max_tokens=4000)
    described = llm_writer.describe_calls(planned, source, SEED)
    return Session(
        ApiClient(source), attempts.AttemptStore(path), prices.Prices(source), prices.Budget(None), retry_policy=QUICK,
        describe=lambda q: described[q.id], **more,
    )  # fmt: skip


def generate(server: Server, path, planned, **more) -> list[dict]:
    asking = session(server, path, planned, **more)
    asking.run(llm_writer.call_chains(planned, asking, SEED))
    return list(llm_writer.stored_conversations(planned, asking.store, asking.client.hosted_model, SEED))


def test_the_whole_grid_is_6240_calls_of_five_and_every_conversation_is_asked_for_once():
    planned = llm_writer.plan_calls(CARDS, GRID, AXES, 20)
    flat = [call for each in planned for call in each]
    assert len(flat) == 6240 and {len(call.items) for call in flat} == {5}
    wanted = Counter((call.scenario.scenario_id, item.number) for call in flat for item in call.items)
    assert len(wanted) == 31_200 and set(wanted.values()) == {1}
    for call in flat[::97]:
        for item in call.items:
            assert variants.mood_and_opening(call.scenario, item.number, AXES) == (item.mood, call.opening)
            assert variants.turn_pairs(call.scenario, item.number, AXES) == item.n_turns
    source = HostedModel("openai-compatible", "own", "http://127.0.0.1:1/v1")
    assert len({llm_writer.request_for(call, source, SEED, []).id for call in flat}) == len(flat)


def test_what_a_good_model_writes_passes_the_same_filters_and_keeps_its_labels(tmp_path):
    planned = few()
    with Server("openai-compatible", good) as server:
        written = generate(server, tmp_path / "a.jsonl", planned)
    assert len(written) == 80 and len({c["conversation_id"] for c in written}) == 80
    kept, _, _ = dataset.apply_filters(written, CARDS)
    assert len(kept) > 60
    by_id = {f"{s.scenario_id}.{n:02d}": (s, n) for s in GRID for n in range(20)}
    for conversation in written:
        scenario, number = by_id[conversation["conversation_id"]]
        assert (conversation["mood"], conversation["opening"]) == variants.mood_and_opening(scenario, number, AXES)
        assert len(conversation["messages"]) == 2 * conversation["n_turns"]
        assert conversation["split"] == scenario.split


def test_later_calls_of_a_scenario_are_told_how_the_earlier_ones_begin_and_keep_their_identity(tmp_path):
    planned = few(1)
    with Server("openai-compatible", good) as server:
        generate(server, tmp_path / "a.jsonl", planned)
        prompts = [r["messages"][-1]["content"] for r in server.requests]
    assert "first lines are taken" not in prompts[0]
    assert [p.count("\n- ") for p in prompts] == [0, 5, 10, 15]
    source = HostedModel("openai-compatible", "own", "http://127.0.0.1:1/v1")
    call = planned[0][1]
    alone, after = llm_writer.request_for(call, source, SEED, []), llm_writer.request_for(call, source, SEED, ["x"])
    assert alone.id == after.id and alone.prompt != after.prompt


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: d["conversations"].pop(), "4 conversations, 5 were asked for"),
        (lambda d: d["conversations"][1].update(mood="bored"), "conversation 2: mood 'bored'"),
        (lambda d: d["conversations"][0]["messages"].pop(), "at least 2 items"),
        (lambda d: d["conversations"][0]["messages"].reverse(), "user and assistant in turn"),
        (lambda d: d["conversations"][0]["messages"][0].update(content=""), "at least 1 character"),
        (lambda d: d["conversations"][0].update(note="x"), "Extra inputs"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_asked_for_again_and_told_why(spoil, said, tmp_path):
    def script(body: dict, n: int) -> str:
        if n > 1:
            return good({"messages": body["messages"][:2]}, n)
        answer = said_by_grammar(body)
        spoil(answer)
        return json.dumps(answer)

    planned = [few(1)[0][:1]]
    with Server("openai-compatible", script) as server:
        assert len(generate(server, tmp_path / "a.jsonl", planned)) == 5
        assert said in server.requests[1]["messages"][-1]["content"]


def test_the_facts_tell_planned_from_answered_and_an_unpriced_model_has_no_price(tmp_path):
    planned = few(2)
    with Server("openai-compatible", lambda body, n: "refusal" if n % 2 else good(body, n)) as server:
        asking = session(server, tmp_path / "a.jsonl", planned, max_in_flight=1)
        asking.run(llm_writer.call_chains(planned, asking, SEED))
        facts = llm_writer.generator_facts(planned, asking.store, asking.client.hosted_model, SEED)
    assert (facts["calls_planned"], facts["calls_answered"]) == (8, 4)
    assert facts["attempts"] == {"ok": 4, "refusal": 4} and facts["usd"] is None
    assert facts["models_returned"] == ["own-2025-12-11"]


def test_the_order_and_bytes_of_the_conversations_depend_on_the_answers_alone(tmp_path):
    planned = few(3)
    with Server("openai-compatible", good) as server:
        first = generate(server, tmp_path / "a.jsonl", planned, max_in_flight=1)
        second = generate(server, tmp_path / "b.jsonl", planned, max_in_flight=16)
        again = generate(server, tmp_path / "a.jsonl", planned)
    assert first == second == again and len(first) == 60


def test_a_plan_has_its_price_before_anything_is_sent():
    planned = llm_writer.plan_calls(CARDS, GRID, AXES, 20)
    source = HostedModel("google", "gemini-2.5-flash", max_tokens=4096)
    plan = llm_writer.estimate_cost(planned, prices.Prices(source), SEED, words_per_turn_pair=90)
    assert plan.calls == 6240 and plan.hosted_model.host == "generativelanguage.googleapis.com"
    assert 0 < plan.usd_low < plan.usd_mid < plan.usd_high
    by_hand = plan.tokens_in * 0.30e-6 + plan.tokens_out * 2.50e-6  # the listed prices of that model
    assert plan.usd_mid == pytest.approx(by_hand, rel=0.01)
    unknown = llm_writer.estimate_cost(planned, prices.Prices(HostedModel("google", "no-such-model")), SEED, 90)
    assert unknown.usd_mid is None and unknown.prices is None and "no price is known" in str(unknown)


# ---------------------------------------------------------------- killed at any moment


def test_killed_at_20_random_moments_the_planned_set_is_written_and_nothing_is_paid_twice_beyond_what_was_in_flight(
    tmp_path,
):
    path, in_flight, kills = tmp_path / "a.jsonl", 4, 20
    served: Counter[str] = Counter()
    lock = threading.Lock()

    def script(body: dict, n: int) -> str:
        prompt = body["messages"][-1]["content"]
        with lock:
            served[prompt.split("In this order:")[0]] += 1  # without what depends on earlier answers
        time.sleep(0.02)
        return good(body, n)

    with Server("openai-compatible", script) as server:
        killed_at_random(generate_in_child, (server.url, path, in_flight), kills, seed=7)
    planned = few(30)
    source = HostedModel("openai-compatible", "own", "http://127.0.0.1:1/v1", max_tokens=4000)
    written = list(llm_writer.stored_conversations(planned, attempts.AttemptStore(path), source, SEED))
    assert Counter(c["conversation_id"] for c in written) == Counter(
        f"{call.scenario.scenario_id}.{item.number:02d}" for each in planned for call in each for item in call.items
    )
    stored = Counter(
        line["call_id"] for line in map(json.loads, path.read_text().splitlines()) if line["status"] == "ok"
    )
    assert set(stored.values()) == {1} and len(stored) == 120
    assert set(served) and sum(served.values()) <= 120 + kills * in_flight


def generate_in_child(url: str, path: Path, in_flight: int, begun: Any) -> None:
    planned = few(30)
    source = HostedModel("openai-compatible", "own", url, max_tokens=4000)
    asking = Session(
        ApiClient(source), attempts.AttemptStore(path), prices.Prices(source), prices.Budget(None),
        max_in_flight=in_flight, retry_policy=QUICK,
    )  # fmt: skip
    begun.set()
    asking.run(llm_writer.call_chains(planned, asking, SEED))
