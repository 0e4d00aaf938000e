"""Asking many questions of a hosted model: every attempt on disk, nothing asked or paid twice, limits respected."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from telco_nb import __version__
from telco_nb.hosted.api import RECEIPT, ApiClient, Exchange, Request, Response
from telco_nb.hosted.attempts import AttemptStore
from telco_nb.hosted.ledger import ledger_of
from telco_nb.hosted.prices import Budget, BudgetStop, Prices
from telco_nb.hosted.throttle import RetryPolicy, Throttle


class CallsStopped(RuntimeError):
    """No further request makes sense; what was answered so far is stored. `status` is the status that ended it."""

    def __init__(self, status: str, message: str):
        self.status = status
        super().__init__(f"BudgetStop: {message}" if status == "budget_stop" else message)


def run_async(work: Callable[[], Awaitable[Any]], interrupt: Callable[[], float] | None = None) -> Any:
    """The result of `work()` on an event loop of its own in a thread of its own (a notebook has one running).

    On Ctrl-C `interrupt` is called, which may make the work end; it returns how many seconds to wait for that.
    """
    ended: list[tuple[Any, BaseException | None]] = []

    async def run() -> Any:
        return await work()

    def target() -> None:
        try:
            ended.append((asyncio.run(run()), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=target, name="calls", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        thread.join(interrupt() if interrupt else 0)
        raise
    result, error = ended[0]
    if error:
        raise error
    return result


class Session:
    """Questions to one model with one store. `ask` answers from the store if it can, else by a request."""

    def __init__(
        self,
        model: ApiClient,
        store: AttemptStore,
        prices: Prices,
        budget: Budget,
        *,
        max_in_flight: int = 16,
        patience: RetryPolicy | None = None,
        describe: Callable[[Request], Mapping[str, Any]] = lambda question: {},
        line: Callable[[Request, Response, float], dict[str, Any]] | None = None,
    ):
        self.model, self.store, self.prices, self.budget = model, store, prices, budget
        self.throttle = Throttle(max_in_flight)
        self.max_in_flight = max_in_flight
        self.patience = patience or RetryPolicy()
        self.describe = describe  # what else a line should say of its question
        self.make_line = line or self.line  # or what a line should be altogether: (question, outcome, seconds)
        self.stopped: CallsStopped | None = None
        self.in_a_row = 0
        self.under_way = ledger_of(store.path).under_way

    async def ask(self, question: Request) -> dict[str, Any] | None:
        """The stored line of the good answer, or None if there is none after all patience.

        Raises CallsStopped if no request may be sent any more.
        """
        if question.id in self.store.ok:
            return self.store.ok[question.id]
        if question.id in self.under_way:
            raise CallsStopped(
                "under_way",
                f"{len(self.under_way)} questions are under way in a batch, and would be paid for twice. Run "
                "`python -m telco_nb batch collect` for this profile (and judge) first.",
            )
        counts: Counter[str] = Counter()
        failed: list[Exchange] = []
        while True:
            outcome = await self._attempt(question, failed)
            if outcome.status == "ok":
                return self.store.ok[question.id]
            counts[outcome.status] += 1
            self._give_up_all(outcome)
            if not self.patience.again(counts, outcome.status):
                return None
            if outcome.status == "parse_error":
                failed.append((outcome.raw or "", outcome.error or ""))
            elif outcome.status != "rate_limited":  # the throttle waits for those
                await asyncio.sleep(self.patience.wait_s(counts.total(), outcome.retry_after))

    async def _attempt(self, question: Request, failed: Sequence[Exchange]) -> Response:
        """One request and one line in the store."""
        if self.stopped:
            raise self.stopped
        sent_at = await self.throttle.enter()
        outcome = Response("timeout")
        try:
            if self.stopped:
                raise self.stopped
            reserved = self._reserve(question, failed)
            started = time.perf_counter()
            outcome = await self.model.ask(question, failed)
            usd = self.prices.usd(outcome.usage) if outcome.usage else None
            at_most = reserved if outcome.may_be_billed else None
            self.budget.settle(reserved, at_most or usd or 0.0)
            line = self.make_line(question, outcome, time.perf_counter() - started)
            self.store.append([line | {"usd": usd, "usd_at_most": at_most}])
            return outcome
        finally:
            await self.throttle.leave(sent_at, outcome)

    def _reserve(self, question: Request, failed: Sequence[Exchange]) -> float:
        again = sum(len(raw.encode()) + len(wrong.encode()) for raw, wrong in failed)
        try:
            return self.budget.reserve(
                self.prices.worst_case(question, again) if self.budget.max_usd is not None else None
            )
        except BudgetStop as stop:
            self.store.append([self.make_line(question, Response("budget_stop", error=str(stop)), 0.0)])
            self.stopped = CallsStopped("budget_stop", str(stop))
            raise self.stopped from None

    def _give_up_all(self, outcome: Response) -> None:
        """Stop everything if an answer says that all others would end alike, or if nothing has worked for long."""
        broken = outcome.status in ("provider_error", "timeout")
        self.in_a_row = self.in_a_row + 1 if broken else 0
        if outcome.stop:
            self.stopped = CallsStopped(outcome.status, str(outcome.error))
        elif self.in_a_row >= self.patience.failures_in_a_row:
            said = (
                f"the last {self.in_a_row} requests to {self.model.source.host} failed, the last with: {outcome.error}"
            )
            self.stopped = CallsStopped(outcome.status, said)
        if self.stopped:
            raise self.stopped

    def line(self, question: Request, outcome: Response, seconds: float) -> dict[str, Any]:
        """What the store keeps of an attempt."""
        source = self.model.source
        return {
            self.store.key: question.id,
            **self.describe(question),
            "attempt": self.store.attempts[question.id] + 1,
            "status": outcome.status,
            "error": outcome.error,
            "output": outcome.output.model_dump() if outcome.output else None,
            "raw": outcome.raw,
            "kind": source.kind,
            "host": source.host,
            "model_asked": source.model,
            **{name: outcome.receipt.get(name) for name in RECEIPT},
            "price_table": self.prices.table,
            "usd": None,
            "usd_at_most": None,
            "batch_id": None,
            "latency_s": round(seconds, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": __version__,
        }

    async def _run(
        self, chains: Iterable[Callable[[], Awaitable[Any]]], progress: Callable[[int, int], None] | None
    ) -> None:
        todo = list(chains)
        queue = iter(todo)
        done = 0

        async def worker() -> None:
            nonlocal done
            for chain in queue:
                await chain()
                done += 1
                if progress:
                    progress(done, len(todo))

        workers = [asyncio.create_task(worker()) for _ in range(min(len(todo), 2 * self.max_in_flight))]
        results = await asyncio.gather(*workers, return_exceptions=True)
        await self.model.close()
        errors = [r for r in results if isinstance(r, BaseException)]
        for error in sorted(errors, key=lambda e: isinstance(e, CallsStopped)):
            raise error

    def run(
        self, chains: Iterable[Callable[[], Awaitable[Any]]], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Run coroutine functions that call `ask`, several at a time, in a thread with an event loop of its own.

        (A notebook's kernel has a running loop already.) When one stops everything, requests under way are still waited
        for and stored, as they will be paid for. Raises CallsStopped then; a Ctrl-C stops in the same way.
        """

        def stop() -> float:
            self.stopped = CallsStopped("interrupted", "interrupted; the answers so far are stored")
            return self.model.source.timeout_s

        run_async(lambda: self._run(chains, progress), stop)
