"""Tests reach nothing beyond loopback: what tries fails its test, in its own process and in Python that it starts."""

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import loopback
import pytest
from loopback_only.sitecustomize import EXPECTED

from telco_nb import ROOT

BEYOND = "192.0.2.1"  # of no machine (RFC 5737)
TRIES = {
    "connect": f"socket.create_connection(('{BEYOND}', 9), timeout=1)",
    "connect_ex": f"socket.socket().connect_ex(('{BEYOND}', 9))",
    "datagram": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{BEYOND}', 9))",
    "version 6": "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 9))",
    "look-up": "socket.getaddrinfo('example.invalid', 443)",
    "old look-up": "socket.gethostbyname('example.invalid')",
    "backwards": f"socket.gethostbyaddr('{BEYOND}')",
}
PLANTED = f"""
import contextlib, socket, subprocess, sys
TRY = "import contextlib, socket\\nwith contextlib.suppress(OSError): socket.create_connection(('{BEYOND}', 9), 1)"
def test_stays():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
def test_tries():
    exec(TRY)
def test_starts_what_tries():
    subprocess.run([sys.executable, "-c", TRY], check=True)
"""


@pytest.mark.parametrize("tried", TRIES.values(), ids=TRIES)
def test_an_attempt_beyond_loopback_is_stopped_and_noted(tried):
    with pytest.raises(OSError, match="tests reach nothing beyond loopback"):
        exec(tried, {"socket": socket})
    (line,) = loopback.take_notes()
    assert "test_an_attempt_beyond_loopback_is_stopped_and_noted" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", None])
def test_a_look_up_of_this_machine_is_none(host):
    socket.getaddrinfo(host, 80)
    assert loopback.take_notes() == []


def test_what_is_expected_is_stopped_as_well_and_has_a_reason(monkeypatch):
    assert all(len(reason.split()) > 5 for reason in EXPECTED.values())
    for argv, n in ((["/x/ray/dashboard/dashboard.py"], 0), (["/x/other.py"], 1)):
        monkeypatch.setattr(sys, "argv", argv)
        with socket.socket() as stream, pytest.raises(OSError, match="beyond loopback"):
            stream.connect(("169.254.169.254", 80))
        assert len(loopback.take_notes()) == n


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_planted_attempt_fails_its_test_though_the_error_is_caught(tmp_path, workers):
    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *workers, "."]
    folders = (ROOT / "tests", ROOT / "tests" / "support")
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": loopback.python_path(ROOT, *folders)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "3 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    for name in ("test_tries", "test_starts_what_tries"):
        assert f"ERROR test_planted.py::{name} - Failed: Tests reach nothing beyond loopback" in done.stdout


def test_whoever_sets_the_path_of_a_child_keeps_the_watcher_on_it():
    files = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(loopback.__file__)]
    found = [(path, value) for path in files for value in paths_set_in(path)]
    wrong = [f"{path}:{value.lineno}" for path, value in found if "python_path(" not in ast.unparse(value)]
    assert len(found) > 5 and wrong == []


def paths_set_in(path: Path) -> list[ast.expr]:
    """What a file of Python gives to PYTHONPATH, in a dictionary or by setenv."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            found += [v for k, v in zip(node.keys, node.values, strict=True) if is_path_name(k)]
        elif isinstance(node, ast.Call) and "setenv" in ast.unparse(node.func) and is_path_name(node.args[0]):
            found.append(node.args[1])
    return found


def is_path_name(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == "PYTHONPATH"
