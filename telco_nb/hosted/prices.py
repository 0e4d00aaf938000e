"""What calls to hosted models cost, before and after: prices by genai-prices, and a budget that is never overdrawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from telco_nb.hosted.api import HostedModel, Request

# Batches cost half the price at all three providers, as they published it when this was written (November 2026).
# genai-prices does not know it.
BATCH_FACTOR = 0.5
BYTES_PER_TOKEN = 4.0  # of English text, for estimates only; a cap counts one token a byte, which no tokenizer exceeds


class BudgetStop(RuntimeError):
    """The next request might exceed the budget, or has no known price; nothing more may be sent."""


@dataclass(frozen=True)
class Prices:
    """Prices of one source. A server of one's own has the prices that were declared for it (USD per million tokens)."""

    source: HostedModel
    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None
    factor: float = 1.0

    @property
    def declared(self) -> bool:
        return self.input_usd_per_mtok is not None and self.output_usd_per_mtok is not None

    @property
    def table(self) -> str | None:
        """Where a price comes from; None if there is none."""
        if self.declared:
            return "declared in the parameters"
        return f"genai-prices {metadata.version('genai-prices')}" if self._known() else None

    def _known(self) -> bool:
        return self.source.kind != "openai-compatible" and _listed(self.source.kind, self.source.model)

    def usd(self, usage: Any) -> float | None:
        """Dollars of one request (each is priced alone, as price tiers are by request); None if no price is known."""
        if self.declared:
            tokens = (
                (usage.input_tokens or 0, self.input_usd_per_mtok),
                (usage.output_tokens or 0, self.output_usd_per_mtok),
            )
            return self.factor * sum(n * price for n, price in tokens) / 1e6  # type: ignore[operator]
        if not self._known():
            return None
        from genai_prices import calc_price

        price = calc_price(usage, self.source.model, provider_id=self.source.kind)
        return self.factor * float(price.total_price)

    def of_tokens(self, tokens_in: float, tokens_out: float) -> float | None:
        from genai_prices import Usage

        return self.usd(Usage(input_tokens=round(tokens_in), output_tokens=round(tokens_out)))

    def worst_case(self, question: Request, sent_again: int = 0) -> float | None:
        """An upper bound on one request: a token for every byte sent, and all the tokens that may come back.

        A token that is written to a provider's cache costs a quarter more, which so many tokens have room for.
        `sent_again`: bytes of failed answers that go along in a re-ask.
        """
        schema = len(str(question.schema.model_json_schema()))
        sent = len(question.text.encode()) + 2 * schema + sent_again + 500
        return self.of_tokens(sent, self.source.max_tokens)


@cache
def _listed(kind: str, model: str) -> bool:
    from genai_prices import Usage, calc_price

    try:
        calc_price(Usage(input_tokens=1, output_tokens=1), model, provider_id=kind)
    except LookupError:
        return False
    return True


class Budget:
    """Dollars that may be spent. The worst case of a request is set aside before it is sent; else it is not sent.

    `max_usd` None: no cap; what cannot be priced is then recorded as unpriced (null).
    """

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0):
        self.max_usd, self.spent_usd, self.reserved_usd = max_usd, spent_usd, 0.0

    def reserve(self, worst_usd: float | None) -> float:
        """Set the worst case aside. Raises BudgetStop if it might exceed the cap, or if it is unknown under a cap."""
        if self.max_usd is None:
            return 0.0
        if worst_usd is None:
            raise BudgetStop(
                "there is a cap in dollars, but no price is known for this model. Give input_usd_per_mtok and "
                "output_usd_per_mtok (0.0 for a server of your own) in its parameter file."
            )
        if self.spent_usd + self.reserved_usd + worst_usd > self.max_usd:
            raise BudgetStop(
                f"${self.spent_usd:.2f} of ${self.max_usd:.2f} are spent and ${self.reserved_usd:.2f} set aside for "
                f"requests under way; the next one might cost ${worst_usd:.4f}. Raise --max-usd to go on; what is paid "
                "for is kept."
            )
        self.reserved_usd += worst_usd
        return worst_usd

    def settle(self, reserved_usd: float, usd: float) -> None:
        """Release what was set aside and book what was spent."""
        self.reserved_usd -= reserved_usd
        self.spent_usd += usd


@dataclass(frozen=True)
class Estimate:
    """What a set of calls will come to; dollars are None where no price is known."""

    source: HostedModel
    calls: int
    tokens_in: int
    tokens_out: int
    usd_low: float | None
    usd_mid: float | None
    usd_high: float | None
    prices: str | None

    def __str__(self) -> str:
        where = f"{self.source.host}{' (this network)' if self.source.is_local else ''}"
        usd = "no price is known"
        if self.usd_mid is not None:
            usd = f"${self.usd_mid:,.2f} (${self.usd_low:,.2f} to ${self.usd_high:,.2f}, {self.prices})"
        return (
            f"{self.calls:,} calls to {self.source.model} at {where}, {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out: {usd}"
        )


Range = tuple[float, float, float]  # low, mid, high


def estimate(price: Prices, calls: int, tokens_in: Range, tokens_out: Range) -> Estimate:
    """Of `calls` calls with so many tokens each, on average; what a provider serves from its cache costs less."""
    usd = [price.of_tokens(*tokens) for tokens in zip(tokens_in, tokens_out, strict=True)]
    low, mid, high = (None if one is None else calls * one for one in usd)
    sent, back = round(calls * tokens_in[1]), round(calls * tokens_out[1])
    return Estimate(price.source, calls, sent, back, low, mid, high, price.table)


class CostRefused(RuntimeError):
    """The estimate exceeds the cap, or nobody has agreed to it. Exit code 4."""


def require_consent(
    estimates: Sequence[Estimate], max_usd: float | None, yes: bool, ask: Callable[[], bool] | None
) -> None:
    """Return if the calls may be made. Raises CostRefused with what to do if not.

    A cap below the middle estimate is refused before anything is spent. Data leaves this network only if somebody has
    said so: by --yes, or by answering `ask` (None: nobody is there to ask).
    """
    waiting = [e for e in estimates if e.calls]
    expected = sum(e.usd_mid or 0.0 for e in waiting)
    if max_usd is not None and expected > max_usd:
        raise CostRefused(
            f"about ${expected:,.2f} are expected, and --max-usd allows ${max_usd:,.2f}. Raise it, or ask for less."
        )
    remote = sorted({e.source.host for e in waiting if not e.source.is_local})
    if remote and not yes and not (ask and ask()):
        raise CostRefused(f"nothing was sent. To send this to {', '.join(remote)}, add --yes; --max-usd sets a limit.")
