"""Where jobs run: an engine that cannot start one, and the GPUs of each place."""

from types import SimpleNamespace

import pytest

from telco_nb.engine import local_engine, progress, runner, schedule, worker
from telco_nb.study.plan import Job


def jobs_with(*processes: int) -> list[Job]:
    return [Job("03_train", f"c{i}", {"processes": n}, ()) for i, n in enumerate(processes)]


@pytest.fixture
def state_and_runner(tmp_path, monkeypatch):
    """A job to run, and a runner with an engine whose `start` a test replaces."""
    state = progress.State(Job("01_a", "s", {}, ()), "run", "first")
    engine = local_engine.LocalEngine(["0"], None, 1)
    made = worker.Runner([state], tmp_path, runner.Options(), None, engine)
    made.display = SimpleNamespace(changed=lambda state: None, tick=lambda: None)
    monkeypatch.setattr(made, "write_job", lambda state: tmp_path / ".01_a.job.json")
    return state, made


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_process_that_cannot_be_started_fails_its_job_alone(state_and_runner, monkeypatch):
    state, busy = state_and_runner
    monkeypatch.setattr(busy.engine, "start", full_disk)
    assert str(busy._run_job(state, "0")) == "could not run: OSError: [Errno 28] No space left on device"


def test_an_error_while_a_process_is_followed_is_no_failure_to_start(state_and_runner, monkeypatch):
    state, busy = state_and_runner
    monkeypatch.setattr(busy.engine, "start", lambda *_: map(full_disk, [{}]))
    with pytest.raises(OSError, match="No space left"):
        busy._run_job(state, "0")


def test_places_get_as_many_gpus_as_a_training_has_processes():
    assert local_engine.gpus_per_place((), jobs_with(2)) == [None]
    assert local_engine.gpus_per_place(("0", "1", "2", "3"), jobs_with(1)) == ["0", "1", "2", "3"]
    assert local_engine.gpus_per_place(("0", "1", "2", "3"), jobs_with(2, 2)) == ["0,1", "2,3"]
    with pytest.raises(schedule.UsageError, match="--gpus names 3 GPUs, and processes is 2: name a multiple of 2"):
        local_engine.gpus_per_place(("0", "1", "2"), jobs_with(2))
