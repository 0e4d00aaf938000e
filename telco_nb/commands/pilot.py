"""The pilot sends the first questions of a judge's plan to the provider and prices the whole plan from their tokens.

The first questions are those of the gate, so a judge that fails the gate has cost little. The verdicts go into the
store that 05_judge uses, so nothing is paid twice; the plan of run_all.py then uses the measured lengths.
"""

from __future__ import annotations

from typing import Annotated

import typer

from telco_nb.commands import estimate
from telco_nb.commands.common import MaxUsd, NoEgress, ParamsDir, Profile, Yes, errors_as_exit_codes, locked_study
from telco_nb.hosted import egress, prices
from telco_nb.hosted.ledger import ledger_of
from telco_nb.judge import asking
from telco_nb.judge.language_model import LanguageModelJudge
from telco_nb.judge.protocol import Protocol, open_study
from telco_nb.study import params


def ask(protocol: Protocol[LanguageModelJudge], calls: int, max_usd: float | None = None, yes: bool = False) -> int:
    """Asks the next questions of a judge's plan.

    Args:
        protocol: the judge's protocol.
        calls: number of questions, at most.
        max_usd: the cap in dollars; None for no cap.
        yes: the user agrees to send data to the host.

    Returns:
        The number of questions asked.

    Raises:
        CostRefused: the questions may not be sent.
        CallsStopped: the provider or the budget ended the asking.
    """
    questions = protocol.due(ledger_of(protocol.store.path).under_way)[0][:calls]
    cost = estimate.estimate_questions(protocol.judge, questions, protocol.store.path)
    prices.require_consent([cost], max_usd, yes, ask=None)
    protocol.judge.ask_all(questions, protocol.store)
    return len(questions)


def report(protocol: Protocol[LanguageModelJudge]) -> str:
    """The tokens per question so far, and the estimated cost of the whole plan and of its unanswered part."""
    judge, store = protocol.judge, protocol.store
    statuses = ", ".join(f"{n:,} {status}" for status, n in sorted(store.statuses.items())) or "none"
    lines = [f"attempts in the store: {statuses}; ${store.spent_usd:,.4f}"]
    lengths = estimate.measured(store.path, judge.hosted_model.model)
    if lengths is None:
        return "\n".join([*lines, f"too few to measure: {estimate.MEASURED_FROM} questions are needed"])
    for name, (low, mid, high) in zip(("in", "out"), lengths, strict=True):
        lines.append(f"tokens {name} per question: {mid:,.0f} [{low:,.0f}, {high:,.0f}]")
    plan = [question for question in protocol.every if asking.rule_verdict(question.case) is None]
    unanswered = [question for question in plan if question.id not in store.ok]
    for name, questions in (("the whole plan", plan), ("of these not answered yet", unanswered)):
        lines.append(f"{name}: {estimate.estimate_questions(judge, questions, store.path)}")
    return "\n".join(lines)


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
    no_egress: NoEgress = False,
) -> None:
    """Ask a hosted judge its first questions, and price all of them by the tokens that these took."""
    with errors_as_exit_codes("pilot"), locked_study(profile, params_dir):
        if no_egress:
            egress.forbid()
        protocol = open_study(profile, judge, params_dir, to_ask=True, max_usd=max_usd)
        model = protocol.judge.hosted_model
        egress.require_allowed(model.address, model.parameter)
        print(f"asked {model.model} at {model.host}: {ask(protocol, calls, max_usd, yes)}")
        print(report(protocol))
