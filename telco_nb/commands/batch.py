"""Batch mode: the same requests at half the price and up to a day later, in commands that can all be repeated.

`submit` hands over the requests that are neither answered nor under way, `poll` shows the state at the provider, and
`collect` stores the results. The study itself then finds the answers in the store and sends nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import typer
from pydantic import TypeAdapter

from telco_nb.commands.common import (
    CommandError,
    MaxUsd,
    NoEgress,
    ParamsDir,
    Profile,
    Yes,
    errors_as_exit_codes,
    locked_study,
)
from telco_nb.commands.estimate import Corpus
from telco_nb.corpus import llm_writer
from telco_nb.hosted import api, egress, prices
from telco_nb.hosted.keys import safe
from telco_nb.hosted.ledger import BatchRecord
from telco_nb.hosted.session import CallsStopped, Session, is_lost, run_async
from telco_nb.judge import language_model
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.protocol import Protocol, open_study
from telco_nb.study import params, record

if TYPE_CHECKING:
    from pydantic_ai.models.batch import Batch, BatchRequest

DEADLINE_S = 1800.0  # of one call: results may have 1 GiB
T = TypeVar("T")
Action = Literal["submit", "poll", "collect", "forget"]


# ---------------------------------------------------------------- the three steps


async def submit(session: Session, requests: Sequence[api.Request]) -> int:
    """Submits the requests that are neither answered nor under way, as many as the cap allows; returns their number.

    Raises CommandError if an earlier batch is unconfirmed or the provider has no batches, and BudgetStop if the worst
    case of the first request exceeds the budget.
    """
    model, ledger = session.client.model, session.ledger
    limit = model.batch_max_requests
    if limit is None:
        raise CommandError(f"{session.client.hosted_model.kind}: this provider has no batches. Run the study instead.")
    if ledger.unconfirmed:
        raise CommandError(
            f"{len(ledger.unconfirmed)} batches were being submitted when the process ended, and may exist at the "
            "provider. Look there. If they do not exist, run `forget`; if they do, cancel them first."
        )
    waiting = [r for r in requests if r.id not in session.store.ok and r.id not in session.under_way]
    worst = _reserve(session, waiting)
    for i in range(0, len(worst), limit):
        part = waiting[: len(worst)][i : i + limit]
        known = [usd for usd in worst[i : i + limit] if usd is not None]
        encoded = [await _asked(session, model.batch_encode(_batch_request(session, request))) for request in part]
        at_most = sum(known) if len(known) == len(part) else None
        ledger.write("submitting", ids=[request.id for request in part], usd_at_most=at_most)
        handle = _batch_type().dump_python(await _asked(session, model.batch_create(encoded)), mode="json")
        ledger.write("submitted", entry=len(ledger.batches) - 1, handle=handle)
    return len(worst)


def _reserve(session: Session, requests: Sequence[api.Request]) -> list[float | None]:
    """The worst cases of as many requests as the budget allows. Raises BudgetStop if it does not allow one."""
    worst: list[float | None] = []
    for usd in map(session.prices.worst_case, requests):
        try:
            session.budget.reserve(usd)
        except prices.BudgetStop:
            if worst:
                break
            raise
        worst.append(usd)
    return worst


def _batch_type() -> TypeAdapter[Batch]:
    """Converts a batch to the handle in the ledger and back."""
    from pydantic_ai.models.batch import Batch

    return TypeAdapter(Batch)


async def _asked(session: Session, call: Awaitable[T]) -> T:
    """What a call of the provider's SDK returns; each of its errors becomes CallsStopped, without its traceback.

    The deadline is for the whole call: a server that sends a byte now and then never exceeds the limit of one reading.
    """
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await call
    except TimeoutError:
        host = session.client.hosted_model.host
        fix = "Run it again: it goes on from the ledger"
        raise CallsStopped("timeout", f"{host} did not end its reply within {DEADLINE_S:,.0f} s. {fix}.") from None
    except Exception as error:  # of the SDK, in any of its ways
        response = api.failed_response(error, session.client.hosted_model)
    raise CallsStopped(response.status, str(response.error))


async def _status(session: Session, batch: BatchRecord) -> Batch:
    return await _asked(session, session.client.model.batch_status(_batch_type().validate_python(batch.handle)))


def _batch_request(session: Session, request: api.Request) -> BatchRequest:
    from pydantic_ai.models.batch import BatchRequest

    model = session.client.hosted_model
    return BatchRequest(
        custom_id=request.id[:64],  # the longest id that all providers accept; a sha256 fits
        messages=api.messages(request, (), model),
        model_settings=session.client.settings(live=False),
        model_request_parameters=api.request_parameters(request, model),
    )


async def poll(session: Session) -> list[str]:
    """The state of each open batch, one line each."""
    lines = []
    for i, batch in session.ledger.open():
        if batch.handle is None:
            lines.append(f"batch {i}: unknown; it was being submitted when the process ended")
            continue
        status = await _status(session, batch)
        lines.append(safe(f"batch {i}: {status.status}, {status.request_count} requests, {status.id}"))
    return lines


async def collect(session: Session, requests: Sequence[api.Request]) -> dict[str, int]:
    """Stores the results of all batches that have ended; returns the number of attempts by status.

    `requests` are all requests of the study. Results of other requests (the study has changed) are not stored, and are
    counted as `not asked any more`. A repeated call changes nothing.
    """
    by_id = {request.id[:64]: request for request in requests}
    counts: Counter[str] = Counter()
    for i, batch in list(session.ledger.open()):
        if batch.handle is None or (status := await _status(session, batch)).status != "ended":
            continue
        results = await _asked(session, session.client.model.batch_results(status))
        known = [(by_id[result.custom_id], result) for result in results if result.custom_id in by_id]
        stored = session.store.batches[safe(status.id)]
        lines = [_line(session, request, result, status.id) for request, result in known if request.id not in stored]
        session.store.append(lines)
        session.ledger.close(i, "collected", share=len(known) / max(1, len(results)))
        counts.update(line["status"] for line in lines)
        counts["not asked any more"] += len(results) - len(known)
    return dict(+counts)


def _line(session: Session, request: api.Request, result: Any, batch_id: str) -> dict[str, Any]:
    asked = _batch_request(session, request)
    try:
        reply = session.client.model.batch_decode(result, asked)
    except Exception as error:  # of the SDK: the request failed, or its result cannot be read
        response = api.failed_response(error, session.client.hosted_model)
    else:
        response = api.read_response(reply, request)
    response.receipt["parameters_sent"] = {"batch": True}
    usd = session.prices.usd(response.usage) if response.usage else None
    at_most = session.prices.worst_case(request) if is_lost(response, usd) else None
    amounts = {"usd": usd, "usd_at_most": at_most}
    return session.make_line(request, response, 0.0) | amounts | {"batch_id": safe(batch_id), "latency_s": None}


# ---------------------------------------------------------------- the requests of a study


class BatchWork(NamedTuple):
    """A session, all requests of the study, those that can be submitted now, and the reason for this selection."""

    session: Session
    every: list[api.Request]
    due: list[api.Request]
    reason: str


def _generator_work(profile: str, params_dir: Path, max_usd: float | None) -> BatchWork:
    """The requests of a study's generator, of each scenario one at a time.

    The next request of a scenario contains the first lines of the earlier answers.
    """
    values = params.load_study(profile, params_dir).values("shared")
    model = api.hosted_model_from(values, "generator")
    if model is None:
        raise api.ProviderError(f"profile {profile}: the generator is offline; there is nothing to submit.")
    planned = Corpus(values).planned()
    session = llm_writer.open_session(values, model, planned, record.profile_root(profile), max_usd, batch=True)
    every, due = [], []
    for calls in planned:
        siblings: list[str] = []
        unanswered = []
        for call in calls:
            request = llm_writer.request_for(call, model, siblings)
            every.append(request)
            if line := session.store.ok.get(request.id):
                siblings += llm_writer.first_lines(line["output"])
            else:
                unanswered.append(request)
        due += unanswered[:1]
    return BatchWork(session, every, due, "one at a time of each scenario")


def judge_work(protocol: Protocol[LanguageModelJudge]) -> BatchWork:
    """The requests of a judge, the gate's first. Attempts are stored as 05_judge stores them."""
    session = protocol.judge.session(protocol.every, protocol.store, batch=True)
    questions, reason = protocol.due(session.under_way)
    every, due = ([language_model.request_for(q) for q in part] for part in (protocol.every, questions))
    return BatchWork(session, every, due, reason)


# ---------------------------------------------------------------- command line


EPILOG = """
**Example**: conversations in four rounds, because a scenario has four requests and later ones contain the first lines
of earlier answers; then a judge in two rounds: its gate and, if it passes, the rest

    export GOOGLE_API_KEY=... ANTHROPIC_API_KEY=...
    python -m telco_nb batch submit --profile paper --max-usd 30 --yes
    python -m telco_nb batch poll --profile paper
    python -m telco_nb batch collect --profile paper
    ./run_all.py --profile paper --steps 01-04
    python -m telco_nb batch submit --profile paper --judge claude-sonnet-4-5 --max-usd 60 --yes
    python -m telco_nb batch collect --profile paper --judge claude-sonnet-4-5
"""


def main(
    action: Action,
    profile: Profile,
    judge: Annotated[
        str | None, typer.Option(help="A judge: a file of params/judges. Default: the profile's generator.")
    ] = None,
    params_dir: ParamsDir = params.PARAMS_DIR,
    max_usd: MaxUsd = None,
    yes: Yes = False,
    no_egress: NoEgress = False,
) -> None:
    """Generate conversations or judge answers in batches: half the price, up to a day later.

    Every command can be repeated.
    """
    with errors_as_exit_codes("batch"), locked_study(profile, params_dir):
        if no_egress:
            egress.forbid()
        if judge:
            work = judge_work(open_study(profile, judge, params_dir, to_ask=action == "submit", max_usd=max_usd))
        else:
            work = _generator_work(profile, params_dir, max_usd)
        _act(action, work, yes)


def _act(action: Action, work: BatchWork, yes: bool) -> None:
    session = work.session
    if action == "submit":
        model = session.client.hosted_model
        print(f"{len(work.due):,} requests to {model.model} at {model.host}: {work.reason}.")
        if work.due and not yes and not model.is_local:
            raise prices.CostRefused(f"nothing was sent. To send this to {model.host}, add --yes.")
        n = _run(session, submit(session, work.due))
        print(f"submitted: {n:,}{'' if n == len(work.due) else '; the others are under way or exceed the cap'}")
    elif action == "poll":
        print("\n".join(_run(session, poll(session))) or "no open batch")
    elif action == "collect":
        print(f"collected: {_run(session, collect(session, work.every)) or 'nothing yet'}")
    else:
        for i in session.ledger.unconfirmed:
            session.ledger.close(i, "forgotten")
        print("the unconfirmed batches are forgotten; their requests can be submitted again")


def _run(session: Session, work: Coroutine[Any, Any, T]) -> T:
    """The result of work with the provider, whose client is then closed."""

    async def run() -> T:
        try:
            return await work
        finally:
            await session.client.close()

    return run_async(run)
