"""Prices of requests to hosted models by genai-prices, estimates before a run, and a budget that is never exceeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

from telco_nb.hosted.api import HostedModel, ProviderError, Request
from telco_nb.hosted.egress import CostRefused, agree
from telco_nb.hosted.lines import is_amount

# Batches cost half the price at all three providers, as published in November 2026. genai-prices does not know this.
BATCH_FACTOR = 0.5
BYTES_PER_TOKEN = 4.0  # of English text, for estimates; a cap counts one token per byte, which no tokenizer exceeds

Range = tuple[float, float, float]  # low, mid, high


class BudgetStop(RuntimeError):
    """The next request could exceed the budget, or has no known price; nothing more may be sent."""


@dataclass(frozen=True)
class Prices:
    """Prices of one model: those declared in the parameters (USD per million tokens), else those of genai-prices."""

    hosted_model: HostedModel
    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("input_usd_per_mtok", "output_usd_per_mtok"):
            value = getattr(self, name)
            if value is not None and not is_amount(value):
                raise ProviderError(f"{name} of {self.hosted_model.model}: {value!r} is not a price from 0 up.")

    @cached_property
    def table(self) -> str | None:
        """The origin of the prices; None if no price is known."""
        if self.input_usd_per_mtok is not None and self.output_usd_per_mtok is not None:
            return "declared in the parameters"
        return None if self.of_tokens(1, 1) is None else f"genai-prices {metadata.version('genai-prices')}"

    def usd(self, usage: Any) -> float | None:
        """Dollars of one request with these token counts. Price tiers are per request.

        None if no price is known, or if no amount follows from the counts: a server can report negative tokens.
        """
        try:
            usd = self._usd(usage)
        except (ValueError, TypeError, ArithmeticError):
            return None
        return usd if is_amount(usd) else None

    def _usd(self, usage: Any) -> float | None:
        if self.input_usd_per_mtok is not None and self.output_usd_per_mtok is not None:
            if (usage.input_tokens or 0) < 0 or (usage.output_tokens or 0) < 0:
                return None
            usd_in = (usage.input_tokens or 0) * self.input_usd_per_mtok
            usd_out = (usage.output_tokens or 0) * self.output_usd_per_mtok
            return self.factor * (usd_in + usd_out) / 1e6
        if self.hosted_model.kind == "openai-compatible":
            return None
        from genai_prices import calc_price

        try:
            price = calc_price(usage, self.hosted_model.model, provider_id=self.hosted_model.kind)
        except LookupError:
            return None
        return self.factor * float(price.total_price)

    def of_tokens(self, tokens_in: float, tokens_out: float) -> float | None:
        """Dollars of one request with so many tokens, rounded to whole tokens."""
        from genai_prices import Usage

        return self.usd(Usage(input_tokens=round(tokens_in), output_tokens=round(tokens_out)))

    def worst_case(self, request: Request, resent_bytes: int = 0) -> float | None:
        """An upper bound of the dollars of one request: a token per byte sent, and all tokens that may come back.

        A token that is written to a provider's cache costs a quarter more; one token per byte leaves room for that.
        `resent_bytes`: bytes of unreadable replies that are sent along.
        """
        schema = len(str(request.schema.model_json_schema()))
        sent = len(request.text.encode()) + 2 * schema + resent_bytes + 500
        return self.of_tokens(sent, self.hosted_model.max_tokens)


class Budget:
    """Dollars that may be spent. The worst case of a request is reserved before it is sent; else it is not sent.

    With `max_usd` None there is no cap, and requests without a known price are recorded without one (null).

    Raises ProviderError if the cap or what is spent is not a finite number from 0 up: a comparison with NaN is never
    true, so it would allow everything.
    """

    def __init__(self, max_usd: float | None, spent_usd: float = 0.0):
        for name, value in (("the cap (--max-usd)", max_usd), ("what is spent so far", spent_usd)):
            if value is not None and not is_amount(value):
                raise ProviderError(f"{name} is {value!r}, not a number of dollars from 0 up.")
        self.max_usd, self.spent_usd, self.reserved_usd = max_usd, spent_usd, 0.0

    def reserve(self, worst_usd: float | None) -> float:
        """Reserve the worst case. Raises BudgetStop if it could exceed the cap, or if it is unknown under a cap."""
        if self.max_usd is None:
            return 0.0
        if worst_usd is None:
            raise BudgetStop(
                "there is a cap in dollars, but no price is known for this model. Set input_usd_per_mtok and "
                "output_usd_per_mtok (0.0 for a server of your own) in its parameter file."
            )
        if not is_amount(worst_usd):
            raise BudgetStop(f"the worst case of the next request is {worst_usd!r}, not a number of dollars from 0 up.")
        if self.spent_usd + self.reserved_usd + worst_usd > self.max_usd:
            raise BudgetStop(
                f"${self.spent_usd:.2f} of ${self.max_usd:.2f} are spent and ${self.reserved_usd:.2f} reserved for "
                f"requests under way; the next one could cost ${worst_usd:.4f}. Raise --max-usd to go on; paid answers "
                "are kept."
            )
        self.reserved_usd += worst_usd
        return worst_usd

    def spend(self, reserved_usd: float, usd: float) -> None:
        """Replace a reserved amount by the amount spent."""
        self.reserved_usd -= reserved_usd
        self.spent_usd += usd


@dataclass(frozen=True)
class Estimate:
    """The expected tokens and dollars of a set of calls; dollars are None if no price is known."""

    hosted_model: HostedModel
    calls: int
    tokens_in: int
    tokens_out: int
    usd_low: float | None
    usd_mid: float | None
    usd_high: float | None
    prices: str | None

    def __str__(self) -> str:
        where = f"{self.hosted_model.host}{' (this network)' if self.hosted_model.is_local else ''}"
        usd = "no price is known"
        if self.usd_mid is not None:
            usd = f"${self.usd_mid:,.2f} (${self.usd_low:,.2f} to ${self.usd_high:,.2f}, {self.prices})"
        return (
            f"{self.calls:,} calls to {self.hosted_model.model} at {where}, {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out: {usd}"
        )


def estimate(price: Prices, calls: int, tokens_in: Range, tokens_out: Range) -> Estimate:
    """Estimates a set of calls; the parts that a provider serves from its cache cost less.

    Args:
        price: the model's prices.
        calls: number of calls.
        tokens_in: mean tokens sent per call.
        tokens_out: mean tokens received per call.
    """
    usd = [price.of_tokens(*tokens) for tokens in zip(tokens_in, tokens_out, strict=True)]
    low, mid, high = (None if one is None else calls * one for one in usd)
    sent, received = round(calls * tokens_in[1]), round(calls * tokens_out[1])
    return Estimate(price.hosted_model, calls, sent, received, low, mid, high, price.table)


def require_consent(
    estimates: Sequence[Estimate], max_usd: float | None, yes: bool, ask: Callable[[], bool] | None
) -> None:
    """Returns if the calls may be made, and holds their hosts to how far away they lie now (`egress.agree`).

    Data leaves this network only with somebody's consent.

    Args:
        estimates: the calls.
        max_usd: the cap in dollars; None for no cap.
        yes: consent was given with --yes.
        ask: asks for consent; None if nobody can answer.

    Raises:
        CostRefused: the middle estimate exceeds the cap, or there is no consent; the message says what to do.
    """
    if max_usd is not None and not is_amount(max_usd):
        raise ProviderError(f"--max-usd is {max_usd!r}, not a number of dollars from 0 up.")
    planned = [e for e in estimates if e.calls]
    expected = sum(e.usd_mid or 0.0 for e in planned)
    if max_usd is not None and expected > max_usd:
        raise CostRefused(
            f"about ${expected:,.2f} are expected, and --max-usd allows ${max_usd:,.2f}. Raise it, or plan fewer calls."
        )
    remote = sorted({e.hosted_model.host for e in planned if not e.hosted_model.is_local})
    if remote and not yes and not (ask and ask()):
        raise CostRefused(f"nothing was sent. To send this to {', '.join(remote)}, add --yes; --max-usd sets a limit.")
    agree(e.hosted_model.address for e in estimates)
