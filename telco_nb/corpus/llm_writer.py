"""The LLM generator: a hosted model writes the conversations, one call for up to 5 of a scenario."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from telco_nb import DATA_DIR
from telco_nb.corpus.cards import Card, Problem
from telco_nb.corpus.scenarios import Context, Scenario, conversation_row
from telco_nb.corpus.variants import conversation_plan
from telco_nb.hosted import attempts, prices
from telco_nb.hosted.api import ApiClient, HostedModel, Request, hosted_model_from
from telco_nb.hosted.session import Session
from telco_nb.study.plan import STORES
from telco_nb.study.record import sha256

PROMPT_PATH = DATA_DIR / "generator_prompt.md"
SYSTEM_TEMPLATE, CALL_TEMPLATE = PROMPT_PATH.read_text(encoding="utf-8").split("\n---\n")
GENERATOR_ID = "llm-2"
STORE = f"shared/{STORES['02_synth']}"  # below a study's folder
ORIGIN = "llm"
ITEMS_PER_CALL = 5
CARD_FIELDS = {"term", "aliases", "definition", "facts", "figures", "wrong_beliefs"}  # what the model is told of a term
TOKENS_PER_WORD = 1.35  # of English chat with JSON around it, for estimates only


# The JSON schema of these classes goes to the model: their names and docstrings are part of the prompt.
class _NoExtraFields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_NoExtraFields):
    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class Conversation(_NoExtraFields):
    manner: str
    messages: list[Message] = Field(min_length=2)


class Conversations(_NoExtraFields):
    """What one call returns."""

    conversations: list[Conversation]


class WriterItem(NamedTuple):
    """One conversation to write: its number within the scenario, the customer's manner, the exchanges."""

    number: int
    manner: str
    exchanges: int


class WriterCall(NamedTuple):
    """At most ITEMS_PER_CALL items of one scenario, with the texts on its problem (`system`) and its context."""

    scenario: Scenario
    system: str
    context: str
    items: tuple[WriterItem, ...]


Plan = list[list[WriterCall]]  # the calls of each scenario, in the order in which they are sent


def hosted_writer(values: Mapping[str, Any]) -> HostedModel | None:
    """Return the hosted model that the parameters `values` of 02_synth name, or None for the variants by rule.

    Raises ProviderError for a missing model or an endpoint that cannot be used.
    """
    return hosted_model_from(values, "generator")


def plan_calls(cards: list[Card], scenarios: list[Scenario], contexts: list[Context], numbers: range) -> Plan:
    """Plan the calls that write all conversations.

    Args:
        cards: the cards.
        scenarios: the scenario grid.
        contexts: the contexts.
        numbers: the numbers within each scenario that are written, as `variants.write_variants` takes them.

    Returns:
        The calls of each scenario in sending order: a later prompt lists the first lines of earlier conversations.
    """
    by_id, by_context = {card.id: card for card in cards}, {context.id: context for context in contexts}

    @cache  # the scenarios of a problem share it
    def system(term_id: str, problem_id: str) -> str:
        return system_prompt(by_id[term_id], by_id[term_id].by_problem[problem_id])

    planned = []
    for scenario in scenarios:
        context = by_context[scenario.context]
        changes = by_id[scenario.term_id].by_problem[scenario.problem_id].contexts[context.id]
        told = system(scenario.term_id, scenario.problem_id), _data({context.label: changes})
        items = [WriterItem(number, *conversation_plan(scenario, number)) for number in numbers]
        parts = (items[i : i + ITEMS_PER_CALL] for i in range(0, len(items), ITEMS_PER_CALL))
        planned.append([WriterCall(scenario, *told, tuple(part)) for part in parts])
    return planned


def system_prompt(card: Card, problem: Problem) -> str:
    """Return the rules with the card's general part, this one problem, and how to tell its neighbours from it."""
    shown = {
        "card": card.model_dump(include=CARD_FIELDS, exclude_defaults=True),
        "problem": problem.model_dump(exclude={"weight", "contexts"}, exclude_defaults=True),
        "neighbours": {other.id: other.tells for other in card.problems if other.id != problem.id},
    }
    return _filled(SYSTEM_TEMPLATE, {name: _data(value) for name, value in shown.items()})


def _data(value: Any) -> str:
    """Return a value as JSON that cannot close the tags around it."""
    return json.dumps(value, ensure_ascii=False, indent=1).replace("</", "<\\/")


def _filled(template: str, texts: Mapping[str, str]) -> str:
    """Put the texts into their places, in one pass: what looks like a place inside a text stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], template)


def _call_prompt(call: WriterCall, siblings: list[str]) -> str:
    wanted = (
        f"{i}. manner `{item.manner}`, {2 * item.exchanges} messages ({item.exchanges} of each side)"
        for i, item in enumerate(call.items, 1)
    )
    used = "".join(f"- {line}\n" for line in siblings)
    texts = {
        "n": str(len(call.items)),
        "reading": call.scenario.reading.replace("</", "< /"),
        "context": call.context,
        "wanted": "\n".join(wanted),
        "siblings": f"<taken>\n{used}</taken>\n\nThese first lines are taken; begin in other ways.\n\n" if used else "",
    }
    return _filled(CALL_TEMPLATE, texts)


def request_for(call: WriterCall, model: HostedModel, siblings: list[str]) -> Request:
    """Return the request of a call; its id depends on all that is sent but `siblings`, and on model and items.

    `siblings` are the first lines of the scenario's earlier conversations, which the model must not repeat.
    """
    identity = [
        GENERATOR_ID, model.kind, model.model, model.settings(), call.system, _call_prompt(call, []),
        call.scenario.scenario_id, [item.number for item in call.items],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    check = partial(_output_fault, items=call.items)
    return Request(digest, call.system, _call_prompt(call, siblings), Conversations, check)


def _output_fault(output: Conversations, items: tuple[WriterItem, ...]) -> str | None:
    """Check an answer that fits the schema: number of conversations, manners, exchanges, roles. Return the fault."""
    if len(output.conversations) != len(items):
        return f"{len(output.conversations)} conversations, {len(items)} were asked for"
    for i, (written, item) in enumerate(zip(output.conversations, items, strict=True), 1):
        if written.manner != item.manner:
            return f"conversation {i}: manner {written.manner!r}, {item.manner!r} was asked for"
        if [m.role for m in written.messages] != ["user", "assistant"] * item.exchanges:
            return f"conversation {i}: {2 * item.exchanges} messages were asked for, user and assistant in turn"
    return None


def _rows(call: WriterCall, output: dict[str, Any], finish_reason: str | None) -> Iterator[dict[str, Any]]:
    """Yield the conversations of a stored answer, with the keys of conversations.parquet and the finish reason."""
    for item, written in zip(call.items, output["conversations"], strict=True):
        messages = [{"role": m["role"], "content": m["content"].strip()} for m in written["messages"]]
        row = conversation_row(call.scenario, item.number, ORIGIN, messages, item.manner)
        yield row | {"finish_reason": finish_reason}


def first_lines(output: dict[str, Any]) -> list[str]:
    """Return the first 12 words of each conversation of an answer, on one line each; none can close a tag."""
    texts = [written["messages"][0]["content"].replace("<", "‹") for written in output["conversations"]]
    return [" ".join(text.split()[:12]) for text in texts]


def call_chains(planned: Plan, session: Session) -> list[Callable[[], Awaitable[None]]]:
    """Return one coroutine function per scenario, which sends the scenario's calls one after the other.

    Args:
        planned: the calls by scenario (`plan_calls`).
        session: the session that sends and stores them (`open_session`).
    """

    async def send(scenario_calls: list[WriterCall]) -> None:
        siblings: list[str] = []
        for call in scenario_calls:
            line = await session.ask(request_for(call, session.client.hosted_model, siblings))
            if line:
                siblings += first_lines(line["output"])

    return [partial(send, scenario_calls) for scenario_calls in planned]


def _by_request_id(planned: Plan, model: HostedModel) -> dict[str, WriterCall]:
    return {request_for(call, model, []).id: call for calls in planned for call in calls}


def describe_calls(planned: Plan, model: HostedModel) -> dict[str, dict[str, Any]]:
    """Return the fields by which a stored attempt describes its call, by request id."""
    prompt_sha256 = sha256(PROMPT_PATH)
    return {
        request_id: {
            "generator": GENERATOR_ID,
            "prompt_sha256": prompt_sha256,
            "scenario_id": call.scenario.scenario_id,
            "numbers": [item.number for item in call.items],
        }
        for request_id, call in _by_request_id(planned, model).items()
    }


def stored_conversations(planned: Plan, store: attempts.AttemptStore, model: HostedModel) -> Iterator[dict[str, Any]]:
    """Yield all stored conversations of a plan, in grid order.

    Args:
        planned: the calls by scenario (`plan_calls`).
        store: the store of attempts.
        model: the hosted model.
    """
    for request_id, call in _by_request_id(planned, model).items():
        if line := store.ok.get(request_id):
            yield from _rows(call, line["output"], line["finish_reason"])


def open_session(
    values: Mapping[str, Any],
    model: HostedModel,
    planned: Plan,
    root: Path,
    max_usd: float | None,
    batch: bool = False,
    target: Path | None = None,
) -> Session:
    """Open a session for the calls of a plan, with the store and the budget of the study in `root`.

    Args:
        values: the parameters of 02_synth.
        model: the hosted model.
        planned: the calls by scenario (`plan_calls`).
        root: the study's folder.
        max_usd: the most that the whole study may spend, in US dollars; None for no limit.
        batch: send the calls in batches, at half the price.
        target: the folder for the results, if it is another: then the store is a copy there.
    """
    described = describe_calls(planned, model)
    declared = values["generator_input_usd_per_mtok"], values["generator_output_usd_per_mtok"]
    price = prices.Prices(model, *declared, prices.BATCH_FACTOR if batch else 1.0)
    return Session(
        ApiClient(model, batch), attempts.AttemptStore(attempts.store_for(root, target, STORE)), price,
        prices.Budget(max_usd, attempts.spent_usd(root)),
        max_in_flight=values["max_in_flight"], describe=lambda request: described[request.id],
    )  # fmt: skip


def store_path(root: Path) -> Path:
    """Return the file with the attempts of a study's generator."""
    return root / STORE


def unanswered_calls(planned: Plan, store: attempts.AttemptStore, model: HostedModel) -> Plan:
    """Return the calls of a plan, by scenario, that have no good answer in the store."""
    return [[c for c in calls if request_for(c, model, []).id not in store.ok] for calls in planned]


def generator_facts(planned: Plan, store: attempts.AttemptStore, model: HostedModel) -> dict[str, Any]:
    """Describe the generator for the data card.

    Args:
        planned: the calls by scenario (`plan_calls`).
        store: the store of attempts.
        model: the hosted model.

    Returns:
        The models, prompt hash, counts of calls and attempts, tokens, and US dollars (None without a known price).
    """
    ids = _by_request_id(planned, model).keys()
    answers = [store.ok[i] for i in ids if i in store.ok]
    return {
        "id": GENERATOR_ID,
        "model": model.model,
        "models_returned": sorted({line["model_returned"] or "unknown" for line in answers}),
        "host": model.host,
        "prompt_sha256": sha256(PROMPT_PATH),
        "calls_planned": len(ids),
        "calls_answered": len(answers),
        "attempts": dict(sorted(store.statuses.items())),
        "tokens_in": _total(answers, "tokens_in"),
        "tokens_out": _total(answers, "tokens_out"),
        "usd": store.spent_usd if store.priced else None,
    }


def _total(answers: list[dict[str, Any]], name: str) -> int | None:
    counted = [line[name] for line in answers if line[name] is not None]
    return sum(counted) if counted else None


def estimate_cost(planned: Plan, price: prices.Prices, words_per_exchange: float) -> prices.Estimate:
    """Estimate the cost of a plan from the length of every 50th prompt.

    `words_per_exchange` is the mean length of a question and its answer in conversations at hand. The estimate assumes
    the same length for the model (high: twice as long; low: two thirds).
    """
    flat = [call for calls in planned for call in calls]
    if not flat:
        return prices.estimate(price, 0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    sample = [request_for(call, price.hosted_model, ["x" * 60] * 10) for call in flat[::50]]
    tokens_in = sum(len(request.text) for request in sample) / len(sample) / prices.BYTES_PER_TOKEN
    exchanges = sum(item.exchanges for call in flat for item in call.items) / len(flat)
    mid = exchanges * words_per_exchange * TOKENS_PER_WORD
    low, mid, high = (min(price.hosted_model.max_tokens, share * mid) for share in (2 / 3, 1.0, 2.0))
    return prices.estimate(price, len(flat), (tokens_in, tokens_in, tokens_in), (low, mid, high))
