"""Language models as judges: they take the same cases and return the same verdicts as any judge, through an API."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from telco_nb.hosted import api, attempts, prices, throttle
from telco_nb.hosted.session import Session
from telco_nb.judge.cases import Judge, Question, verdict_fault
from telco_nb.judge.prompts import REPLIES, PairReply, RubricReply, render_prompt
from telco_nb.judge.store import VerdictStore


class LanguageModelJudge(Judge):
    """A judge that is asked over HTTP: the model of a provider, or a model on a server of the user's own."""

    is_proxy = is_free = False
    forms = ("pair", "rubric")

    def __init__(
        self, name: str, hosted_model: api.HostedModel, price: prices.Prices, budget: prices.Budget, max_in_flight: int
    ):
        self.name, self.kind, self.model = name, hosted_model.kind, hosted_model.model
        self.hosted_model, self.price, self.budget, self.max_in_flight = hosted_model, price, budget, max_in_flight
        # The address is left out: the same model on another server gives the same verdicts.
        self.parameters = hosted_model.settings()
        self.description = f"the language model {hosted_model.model}, asked at {hosted_model.host}"

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any], root: Path, max_usd: float | None) -> LanguageModelJudge:
        """The judge of a parameter file. Raises ProviderError if the parameters do not describe a usable model."""
        hosted_model = api.hosted_model_from(values, "judge")
        assert hosted_model is not None, f"{values['judge_kind']} is not a hosted kind"
        price = prices.Prices(hosted_model, values["judge_input_usd_per_mtok"], values["judge_output_usd_per_mtok"])
        budget = prices.Budget(max_usd, attempts.spent_usd(root))
        return cls(values["judge"], hosted_model, price, budget, values["max_in_flight"])

    def ask_all(
        self,
        questions: Sequence[Question],
        store: VerdictStore,
        progress: Callable[[int, int], None] | None = None,
        retry_policy: throttle.RetryPolicy | None = None,
    ) -> None:
        """Asks all questions and stores every attempt.

        Args:
            questions: questions without a verdict.
            store: the judge's store.
            progress: called with (number done, number of all).
            retry_policy: how often a failed request is repeated; None for the default.

        Raises:
            CallsStopped: a wrong key, a retired model or the budget ends the asking; what was answered is stored.
        """
        session = self.session(questions, store, retry_policy=retry_policy)
        spread = spread_over_prompts(questions, 2 * self.max_in_flight)
        session.run([lambda q=q: session.ask(request_for(q)) for q in spread], progress)

    def session(
        self,
        questions: Sequence[Question],
        store: VerdictStore,
        *,
        retry_policy: throttle.RetryPolicy | None = None,
        batch: bool = False,
    ) -> Session:
        """A session for these questions. With `batch` they are sent in batches, which cost less."""
        by_id = {question.id: question for question in questions}
        price = replace(self.price, factor=prices.BATCH_FACTOR if batch else 1.0)

        def line(request: api.Request, response: api.Response, seconds: float) -> dict[str, Any]:
            reply = cast("PairReply | RubricReply | None", response.output)
            usd = price.usd(response.usage) if response.usage else None
            return store.attempt_line(
                self, by_id[request.id], reply.to_verdict() if reply else None, status=response.status,
                error=response.error, raw=response.raw, latency_s=round(seconds, 6), **response.receipt,
                price_table=price.table, usd=usd,
            )  # fmt: skip

        client = api.ApiClient(self.hosted_model, batch)
        return Session(
            client, store, price, self.budget, line=line, max_in_flight=self.max_in_flight, retry_policy=retry_policy
        )


def spread_over_prompts(questions: Sequence[Question], distance: int) -> list[Question]:
    """Orders the questions so that two on one test prompt are `distance` apart, if there are enough prompts.

    A provider caches the shared part of two requests once it has answered the first, for some minutes. Requests at the
    same time should therefore be about different prompts.
    """
    by_prompt: dict[str, list[Question]] = {}
    for question in questions:
        by_prompt.setdefault(question.row["prompt_id"], []).append(question)
    groups = list(by_prompt.values())
    blocks = [itertools.zip_longest(*groups[i : i + distance]) for i in range(0, len(groups), distance)]
    return [question for block in blocks for turn in block for question in turn if question is not None]


def request_for(question: Question) -> api.Request:
    """The request of a question to a provider."""
    case, prompt = question.case, render_prompt(question.case)
    return api.Request(
        question.id, prompt.system, prompt.own, REPLIES[case.form],
        lambda reply: verdict_fault(reply.to_verdict(), case), prompt.shared,
    )  # fmt: skip
