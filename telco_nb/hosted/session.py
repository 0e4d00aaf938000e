"""Sends many requests to one hosted model. Every attempt is stored, and no request is sent or paid for twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any, TypeVar

from telco_nb import __version__
from telco_nb.hosted.api import ApiClient, ProviderError, Request, Response, UnreadableReply
from telco_nb.hosted.attempts import AttemptStore
from telco_nb.hosted.egress import log_path, require_agreed
from telco_nb.hosted.ledger import ledger_of
from telco_nb.hosted.prices import Budget, BudgetStop, Prices
from telco_nb.hosted.throttle import RetryPolicy, Throttle

T = TypeVar("T")


class CallsStopped(RuntimeError):
    """No further request may be sent; the answers so far are stored. `status` is that of the request that ended it."""

    def __init__(self, status: str, message: str):
        self.status = status
        super().__init__(f"BudgetStop: {message}" if status == "budget_stop" else message)


def run_async(work: Callable[[], Coroutine[Any, Any, T]], interrupt: Callable[[], float] = lambda: 0.0) -> T:
    """The result of `work()`, run in a new thread with its own event loop, because a notebook's loop is in use.

    On Ctrl-C `interrupt` is called. It may end the work, and returns how many seconds to wait for that.
    """
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(asyncio.run(work()))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=target, name="requests", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        thread.join(interrupt())
        raise
    return future.result()


def is_lost(response: Response, usd: float | None) -> bool:
    """True if what a request cost is unknown: its reply was lost, or came without a count of tokens to trust."""
    uncounted = response.usage is not None and (usd is None or not response.usage.input_tokens)
    return response.may_be_billed or uncounted


class Session:
    """Requests to one model with one store.

    Args:
        client: the client of the model.
        store: the attempts so far; new ones are appended.
        prices: the model's prices.
        budget: the dollars that may be spent.
        max_in_flight: number of requests under way at once, at most.
        retry_policy: how often a failed request is repeated; None for the default.
        describe: further fields of a stored line, from its request.
        line: replaces the stored line by its own, from (request, response, seconds).
    """

    def __init__(
        self,
        client: ApiClient,
        store: AttemptStore,
        prices: Prices,
        budget: Budget,
        *,
        max_in_flight: int = 16,
        retry_policy: RetryPolicy | None = None,
        describe: Callable[[Request], Mapping[str, Any]] = lambda request: {},
        line: Callable[[Request, Response, float], dict[str, Any]] | None = None,
    ):
        self.client, self.store, self.prices, self.budget = client, store, prices, budget
        self.throttle = Throttle(max_in_flight)
        self.retry_policy = retry_policy or RetryPolicy()
        self.describe = describe
        self.make_line = line or self._line
        self.stopped: CallsStopped | None = None
        self.failures_in_a_row = 0
        self.ledger = ledger_of(store.path)
        self.under_way = self.ledger.under_way
        client.transport.log = log_path(store.path)

    async def ask(self, request: Request) -> dict[str, Any] | None:
        """The stored line of the good answer, after a request if none is stored; None if all attempts failed.

        Raises CallsStopped if no further request may be sent, EgressRefused if the plan knew no host so far away.
        """
        if request.id in self.store.ok:
            return self.store.ok[request.id]
        require_agreed(self.client.hosted_model.address, self.client.hosted_model.parameter)
        if request.id in self.under_way:
            raise CallsStopped(
                "under_way",
                f"{len(self.under_way)} requests are under way in a batch, and would be paid for twice. Run "
                "`python -m telco_nb batch collect` for this profile (and judge) first.",
            )
        counts: Counter[str] = Counter()
        unreadable: list[UnreadableReply] = []
        while True:
            response = await self._attempt(request, unreadable)
            if response.status == "ok":
                return self.store.ok[request.id]
            counts[response.status] += 1
            self._stop_if_hopeless(response)
            if not self.retry_policy.may_retry(counts, response.status):
                return None
            if response.status == "parse_error":
                unreadable.append((response.raw or "", response.error or ""))
            elif response.status != "rate_limited":  # the throttle waits after a refusal
                await asyncio.sleep(self.retry_policy.wait_s(counts.total(), response.retry_after))

    async def _attempt(self, request: Request, unreadable: Sequence[UnreadableReply]) -> Response:
        """Send one request and store one line."""
        if self.stopped:
            raise self.stopped
        sent_at = await self.throttle.enter()
        response = Response("timeout")
        try:
            if self.stopped:
                raise self.stopped
            reserved = self._reserve(request, unreadable)
            started = time.perf_counter()
            response = await self._send(request, unreadable, reserved)
            usd = self.prices.usd(response.usage) if response.usage else None
            at_most = self._worst_case(request, unreadable) if is_lost(response, usd) else None
            self.budget.spend(reserved, at_most or usd or 0.0)
            line = self.make_line(request, response, time.perf_counter() - started)
            self.store.append([line | {"usd": usd, "usd_at_most": at_most}])
            return response
        finally:
            await self.throttle.leave(sent_at, response)

    async def _send(self, request: Request, unreadable: Sequence[UnreadableReply], reserved: float) -> Response:
        """Send a request. If that has no response, its reservation is settled: given back if nothing was sent."""
        try:
            return await self.client.ask(request, unreadable)
        except BaseException as error:
            self.budget.spend(reserved, 0.0 if isinstance(error, ProviderError) else reserved)
            raise

    def _reserve(self, request: Request, unreadable: Sequence[UnreadableReply]) -> float:
        """Reserve the request's worst case. Raises CallsStopped if the budget does not allow it."""
        if self.budget.max_usd is None:
            return 0.0
        try:
            return self.budget.reserve(self._worst_case(request, unreadable))
        except BudgetStop as stop:
            self.store.append([self.make_line(request, Response("budget_stop", error=str(stop)), 0.0)])
            self.stopped = CallsStopped("budget_stop", str(stop))
            raise self.stopped from None

    def _worst_case(self, request: Request, unreadable: Sequence[UnreadableReply]) -> float | None:
        resent_bytes = sum(len(raw.encode(errors="replace")) + len(fault.encode()) for raw, fault in unreadable)
        return self.prices.worst_case(request, resent_bytes)

    def _stop_if_hopeless(self, response: Response) -> None:
        """Stop the session if all other requests would end like this one, or if too many failed in a row."""
        failed = response.status in ("provider_error", "timeout")
        self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
        if response.stop:
            self.stopped = CallsStopped(response.status, str(response.error))
        elif self.failures_in_a_row >= self.retry_policy.failures_in_a_row:
            message = f"the last {self.failures_in_a_row} requests to {self.client.hosted_model.host} failed"
            self.stopped = CallsStopped(response.status, f"{message}, the last with: {response.error}")
        if self.stopped:
            raise self.stopped

    def _line(self, request: Request, response: Response, seconds: float) -> dict[str, Any]:
        model = self.client.hosted_model
        return {
            self.store.key: request.id,
            **self.describe(request),
            "attempt": self.store.attempts[request.id] + 1,
            "status": response.status,
            "error": response.error,
            "output": response.output.model_dump() if response.output else None,
            "raw": response.raw,
            "kind": model.kind,
            "host": model.host,
            "model_asked": model.model,
            **response.receipt,
            "price_table": self.prices.table,
            "usd": None,
            "usd_at_most": None,
            "batch_id": None,
            "latency_s": round(seconds, 3),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": __version__,
        }

    def run(
        self, chains: Iterable[Callable[[], Awaitable[Any]]], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs coroutine functions that call `ask`, several at a time.

        Args:
            chains: the coroutine functions.
            progress: called with (number done, number of all).

        Raises:
            CallsStopped: one request ended the session, or Ctrl-C did. The requests under way are still awaited and
                stored, because they are paid for.
        """

        def stop() -> float:
            self.stopped = CallsStopped("interrupted", "interrupted; the answers so far are stored")
            return self.client.hosted_model.timeout_s

        run_async(lambda: self._run(list(chains), progress), stop)

    async def _run(
        self, chains: Sequence[Callable[[], Awaitable[Any]]], progress: Callable[[int, int], None] | None
    ) -> None:
        queue, done = iter(chains), 0

        async def worker() -> None:
            nonlocal done
            for chain in queue:
                await chain()
                done += 1
                if progress:
                    progress(done, len(chains))

        workers = [worker() for _ in range(min(len(chains), 2 * self.throttle.max_in_flight))]
        results = await asyncio.gather(*workers, return_exceptions=True)
        await self.client.close()
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:  # an unexpected error comes before the CallsStopped of the other workers
            raise min(errors, key=lambda error: isinstance(error, CallsStopped))
