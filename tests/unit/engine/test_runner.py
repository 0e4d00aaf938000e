"""Tests of the plan, the options and the messages of the runner; tests/faults runs it with real kernels."""

import dataclasses
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine import (
    archive,
    forecast,
    fork_server,
    local_engine,
    machine_checks,
    progress,
    runner,
    schedule,
)
from telco_nb.engine.archive import Failure
from telco_nb.engine.job import death_reason, kernel_environment
from telco_nb.engine.progress import State
from telco_nb.study import machine, model_files, params, record
from telco_nb.study.plan import Job, plan_jobs, refuse_too_few


def job(step: str, scope: str, *depends: str, **parameters) -> Job:
    inputs = tuple((d.split("/")[1], d.split("/")[0], "artefacts/*") for d in depends)
    return Job(step, scope, parameters, inputs)


JOBS = [  # as in the real plan, the untuned model answers before anything is trained
    job("02_synth", "shared"),
    job("04_energy", "untuned", "shared/02_synth"),
    job("03_train", "c01", "shared/02_synth", epochs=1),
    job("04_energy", "c01", "c01/03_train"),
    job("03_train", "c02", "shared/02_synth", epochs=3),
    job("04_energy", "c02", "c02/03_train"),
    job("05_judge", "judge-checklist", "c01/04_energy", "c02/04_energy"),
]


@pytest.fixture
def recorded(monkeypatch):
    """Records without files: `stale` maps job ids to reasons, `finished` to manifests."""
    records = SimpleNamespace(stale={}, finished={})
    monkeypatch.setattr(
        schedule, "is_current", lambda j, root: (j.id not in records.stale, records.stale.get(j.id, "up to date"))
    )
    monkeypatch.setattr(record, "finished", lambda root, scope, step: records.finished.get(f"{scope}/{step}"))
    return records


def seen(seconds: float, **values) -> dict:
    """The record of a step that has finished on this machine."""
    return {"seconds": seconds, "parameters": values, "device": machine.device_facts(), "outputs": [], "exports": {}}


def decisions(jobs, forced=frozenset()) -> dict:
    return {s.job.id: (s.decision, s.reason) for s in schedule.plan_states(jobs, Path("/nowhere"), set(forced))}


# ---------------------------------------------------------------- the plan


def test_a_changed_parameter_runs_its_step_and_only_perhaps_what_follows(recorded):
    recorded.stale = {"c02/03_train": "learning_rate 0.0002 -> 0.0001"}
    plan = decisions(JOBS)
    assert plan["c02/03_train"] == ("run", "learning_rate 0.0002 -> 0.0001")
    assert plan["c02/04_energy"][0] == plan["judge-checklist/05_judge"][0] == "maybe"
    assert plan["c01/03_train"] == plan["c01/04_energy"] == ("skip", "up to date")


def test_force_runs_what_it_names(recorded):
    forced = schedule.choose_forced(JOBS, ("c0*/03",))
    assert forced == {"c01/03_train", "c02/03_train"}
    assert decisions(JOBS, forced)["c01/03_train"] == ("run", "forced")
    assert schedule.choose_forced(JOBS, ("04_energy",)) == {"untuned/04_energy", "c01/04_energy", "c02/04_energy"}


@pytest.mark.parametrize(
    ("text", "steps"),
    [("02-03", {"02_synth", "03_train"}), ("3,5", {"03_train", "05_judge"}), ("02_synth", {"02_synth"})],
)
def test_steps_are_chosen_by_number_range_or_name(text, steps):
    assert {j.step for j in schedule.choose_steps(JOBS, text)} == steps


@pytest.mark.parametrize("text", ["9", "04-03", "", "train", "03-"])
def test_unknown_steps_are_refused(text):
    with pytest.raises(schedule.UsageError, match="--steps"):
        schedule.choose_steps(JOBS, text)


@pytest.mark.parametrize("word", ["c09/03", "07", "c01/"])
def test_forcing_what_is_not_there_is_refused(word):
    with pytest.raises(schedule.UsageError, match=r"Known|It has|no such step"):
        schedule.choose_forced(JOBS, (word,))


def test_configurations_are_chosen_by_name_or_pattern_in_their_order():
    lora = {f"c{n:02}": {} for n in range(1, 13)}
    study = params.StudyParams("p", {}, lora, {}, ["c01", "c02", "c10"])
    assert schedule.choose_configs("c10, c01", study) == ["c01", "c10"]
    assert schedule.choose_configs("c0*", study) == ["c01", "c02"], "a pattern stays within the profile"
    assert schedule.choose_configs("c12", study) == ["c12"], "a name need not"
    for text in ("c99", "x*", "", ","):
        with pytest.raises(schedule.UsageError, match="--configs"):
            schedule.choose_configs(text, study)


def test_a_left_out_step_without_a_result_is_refused_with_the_command(recorded):
    chosen = schedule.choose_steps(JOBS, "03-04")
    with pytest.raises(schedule.UsageError, match=re.escape("shared/02_synth") + ".*--steps 02-04"):
        schedule.plan_states(chosen, Path("/nowhere"), set())
    recorded.finished["shared/02_synth"] = {"seconds": 1, "parameters": {}}
    assert len(schedule.plan_states(chosen, Path("/nowhere"), set())) == 5


def test_expected_seconds_come_from_earlier_runs_per_epoch(recorded):
    recorded.finished["c01/03_train"] = seen(30.0, epochs=1)
    recorded.stale = {"c02/03_train": "no result yet"}
    states = {s.job.id: s for s in schedule.plan_states(JOBS, Path("/nowhere"), set())}
    assert states["c02/03_train"].expected_seconds == 90 + forecast.OVERHEAD_SECONDS
    assert states["c01/04_energy"].expected_seconds is None


def test_the_remaining_time_says_if_a_duration_is_unknown():
    known = State(JOBS[0], "run", "", expected_seconds=600)
    unknown, skipped = State(JOBS[1], "run", ""), State(JOBS[2], "skip", "", expected_seconds=900)
    assert progress.remaining_text([known, skipped]) == "about 10 min"
    assert progress.remaining_text([known, unknown]) == "more than 10 min"
    assert progress.remaining_text([unknown]) == "unknown, as there is no earlier run"
    assert progress.remaining_text([skipped]) == "nothing"
    two = [dataclasses.replace(known, status="running") for _ in range(2)]
    assert progress.remaining_text(two) == "about 10 min"


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize(
    ("statuses", "stopped", "code"),
    [
        (["done", "skipped"], False, 0),
        (["done", "failed", "blocked"], False, 1),
        (["failed", "waiting"], False, 1),
        (["failed", "interrupted", "waiting"], True, 130),
        (["done", "waiting"], True, 130),
        (["done", "done"], True, 0),
    ],
)
def test_exit_codes(statuses, stopped, code):
    assert runner.exit_code([State(JOBS[0], "run", "", status=s) for s in statuses], stopped) == code


@pytest.mark.parametrize(
    "name", ["GlossaryError", "WrittenFileError", "InputFileError", "ParameterError", "VotesError"]
)
def test_a_step_that_refuses_a_file_of_the_users_ends_the_run_with_exit_code_2(name):
    failed = State(JOBS[0], "run", "", status="failed", failure=Failure("error", f"{name}: a.yaml: term: missing", 3))
    assert runner.exit_code([failed, State(JOBS[1], "run", "", status="blocked")], stopped=False) == 2


def test_the_command_that_goes_on_keeps_the_options_but_forces_nothing():
    options = runner.Options(profile="smoke", configs="c0*", steps="03-04", force=("03",), keep_going=False)
    assert options.command() == "./run_all.py --profile smoke --configs 'c0*' --steps 03-04"


def test_the_report_key_changes_with_what_the_report_shows(tmp_path):
    before = runner.report_key(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "01_a.ipynb").write_text("{}")
    changed = runner.report_key(tmp_path)
    assert before != changed
    assert changed == runner.report_key(tmp_path)


# ---------------------------------------------------------------- the lock


def test_a_lock_is_refused_with_the_holders_pid_and_free_after_its_death(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOCK_SECONDS", 0.3)
    hold = f"import fcntl, os, time; f = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    hold += "f.write(str(os.getpid())); f.flush(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(runner.UnfitError, match=f"process {holder.pid}"), runner.lock(tmp_path):
        pass
    holder.kill()
    with runner.lock(tmp_path) as stream:
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        assert not stream.closed
    holder.communicate()


def test_an_outputs_folder_that_cannot_be_made_is_unfit(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(runner.UnfitError, match="--outputs"), runner.lock(tmp_path / "file" / "smoke"):
        pass


# ---------------------------------------------------------------- stopping a child


def test_stopping_escalates_with_time_and_with_each_request(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append(number))
    monkeypatch.setattr(local_engine, "INTERRUPT_SECONDS", 0.05)
    stopping = local_engine._stop_child(SimpleNamespace(pid=1))
    stopping.send(1)
    stopping.send(1)
    assert sent == [signal.SIGINT]
    time.sleep(0.06)
    stopping.send(1)
    assert sent == [signal.SIGINT, signal.SIGTERM]
    stopping.send(2)
    assert sent == [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


# ---------------------------------------------------------------- what is shown


def rendered(*things, **options) -> str:
    console = Console(file=io.StringIO(), width=110, **options)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_the_plan_shows_one_row_for_each_decision_step_and_reason(recorded):
    recorded.stale = {"c01/03_train": "no result yet", "c02/03_train": "no result yet"}
    text = rendered(progress.plan_table(schedule.plan_states(JOBS, Path("/nowhere"), set())))
    assert re.search(r"run +03_train +c01 c02 +no result yet", text)


def test_a_tall_table_hides_finished_rows_first():
    states = [State(job("03_train", f"c{n:02}"), "run", "", status="done") for n in range(10)]
    states += [State(job("03_train", "c98"), "run", "", status="failed")]
    states += [State(job("03_train", "c99"), "run", "", status="running")]
    text = rendered(progress.status_table(states, most_rows=4))
    assert "c98" in text
    assert "c99" in text
    assert "not shown: 8 finished, 0 waiting" in text


def test_lines_show_each_event_and_a_running_job_every_minute(monkeypatch):
    console = Console(file=io.StringIO(), width=110)
    state = State(
        job("03_train", "c01"), "run", "no result yet", status="running", started=time.monotonic(), cell=3, cells=9
    )
    lines = progress.Lines(console, [state])
    lines.changed(state)
    lines.tick()
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0)
    lines.tick()
    state.status, state.seconds, state.failure = "failed", 75.0, Failure("error", "ValueError: x", 4)
    lines.changed(state)
    started, beat, ended = console.file.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:]{8} c01/03_train running: no result yet$", started)
    assert beat.endswith("c01/03_train running 0:00, cell 3 of 9")
    assert "failed in 1:15: error in a cell In [4]: ValueError: x (1 of 1; to go: nothing)" in ended


def test_a_terminal_gets_a_table_and_anything_else_lines():
    with progress.open_display(Console(file=io.StringIO(), force_terminal=True), []) as display:
        assert isinstance(display, progress.LiveTable)
    with progress.open_display(Console(file=io.StringIO()), []) as display:
        assert isinstance(display, progress.Lines)


# ---------------------------------------------------------------- the executed notebook


def notebook(*cells: dict) -> dict:
    return {"cells": list(cells), "metadata": {"papermill": {"input_path": "/x"}}, "nbformat": 4, "nbformat_minor": 5}


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source, "outputs": list(outputs), "metadata": {}, "execution_count": 1}


def test_long_output_is_cut_in_the_middle_and_says_so():
    text = "".join(f"{n}\n" for n in range(1000))
    short = "".join(archive._shortened({"output_type": "stream", "text": text})["text"])
    assert short.startswith("0\n1\n")
    assert short.endswith("998\n999\n")
    assert "940 lines left out" in short
    line = "".join(archive._shortened({"output_type": "stream", "text": "x" * 10**6})["text"])
    assert len(line) < 1.1 * archive.LONG_CHARACTERS


def test_machine_paths_are_replaced_but_images_are_left_alone(tmp_path):
    picture = f"{tmp_path}/abc"
    output = {"output_type": "display_data", "data": {"image/png": picture, "text/plain": f"{ROOT}/telco_nb/x.py"}}
    cleaned = archive._cleaned(notebook(code("1", output)), tmp_path, "c01", "03_train")
    data = cleaned["cells"][0]["outputs"][0]["data"]
    assert data == {"image/png": picture, "text/plain": "telco_nb/x.py"}
    assert cleaned["metadata"]["papermill"]["output_path"] == "c01/03_train.ipynb"
    assert archive.without_machine_paths(f"{Path.home()}/models {tmp_path}/a", tmp_path) == (
        f"~/models outputs/{tmp_path.name}/a"
    )


def test_a_user_without_a_home_folder_can_keep_records_and_is_asked_for_a_cache_by_name(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("TELCO_NB_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert archive.without_machine_paths(f"{tmp_path}/a /b", tmp_path) == f"outputs/{tmp_path.name}/a /b"
    assert machine_checks.hub_cache().name == "hub"
    with pytest.raises(params.ParameterError, match="Name one in TELCO_NB_CACHE"):
        model_files.cache_dir()


def test_a_failure_before_anything_was_saved_still_leaves_a_record(tmp_path):
    (tmp_path / "c01").mkdir()
    archive.running_notebook(tmp_path, "c01", "03_train").write_text('{"cells": [')
    archive.keep_failed(tmp_path, "c01", "03_train", Failure("died", "killed by `SIGKILL`", 2))
    kept = json.loads((tmp_path / "c01" / "03_train.failed.ipynb").read_text())
    assert kept["metadata"]["telco_nb_failure"] == {"kind": "died", "reason": "killed by `SIGKILL`", "cell": 2}
    assert "The kernel died, In [2]: `killed by 'SIGKILL'`" in "".join(kept["cells"][0]["source"])


# ---------------------------------------------------------------- the kernel's surroundings and the machine


def test_the_hub_is_off_unless_the_user_names_a_hub_id(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def offline(model: str | None) -> str:
        return kernel_environment("job.json", {"base_model": model}, tmp_path)["HF_HUB_OFFLINE"]

    assert offline("smollm2-135m-instruct") == offline(None) == offline(str(tmp_path)) == offline("./a/b") == "1"
    assert offline("Qwen/Qwen2.5-3B") == "0"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline("Qwen/Qwen2.5-3B") == "1", "the user's own choice stands"


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
def test_kernels_are_forked_for_more_than_one_job_never_beside_an_untried_gpu_and_never_if_unwanted(monkeypatch):
    monkeypatch.delenv(fork_server.SWITCH, raising=False)
    monkeypatch.setattr(fork_server, "OTHER_GPUS", ("/no/such/device",))
    assert fork_server.is_useful(2)
    assert not fork_server.is_useful(1)
    monkeypatch.setattr(fork_server, "OTHER_GPUS", ("/dev/null",))
    assert not fork_server.is_useful(2)
    monkeypatch.setattr(fork_server, "OTHER_GPUS", ())
    monkeypatch.setenv(fork_server.SWITCH, "0")
    assert not fork_server.is_useful(2)
    monkeypatch.setenv(fork_server.SWITCH, "1")
    assert fork_server.is_useful(1)


DRIVER = "int cuCtxGetCurrent(void **context) { *context = 0; return %d; }"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="a driver is compiled")
@pytest.mark.parametrize("answer", [3, 0])
def test_nothing_is_forked_once_a_gpus_driver_has_started(monkeypatch, tmp_path, answer):
    """A library in place of NVIDIA's, which says that it has not been started (3) or that it has (0)."""
    (tmp_path / "driver.c").write_text(DRIVER % answer)
    library = tmp_path / "libdriver.so"
    subprocess.run(["cc", "-shared", "-o", library, tmp_path / "driver.c"], check=True)
    monkeypatch.setattr(fork_server, "CUDA_LIBRARY", str(library))
    monkeypatch.delitem(sys.modules, "telco_nb.lora.base_model", raising=False)
    monkeypatch.setattr(fork_server, "_thread_count", lambda: 1)
    assert fork_server._load_model() is (answer == 3)
    monkeypatch.setattr(fork_server, "CUDA_LIBRARY", "libno_such_driver.so")
    assert fork_server._load_model()
    gc.unfreeze()


def test_the_reason_of_a_death_depends_on_exit_code_and_memory():
    used = "its largest memory use was 3.0 GiB"
    assert death_reason(-9, True, 3 * 2**30) == f"out of memory: the system killed it; {used}"
    assert death_reason(-9, False, 3 * 2**30) == f"killed by SIGKILL, most often for lack of memory; {used}"
    assert death_reason(-9, True) == "out of memory: the system killed it", "an unknown use is not 0"
    assert death_reason(-11, False) == "killed by SIGSEGV"
    assert death_reason(7, False) == "it ended with exit code 7"
    with_log = death_reason(1, False, exception="OSError: [Errno 28] No space left on device")
    assert with_log == "it ended with exit code 1; its log ends with OSError: [Errno 28] No space left on device"


def test_an_unexpected_error_of_a_run_is_in_the_summary_by_class_and_text(tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise LookupError("nothing there")

    monkeypatch.setattr(runner, "load_study", fail)
    options = runner.Options(json_file=tmp_path / "run.json")
    assert runner.run(options, runner.Services(None, None)) == 1
    assert json.loads((tmp_path / "run.json").read_text())["error"] == "LookupError: nothing there"
    assert "Traceback" in capsys.readouterr().err


def test_the_machine_checks_name_a_missing_model_and_a_full_disk(tmp_path, monkeypatch):
    (model,) = machine_checks.find_problems([job("03_train", "c01", base_model="no-such-folder")], tmp_path / "outputs")
    assert "no-such-folder" in model
    monkeypatch.setattr(machine_checks, "FREE_BYTES", 2**60)
    assert any("GiB free" in text for text in machine_checks.find_problems([], tmp_path))


def test_the_machine_checks_know_the_packaged_model_by_its_name():
    source = (ROOT / "telco_nb" / "lora" / "base_model.py").read_text()
    assert f'PACKAGED_MODEL = "{machine_checks.PACKAGED_MODEL}"' in source


def test_the_runner_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'papermill', 'pandas', 'numpy', 'jupyter_client', 'nbformat', 'matplotlib'}"
    program = f"import sys, run_all; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# ---------------------------------------------------------------- the command line


def run_all(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "run_all.py", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "lapdog"], "lapdog.yaml"),
        (["--configs", "c99"], "--configs c99"),
        (["--nonsense"], "--nonsense"),
        (["--configs", "c01"], "a ranking needs two configurations or more, and this study has c01"),
        (["--params", "no/such/folder"], "base.yaml"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(words, message):
    done = run_all(*words, "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_wrong_parameter_file_exits_2_with_file_key_and_fix_and_is_in_the_json(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "params" / "lora" / "c03.yaml").write_text("learning_rate: 1e-4\n")
    done = run_all("--params", str(tmp_path / "params"), "--json", str(tmp_path / "run.json"))
    assert done.returncode == 2
    assert "c03.yaml:1: learning_rate: YAML reads 1e-4 as text" in done.stderr
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["exit_code"] == 2
    assert "1.0e-4" in summary["error"]


def test_tables_list_configurations_by_name_whatever_the_order_of_runs(recorded):
    jobs = plan_jobs(params.load_study("laptop"))
    recorded.stale = {job.id: "new" for job in jobs}
    states = schedule.plan_states(jobs, Path("/nowhere"), set())
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(progress.plan_table(states), progress.status_table(states))
    plan, _, status = console.export_text().partition("06_analysis  study")
    names = [f"c{number:02}" for number in range(1, 17)]
    assert [word for word in plan.partition("03_train")[2].split() if word in names][:16] == names
    assert [line.split()[0] for line in status.splitlines() if line.split() and line.split()[0] in names] == names
    assert [s.job.scope for s in states if s.job.scope in names and s.job.step == "03_train"] != names


def test_one_configuration_may_be_trained_but_not_judged():
    study = params.load_study("smoke", configs=["c01"])
    jobs = plan_jobs(study)
    refuse_too_few(schedule.choose_steps(jobs, "01-04"))
    for steps in (None, "05", "06"):
        with pytest.raises(params.ParameterError, match=r"Name more with --configs .* --steps 01-04"):
            refuse_too_few(schedule.choose_steps(jobs, steps))
    refuse_too_few(plan_jobs(params.load_study("smoke")))


def test_options_of_a_run_before_verify_are_refused():
    done = run_all("--profile", "smoke", "verify")
    assert done.returncode == 2 and "write options behind verify" in done.stderr


def test_help_shows_examples_and_exit_codes():
    text = run_all("--help").stdout
    assert "./run_all.py --profile smoke --dry-run" in text
    assert "130: interrupted" in text


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="needs the folder .venv that make sets up")
def test_the_command_line_starts_with_any_python():
    bare = subprocess.run([sys._base_executable, "-S", ROOT / "run_all.py", "--help"], capture_output=True, text=True)
    assert "Exit codes" in bare.stdout
