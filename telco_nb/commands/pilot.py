"""The pilot: the first questions of a judge's plan, asked for real, and what they say about the price of all.

They are those of the gate, so a judge that fails it has cost little. Verdicts land in the store that 05_judge goes on
from, so nothing is paid twice; the plan of run_all.py then counts with the measured lengths.
"""

from __future__ import annotations

from typing import Annotated

import typer

from telco_nb.commands import estimate
from telco_nb.commands.common import MaxUsd, ParamsDir, Profile, Yes, errors_as_exit_codes
from telco_nb.engine import runner
from telco_nb.hosted import prices
from telco_nb.hosted.ledger import ledger_of
from telco_nb.judge import asking
from telco_nb.judge.cases import Question
from telco_nb.judge.protocol import Protocol, open_study
from telco_nb.study import params, record


def ask(asked: Protocol, calls: int, max_usd: float | None = None, yes: bool = False) -> int:
    """Ask the next `calls` questions; returns how many there were.

    Raises CostRefused if they may not be sent, CallsStopped if the provider or the budget ends it.
    """
    now = asked.due(ledger_of(asked.store.path).under_way)[0][:calls]
    prices.require_consent([estimate.estimate_questions(asked.judge, now, asked.store.path)], max_usd, yes, ask=None)
    asked.judge.put(now, asked.store, asking.normalised_line)
    return len(now)


def report(asked: Protocol) -> str:
    """What a question took, and what all of the plan come to, as far as the store can tell."""
    lengths = estimate.measured(asked.store.path, asked.judge.source.model)
    tried = ", ".join(f"{n:,} {status}" for status, n in sorted(asked.store.statuses.items())) or "none"
    lines = [f"attempts in the store: {tried}; ${asked.store.spent_usd:,.4f}"]
    if lengths is None:
        return "\n".join([*lines, f"too few to measure: {estimate.MEASURED_FROM} questions are needed"])
    for name, (low, mid, high) in zip(("in", "out"), lengths, strict=True):
        lines.append(f"tokens {name} per question: {mid:,.0f} [{low:,.0f}, {high:,.0f}]")
    models = [question for question in asked.every if asking.rule_verdict(question.case) is None]
    lines.append(f"the whole plan: {_priced(asked, models)}")
    left = [question for question in models if question.id not in asked.store.ok]
    return "\n".join([*lines, f"of these not answered yet: {_priced(asked, left)}"])


def _priced(asked: Protocol, questions: list[Question]) -> prices.Estimate:
    return estimate.estimate_questions(asked.judge, questions, asked.store.path)


EPILOG = """
**Example**

- `python -m telco_nb pilot --profile paper --judge gpt-5-2 --calls 20 --yes`
"""


def main(
    profile: Profile,
    judge: Annotated[str, typer.Option(help="The judge: a file of params/judges.")],
    calls: Annotated[int, typer.Option(metavar="N", min=1, help="Questions to ask.")] = 20,
    params_dir: ParamsDir = params.PARAMS_DIR,
    max_usd: MaxUsd = None,
    yes: Yes = False,
) -> None:
    """Ask a hosted judge its first questions, and price all of them by the tokens that these took."""
    with errors_as_exit_codes("pilot"), runner.lock(record.profile_root(profile)):
        asked = open_study(profile, judge, params_dir, to_ask=True, max_usd=max_usd)
        print(f"asked {asked.judge.source.model} at {asked.judge.source.host}: {ask(asked, calls, max_usd, yes)}")
        print(report(asked))
