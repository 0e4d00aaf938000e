"""The command line of all side commands: `python -m telco_nb --help`. `./run_all.py` runs the study itself."""

from __future__ import annotations

import typer

from telco_nb.commands import batch, chat, dataset, export, pilot, publish, rerank, results, serve, votes

app = typer.Typer(
    name="python -m telco_nb",
    help="Side commands of the study; ./run_all.py runs the study itself.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (pilot, batch, votes, rerank, publish, results, dataset, chat, export, serve):
    app.command(module.__name__.rpartition(".")[2], epilog=module.EPILOG)(module.main)

if __name__ == "__main__":
    app()
