"""An adapter that does not fit is refused by name, and nothing is merged."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_kernels import tiny

from telco_nb.lora import decoding, step
from telco_nb.lora.base_model import ModelError
from telco_nb.study import record

FACTS = {
    "schema_version": 1, "step": "03_train", "scope": "c01", "key": None, "key_parts": {}, "executor": "papermill",
    "status": "ok", "headline": "", "inputs": [], "outputs": [], "exports": {}, "environment": {}, "device": {},
    "started_at": "2026-06-05", "seconds": 1.0,
}  # fmt: skip
QV = {"rank": 4, "lora_alpha": 8, "target_modules": "qv", "rslora": False, "dora": False, "bias": "none"}


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter in the folder of a finished step, trained as QV says."""
    folder = tmp_path / "c01" / "03_train" / "artefacts" / "adapter"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=step.TARGET_MODULES["qv"], init_lora_weights=False)
    get_peft_model(tiny("qwen2"), lora).save_pretrained(folder)
    trained_with(folder, **QV)
    return folder


def trained_with(adapter: Path, **parameters) -> None:
    record.write_manifest(adapter.parents[1] / "manifest.json", FACTS | {"parameters": parameters})


def edit(adapter: Path, **options) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def refused(adapter: Path, words: str, kind: str = "qwen2") -> None:
    model = tiny(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ModelError, match=words) as error:
        decoding.merge_adapter(model, adapter, torch.float32)
    assert str(adapter) in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_adapter_that_fits_is_merged(adapter):
    decoding.merge_adapter(tiny("qwen2"), adapter, torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 8}, "rank is 4, and the configuration says 8"),
        ({"lora_alpha": 16}, "lora_alpha is 8, and the configuration says 16"),
        ({"target_modules": "all"}, "target_modules is .*'q_proj', 'v_proj'.*, and the configuration says .*'up_proj'"),
        ({"rslora": True}, "rslora is False"),
    ],
)
def test_an_adapter_of_another_configuration_is_refused(adapter, change, words):
    trained_with(adapter, **QV | change)
    refused(adapter, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8}, r"lora_A of .*q_proj is \(4, \d+\), not \(8, \d+\)"),
        ({"target_modules": ["q_proj"]}, "v_proj is no layer to adapt here"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj has no adapter"),
        ({"target_modules": ["query"]}, "it adapts no layer of this model"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set, which is not merged here"),
        ({"peft_type": "IA3"}, "no LoRA adapter|cannot be read"),
        ({"r": "four"}, "the adapter"),
    ],
)
def test_an_adapter_whose_options_do_not_fit_its_weights_is_refused(adapter, options, words):
    trained_with(adapter)
    edit(adapter, **options)
    refused(adapter, words)


def test_an_adapter_of_another_base_model_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("lora_B.weight"))
    save_file(weights | {name: torch.zeros(weights[name].shape[0] + 8, 4)}, path)
    refused(adapter, "lora_B of .* is .*, not")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"{", b"\x80\x04", b"[]"])
def test_a_missing_or_damaged_file_of_an_adapter_is_named(adapter, name, content):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    refused(adapter, "cannot be read")
