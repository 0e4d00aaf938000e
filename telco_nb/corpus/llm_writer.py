"""The LLM generator: conversations by a hosted model, one call for the seeds of a scenario that share an opening."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from telco_nb import DATA_DIR
from telco_nb.corpus import variants
from telco_nb.corpus.cards import Card
from telco_nb.corpus.scenarios import Axes, Scenario
from telco_nb.hosted import attempts, prices
from telco_nb.hosted.api import ApiClient, HostedModel, Request
from telco_nb.hosted.session import Session

PROMPT_PATH = DATA_DIR / "generator_prompt.md"
GENERATOR_ID = "llm-1"
ITEMS_PER_CALL = 5
OPENINGS = {
    "question": "a question",
    "complaint": "a complaint about what has happened",
    "pasted_error": "an error message or a line of a bill that the customer pastes, with a word or two about it",
    "follow_up": "a reference to an earlier contact about the same thing",
}
TOKENS_PER_WORD = 1.35  # of English chat with JSON around it, for estimates only


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class Conversation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    mood: str
    messages: list[Message] = Field(min_length=2)


class Conversations(BaseModel):
    """What one call returns."""

    model_config = ConfigDict(extra="forbid")

    conversations: list[Conversation]


@dataclass(frozen=True)
class WriterItem:
    """One conversation that is wanted: its seed number within the scenario, mood and turn pairs."""

    number: int
    mood: str
    n_turns: int


@dataclass(frozen=True)
class WriterCall:
    """The items of one scenario that share an opening, at most ITEMS_PER_CALL."""

    scenario: Scenario
    card: Card
    opening: str
    items: tuple[WriterItem, ...]


@cache
def prompt_template() -> tuple[str, str]:
    """(shared part, part of one call) of the prompt file."""
    shared, own = PROMPT_PATH.read_text(encoding="utf-8").split("\n---\n")
    return shared, own


def prompt_sha256() -> str:
    return hashlib.sha256(PROMPT_PATH.read_bytes()).hexdigest()


def plan_calls(
    cards: list[Card], scenarios: list[Scenario], axes: Axes, seeds_per_scenario: int
) -> list[list[WriterCall]]:
    """The calls of each scenario, in the order in which they are sent: later ones are told how earlier ones begin."""
    by_id = {card.id: card for card in cards}
    return [_calls(by_id[scenario.term_id], scenario, axes, seeds_per_scenario) for scenario in scenarios]


def _calls(card: Card, scenario: Scenario, axes: Axes, seeds_per_scenario: int) -> list[WriterCall]:
    by_opening: dict[str, list[WriterItem]] = {}
    for number in range(seeds_per_scenario):
        mood, opening = variants.mood_and_opening(scenario, number, axes)
        item = WriterItem(number, mood, variants.turn_pairs(scenario, number, axes))
        by_opening.setdefault(opening, []).append(item)
    return [
        WriterCall(scenario, card, opening, tuple(items[i : i + ITEMS_PER_CALL]))
        for opening, items in by_opening.items()
        for i in range(0, len(items), ITEMS_PER_CALL)
    ]


# ---------------------------------------------------------------- one call


def request_for(call: WriterCall, source: HostedModel, seed: int, siblings: list[str]) -> Request:
    """The call as a question. Its id leaves the siblings out: what came before must not make it a new question."""
    shared, own = prompt_template()
    system = shared.replace("{{card}}", card_text(call.card))
    wanted = "\n".join(
        f"{i}. mood `{item.mood}`, {2 * item.n_turns} messages ({item.n_turns} of each side)"
        for i, item in enumerate(call.items, 1)
    )
    used = "".join(f"- {line}\n" for line in siblings)
    fill = {
        "n": str(len(call.items)),
        "reading": call.scenario.reading,
        "opening": OPENINGS.get(call.opening, call.opening.replace("_", " ")),
        "wanted": wanted,
        "siblings": f"These first lines are taken; begin in other ways:\n{used}\n" if siblings else "",
    }
    identity = [
        GENERATOR_ID,
        source.kind,
        source.model,
        source.settings(),
        seed,
        system,
        own,
        call.scenario.scenario_id,
    ]
    identity += [call.scenario.reading, call.opening, [vars(item) for item in call.items]]
    for name, text in fill.items():
        own = own.replace(f"{{{{{name}}}}}", text)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Request(digest, system, own, Conversations, lambda output: output_fault(output, call.items))


def card_text(card: Card) -> str:
    """The card as YAML, customer sentences included: what an operator's own glossary file holds."""
    import yaml

    return yaml.safe_dump(card.model_dump(), sort_keys=False, allow_unicode=True, width=110).strip()


def output_fault(output: Conversations, items: tuple[WriterItem, ...]) -> str | None:
    """What is wrong with an answer that fits the schema: number of conversations, moods, turns, roles."""
    if len(output.conversations) != len(items):
        return f"{len(output.conversations)} conversations, {len(items)} were asked for"
    for i, (found, item) in enumerate(zip(output.conversations, items, strict=True), 1):
        if found.mood != item.mood:
            return f"conversation {i}: mood {found.mood!r}, {item.mood!r} was asked for"
        if [m.role for m in found.messages] != ["user", "assistant"] * item.n_turns:
            return f"conversation {i}: {2 * item.n_turns} messages were asked for, user and assistant in turn"
    return None


def conversations(call: WriterCall, output: dict[str, Any], finish_reason: str | None) -> Iterator[dict[str, Any]]:
    """What a stored answer holds, with the keys of conversations.parquet."""
    scenario = call.scenario
    for item, found in zip(call.items, output["conversations"], strict=True):
        yield {
            "conversation_id": f"{scenario.scenario_id}.{item.number:02d}",
            "scenario_id": scenario.scenario_id,
            "term_id": scenario.term_id,
            "intent": scenario.intent,
            "situation": scenario.situation,
            "customer": scenario.customer,
            "mood": item.mood,
            "opening": call.opening,
            "n_turns": item.n_turns,
            "messages": [{"role": m["role"], "content": m["content"].strip()} for m in found["messages"]],
            "split": scenario.split,
            "finish_reason": finish_reason,
        }


def first_lines(output: dict[str, Any], words: int = 12) -> list[str]:
    """How the conversations of an answer begin, on one line each: model output, so it is cut and flattened."""
    texts = [found["messages"][0]["content"] for found in output["conversations"]]
    return [" ".join(text.split()[:words]) for text in texts]


# ---------------------------------------------------------------- all calls


def call_chains(planned: list[list[WriterCall]], session: Session, seed: int) -> list[Callable[[], Awaitable[None]]]:
    """One coroutine function per scenario, which asks its calls one after the other."""

    async def ask(scenario_calls: list[WriterCall]) -> None:
        siblings: list[str] = []
        for call in scenario_calls:
            line = await session.ask(request_for(call, session.model.source, seed, siblings))
            if line:
                siblings += first_lines(line["output"])

    return [lambda each=each: ask(each) for each in planned]


def describe_calls(planned: list[list[WriterCall]], source: HostedModel, seed: int) -> dict[str, dict[str, Any]]:
    """What a stored line says of its question, by question id."""
    return {
        request_for(call, source, seed, []).id: {
            "generator": GENERATOR_ID,
            "prompt_sha256": prompt_sha256(),
            "scenario_id": call.scenario.scenario_id,
            "opening": call.opening,
            "numbers": [item.number for item in call.items],
        }
        for each in planned
        for call in each
    }


def stored_conversations(
    planned: list[list[WriterCall]], store: attempts.AttemptStore, source: HostedModel, seed: int
) -> Iterator[dict[str, Any]]:
    """All conversations that the store holds of a plan, in grid order."""
    for each in planned:
        found = []
        for call in each:
            line = store.ok.get(request_for(call, source, seed, []).id)
            if line:
                found += conversations(call, line["output"], line["finish_reason"])
        yield from sorted(found, key=lambda c: c["conversation_id"])


def open_session(
    values: Mapping[str, Any],
    source: HostedModel,
    planned: list[list[WriterCall]],
    root: Path,
    max_usd: float | None,
    batch: bool = False,
) -> Session:
    """A session for the calls of a plan, with the store and the budget of the study in `root`.

    Args:
        values: the parameters of 02_synth.
        source: the hosted model that writes.
        planned: the calls by scenario (`plan_calls`).
        root: the study's folder.
        max_usd: the most that the whole study may spend, in dollars; None for no limit.
        batch: the calls are handed over in batches, at half the price.
    """
    described = describe_calls(planned, source, values["seed"])
    declared = values["generator_input_usd_per_mtok"], values["generator_output_usd_per_mtok"]
    price = prices.Prices(source, *declared, prices.BATCH_FACTOR if batch else 1.0)
    return Session(
        ApiClient(source, batch), attempts.AttemptStore(store_path(root)), price,
        attempts.open_budget(root, max_usd),
        max_in_flight=values["max_in_flight"], describe=lambda asked: described[asked.id],
    )  # fmt: skip


def store_path(root: Path) -> Path:
    """Where the attempts of a study's generator are kept."""
    return root / "shared" / "store" / "conversations.jsonl"


def unanswered_calls(
    planned: list[list[WriterCall]], store: attempts.AttemptStore, source: HostedModel, seed: int
) -> list[list[WriterCall]]:
    """What of a plan the store has no good answer for."""
    return [[c for c in each if request_for(c, source, seed, []).id not in store.ok] for each in planned]


def generator_facts(
    planned: list[list[WriterCall]], store: attempts.AttemptStore, source: HostedModel, seed: int
) -> dict[str, Any]:
    """What the data set's card says of its generator."""
    ids = {request_for(call, source, seed, []).id for each in planned for call in each}
    answered = ids & set(store.ok)
    return {
        "id": GENERATOR_ID,
        "model": source.model,
        "models_returned": sorted({store.ok[i]["model_returned"] or "unknown" for i in answered}),
        "host": source.host,
        "prompt_sha256": prompt_sha256(),
        "calls_planned": len(ids),
        "calls_answered": len(answered),
        "attempts": dict(sorted(store.statuses.items())),
        "tokens_in": _total(store, answered, "tokens_in"),
        "tokens_out": _total(store, answered, "tokens_out"),
        "usd": store.spent_usd if store.priced else None,
    }


def _total(store: attempts.AttemptStore, ids: set[str], name: str) -> int | None:
    counted = [store.ok[i][name] for i in ids if store.ok[i][name] is not None]
    return sum(counted) if counted else None


def estimate_cost(
    planned: list[list[WriterCall]], price: prices.Prices, seed: int, words_per_turn_pair: float
) -> prices.Estimate:
    """The cost of a plan.

    Prompts are measured on every 50th scenario; answers by the mean words of a turn pair that the offline generator
    writes for the same plan (high: twice that; low: two thirds).
    """
    flat = [call for each in planned for call in each]
    if not flat:
        return prices.estimate(price, 0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    sample = [request_for(call, price.source, seed, ["x" * 60] * 10) for call in flat[::50]]
    tokens_in = sum(len(q.text) for q in sample) / len(sample) / prices.BYTES_PER_TOKEN
    turns = sum(item.n_turns for call in flat for item in call.items) / len(flat)
    mid = turns * words_per_turn_pair * TOKENS_PER_WORD
    outs = tuple(min(price.source.max_tokens, share * mid) for share in (2 / 3, 1.0, 2.0))
    return prices.estimate(price, len(flat), (tokens_in, tokens_in, tokens_in), outs)  # type: ignore[arg-type]
