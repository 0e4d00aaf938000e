"""The forecast comes from what the same steps took on this machine, and says what it does not know."""

import io
import json
import time
from pathlib import Path

import fake_study
import pytest
from rich.console import Console

from telco_nb.engine import forecast, progress, ray_engine, runner, schedule
from telco_nb.engine.local_engine import gpus_per_place
from telco_nb.hosted.prices import Estimate
from telco_nb.study import record
from telco_nb.study.manifest import sealed
from telco_nb.study.plan import Job

SCOPES = ("c01", "c02", "c03", "c04")
JOBS = [Job("03_train", scope, {"epochs": 2}, ()) for scope in SCOPES]
JOBS += [Job("06_analysis", "study", {"usd_per_kwh": 0.5}, ())]


def finish(builder: fake_study.Builder, scope: str, seconds: float, epochs: int, **changes) -> None:
    """A finished training that took `seconds` and 0.1 Wh an epoch; `changes` go into its manifest."""
    run = builder.open("03_train", scope, {"epochs": epochs})
    run.artefact("weights").write_bytes(b"x" * 1000)
    run.metric(train_energy_wh=0.1 * epochs, energy_kind="measured")
    builder.close(run, "trained")
    path = record.step_dir(builder.root, scope, "03_train") / "manifest.json"
    manifest = json.loads(path.read_text()) | {"seconds": seconds} | changes
    path.write_text(json.dumps(sealed(manifest)))


def told(root: Path, monkeypatch, current: tuple[str, ...] = (), estimates=()) -> tuple[dict, str]:
    """The forecast by step, and what is printed, where the jobs of the scopes `current` are up to date."""
    monkeypatch.setattr(schedule, "is_current", lambda job, root: (job.scope in current, "x changed"))
    states, said = schedule.plan_states(JOBS, root, set()), io.StringIO()
    rows = forecast.show_forecast(Console(file=said, width=200), root, JOBS, states, estimates)
    return {row.step: row for row in rows}, said.getvalue()


def test_time_disk_and_energy_are_the_median_and_the_range_of_what_was_seen_per_epoch(tmp_path, monkeypatch):
    builder = fake_study.Builder(tmp_path)
    for scope, seconds, epochs in (("c01", 10.0, 1), ("c02", 40.0, 2), ("c03", 60.0, 1)):
        finish(builder, scope, seconds, epochs)
    rows, said = told(builder.root, monkeypatch, SCOPES[:3])
    train = rows["03_train"]
    assert (train.jobs, train.n) == (1, 3)
    assert train.seconds == (2 * 10 + 1, 2 * 20 + 1, 2 * 60 + 1), "10, 20 and 60 s an epoch, for two epochs"
    assert train.bytes[1] == pytest.approx(1000, abs=200)
    assert train.energy_wh == pytest.approx((0.2, 0.2, 0.2)) and train.energy_kind == "measured"
    assert "0:41 (0:21 to 2:01)" in said and "0.2 measured" in said
    assert "0.0001 USD at 0.5 USD a kWh" in said


def test_what_was_never_seen_is_said_to_be_unknown(tmp_path, monkeypatch):
    rows, said = told(tmp_path, monkeypatch)
    assert rows["03_train"] == forecast.Expected("03_train", 4, 0) and "are not known" in said
    finish(fake_study.Builder(tmp_path), "c01", 10.0, 1)
    rows, said = told(tmp_path / "laptop", monkeypatch)
    assert "not known" in said.partition("06_analysis")[2] and "> 1:24" in said


def test_runs_of_another_machine_do_not_count(tmp_path, monkeypatch):
    builder = fake_study.Builder(tmp_path)
    finish(builder, "c01", 10.0, 1, device={"cpu": "another", "cores": 64, "gpus": []})
    assert told(builder.root, monkeypatch)[0]["03_train"].n == 0


def test_a_study_that_is_up_to_date_needs_no_forecast(tmp_path, monkeypatch):
    assert told(tmp_path, monkeypatch, (*SCOPES, "study")) == ({}, "")


def test_energies_of_different_kinds_are_not_added(tmp_path, monkeypatch):
    builder = fake_study.Builder(tmp_path)
    for scope, kind in (("c01", "measured"), ("c02", "estimated")):
        finish(builder, scope, 10.0, 1)
        path = record.step_dir(builder.root, scope, "03_train") / "metrics.json"
        path.write_text(json.dumps({"train_energy_wh": 0.1, "energy_kind": kind}))
    rows, said = told(builder.root, monkeypatch)
    assert rows["03_train"].energy_wh is None and "USD at" not in said


@pytest.mark.parametrize(("usd", "text"), [(1.5, "3.00 (2.00 to 4.00) USD"), (None, "no price is known")])
def test_the_money_for_hosted_models_stands_with_it_where_a_price_is_known(tmp_path, monkeypatch, usd, text):
    ends = (None,) * 3 if usd is None else (1.0, usd, 2.0)
    estimates = [Estimate(None, 10, 100, 100, *ends, "2026-11"), Estimate(None, 10, 100, 100, 1.0, 1.5, 2.0, "2026-11")]
    assert text in told(tmp_path, monkeypatch, estimates=estimates)[1]


def test_a_job_that_this_run_has_done_counts_at_once_and_records_are_read_once(tmp_path, monkeypatch):
    builder = fake_study.Builder(tmp_path)
    finish(builder, "c01", 10.0, 1)
    monkeypatch.setattr(schedule, "is_current", lambda job, root: (False, "x changed"))
    states = schedule.plan_states(JOBS, builder.root, set())
    monkeypatch.setattr(record, "finished", lambda *place: pytest.fail("a record was read again"))
    states[1].status, states[1].seconds = "done", 61.0
    forecast.estimate_durations(states, builder.root)
    assert states[2].expected_seconds == 2 * 20 + 1, "the median of 10 and 30 s an epoch"


def at_once(rows: list[forecast.Expected], places: dict[str, int] | None) -> str:
    said = io.StringIO()
    forecast.show_at_once(Console(file=said, width=200), rows, places)
    return said.getvalue()


def test_jobs_that_run_at_once_are_not_added_up():
    rows = [
        forecast.Expected("03_train", 5, 2, (500.0, 1000.0, 1500.0)),
        forecast.Expected("06_analysis", 1, 1, (9,) * 3),
    ]
    said = at_once(rows, {"03_train": 2, "06_analysis": 2})
    assert "up to 2 jobs at once, step by step: 10:09 (5:09 to 15:09)" in said, "five jobs of 200 s in three rounds"
    assert forecast.at_once(rows, {"03_train": 8}) == (109.0, 209.0, 309.0)
    assert at_once(rows, {"03_train": 1, "06_analysis": 8}) == "", "nothing runs at once"
    assert "one job after another" in at_once(rows, None) and at_once([], None) == ""
    unknown = [*rows, forecast.Expected("05_judge", 2, 0)]
    assert "more than 10:09" in at_once(unknown, {"03_train": 2})


@pytest.mark.parametrize(
    ("options", "found"),
    [({}, 1), ({"gpus": ("0", "1", "2", "3")}, 4), ({"engine": "ray"}, 8), ({"engine": "ray", "address": "a:1"}, None)],
)
def test_a_run_hands_its_places_to_the_forecast(monkeypatch, options, found):
    monkeypatch.setattr(ray_engine, "resources_here", lambda: ([8], 1))
    chosen = schedule.Options(**options)
    jobs = [Job("03_train", scope, {"device": "cuda", "processes": 1}, ()) for scope in SCOPES]
    plan = runner.Planned(Path(), jobs, jobs, set(), gpus_per_place(chosen.gpus, jobs))
    assert runner._places(plan, chosen) == (None if found is None else {"03_train": found})


def test_a_queued_job_is_still_to_do():
    now = zip(JOBS, ("queued", "waiting", "done"), strict=False)
    states = [progress.State(job, "run", "", status, 60.0) for job, status in now]
    states[0].started = time.monotonic() - 600  # since when it waits
    assert progress.remaining_text(states) == "about 2 min"
