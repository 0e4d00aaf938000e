"""Asking many questions of a hosted model: every attempt on disk, nothing asked or paid twice, limits respected."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from telco_nb import __version__
from telco_nb.hosted.book import book_of
from telco_nb.hosted.prices import Budget, BudgetStop, Prices, cap_from_environment
from telco_nb.hosted.providers import RECEIPT, ApiModel, Exchange, Outcome, Question


class CallsStopped(RuntimeError):
    """No further request makes sense; what was answered so far is stored. `status` is the status that ended it."""

    def __init__(self, status: str, message: str):
        self.status = status
        super().__init__(f"BudgetStop: {message}" if status == "budget_stop" else message)


# ---------------------------------------------------------------- the store


class AttemptStore:
    """Append-only JSONL, one line per attempt, flushed to the disk before anything else happens.

    `ok` holds the first good line per id, `attempts` counts the lines per id, `spent_usd` is what they cost, at most.
    A last line torn by a kill is cut off (its question is asked again); an unreadable line elsewhere is skipped and
    counted in `unreadable`.
    """

    def __init__(self, path: Path, key: str = "call_id"):
        self.path, self.key = path, key
        self.ok: dict[str, dict[str, Any]] = {}
        self.attempts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.unreadable = 0
        self.batches: dict[str, set[str]] = defaultdict(set)
        self.spent_usd, self.priced = 0.0, True  # priced: no good answer lacks a price
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._cut_torn_line()
        with path.open("rb") as stream:
            for line in stream:
                self._take(line)

    def _cut_torn_line(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as stream:
            if _whole(data[end:]):  # only the line feed is missing: an answer that may have cost money
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            else:
                stream.truncate(end)
                self.unreadable += 1

    def _take(self, line: bytes) -> None:
        try:
            self._enter(json.loads(line))
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1

    def _enter(self, attempt: dict[str, Any]) -> None:
        """Count an attempt. Raises KeyError, TypeError or ValueError for what is none, before it has any effect."""
        identity, status = attempt[self.key], attempt["status"]
        self.attempts[identity] += 1
        self.statuses[status] += 1
        self.spent_usd += cost_of(attempt)
        self.batches[attempt.get("batch_id") or ""].add(identity)
        if status == "ok":
            self.priced = self.priced and attempt.get("usd") is not None
            self.ok.setdefault(identity, attempt)

    def of_batch(self, batch_id: str) -> set[str]:
        """Ids of the questions whose results of a batch are stored."""
        return self.batches[batch_id]

    def append(self, attempts: Sequence[Mapping[str, Any]]) -> None:
        """Write attempts and wait until they are on disk."""
        if not attempts:
            return
        # In ASCII: no text of a model, whatever it holds, can break a line or its encoding.
        lines = [json.dumps(a, allow_nan=False).encode("ascii") + b"\n" for a in attempts]
        with self.path.open("ab") as stream:
            stream.write(b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        for line in lines:
            self._take(line)


def cost_of(attempt: Mapping[str, Any]) -> float:
    """Dollars of an attempt; where its answer was lost, what it may have cost at most."""
    return attempt.get("usd") or attempt.get("usd_at_most") or 0.0


def spent_usd(root: Path) -> float:
    """Dollars that all stores of a study have recorded so far, at most."""
    return sum(cost_of(line) for path in sorted(root.glob("*/store/*.jsonl")) for line in readable(path))


def readable(store: Path) -> Iterator[dict[str, Any]]:
    """The lines of a store that can be read; none if there is no store."""
    for line in store.read_bytes().splitlines() if store.is_file() else []:
        if _whole(line):
            yield json.loads(line)


def open_budget(root: Path) -> Budget:
    """What may still be spent on the study in `root`: the cap of this run, less what its stores have recorded."""
    return Budget(cap_from_environment(), spent_usd(root))


def _whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


# ---------------------------------------------------------------- how fast


class Throttle:
    """When the next request may leave, and how many may be under way; both learn from refusals.

    When the provider refuses, the rate falls by a twentieth, but not below the answers a second of the last minute
    (that many were allowed), and to at most a quarter above them once that is known; the number in flight falls by a
    tenth. Each answer raises both, the rate the faster the longer there was no refusal (after Chiu and Jain 1989, who
    show that such steps settle). A pause that the provider asks for holds for all requests. Slots missed while pausing
    are made up for, as a provider's own bucket fills up meanwhile.
    """

    DOWN, HEADROOM, DOWN_IN_FLIGHT = 0.95, 1.25, 0.9
    UP, MOST_UP = 0.0005, 0.05
    MEMORY_S, LEARNING_S = 60.0, 5.0
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0  # without a Retry-After
    MAKE_UP_S = 2.0

    def __init__(self, max_in_flight: int):
        self.max_in_flight = max_in_flight
        self.allowed = float(max_in_flight)
        self.in_flight = 0
        self.rate = float("inf")  # requests per second
        self.not_before = self.next_slot = self.settled = 0.0
        self.refusals = self.since_refusal = self.n_sent = 0
        self.answers: deque[float] = deque()
        self.started: float | None = None
        self.changed = asyncio.Condition()

    async def enter(self) -> float:
        """Wait for a place and a slot; returns the time at which the request leaves."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.in_flight < int(self.allowed))
            self.in_flight += 1
        while (wait := self._wait()) > 0:
            await asyncio.sleep(wait)
        now = time.monotonic()
        self.started = self.started or now
        self.n_sent += 1
        self.next_slot = max(self.next_slot, now - self.MAKE_UP_S) + 1 / self.rate
        return now

    def _wait(self) -> float:
        return max(self.not_before, self.next_slot) - time.monotonic()

    async def leave(self, sent_at: float, outcome: Outcome) -> None:
        """Give the place back and learn from how it went."""
        async with self.changed:
            self.in_flight -= 1
            if outcome.status == "rate_limited":
                self._refused(sent_at, outcome.retry_after)
            elif outcome.status not in ("timeout", "provider_error"):
                self._answered()
            self.changed.notify_all()

    def _answered(self) -> None:
        self.refusals = 0
        self.since_refusal += 1
        self.answers.append(time.monotonic())
        self.rate *= 1 + min(self.MOST_UP, self.UP * self.since_refusal)
        self.allowed = min(self.max_in_flight, self.allowed + 1 / self.allowed)

    def _refused(self, sent_at: float, retry_after: float | None) -> None:
        now = time.monotonic()
        if sent_at < self.settled:  # sent before the last change: it says nothing about the new rate
            return
        known, span = self._answered_per_s(now)
        most = self.HEADROOM * known if span > self.LEARNING_S else self.n_sent / max(span, 0.1)
        self.rate = max(1 / max(span, 1.0), known, min(self.rate * self.DOWN, most))
        self.allowed = max(1.0, self.allowed * self.DOWN_IN_FLIGHT)
        pause = min(self.LONGEST_PAUSE_S, self.FIRST_PAUSE_S * 2**self.refusals)
        self.refusals += 1
        self.since_refusal = 0
        self.not_before = now + (pause if retry_after is None else retry_after)
        self.settled = self.not_before

    def _answered_per_s(self, now: float) -> tuple[float, float]:
        """Answers a second in the time that is remembered, and how long that is."""
        while self.answers and self.answers[0] < now - self.MEMORY_S:
            self.answers.popleft()
        span = min(self.MEMORY_S, now - (self.started or now))
        return len(self.answers) / max(span, 1.0), span


@dataclass(frozen=True)
class Patience:
    """How often a question is sent in one run, by how the last attempt ended, and how long to wait in between."""

    limits: Mapping[str, int] = field(
        default_factory=lambda: {
            "rate_limited": 100,
            "timeout": 4,
            "provider_error": 5,
            "parse_error": 3,
            "truncated": 2,
        }
    )
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    failures_in_a_row: int = 25  # of all questions: then something is wrong that waiting does not mend

    def again(self, counts: Counter[str], status: str) -> bool:
        return counts[status] < self.limits.get(status, 1)

    def wait_s(self, n_failed: int, retry_after: float | None) -> float:
        """Exponential with full jitter, never less than what the provider asked for."""
        drawn = random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2 ** (n_failed - 1)))
        return max(drawn, retry_after or 0.0)


# ---------------------------------------------------------------- asking


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
        model: ApiModel,
        store: AttemptStore,
        prices: Prices,
        budget: Budget,
        *,
        max_in_flight: int = 16,
        patience: Patience | None = None,
        describe: Callable[[Question], Mapping[str, Any]] = lambda question: {},
        line: Callable[[Question, Outcome, float], dict[str, Any]] | None = None,
    ):
        self.model, self.store, self.prices, self.budget = model, store, prices, budget
        self.throttle = Throttle(max_in_flight)
        self.max_in_flight = max_in_flight
        self.patience = patience or Patience()
        self.describe = describe  # what else a line should say of its question
        self.make_line = line or self.line  # or what a line should be altogether: (question, outcome, seconds)
        self.stopped: CallsStopped | None = None
        self.in_a_row = 0
        self.under_way = book_of(store.path).under_way

    async def ask(self, question: Question) -> dict[str, Any] | None:
        """The stored line of the good answer, or None if there is none after all patience.

        Raises CallsStopped if no request may be sent any more.
        """
        if question.id in self.store.ok:
            return self.store.ok[question.id]
        if question.id in self.under_way:
            raise CallsStopped(
                "under_way",
                f"{len(self.under_way)} questions are under way in a batch, and would be paid for twice. Run "
                "`python -m telco_nb.commands.batches collect` for this profile (and judge) first.",
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

    async def _attempt(self, question: Question, failed: Sequence[Exchange]) -> Outcome:
        """One request and one line in the store."""
        if self.stopped:
            raise self.stopped
        sent_at = await self.throttle.enter()
        outcome = Outcome("timeout")
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

    def _reserve(self, question: Question, failed: Sequence[Exchange]) -> float:
        again = sum(len(raw.encode()) + len(wrong.encode()) for raw, wrong in failed)
        try:
            return self.budget.reserve(
                self.prices.worst_case(question, again) if self.budget.max_usd is not None else None
            )
        except BudgetStop as stop:
            self.store.append([self.make_line(question, Outcome("budget_stop", error=str(stop)), 0.0)])
            self.stopped = CallsStopped("budget_stop", str(stop))
            raise self.stopped from None

    def _give_up_all(self, outcome: Outcome) -> None:
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

    def line(self, question: Question, outcome: Outcome, seconds: float) -> dict[str, Any]:
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
