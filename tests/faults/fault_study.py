"""Runs a study of small notebooks, one fault each, with the real runner in its own process.

`python fault_study.py study.json OPTIONS`, where study.json holds the folders and the jobs,
and OPTIONS are the fields of runner.Options as JSON.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from telco_nb.engine import fork_server, runner
from telco_nb.hosted.api import HostedModel
from telco_nb.hosted.prices import Estimate
from telco_nb.study import params
from telco_nb.study.plan import Job

# The last cell of a good notebook: what run.finish does, without the real notebooks' imports.
FINISH = """
import json, os
from pathlib import Path
from telco_nb.notebook import Run
from telco_nb.study.plan import Job
job = json.loads(Path(os.environ["TELCO_NB_JOB"]).read_text())
made = Job(job["step"], job["scope"], job["parameters"], ())
run = Run(made, Path(job["root"]), Path(job["work"]), job["key"], job["key_parts"], batch=True)
run.artefact("value.txt").write_text(str(value))
run.finish("done")
"""


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook with a parameters cell (`value`), then `cells`."""
    sources = [("value = 1", ["parameters"]), *((source, []) for source in cells)]
    made = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": tags}, "source": source, "outputs": []}
        | {"execution_count": None}
        for i, (source, tags) in enumerate(sources)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))


def main() -> int:
    study = json.loads(Path(sys.argv[1]).read_text())
    values = json.loads(sys.argv[2])
    options = runner.Options(**values | {"json_file": Path(values["json_file"]), "gpus": tuple(values.get("gpus", ()))})
    params.NOTEBOOKS_DIR = Path(study["notebooks"])
    runner.load_study = lambda options: SimpleNamespace(profile="faults")
    runner.plan_jobs = lambda _: [Job(s, c, p, tuple(map(tuple, i))) for s, c, p, i in study["jobs"]]
    fork_server.LIBRARIES = study["libraries"] or fork_server.LIBRARIES
    os.environ["TELCO_NB_OUTPUTS"] = study["outputs"]
    return runner.run(options, runner.Services(estimate=free, build_report=write_report))


def free(job: Job, source: HostedModel, *_: object) -> tuple[Estimate, str]:
    """An estimate of one call that costs nothing."""
    return Estimate(source, 1, 0, 0, 0.0, 0.0, 0.0, None), "a question"


def write_report(root: Path, jobs: list) -> None:
    (root / "report").mkdir(exist_ok=True)
    (root / "report" / "telco_report.html").write_text(f"{len(jobs)} jobs")


if __name__ == "__main__":
    sys.exit(main())
