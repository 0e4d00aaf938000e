"""Money is a finite number from 0 up, wherever it is read; and only who appends to a store changes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_study import flip

from telco_nb import ROOT
from telco_nb.corpus import llm_writer
from telco_nb.hosted import attempts, prices
from telco_nb.hosted.api import HostedModel, ProviderError
from telco_nb.hosted.ledger import BatchLedger
from telco_nb.hosted.lines import MONEY, StoreError
from telco_nb.judge import panel
from telco_nb.judge.store import VerdictStore
from telco_nb.study import params, record, seal
from telco_nb.study.plan import declared

GOOD = {"call_id": "a", "status": "ok", "usd": 0.25, "output": {}}
BAD_MONEY = ["NaN", "Infinity", "-Infinity", "-0.01", '"0.5"', '"free"', "true", "[1]", "{}", "1e999", "-5"]


def line(**more) -> str:
    return json.dumps(GOOD | more) + "\n"


@pytest.mark.parametrize("field", MONEY)
@pytest.mark.parametrize("text", BAD_MONEY)
def test_a_store_with_an_amount_that_is_no_money_is_refused_with_file_and_line(field, text, tmp_path):
    path = tmp_path / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line() + f'{{"call_id": "b", "status": "ok", "output": {{}}, "{field}": {text}}}\n')
    for read in (attempts.AttemptStore, lambda path: list(attempts.read_attempts(path))):
        with pytest.raises(StoreError, match=rf"conversations\.jsonl:2: {field} is "):
            read(path)
    with pytest.raises(StoreError, match=r"conversations\.jsonl:2"):
        attempts.spent_usd(tmp_path)


@pytest.mark.parametrize("usd", [float("nan"), -1.0, "1"])
def test_an_amount_that_is_no_money_is_not_stored(usd, tmp_path):
    store = attempts.AttemptStore(tmp_path / "a.jsonl")
    with pytest.raises(StoreError, match="a new line"):
        store.append([GOOD | {"usd": usd}])
    assert not store.path.exists() and store.spent_usd == 0.0


def test_money_of_every_readable_line_counts_and_null_is_no_money(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        line() + line(call_id="b", usd=None, usd_at_most=0.5) + line(call_id="c", usd=0) + "[" * 100_000 + "\n"
    )
    store = attempts.AttemptStore(path)
    assert store.spent_usd == 0.75 and store.unreadable == 1 and len(store.ok) == 3


@pytest.mark.parametrize("bad", ['"status": ["ok"]', '"call_id": 7', '"call_id": ["a"]', '"status": null'])
def test_a_line_that_is_no_attempt_is_counted_as_unreadable_and_has_no_effect(bad, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"call_id": "a", "status": "ok", "usd": 1, {bad}}}\n')
    store = attempts.AttemptStore(tmp_path / "a.jsonl")
    assert store.unreadable == 1 and not store.attempts and not store.ok and store.spent_usd == 0.0


# ---------------------------------------------------------------- who writes


@pytest.mark.parametrize("tail", [b'{"call_id": "b", "sta', b'{"call_id": "b", "status": "ok", "usd": 1.0}'])
def test_a_reader_changes_no_byte_of_a_store_whose_last_line_is_being_written(tail, tmp_path):
    path = tmp_path / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(line().encode() + tail)
    path.with_name("batches.jsonl").write_bytes(b'{"event": "submi')
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()}
    attempts.AttemptStore(path)
    VerdictStore(path)
    list(attempts.read_attempts(path))
    attempts.spent_usd(tmp_path)
    BatchLedger(path.with_name("batches.jsonl"))
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()} == before


def test_a_reader_creates_no_file(tmp_path):
    assert not attempts.AttemptStore(tmp_path / "judge-x" / "store" / "verdicts.jsonl").ok
    assert not list(tmp_path.iterdir())


def test_the_next_append_removes_a_torn_line_and_completes_a_whole_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line().encode() + b'{"call_id": "b", "sta')
    attempts.AttemptStore(path).append([GOOD | {"call_id": "c"}])
    assert path.read_text() == line() + line(call_id="c")
    path.write_text(line() + line(call_id="b").rstrip("\n"))
    store = attempts.AttemptStore(path)
    store.append([GOOD | {"call_id": "c"}])
    assert path.read_text() == line() + line(call_id="b") + line(call_id="c") and len(store.ok) == 3


def test_an_append_waits_for_the_line_that_another_process_is_writing(tmp_path):
    path = tmp_path / "a.jsonl"
    code = (
        "import fcntl, sys, time; s = open(sys.argv[1], 'ab', 0); fcntl.flock(s, fcntl.LOCK_EX); "
        "s.write(b'{\"call_id\": \"b\", '); print('begun', flush=True); time.sleep(0.5); "
        's.write(b\'"status": "ok"}\\n\')'
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stdout.readline() == b"begun\n"
        attempts.AttemptStore(path).append([GOOD])
    assert set(attempts.AttemptStore(path).ok) == {"a", "b"}


# ---------------------------------------------------------------- batches


def submitted(path, usd: object = 2.0) -> BatchLedger:
    ledger = BatchLedger(path)
    ledger.write("submitting", ids=["a", "b"], usd_at_most=usd)
    ledger.write("submitted", entry=0, handle={"id": "x"})
    return ledger


def test_a_batch_counts_as_spent_until_it_is_collected(tmp_path):
    path = tmp_path / "shared" / "store" / "batches.jsonl"
    submitted(path)
    assert attempts.spent_usd(tmp_path) == 2.0
    BatchLedger(path).close(0, "collected", share=0.75)
    assert attempts.spent_usd(tmp_path) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "event",
    [
        '{"event": "submitting", "ids": [], "usd_at_most": -5}',
        '{"event": "submitting", "ids": [], "usd_at_most": NaN}',
        '{"event": "collected", "entry": 0, "usd_at_most": -5}',
        '{"event": "collected", "entry": 0, "usd_at_most": "-1"}',
        '{"event": "collected", "entry": -1, "usd_at_most": -1}', '{"event": "collected", "entry": 7}',
        '{"event": "collected", "entry": 0, "usd_at_most": NaN}', '{"event": "other"}', "[]", "{", "{}",
    ],
)  # fmt: skip
def test_a_ledger_that_would_return_money_that_it_never_reserved_is_refused_with_file_and_line(event, tmp_path):
    path = tmp_path / "batches.jsonl"
    submitted(path)
    path.write_text(path.read_text() + event + "\n")
    with pytest.raises(StoreError, match=r"batches\.jsonl:3"):
        BatchLedger(path)


def test_a_ledger_line_that_a_kill_cut_short_is_skipped_and_removed_by_the_next_event(tmp_path):
    path = tmp_path / "batches.jsonl"
    submitted(path)
    path.write_bytes(path.read_bytes() + b'{"event": "coll')
    ledger = BatchLedger(path)
    assert ledger.under_way == {"a", "b"}
    ledger.close(0, "collected")
    assert not BatchLedger(path).under_way and b"coll" in path.read_bytes() and path.read_text().count("\n") == 3


# ---------------------------------------------------------------- the cap


@pytest.mark.parametrize("cap", [float("nan"), float("inf"), -1.0, True, "5"])
def test_a_cap_that_is_no_money_is_refused_because_it_would_allow_everything(cap):
    with pytest.raises(ProviderError, match="not a number of dollars"):
        prices.Budget(cap)
    with pytest.raises(ProviderError, match="not a number of dollars"):
        prices.require_consent([], cap, yes=True, ask=None)


@pytest.mark.parametrize("spent", [float("nan"), -5.0])
def test_an_amount_spent_that_is_no_money_is_refused(spent):
    with pytest.raises(ProviderError, match="spent"):
        prices.Budget(1.0, spent)


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -1.0])
def test_a_declared_price_is_money(price):
    with pytest.raises(ProviderError, match="input_usd_per_mtok"):
        prices.Prices(HostedModel("openai", "gpt-5.2"), price, 1.0)


@pytest.mark.parametrize("declared", [(None, None), (1.0, 2.0)])
@pytest.mark.parametrize("tokens", [(-1_000_000, 5), (5, -1_000_000), ("many", 5), (float("nan"), 5), (10**400, 5)])
def test_counts_of_tokens_that_give_no_amount_give_no_price(tokens, declared):
    usage = SimpleNamespace(input_tokens=tokens[0], output_tokens=tokens[1])
    assert prices.Prices(HostedModel("openai", "gpt-5.2"), *declared).usd(usage) is None


@pytest.mark.parametrize("option", ["nan", "inf", "-1"])
def test_a_command_line_with_a_cap_that_is_no_money_ends_with_exit_code_2(option, tmp_path):
    command = [sys.executable, "run_all.py", "--profile", "smoke", "--dry-run", "--max-usd", option]
    env = os.environ | {"TELCO_NB_OUTPUTS": str(tmp_path)}
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode == 2


# ---------------------------------------------------------------- a sum that is not known

UNREADABLE = {
    "no JSON": b'{"call_id": "b", "status": "ok", "usd": 0.5, "output": {\n', "zeros": b"\0" * 80 + b"\n",
    "usd twice": b'{"call_id": "b", "status": "ok", "usd": 0.5, "usd": 0, "output": {}}\n', "a list": b"[]\n",
    "usd_at_most twice": b'{"call_id": "b", "status": "x", "usd_at_most": 0.5, "usd_at_most": null}\n',
    "too deep": b"[" * 100_000 + b"\n", "no UTF-8": b'{"call_id": "\xff", "usd": 0.5}\n',
}  # fmt: skip


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_a_line_that_cannot_be_read_makes_the_sum_unknown_and_is_named(data, tmp_path):
    path = tmp_path / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(line().encode() + data + line(call_id="c").encode())
    with pytest.raises(StoreError, match=r"conversations\.jsonl:2: .*Nothing is sent"):
        attempts.spent_usd(tmp_path)
    path.write_bytes(line().encode() + data.rstrip(b"\n")[:30])
    assert attempts.spent_usd(tmp_path) == 0.25, "a last line that a kill cut short has not been paid yet"


def test_with_a_store_that_cannot_be_read_a_judge_and_a_generator_are_not_opened(tmp_path, monkeypatch):
    """In a plan, in a run, in the pilot and in batches: each opens its judge or generator by these two."""
    path = tmp_path / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(UNREADABLE["usd twice"])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef0123456789abcdef")
    values = params.load_study("smoke").values("shared")
    with pytest.raises(StoreError, match="what it cost is not known"):
        llm_writer.open_session(values, HostedModel("openai", "gpt-5.2"), [], tmp_path, None)
    values |= {"judge": "x", "judge_kind": "openai", "judge_model": "gpt-5.2", "judge_endpoint": None}
    with pytest.raises(StoreError, match="what it cost is not known"):
        panel.open_judge(declared("05_judge") | {k: v for k, v in values.items() if k.startswith("judge")}, tmp_path)


def test_a_generator_works_on_the_unchanged_store_of_the_study_or_by_hand_on_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef0123456789abcdef")
    values, model = params.load_study("smoke").values("shared"), HostedModel("openai", "gpt-5.2")
    root, target = tmp_path / "smoke", tmp_path / "by-hand" / "smoke"
    path = root / "shared" / "store" / "conversations.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line() + '{"torn": ')
    submitted(path.with_name("batches.jsonl"))
    seal.seal_study(root)
    before = path.read_bytes()
    for _ in range(2):
        session = llm_writer.open_session(values, model, [], root, None, target=target)
        session.store.append([GOOD | {"call_id": "b"}])
    assert path.read_bytes() == before and session.under_way == {"a", "b"}
    assert (target / "shared/store/conversations.jsonl").read_text() == line() + 2 * line(call_id="b")
    flip(path, 3)
    for where in (None, target):
        with pytest.raises(record.RecordError, match=r"conversations\.jsonl was changed"):
            llm_writer.open_session(values, model, [], root, None, target=where)


def test_an_event_of_a_ledger_that_gives_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "batches.jsonl"
    path.write_text('{"event": "submitting", "ids": [], "usd_at_most": 5, "usd_at_most": 0}\n')
    with pytest.raises(StoreError, match=r"batches\.jsonl:1.*stands twice"):
        BatchLedger(path)
