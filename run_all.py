#!/usr/bin/env python3
"""Run the study: six notebooks, once per study, configuration or judge, skipping what is up to date."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer

    from telco_nb.engine import clean, rerender, runner, status
    from telco_nb.engine.progress import Output
    from telco_nb.engine.schedule import finite
    from telco_nb.hosted import egress
    from telco_nb.study import params
except ModuleNotFoundError as missing:  # started with another Python than the one that was set up: use that one
    ours = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if ours.is_file() and Path(sys.prefix) != ours.parents[1]:
        os.execv(ours, [str(ours), *sys.argv])
    print(f"run_all: the package {missing.name} is missing. Set up with: make .venv/installed", file=sys.stderr)
    sys.exit(3)

HELP = {"help_option_names": ["-h", "--help"]}
EPILOG = """
**Examples**

- `./run_all.py`: the whole study, laptop profile
- `./run_all.py --profile smoke --dry-run`: what would run, and why
- `./run_all.py --configs 'c0*' --steps 01-04`: data, training and answers of the first nine configurations
- `./run_all.py --profile paper --max-usd 20 --yes`: with hosted models, where the parameters name some
- `./run_all.py --profile paper --gpus 0,1,2,3`: four configurations at once, each on a GPU of its own
- `./run_all.py --notify 'mail -s "Study: $TELCO_NB_EXIT_CODE" me@example.org'`: tell me at the end
- `./run_all.py --force c03/03_train`: train c03 again; what depends on it follows if its result differs
- `./run_all.py --profile overnight --log-level warning`: print nothing but warnings and failures, as cron likes it
- `./run_all.py status --profile overnight`: what is done, running, failed or out of date, and why
- `./run_all.py clean --dry-run`: what nothing needs any more, with its size; without `--dry-run` it is removed
- `./run_all.py verify --profile smoke`: name every file that is not as a run of this study last sealed it
- `./run_all.py verify --seal 0123456789abcdef`: the same, and the seal must be the one that an earlier run printed
- `./run_all.py report --profile smoke --pdf`: the report again, from the files of a finished study, and as PDF

**Exit codes**

- 0: all done or up to date
- 1: a step failed, or a file is not as it was sealed
- 2: wrong parameters or usage
- 3: this machine, the outputs folder or the base model cannot be used as it is
- 4: refused for cost or for sending: nobody agreed, the limit is reached, or --no-egress; what was paid for is kept
- 130: interrupted; the same command goes on
"""
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", context_settings=HELP)


# Options that several commands share.
Profile = Annotated[str, typer.Option("--profile", "-p", help="The study: a file of params/profiles.")]
Outputs = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where results are. Default: outputs, or $TELCO_NB_OUTPUTS.")
]
ParamsDir = Annotated[
    Path, typer.Option("--params", metavar="DIR", help="Where the parameter files are.", show_default="params")
]


def _estimate_job(*arguments: Any) -> Any:
    from telco_nb.commands.estimate import estimate_job  # reads the cards: a dry run without hosted models need not

    return estimate_job(*arguments)


def _find_needs(*arguments: Any, **options: Any) -> Any:
    from telco_nb.commands.needs import study_needs  # needs pandas, as above

    return study_needs(*arguments, **options)


def _read_own_data(*arguments: Any) -> None:
    from telco_nb.commands.estimate import read_own_data  # needs pandas, as above

    read_own_data(*arguments)


def _build_report(*arguments: Any) -> Path:
    from telco_nb.report.build import build_report  # needs pandas, which the runner does without

    return build_report(*arguments)


@app.callback(epilog=EPILOG, invoke_without_command=True)
def main(
    context: typer.Context,
    profile: Annotated[
        str,
        typer.Option("--profile", "-p", help="Of params/profiles: smoke, laptop, overnight, card, paper or yours."),
    ] = "laptop",
    configs: Annotated[
        str | None, typer.Option(help="A study of these LoRA configurations only: c01,c05 or 'c0*'.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="These steps only: 03-06 or 03,04.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="Run though up to date: 03, c03/03 or 'c0*/03'. Repeatable."),
    ] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going/--fail-fast", help="After a failure: go on with what does not depend on it, or stop."
        ),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="With the plan, print all that decides about each step.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0.01,
            max=100_000,
            callback=finite,
            help="Give up on a cell after this long. Default: never.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write a machine-readable summary of the run.")
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go. Default: outputs, or $TELCO_NB_OUTPUTS.")
    ] = None,
    max_usd: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.0,
            callback=finite,
            help="Never let the study spend more than this on hosted models, in dollars, earlier runs and open batches "
            "included. The steps that ask them then run one after another.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to send data to the hosts that the plan names.")] = False,
    no_egress: Annotated[
        bool, typer.Option("--no-egress", help="Refuse every model of a host outside this network.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="As many configurations at once as there are GPUs here (0,1,2), divided by the parameter processes. "
            "Default: one after another.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Where jobs run: local, or ray for a cluster (extra package, see the README)."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="With --engine ray: a running cluster, or auto. Default: one of this machine."
        ),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Run this when all has ended; it finds TELCO_NB_EXIT_CODE, _PROFILE, _SUMMARY and _REPORT in its "
            "environment.",
        ),
    ] = None,
    log_level: Annotated[
        Literal["warning", "info", "debug"],
        typer.Option(help="warning: print warnings and failures only. debug: each cell as it starts, too."),
    ] = "info",
    params_dir: ParamsDir = params.PARAMS_DIR,
) -> None:
    """Run the study: six notebooks, once per study, configuration or judge, skipping what is up to date."""
    if context.invoked_subcommand:
        _refuse_options_of_a_run(context)
        return
    if no_egress:
        egress.forbid()
    options = runner.Options(
        profile=profile,
        configs=configs,
        steps=steps,
        force=tuple(force or ()),
        keep_going=keep_going,
        dry_run=dry_run,
        explain=explain,
        timeout_minutes=timeout,
        json_file=json_file,
        outputs=outputs,
        params_dir=params_dir,
        max_usd=max_usd,
        yes=yes,
        gpus=tuple(filter(None, (gpus or "").split(","))),
        no_egress=no_egress,
        notify=notify,
        log_level=log_level,
        engine=engine,
        address=address,
    )
    sys.exit(runner.run(options, runner.Services(_estimate_job, _build_report, _find_needs, _read_own_data)))


def _refuse_options_of_a_run(context: typer.Context) -> None:
    """Options of a run before the name of a command would have no effect."""
    given = [p.opts[0] for p in context.command.params if _is_given(context, p.name)]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: write options behind {context.invoked_subcommand}", context)


def _is_given(context: typer.Context, name: str | None) -> bool:
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def verify(
    profile: Profile = "laptop",
    outputs: Outputs = None,
    seal: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="The seal must be this one: the characters that the run printed, or all."),
    ] = None,
) -> None:
    """Compare a study with its last seal, and name every file that differs, is missing or is new.

    Exit code 0: all as sealed. 1: something differs. 2: wrong usage. 3: there is no seal.
    """
    sys.exit(runner.verify(profile, outputs, seal))


STATUS_EPILOG = """
**Examples**

- `./run_all.py status`: the laptop study, also while it runs
- `./run_all.py status --outputs /mnt/box/outputs --json status.json`: a study in another place, and as JSON
- `./run_all.py status --metrics /var/lib/node_exporter/telco_nb.prom`: for a collector of Prometheus text files

A step is *stale* if something that decides about its result has changed, *maybe* if it runs again only if the steps
before it give other results, and *waiting* if it has never finished.
"""


@app.command("status", epilog=STATUS_EPILOG)
def show_status(
    profile: Profile = "laptop",
    outputs: Outputs = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write it machine-readable, too.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option("--metrics", metavar="FILE", help="Write it as Prometheus text, too.")
    ] = None,
    params_dir: ParamsDir = params.PARAMS_DIR,
) -> None:
    """Say what of a study is done, running, failed or out of date, and why. Changes nothing."""
    options = runner.Options(profile=profile, outputs=outputs, json_file=json_file, params_dir=params_dir)
    sys.exit(status.status(options, metrics, Output()))


CLEAN_EPILOG = """
**Examples**

- `./run_all.py clean --dry-run`: what may be removed from the laptop study, with its size
- `./run_all.py clean --profile smoke`: remove it
- `./run_all.py clean --all --dry-run`: the results as well, and what the study would then need again

What a record names as an output stays without `--all`. Stores of judges and generator were paid for and always stay.
"""


@app.command("clean", epilog=CLEAN_EPILOG)
def clean_study(
    profile: Profile = "laptop",
    outputs: Outputs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the list and remove nothing.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="The results of all steps as well.")] = False,
    params_dir: ParamsDir = params.PARAMS_DIR,
) -> None:
    """Remove what nothing needs any more: left-overs of failures, dead temporary files, results made by hand."""
    options = runner.Options(profile=profile, outputs=outputs, dry_run=dry_run, params_dir=params_dir)
    sys.exit(clean.clean(options, everything, Output()))


REPORT_EPILOG = """
**Examples**

- `./run_all.py report`: the report of the laptop study again, from its files
- `./run_all.py report --profile smoke --pdf`: and outputs/smoke/report/telco_report.pdf

**Exit codes**: 0 the report stands; 1 it could not be built; 2 wrong usage; 3 there is no finished study, something
has changed or removed what the report is built from, the seal is damaged, another run is using the study, or there is
no Chromium to print with
"""


@app.command(epilog=REPORT_EPILOG)
def report(
    profile: Profile = "laptop",
    outputs: Outputs = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print the one-file report as PDF too, by Chromium.")] = False,
) -> None:
    """Build the report of a finished study again, without running anything."""
    sys.exit(rerender.rerender(profile, outputs, pdf, _build_report, Output()))


if __name__ == "__main__":
    app()
