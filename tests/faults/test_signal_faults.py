"""What a run leaves after real signals to it and to its processes."""

import signal
import time

from fault_runs import SLEEP, alive, job_process, wait_for
from fault_study import FINISH


def test_ctrl_c_stops_the_run_and_keeps_its_work_folder(study):
    study.add("01_a", "import os\nrun_folder = os.path.dirname(os.environ['TELCO_NB_JOB'])", SLEEP, FINISH)
    study.add("02_b", FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 15
    assert study.failure("01_a")["kind"] == "interrupted"
    assert study.status("01_a") == "interrupted"
    assert study.status("02_b") == "waiting"
    assert "Go on with:" in output
    assert (study.root / "s" / ".01_a.work").is_dir()
    assert not alive(children)


def test_a_second_ctrl_c_ends_a_cell_that_ignores_the_first(study):
    deaf = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SLEEP.replace(
        "time.sleep(120)", "while True:\n    try: time.sleep(120)\n    except KeyboardInterrupt: pass"
    )
    study.add("01_a", deaf, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert study.failure("01_a")["kind"] == "interrupted"
    assert not alive(children)


def test_a_killed_runner_leaves_no_process_and_no_lock(study):
    child = "import os, subprocess; subprocess.Popen(['sleep', '120'])\n"
    study.add("01_a", child + SLEEP, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    assert len(alive(children)) >= 3, "the child, its kernel, and what the notebook started"
    process.kill()
    process.wait()
    wait_for(lambda: not alive(children), 2.5)
    study.jobs.clear()
    study.add("01_a", FINISH)
    assert study.run()[0] == 0


def test_a_child_killed_alone_takes_its_kernel_along_and_is_reported(study):
    study.add("01_a", "import os\n" + SLEEP, FINISH)
    process = study.start()
    children = study.wait_until_asleep()
    job_process(process).kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    reason = "the process that runs the notebook: killed by SIGKILL, most often for lack of memory"
    assert study.failure("01_a")["reason"] == reason
    wait_for(lambda: not alive(children), 2)


def test_a_second_run_on_the_same_outputs_is_refused_by_name(study):
    study.add("01_a", "import os\n" + SLEEP, FINISH)
    process = study.start()
    study.wait_until_asleep()
    try:
        code, output = study.run()
        assert code == 3
        assert f"process {process.pid}" in output
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
