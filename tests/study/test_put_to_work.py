"""The exported model at work on another machine: an empty HOME, another folder, no hub, and nothing of this project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import trained_study
from loopback import python_path, watched
from ports import free_port
from told import run_told
from typer.testing import CliRunner

from telco_nb import ROOT
from telco_nb.__main__ import app
from telco_nb.commands import serve
from telco_nb.commands.model_card import QUESTION
from telco_nb.lora import base_model
from telco_nb.study import record

pytestmark = pytest.mark.study

LOGITS = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("saved")
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=False)
def logits(model, dtype=torch.float32):
    with torch.no_grad():
        return model.to(dtype).eval()(input_ids=ids).logits
def distance(model, other, *dtype):
    return (logits(model, *dtype) - logits(other, *dtype)).abs().max().item()
base = AutoModelForCausalLM.from_pretrained("hf/base")
merged = AutoModelForCausalLM.from_pretrained("merged")
bases = [AutoModelForCausalLM.from_pretrained("hf/base") for _ in range(2)]
exported, saved = (PeftModel.from_pretrained(*pair) for pair in zip(bases, ("hf", "saved")))
print(merged.dtype, *(distance(exported, other) for other in (base, saved, merged)))
print(distance(exported, merged, torch.float64))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    base_model.resolve_model(base_model.PACKAGED_MODEL)
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TELCO_NB_OUTPUTS", str(folder))
        trained_study.build(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads of a busy machine wait for each other at every token
        yield folder
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def elsewhere(outputs, tmp_path_factory):
    """A folder with the exports `hf` and `merged`, moved here, and a copy `saved` of the folder that 03 wrote."""
    made, place = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("elsewhere")
    for to in ("hf", "merged"):
        result = CliRunner().invoke(app, ["export", "c04", str(made / to), "--to", to])
        assert result.exit_code == 0, result.output
        (made / to).rename(place / to)
    shutil.copytree(outputs / "laptop/c04/03_train/artefacts/adapter", place / "saved")
    return place


@pytest.fixture
def stranger(tmp_path):
    """The environment of a user with an empty HOME and no network for the hub's client."""
    made = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return made | watched()


def python(code: str, folder: Path, env: dict[str, str]) -> str:
    """What a program prints that cannot import this project."""
    code = f"import sys; sys.modules['telco_nb'] = None\n{code}"
    done = run_told([sys.executable, "-c", code], env, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_adapter_and_merged_model_give_the_same_logits_elsewhere(elsewhere, stranger):
    dtype, *distances = python(LOGITS, elsewhere, stranger).split()
    untuned, saved, merged, without_rounding = map(float, distances)
    assert dtype == "torch.float32" and untuned > 0.1 and saved == 0.0
    # Logits reach 38, where float32 alone rounds the sum of 30 layers by 1e-4; float64 shows that the weights agree.
    assert merged < 3e-4 and without_rounding < 1e-4
    assert not [*Path(stranger["HOME"]).rglob("*.safetensors")]


@pytest.mark.parametrize("to", ["hf", pytest.param("merged", marks=pytest.mark.nightly)])
def test_the_lines_of_the_card_load_the_model_and_answer_as_chat_does(elsewhere, outputs, stranger, to, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (elsewhere / to / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "c04").symlink_to(elsewhere / to)
    chat = CliRunner().invoke(app, ["chat", "c04", "--prompt", QUESTION])
    assert chat.exit_code == 0 and python(code, tmp_path, stranger) == chat.stdout


def section(readme: Path) -> list[str]:
    """The commands under "Put it to work", comments removed."""
    text = readme.read_text(encoding="utf-8").split("## Put it to work\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if shlex.split(line, comments=True)]


@pytest.fixture
def desk(outputs, tmp_path):
    """A folder to give commands in, where `python` is this one; (folder, environment)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": python_path(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return tmp_path, env


def start(line: str, folder: Path, env: dict[str, str]) -> tuple[subprocess.Popen, str]:
    """Start a serve line and wait until it has printed a curl line; (server, curl line)."""
    server = subprocess.Popen(["/bin/sh", "-c", f"exec {line}"], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    assert "answers on http://127.0.0.1:" in server.stdout.readline()
    return server, server.stdout.readline()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's request is one for curl")
def test_every_line_of_put_it_to_work_does_what_it_says(desk):
    folder, env = desk
    port, server, ran = free_port(), None, []
    try:
        for line in section(ROOT / "README.md"):
            line = line.replace("8000", str(port))
            if " serve " in line:
                server, printed = start(line, folder, env)
                with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
                    pass  # another address of this machine: only 127.0.0.1 is served
            else:
                keys = "My bill is too high.\n/quit\n" if " chat " in line else None
                done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True, input=keys)
                assert done.returncode == 0, f"{line}: {done.stderr[-1500:]}"
                printed = done.stdout
            ran.append((line, printed))
    finally:
        if server:
            server.terminate()
            assert server.wait(30) == 0
    kinds = [line.split()[3] if line.startswith("python") else line.split()[0] for line, _ in ran]
    assert {"chat", "export", "serve", "curl"} <= set(kinds)
    for kind, (line, printed) in zip(kinds, ran, strict=True):
        if kind == "curl":
            assert json.loads(printed)["choices"][0]["message"]["content"].strip(), line
        if kind == "export":
            named = re.search(r"export c04 (\S+)", line)
            assert named and (folder / named[1] / "README.md").is_file()
        if kind == "chat":
            assert "untuned: " in printed if "--beside" in line else printed.strip()


def test_serve_answers_as_chat_does_and_when_killed_leaves_no_server(desk):
    folder, env = desk
    port = free_port()
    server, line = start(f"python -m telco_nb serve c04 --port {port}", folder, env)
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, text=True).stdout)
    chat = CliRunner().invoke(app, ["chat", "c04", "--prompt", QUESTION])
    assert answer["choices"][0]["message"]["content"].strip() == chat.stdout.strip()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as listed:
        assert str(Path.home()) not in listed.read().decode()
    (left,) = serve.served_dir().glob(f".c04.{server.pid}.work")
    server.kill()
    server.wait()
    record.sweep(serve.served_dir())
    assert not left.exists()
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    pytest.fail("the server still answers")
