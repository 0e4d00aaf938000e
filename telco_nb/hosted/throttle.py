"""Limits how many requests are under way, how fast they leave, and how often a failed one is repeated."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from telco_nb.hosted.api import Response


class Throttle:
    """Sets the time of the next request and the number of requests under way; adapts both to the provider's refusals.

    After a refusal the rate falls by a twentieth, but not below the answers per second of the last minute, which were
    allowed; once that number is known, the rate is at most a quarter above it. The number in flight falls by a tenth.
    Each answer raises both, and the rate rises faster the longer there was no refusal. Such steps converge (Chiu and
    Jain 1989). A pause that the provider asks for holds for all requests. Slots missed during a pause are made up for,
    because the provider's own token bucket fills meanwhile.
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
        self.not_before = self.next_slot = 0.0
        self.refusals = self.since_refusal = self.n_sent = 0
        self.answers: deque[float] = deque()
        self.started: float | None = None
        self.changed = asyncio.Condition()

    async def enter(self) -> float:
        """Wait for a free place and a slot; returns the time at which the request leaves."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.in_flight < int(self.allowed))
            self.in_flight += 1
        while (wait := max(self.not_before, self.next_slot) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        now = time.monotonic()
        self.started = self.started or now
        self.n_sent += 1
        self.next_slot = max(self.next_slot, now - self.MAKE_UP_S) + 1 / self.rate
        return now

    async def leave(self, sent_at: float, response: Response) -> None:
        """Free the place and adapt the limits to the response."""
        async with self.changed:
            self.in_flight -= 1
            if response.status == "rate_limited":
                self._slow_down(sent_at, response.retry_after)
            elif response.status not in ("timeout", "provider_error"):
                self._speed_up()
            self.changed.notify_all()

    def _speed_up(self) -> None:
        self.refusals = 0
        self.since_refusal += 1
        self.answers.append(time.monotonic())
        self.rate *= 1 + min(self.MOST_UP, self.UP * self.since_refusal)
        self.allowed = min(self.max_in_flight, self.allowed + 1 / self.allowed)

    def _slow_down(self, sent_at: float, retry_after: float | None) -> None:
        now = time.monotonic()
        if sent_at < self.not_before:  # the request left at the old rate and says nothing about the new one
            return
        known, span = self._answers_per_s(now)
        most = self.HEADROOM * known if span > self.LEARNING_S else self.n_sent / max(span, 0.1)
        self.rate = max(1 / max(span, 1.0), known, min(self.rate * self.DOWN, most))
        self.allowed = max(1.0, self.allowed * self.DOWN_IN_FLIGHT)
        pause = min(self.LONGEST_PAUSE_S, self.FIRST_PAUSE_S * 2**self.refusals)
        self.refusals += 1
        self.since_refusal = 0
        self.not_before = now + (pause if retry_after is None else retry_after)

    def _answers_per_s(self, now: float) -> tuple[float, float]:
        """(answers per second in the last minute, seconds that this covers)."""
        while self.answers and self.answers[0] < now - self.MEMORY_S:
            self.answers.popleft()
        span = min(self.MEMORY_S, now - (self.started or now))
        return len(self.answers) / max(span, 1.0), span


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on sending a request again in one run, by the status of its last attempt, and the waits in between."""

    limits: Mapping[str, int] = field(
        default_factory=lambda: dict(rate_limited=100, timeout=4, provider_error=5, parse_error=3, truncated=2)
    )
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    failures_in_a_row: int = 25  # over all requests; then the cause is one that waiting does not remove

    def may_retry(self, counts: Counter[str], status: str) -> bool:
        return counts[status] < self.limits.get(status, 1)

    def wait_s(self, n_failed: int, retry_after: float | None) -> float:
        """Seconds to wait: exponential with full jitter, never less than the provider asked for."""
        drawn = random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2 ** (n_failed - 1)))
        return max(drawn, retry_after or 0.0)
