"""The process of a job: the reason of a failure reaches the runner, whatever has failed."""

import io
import json
import signal
from pathlib import Path

import pytest

from telco_nb.engine import archive
from telco_nb.engine import job as job_module


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("Traceback (most recent call last):\nOSError: [Errno 28] No space left on device\n", "OSError: [Errno 28] No"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\nmore text\n", "torch.OutOfMemoryError: CUDA"),
        ("Fatal Python error: Segmentation fault\n\nCurrent thread\n", "Fatal Python error: Segmentation fault"),
        ("MemoryError\n", "MemoryError"),
        ("an Error is mentioned: but none happened\n", None),
        (None, None),
    ],
)
def test_the_last_exception_of_a_log_is_found(tmp_path, log, found):
    if log is not None:
        (tmp_path / "log").write_text(log)
    text = archive.last_exception(tmp_path / "log")
    assert text is None if found is None else text and text.startswith(found)


class Ended:
    """A job whose notebook ran to its end; its result is then to be kept."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.events = folder, io.StringIO()
        values = {"root": str(folder), "scope": "c01", "step": "03_train", "parameters": {}}
        (folder / "c01").mkdir()
        (folder / "job.json").write_text(json.dumps(values))
        monkeypatch.setattr(job_module, "_redirect_output", lambda log: self.events)
        monkeypatch.setattr(job_module, "kernel_environment", lambda *_: {})
        monkeypatch.setattr(job_module.Execution, "run", lambda _: None)
        monkeypatch.setattr(signal, "signal", lambda *_: None)

    def failure(self) -> dict:
        assert job_module.main(str(self.folder / "job.json")) == 1
        return json.loads(self.events.getvalue().splitlines()[-1])["end"]


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_when_the_result_is_kept_is_the_reason_of_the_failure(tmp_path, monkeypatch):
    ended = Ended(tmp_path, monkeypatch)
    monkeypatch.setattr(archive, "keep_record", no_space)
    failure = ended.failure()
    assert failure == {"kind": "not kept", "reason": "OSError: [Errno 28] No space left on device", "cell": None}
    banner = "".join(json.loads((tmp_path / "c01" / "03_train.failed.ipynb").read_text())["cells"][0]["source"])
    assert "No space left on device" in banner and "Make room on the disk" in banner


def test_the_reason_arrives_even_if_not_even_the_failed_record_can_be_written(tmp_path, monkeypatch):
    ended = Ended(tmp_path, monkeypatch)
    monkeypatch.setattr(archive, "keep_record", no_space)
    monkeypatch.setattr(archive, "keep_failed", no_space)
    assert "No space left on device" in ended.failure()["reason"]


def test_a_full_disk_is_found_behind_the_errors_that_it_leads_to():
    try:
        try:
            no_space()
        except OSError as error:
            raise RuntimeError("the notebook could not be saved") from error
    except RuntimeError as error:
        found = job_module.disk_error(error)
    assert found is not None and found.errno == 28
    assert job_module.disk_error(ConnectionResetError(104, "Connection reset")) is None
