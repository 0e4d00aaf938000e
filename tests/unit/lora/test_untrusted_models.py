"""A folder of a base model may hold code and pickled objects: loading it runs neither."""

import json
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from telco_nb.lora import base_model
from telco_nb.lora.errors import ModelError

TINY = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def folder(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_safetensors_are_loaded(folder):
    assert base_model._load_weights(str(folder), torch.float32).config.hidden_size == 8


def test_pickled_weights_are_refused_unread(folder):
    mark = folder / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Trap(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        base_model._load_weights(str(folder), torch.float32)
    assert not mark.exists()


def test_code_of_a_model_is_not_run(folder):
    mark = folder / "mark"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)):
        base_model._load_weights(str(folder), torch.float32)
    assert not mark.exists()


def test_a_revision_reaches_whatever_is_read_from_the_hub(monkeypatch):
    asked = []

    def stop(source, **options):
        asked.append((source, options["revision"]))
        raise OSError("no network here")

    for name in ("AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", stop)
    with pytest.raises(ModelError, match="no network"):
        base_model.load_model("owner/name", torch.float32, revision="abc123")
    with pytest.raises(ModelError, match="no network"):
        base_model.model_shell("owner/name", "abc123")
    assert asked == [("owner/name", "abc123")] * 2


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"base_model_revision: .* has no revisions"):
        base_model.load_model(str(tmp_path), torch.float32, revision="abc123")
