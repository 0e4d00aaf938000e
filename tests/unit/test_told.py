"""A command that hangs is ended, and the test that ran it says where its processes stood."""

import os
import sys

import psutil
import pytest
from told import run_told

STUCK = """
import subprocess, sys, time
def asleep_on_purpose():
    if len(sys.argv) > 1:
        subprocess.run([sys.executable, *sys.argv[:1]])
    time.sleep(300)
asleep_on_purpose()
"""


def test_a_command_that_hangs_is_ended_with_all_its_processes_and_their_stacks_are_told(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    (tmp_path / "job.log").write_text("the last line of a job")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(AssertionError) as told:
        run_told([sys.executable, str(script), "parent"], os.environ, logs=tmp_path, hangs_after_s=10)
    assert str(told.value).count("in asleep_on_purpose") >= 2  # the parent's and the child's
    assert "hangs:" in str(told.value) and "the last line of a job" in str(told.value)
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_process_that_a_command_leaves_behind_does_not_keep_its_caller_waiting():
    leave = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    done = run_told([sys.executable, "-c", leave], os.environ)
    left = psutil.Process(int(done.stdout))
    assert done.returncode == 0 and left.is_running()  # it still holds the command's output open
    left.kill()
