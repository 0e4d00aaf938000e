"""Publishes a finished study: `python -m telco_nb publish`."""

from __future__ import annotations

from typing import Annotated

import typer

from telco_nb.commands.common import CommandError, errors_as_exit_codes, locked
from telco_nb.report.publish import README, publish_study, rewrite_readme
from telco_nb.study.record import complete_swaps, profile_root, write_bytes

EPILOG = """
**Example**

- `python -m telco_nb publish`: the study `card`, to outputs/reference and to the first screen of README.md
"""


def main(
    profile: Annotated[str, typer.Option("--profile", "-p", help="The finished study.")] = "card",
) -> None:
    """Copy a finished study to outputs/reference, and write its results into README.md."""
    with errors_as_exit_codes("publish"):
        with locked(root := profile_root(profile)):
            complete_swaps(root)
            publish_study(root)
        try:
            write_bytes(README, rewrite_readme().encode())
        except ValueError as error:
            raise CommandError(str(error)) from None
