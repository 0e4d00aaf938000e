"""Where jobs run: an engine that cannot start one, and the GPUs of each place."""

import threading
from types import SimpleNamespace

import pytest

from telco_nb.engine import local_engine, progress, runner, schedule, worker
from telco_nb.hosted import attempts, prices
from telco_nb.study import plan
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


# ---------------------------------------------------------------- jobs that spend


class SpendingEngine:
    """Two places; each job spends what the cap leaves when it starts, as a kernel does, once the other has begun."""

    places, first_status = ["0", "1"], "running"

    def __init__(self, root, max_usd: float | None):
        self.root, self.max_usd = root, max_usd
        self.both = threading.Barrier(2)
        self.met = False

    def start(self, job, *_):
        budget = prices.Budget(self.max_usd, attempts.spent_usd(self.root))
        try:
            self.both.wait(5.0 if self.max_usd is None else 0.6)
            self.met = True
        except threading.BrokenBarrierError:
            self.both.reset()
        store = attempts.AttemptStore(self.root / job.scope / "store" / "verdicts.jsonl")
        try:
            budget.reserve(0.6)
        except prices.BudgetStop as stop:
            return iter([{"failure": {"kind": "error", "reason": str(stop)}}])
        store.append([{"call_id": job.scope, "status": "ok", "usd": 0.6}])
        return iter([{}])

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("max_usd", "spent", "met"), [(1.0, 0.6, False), (None, 1.2, True)])
def test_two_hosted_judges_with_two_places_never_spend_more_than_one_cap(tmp_path, monkeypatch, max_usd, spent, met):
    hosted = {"judge_kind": "openai", "judge_model": "gpt-5.2", "judge_endpoint": None}
    values = plan.declared("05_judge") | hosted
    jobs = [Job("05_judge", f"judge-{name}", values | {"judge": name}, ()) for name in "ab"]
    states = [progress.State(job, "run", "first") for job in jobs]
    engine = SpendingEngine(tmp_path, max_usd)
    made = worker.Runner(states, tmp_path, runner.Options(max_usd=max_usd), progress.Output("warning"), engine)
    monkeypatch.setattr(made, "write_job", lambda state: tmp_path / f"{state.job.scope}.json")
    monkeypatch.setattr(made, "_is_current", lambda state: False)
    made.go()
    assert (attempts.spent_usd(tmp_path), engine.met) == (spent, met)
    assert [state.status for state in states].count("done") == round(spent / 0.6)
