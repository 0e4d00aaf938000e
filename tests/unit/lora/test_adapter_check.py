"""An adapter that does not fit is refused by name, and nothing is merged."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_kernels import tiny

from telco_nb.lora import adapter_check, decoding, step
from telco_nb.lora.base_model import ModelError, weights_checksum
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
        ({"r": 8}, r"q_proj\.lora_A\.weight is \(4, \d+\), not \(8, \d+\)"),
        ({"target_modules": ["q_proj"]}, r"v_proj\.lora_A\.weight does not belong there"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"o_proj\.lora_A\.weight is missing"),
        ({"target_modules": ["query"]}, "it adapts no layer of this model"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set, which is not merged here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"exclude_modules": ["lm_head"]}, "exclude_modules is set"),
        ({"an_option_of_a_later_peft": 4}, "an_option_of_a_later_peft is set"),
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
    refused(adapter, r"lora_B\.weight is .*, not")


def test_every_option_is_refused_that_is_not_allowed_and_differs_from_the_default(tmp_path):
    """A new option of peft is refused until somebody has looked at it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    for field in dataclasses.fields(LoraConfig):
        config = LoraConfig()
        setattr(config, field.name, "something else")
        is_refused = bool(adapter_check._option_faults(tmp_path, config))
        assert is_refused == (field.name not in adapter_check.ALLOWED_OPTIONS - {"init_lora_weights"}), field.name


FIRST = "base_model.model.model.layers.0.self_attn"
WEIGHTS = {
    "an extra head": (
        lambda w: {"base_model.model.lm_head.weight": torch.ones(2, 2)},
        "lm_head.weight does not belong",
    ),
    "an extra bias": (lambda w: {f"{FIRST}.q_proj.lora_B.bias": torch.ones(2)}, "lora_B.bias does not belong"),
    "no B": (lambda w: {f"{FIRST}.q_proj.lora_B.weight": None}, "q_proj.lora_B.weight is missing"),
    "NaN": (lambda w: {n: w[n] * torch.nan for n in [f"{FIRST}.v_proj.lora_A.weight"]}, "no finite number"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_an_extra_a_missing_and_an_infinite_weight_are_refused_by_name(adapter, case):
    change, words = WEIGHTS[case]
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in (weights | change(weights)).items() if w is not None}, path)
    refused(adapter, words)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"bias": "all"}], ids=str)
def test_an_adapter_has_all_the_weights_that_its_options_name(tmp_path, options):
    lora = LoraConfig(r=4, target_modules=step.TARGET_MODULES["qv"], init_lora_weights=False, **options)
    get_peft_model(tiny("qwen2"), lora).save_pretrained(tmp_path)
    decoding.merge_adapter(tiny("qwen2"), tmp_path, torch.float32)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(("bias", "magnitude_vector")))
    save_file({n: w for n, w in weights.items() if n != name}, path)
    refused(tmp_path, f"{name.removeprefix('base_model.model.')} is missing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biases", ["none", "all"])
def test_an_adapter_is_not_merged_into_other_weights_than_those_of_its_training(tmp_path, dtype, biases):
    base = tiny("qwen2")
    checksum = weights_checksum(tiny("qwen2").to(getattr(torch, dtype)), biases=biases == "none")
    get_peft_model(
        tiny("qwen2"), LoraConfig(r=4, target_modules=step.TARGET_MODULES["qv"], bias=biases)
    ).save_pretrained(tmp_path)
    facts = {"name": "tiny", "checksum": checksum, "dtype": dtype, "quantization": "none"}
    record.write_json(tmp_path / record.BASE_FILE, facts)
    decoding.merge_adapter(base, tmp_path, torch.float32)
    record.write_json(tmp_path / record.BASE_FILE, facts | {"checksum": "0" * 64})
    refused(tmp_path, "does not hold the weights on which the adapter .* was trained: .* train it again: --force 03")
    record.write_json(tmp_path / record.BASE_FILE, facts | {"checksum": None, "quantization": "nf4"})
    decoding.merge_adapter(tiny("qwen2"), tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"{", b"\x80\x04", b"[]"])
def test_a_missing_or_damaged_file_of_an_adapter_is_named(adapter, name, content):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    refused(adapter, "cannot be read")
