"""Language models as judges: the same cases and verdicts as any judge, asked through an API, several at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from telco_nb.hosted import api, attempts, prices, throttle
from telco_nb.hosted.api import ApiClient, HostedModel, Response
from telco_nb.hosted.session import Session
from telco_nb.judge import cases, prompts
from telco_nb.judge.cases import Form, Question, Verdict
from telco_nb.judge.store import VerdictStore


class LanguageModelJudge:
    """A judge that is asked over HTTP: a provider's model, or one on a server of one's own."""

    is_proxy = False
    is_free = False
    forms: tuple[Form, ...] = ("pair", "rubric")

    def __init__(self, name: str, source: HostedModel, price: prices.Prices, budget: prices.Budget, max_in_flight: int):
        self.name, self.kind, self.model = name, source.kind, source.model
        self.source, self.price, self.budget, self.max_in_flight = source, price, budget, max_in_flight
        self.parameters: dict[str, Any] = source.settings()  # not the address: a server that moved says the same
        self.description = f"the language model {source.model}, asked at {source.host}"

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any], root: Path, max_usd: float | None) -> LanguageModelJudge:
        """The judge of a parameter file. Raises ProviderError if it cannot be asked as described."""
        source = api.hosted_model_from(values, "judge")
        assert source is not None, f"{values['judge_kind']} is not a hosted kind"
        price = prices.Prices(source, values["judge_input_usd_per_mtok"], values["judge_output_usd_per_mtok"])
        budget = attempts.open_budget(root, max_usd)
        return cls(values["judge"], source, price, budget, values["max_in_flight"])

    def put(
        self,
        waiting: Sequence[Question],
        store: VerdictStore,
        line: Callable[..., dict[str, Any]],
        progress: Callable[[int, int], None] | None = None,
        patience: throttle.RetryPolicy | None = None,
    ) -> None:
        """Ask all questions and store every attempt as `line(judge, question, status, verdict, ...)` describes it.

        Raises CallsStopped if a wrong key, a retired model or the budget ends it; what was answered is stored.
        """
        session = self.session(waiting, store, line, patience=patience)
        in_turn = spread_over_prompts(waiting, 2 * self.max_in_flight)
        session.run([lambda q=q: session.ask(request_for(q)) for q in in_turn], progress)

    def session(
        self,
        questions: Sequence[Question],
        store: VerdictStore,
        line: Callable[..., dict[str, Any]],
        *,
        patience: throttle.RetryPolicy | None = None,
        batch: bool = False,
    ) -> Session:
        """A session for these questions, with lines as in `put`. `batch`: they are handed over in batches, for less."""
        by_id = {question.id: question for question in questions}
        price = replace(self.price, factor=prices.BATCH_FACTOR if batch else 1.0)

        def described(asked: api.Request, outcome: Response, seconds: float) -> dict[str, Any]:
            verdict = verdict_of(outcome)
            more = {"error": outcome.error, "latency_s": seconds}
            number = store.attempts[asked.id] + 1
            made = line(self, by_id[asked.id], outcome.status, verdict, attempt=number, **more)
            return made | receipt_of(outcome, price) | {"raw": outcome.raw}

        return Session(
            ApiClient(self.source, batch), store, price, self.budget, line=described,
            max_in_flight=self.max_in_flight, patience=patience,
        )  # fmt: skip


def spread_over_prompts(waiting: Sequence[Question], distance: int) -> list[Question]:
    """The questions in an order in which two on one test prompt are `distance` apart, where there are enough prompts.

    What they share is in a provider's cache once the first of them is being answered, and stays there for minutes.
    Those that are under way at once should therefore be on different prompts.
    """
    by_prompt: dict[str, list[Question]] = {}
    for question in waiting:
        by_prompt.setdefault(question.row["prompt_id"], []).append(question)
    groups = list(by_prompt.values())
    blocks = [itertools.zip_longest(*groups[i : i + distance]) for i in range(0, len(groups), distance)]
    return [question for block in blocks for turn in block for question in turn if question is not None]


def request_for(question: Question) -> api.Request:
    """A question of the plan as it goes to a provider."""
    case, prompt = question.case, prompts.render_prompt(question.case)
    return api.Request(
        question.id, prompt.system, prompt.own, prompts.REPLIES[case.form],
        lambda reply: cases.verdict_fault(reply.to_verdict(), case), prompt.shared,
    )  # fmt: skip


def verdict_of(outcome: Response) -> Verdict | None:
    """The verdict of a good reply; None for every other end."""
    return outcome.output.to_verdict() if outcome.output else None  # type: ignore[attr-defined]


def receipt_of(outcome: Response, price: prices.Prices) -> dict[str, Any]:
    """The fields of a stored line that only the provider and the price table can tell."""
    usd = price.usd(outcome.usage) if outcome.usage else None
    return {**outcome.receipt, "price_table": price.table, "usd": usd}
