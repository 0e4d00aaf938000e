"""Free memory: the least of the machine's, the control groups' and the process's own limit."""

import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from telco_nb.study import memory

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 50 GB free, without limits; a test writes its control groups."""
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GB))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_a_limit_the_machine_decides_and_processes_share_it(machine):
    assert memory.free_main_memory() == 50 * GB
    assert memory.free_main_memory(4) == 12.5 * GB


def test_a_limit_of_version_2_counts_less_its_use_and_plus_its_idle_cache(machine):
    write(machine, membership="0::/job")
    stat = f"anon 5\ninactive_file {2 * GB}\nactive_file 7"
    write(machine / "cgroup/job", memory__max=8 * GB, memory__current=5 * GB, memory__stat=stat)
    assert memory.free_main_memory() == 5 * GB


def test_the_tightest_group_around_a_process_decides(machine):
    write(machine, membership="0::/slice/job")
    write(machine / "cgroup/slice/job", memory__max="max", memory__current=1)
    write(machine / "cgroup/slice", memory__max=6 * GB, memory__high=4 * GB, memory__current=3 * GB)
    write(machine / "cgroup", memory__max=9 * GB, memory__current=3 * GB)
    assert memory.free_main_memory() == GB


def test_inside_a_container_the_group_is_the_mounted_root(machine):
    write(machine, membership="0::/../other/path")
    write(machine / "cgroup", memory__max=2 * GB, memory__current=GB)
    assert memory.free_main_memory() == GB


def test_a_limit_of_version_1_counts_and_its_huge_number_for_none_does_not(machine):
    write(machine, membership="5:cpu,cpuacct:/\n4:memory:/docker/1")
    folder = machine / "cgroup/memory/docker/1"
    write(folder, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GB)
    assert memory.free_main_memory() == 50 * GB
    write(folder, memory__limit_in_bytes=3 * GB, memory__usage_in_bytes=GB, memory__stat="total_inactive_file 5")
    assert memory.free_main_memory() == 2 * GB + 5


def test_the_limit_of_the_address_space_is_each_processes_own(machine, monkeypatch):
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + 20 * GB, -1))
    assert memory.free_main_memory(2) == pytest.approx(20 * GB, abs=0.5 * GB)
    assert memory.free_main_memory(4) == 12.5 * GB


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "-1", "12 13"])
def test_unreadable_files_of_a_control_group_are_no_limit(machine, text):
    write(machine, membership=text)
    write(machine / "cgroup", memory__max=text, memory__current=text)
    assert memory.free_main_memory() == 50 * GB


def test_more_use_than_the_limit_leaves_nothing(machine):
    write(machine, membership="0::/")
    write(machine / "cgroup", memory__max=GB, memory__current=2 * GB)
    assert memory.free_main_memory() == 0


def test_kills_for_lack_of_memory_are_counted_in_the_own_group_first(machine):
    write(machine, membership="0::/job")
    write(machine / "cgroup/job", memory__events="low 0\noom 5\noom_kill 3")
    assert memory.oom_kills() == 3
