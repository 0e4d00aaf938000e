"""What a run leaves after faults in notebooks, and what the run after it does, with real kernels."""

import json
import sys

import pytest
from fault_runs import Study, alive, can_unshare
from fault_study import FINISH

# ---------------------------------------------------------------- one run with many faults


@pytest.fixture(scope="module", params=["0", "1"], ids=["plain", "warm"])
def faulty(tmp_path_factory, request):
    """One run over all faults that need no signal from outside."""
    study = Study(tmp_path_factory.mktemp("faulty"), request.param)
    study.add("01_error", "print('before')", "1 / 0", FINISH)
    study.add("02_exit_zero", "import sys; sys.exit(0)", FINISH)
    study.add("03_exit_hard", "import os; os._exit(7)", FINISH)
    study.add("04_killed", "import os; os.kill(os.getpid(), 9)", FINISH)
    study.add("05_no_manifest", "1 + 1")
    study.add("06_lines", "for i in range(20_000):\n    print('line', i, flush=True)", FINISH)
    study.add("07_other_key", FINISH.replace('job["key"]', '"another"'))
    study.add("08_after_error", FINISH, reads=("01_error",))
    study.add("09_after_that", FINISH, reads=("08_after_error",))
    study.add("10_after_lines", FINISH, reads=("06_lines",))
    study.add("11_timeout", "import time; time.sleep(60)", FINISH)
    study.exit_code, study.output = study.run(timeout_minutes=0.25)
    return study


def test_a_failed_step_gives_exit_code_1_and_the_others_go_on(faulty):
    assert faulty.exit_code == 1
    assert faulty.status("06_lines") == faulty.status("10_after_lines") == "done"


@pytest.mark.parametrize(
    ("step", "kind", "cell", "words"),
    [
        ("01_error", "error", 4, "ZeroDivisionError: division by zero"),
        ("02_exit_zero", "no result", 3, "sys.exit()"),
        ("03_exit_hard", "died", 3, "exit code 7"),
        ("04_killed", "died", 3, "SIGKILL"),
        ("05_no_manifest", "no result", None, "run.finish"),
        ("07_other_key", "no result", None, "not of this execution"),
        ("11_timeout", "timeout", 3, "15 s"),
    ],
)
def test_the_failed_record_names_the_class_and_the_cell(faulty, step, kind, cell, words):
    failure = faulty.failure(step)
    assert (failure["kind"], failure["cell"]) == (kind, cell)
    assert words in failure["reason"]
    banner = faulty.notebook(f"{step}.failed")["cells"][0]
    assert banner["cell_type"] == "markdown"
    assert words in "".join(banner["source"])
    assert words in faulty.output, "the summary repeats it"
    assert not (faulty.root / "s" / f"{step}.ipynb").exists()
    assert not (faulty.root / "s" / step).exists()


def test_cells_after_a_kernel_death_are_not_marked_as_completed(faulty):
    cells = faulty.notebook("04_killed.failed")["cells"][1:]
    assert [c["metadata"]["papermill"]["status"] for c in cells[-2:]] == ["failed", "pending"]


def test_dependants_are_blocked_all_the_way_down(faulty):
    assert faulty.jobs_summary["08_after_error"]["reason"] == "blocked by s/01_error"
    assert faulty.jobs_summary["09_after_that"]["reason"] == "blocked by s/08_after_error"
    assert not (faulty.root / "s" / "09_after_that.failed.ipynb").exists()


def test_twenty_thousand_lines_lose_nothing_and_stay_readable(faulty):
    (stream,) = [o for c in faulty.notebook("06_lines")["cells"] for o in c.get("outputs", []) if "text" in o]
    text = "".join(stream["text"])
    assert "19,940 lines left out" in text
    assert text.endswith("line 19999\n")


def test_records_hold_no_machine_paths(faulty):
    for path in [*faulty.root.glob("s/*.ipynb"), *faulty.root.glob("s/*.failed.log")]:
        assert str(faulty.root) not in path.read_text(), path
        assert sys.prefix not in path.read_text(), path


def test_nothing_is_left_over(faulty):
    assert not alive(faulty.processes())
    assert not [*faulty.root.glob("s/.*.running.*"), *faulty.root.glob("s/.*.job.json")]
    assert {path.suffix for path in (faulty.folder / "notebooks").iterdir()} == {".ipynb"}, "no sockets beside them"
    assert not [*faulty.temporary.glob("tnb-*")]


def test_the_summary_names_the_command_that_goes_on(faulty):
    assert "./run_all.py --profile laptop" in faulty.output
    assert (faulty.root / "report" / "telco_report.html").read_text() == "11 jobs"


EXIT_MESSAGE = """
import threading
from types import SimpleNamespace
from telco_nb.lora import data_parallel
data_parallel.GRACE_SECONDS = 0.1
gone = SimpleNamespace(has_died=True, exit_message=lambda: "process 2 of this training ended with code -9")
data_parallel._watch_peers([gone], threading.Event(), lambda text: None)
"""


def test_a_kernel_that_gives_up_on_a_dead_peer_leaves_the_reason_in_the_log(tmp_path):
    study = Study(tmp_path)
    study.add("train", EXIT_MESSAGE, FINISH)
    code, _ = study.run("env", "-u", "PYTEST_CURRENT_TEST")  # with it, ipykernel would leave the streams alone
    assert code == 1 and study.failure("train")["reason"] == "it ended with exit code 1"
    log = (study.root / "s" / "train.failed.log").read_text()
    assert "process 2 of this training ended with code -9" in log


# ---------------------------------------------------------------- runs after runs


def test_a_command_is_told_the_outcome_and_its_own_failure_changes_nothing(tmp_path):
    study = Study(tmp_path)
    study.add("01_glossary", FINISH)
    told = "printf '%s %s %s' $TELCO_NB_EXIT_CODE $TELCO_NB_PROFILE \"$TELCO_NB_SUMMARY\" > told.txt; exit 7"
    code, output = study.run(notify=f"cd {tmp_path}; {told}")
    assert code == 0 and "--notify: exit code 7" in output
    assert (tmp_path / "told.txt").read_text() == "0 laptop 1 done"


def test_a_failure_keeps_the_last_good_record_and_a_success_removes_the_failed_one(study):
    study.add("01_a", FINISH)
    assert study.run()[0] == 0
    good = study.notebook("01_a")
    study.jobs.clear()
    study.add("01_a", FINISH, "raise ValueError('broken')", value=2)
    code, output = study.run()
    assert code == 1
    assert "value 1 -> 2" in output
    assert study.notebook("01_a") == good
    assert (study.root / "s" / "01_a" / "artefacts" / "value.txt").read_text() == "1"
    assert (study.root / "s" / "01_a.failed.ipynb").exists()
    study.jobs.clear()
    study.add("01_a", FINISH, value=2)
    assert study.run()[0] == 0
    assert (study.root / "s" / "01_a" / "artefacts" / "value.txt").read_text() == "2"
    assert not [*study.root.glob("s/*.failed.*")]


def test_a_second_run_starts_no_kernel_and_a_same_result_stops_the_chain(study):
    study.add("01_a", FINISH)
    study.add("02_b", FINISH, reads=("01_a",))
    assert study.run()[0] == 0
    assert study.run()[0] == 0
    assert {job["status"] for job in study.jobs_summary.values()} == {"skipped"}
    assert study.run(force=["01"])[0] == 0
    assert study.status("01_a") == "done"
    assert study.jobs_summary["02_b"]["reason"] == "inputs unchanged"
    study.jobs[0] = ("01_a", "s", {"value": 5}, [])
    assert study.run()[0] == 0
    assert study.status("02_b") == "done", "one of its inputs is another one now"


def test_fail_fast_stops_at_the_first_failure(study):
    study.add("01_a", "1 / 0")
    study.add("02_b", FINISH)
    assert study.run(keep_going=False)[0] == 1
    assert study.status("02_b") == "waiting"


def test_a_step_left_out_must_have_finished_before(study):
    study.add("01_a", FINISH)
    study.add("02_b", FINISH, reads=("01_a",))
    code, output = study.run(steps="02")
    assert code == 2
    assert "s/01_a" in output
    assert "--steps 01-02" in output


def test_a_kernel_of_another_environment_is_not_used(study):
    trap = study.folder / "jupyter" / "kernels" / "python3"
    trap.mkdir(parents=True)
    (trap / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    study.add("01_a", FINISH)
    assert study.run(environment={"JUPYTER_PATH": str(study.folder / "jupyter")})[0] == 0


@pytest.mark.skipif(not can_unshare(), reason="needs the right to make a network namespace")
def test_a_run_needs_no_network_not_even_loopback(study):
    study.add("01_a", FINISH)
    assert study.run("unshare", "-n")[0] == 0
