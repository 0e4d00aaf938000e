"""Batch mode: the same questions at half the price and up to a day later, in three commands that can be repeated.

`submit` hands over what is not answered and not under way, `poll` says how far the provider is, `collect` puts what is
done into the store of attempts. The study itself then finds its answers there and asks nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter

from telco_nb import ROOT
from telco_nb.commands.common import CommandError, MaxUsd, ParamsDir, Profile, Yes, errors_as_exit_codes
from telco_nb.corpus import llm_writer, scenarios
from telco_nb.corpus.cards import load_cards
from telco_nb.engine import runner
from telco_nb.hosted import prices
from telco_nb.hosted.api import (
    ProviderError,
    Request,
    failed_response,
    hosted_model_from,
    messages,
    read_response,
    request_parameters,
)
from telco_nb.hosted.ledger import BatchLedger, BatchRecord, ledger_of
from telco_nb.hosted.session import Session, run_async
from telco_nb.judge import asking, language_model
from telco_nb.judge.protocol import Protocol, open_study
from telco_nb.study import params, record

if TYPE_CHECKING:
    from pydantic_ai.models.batch import Batch, BatchRequest


class BatchError(CommandError):
    """A batch cannot be submitted or collected; the message says what to do."""


# ---------------------------------------------------------------- the three steps


async def submit(session: Session, questions: Sequence[Request], book: BatchLedger) -> int:
    """Hand over the questions that are neither answered nor under way, as many as the cap allows; returns how many.

    Raises BatchError for a batch of unknown fate or a model without batches, BudgetStop if the worst case of the first
    question exceeds what may be spent.
    """
    limit = session.model.model.batch_max_requests
    if limit is None:
        kind = session.model.source.kind
        raise BatchError(f"{kind}: no batches at this provider. Run the study itself instead.")
    if book.doubtful:
        raise BatchError(
            f"{len(book.doubtful)} batches were being submitted when the process ended, and may exist at the provider. "
            "Look there. If they do not, run `forget`; if they do, cancel them first."
        )
    waiting = [q for q in questions if q.id not in session.store.ok and q.id not in book.under_way]
    worst = {q.id: session.prices.worst_case(q) for q in waiting}
    waiting = waiting[: _affordable(session.budget, list(worst.values()))]
    unknown = None in worst.values()  # then there is no cap: it would have refused
    for i in range(0, len(waiting), limit):
        part = waiting[i : i + limit]
        encoded = [await session.model.model.batch_encode(_request(session, q)) for q in part]
        book.note(
            "submitting", ids=[q.id for q in part], usd_at_most=None if unknown else sum(worst[q.id] for q in part)
        )
        handle = await session.model.model.batch_create(encoded)
        book.note("submitted", entry=len(book.entries) - 1, handle=handle_type().dump_python(handle, mode="json"))
    return len(waiting)


def _affordable(budget: prices.Budget, worst: Sequence[float | None]) -> int:
    """How many of these worst cases, in order, the budget can set aside at once. Raises BudgetStop if not even one."""
    for n, usd in enumerate(worst):
        try:
            budget.reserve(usd)
        except prices.BudgetStop:
            if n == 0:
                raise
            return n
    return len(worst)


def handle_type() -> TypeAdapter:
    """What the book keeps of a batch, so that it can be asked for again."""
    from pydantic_ai.models.batch import Batch

    return TypeAdapter(Batch)


async def _now(session: Session, entry: BatchRecord) -> Batch:
    """A batch as the provider has it now."""
    return await session.model.model.batch_status(handle_type().validate_python(entry.handle))


def _request(session: Session, question: Request) -> BatchRequest:
    from pydantic_ai.models.batch import BatchRequest

    source = session.model.source
    return BatchRequest(
        custom_id=question.id[:64],  # the longest id that all providers take: a sha256 fits
        messages=messages(question, (), source),
        model_settings=session.model.settings(live=False),
        model_request_parameters=request_parameters(question, source.structured),
    )


async def poll(session: Session, book: BatchLedger) -> list[str]:
    """How far each open batch is, one line each."""
    said = []
    for i, entry in book.open():
        if entry.handle is None:
            said.append(f"batch {i}: unknown; it was being submitted when the process ended")
            continue
        now = await _now(session, entry)
        said.append(f"batch {i}: {now.status}, {now.request_count} requests, {now.id}")
    return said


async def collect(session: Session, questions: Sequence[Request], book: BatchLedger) -> dict[str, int]:
    """Store the results of all batches that have ended; returns attempts by status. Repeating it changes nothing.

    `questions`: all of the study. Results of others (the study has changed since) are counted as `not asked any more`.
    """
    by_id = {q.id[:64]: q for q in questions}
    counts: Counter[str] = Counter()
    for i, entry in list(book.open()):
        if entry.handle is None or (now := await _now(session, entry)).status != "ended":
            continue
        stored = session.store.of_batch(now.id)
        results = await session.model.model.batch_results(now)
        known = [r for r in results if r.custom_id in by_id]
        fresh = [r for r in known if by_id[r.custom_id].id not in stored]
        lines = [_line(session, by_id[result.custom_id], result, now.id) for result in fresh]
        session.store.append(lines)
        book.close(i, "collected", share=len(known) / max(1, len(results)))
        counts.update(line["status"] for line in lines)
        counts["not asked any more"] += len(results) - len(known)
    return dict(+counts)


def _line(session: Session, question: Request, result: Any, batch_id: str) -> dict[str, Any]:
    from pydantic_ai.exceptions import AgentRunError

    try:
        response = session.model.model.batch_decode(result, _request(session, question))
        outcome = read_response(response, question, {"batch": True})
    except AgentRunError as error:
        outcome = failed_response(error, session.model.source, {"batch": True})
    usd = session.prices.usd(outcome.usage) if outcome.usage else None
    return session.make_line(question, outcome, 0.0) | {"usd": usd, "batch_id": batch_id, "latency_s": None}


# ---------------------------------------------------------------- what there is to ask


@dataclass(frozen=True)
class Work:
    """What a study has for batches: `every` question, those that can be asked `now`, and a word on which these are."""

    session: Session
    every: list[Request]
    now: list[Request]
    book: BatchLedger
    said: str


def generator_work(profile: str, params_dir: Path, max_usd: float | None) -> Work:
    """The questions of a study's generator.

    Of each scenario one call is asked at a time: the next is told how the answers before it begin.
    """
    study = params.load_study(profile, params_dir)
    values = study.values("shared")
    source = hosted_model_from(values, "generator")
    if source is None:
        raise ProviderError(f"profile {profile}: the generator is offline; there is nothing to submit.")
    root = record.profile_root(profile)
    cards = load_cards(ROOT / values["glossary_path"])
    axes = scenarios.load_axes(ROOT / values["axes_path"])
    seed = values["seed"]
    planned = llm_writer.plan_calls(
        cards, scenarios.build_scenarios(cards, axes, seed), axes, values["seeds_per_scenario"]
    )
    session = llm_writer.open_session(values, source, planned, root, max_usd, batch=True)
    every, now = [], []
    for each in planned:
        siblings: list[str] = []
        asked = False
        for call in each:
            question = llm_writer.request_for(call, source, seed, siblings)
            every.append(question)
            line = session.store.ok.get(question.id)
            if line:
                siblings += llm_writer.first_lines(line["output"])
            elif not asked:
                now.append(question)
                asked = True
    return Work(session, every, now, ledger_of(llm_writer.store_path(root)), "one at a time of each scenario")


def judge_work(asked: Protocol) -> Work:
    """The questions of a judge, the gate's first. Attempts are stored as 05_judge stores them."""
    book = ledger_of(asked.store.path)
    now, said = asked.due(book.under_way)
    session = asked.judge.session(asked.every, asked.store, asking.normalised_line, batch=True)
    return Work(
        session,
        [language_model.request_for(q) for q in asked.every],
        [language_model.request_for(q) for q in now],
        book,
        said,
    )


# ---------------------------------------------------------------- command line


EPILOG = """
**Example**: conversations in four rounds, as each scenario is asked for four times, and later calls are told how earlier
ones begin; then a judge in two rounds, its gate and, if it passes, all the rest

    export GOOGLE_API_KEY=... ANTHROPIC_API_KEY=...
    python -m telco_nb batch submit --profile paper --max-usd 30 --yes
    python -m telco_nb batch poll --profile paper
    python -m telco_nb batch collect --profile paper
    ./run_all.py --profile paper --steps 01-04
    python -m telco_nb batch submit --profile paper --judge claude-sonnet-4-5 --max-usd 60 --yes
    python -m telco_nb batch collect --profile paper --judge claude-sonnet-4-5
"""


def main(
    action: Annotated[str, typer.Argument(metavar="submit|poll|collect|forget")],
    profile: Profile,
    judge: Annotated[
        str | None, typer.Option(help="A judge: a file of params/judges. Default: the profile's generator.")
    ] = None,
    params_dir: ParamsDir = params.PARAMS_DIR,
    max_usd: MaxUsd = None,
    yes: Yes = False,
) -> None:
    """Generate conversations or judge answers in batches: half the price, up to a day later.

    Every command can be repeated.
    """
    with errors_as_exit_codes("batch"), runner.lock(record.profile_root(profile)):
        if judge:
            work = judge_work(open_study(profile, judge, params_dir, to_ask=action == "submit", max_usd=max_usd))
        else:
            work = generator_work(profile, params_dir, max_usd)
        _act(action, work, yes)


def _act(action: str, work: Work, yes: bool) -> None:
    session, book = work.session, work.book
    if action == "submit":
        source = session.model.source
        print(f"{len(work.now):,} requests to {source.model} at {source.host}: {work.said}.")
        if work.now and not yes and not source.is_local:
            raise prices.CostRefused(f"nothing was sent. To send this to {source.host}, add --yes.")
        n = _run(session, submit(session, work.now, book))
        rest = "" if n == len(work.now) else "; the others are under way, or have to wait for these under the cap"
        print(f"submitted: {n:,}{rest}")
    elif action == "poll":
        print("\n".join(_run(session, poll(session, book))) or "no open batch")
    elif action == "collect":
        print(f"collected: {_run(session, collect(session, work.every, book)) or 'nothing yet'}")
    elif action == "forget":
        for i in book.doubtful:
            book.close(i, "forgotten")
        print("batches of unknown fate are forgotten; their questions can be submitted again")
    else:
        raise BatchError(f"{action}: submit, poll, collect or forget is needed.")


def _run(session: Session, work: Awaitable[Any]) -> Any:
    async def run() -> Any:
        try:
            return await work
        finally:
            await session.model.close()

    return run_async(run)
