"""Other base models: each is computed exactly or refused by name, before anything is trained."""

import json

import pytest
import torch
from architectures import CASES, Case, answers_as_transformers, check_case, refusal, table, tiny_model, two_examples
from peft import LoraConfig
from transformers import AutoConfig

from telco_nb import ROOT
from telco_nb.lora import base_model, decoding, kernels, preflight, step
from telco_nb.lora.errors import ModelError, PreflightError

EXACT, REFUSED = [c for c in CASES if not c.why], [c for c in CASES if c.why]
NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_the_step_and_the_answers_are_those_of_transformers(case):
    _, check = check_case(case)
    assert check.loss_difference < 1e-5 and check.gradient_difference < 1e-4
    assert answers_as_transformers(case)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_the_step_would_leave_out_is_refused_by_name_with_the_fix(case):
    message = refusal(case)
    assert case.message in message and "base_model" in message


def test_the_table_in_the_readme_is_what_is_found():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    head, *rows = table()
    start = lines.index(head)
    assert lines[start : start + len(rows) + 2] == [head, *rows, ""]


# ---------------------------------------------------------------- a step that leaves something out is seen


def test_without_the_soft_limit_of_the_logits_the_preflight_refuses(monkeypatch):
    monkeypatch.setattr(kernels, "has_own_head", lambda causal: False)
    with pytest.raises(PreflightError, match=r"loss \d+\.\d+ in a packed row, \d+\.\d+ by plain transformers"):
        check_case(NAMED["Gemma 3 (text)"])


def test_without_the_window_the_preflight_refuses(monkeypatch):
    monkeypatch.setattr(step, "check_attention_options", lambda *_, **__: None)
    with pytest.raises(PreflightError, match="does not compute what this model computes"):
        check_case(NAMED["Mistral, a shorter window"])


def test_a_wrong_gradient_alone_is_refused(monkeypatch):
    true = kernels.HeadLoss.backward
    monkeypatch.setattr(kernels.HeadLoss, "backward", lambda ctx, g: (true(ctx, g)[0] * 1.01, None, None))
    with pytest.raises(PreflightError, match=r"relative difference of gradients 0\.01"):
        check_case(NAMED["Llama, SmolLM2"])


def test_the_preflight_draws_nothing_and_keeps_no_gradient():
    model = step.attach_adapters(tiny_model(EXACT[0]), step_lora())
    step.prepare_step(model)
    examples, before = two_examples(), torch.get_rng_state()
    preflight.check_step(model, examples)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters()) and kernels.is_fused(model)


def step_lora(targets=("q_proj",)):
    return LoraConfig(r=4, target_modules=list(targets))


def test_an_answer_longer_than_the_window_is_refused():
    model = tiny_model(NAMED["Mistral, a shorter window"])
    with pytest.raises(ModelError, match="Lower max_length or answer_max_tokens"):
        decoding.generate(model, [[3, 4, 5]], end=-1, max_tokens=9)
    assert len(decoding.generate(model, [[3, 4, 5]], end=-1, max_tokens=5)[0]) == 5


def test_an_unknown_option_of_attention_is_refused_and_not_dropped():
    step.check_attention_options(9, position_ids=torch.arange(9), softcap=None, is_causal=None)
    with pytest.raises(ModelError, match=r"uses s_aux, softcap, which is not computed here\. Use another"):
        step.check_attention_options(9, s_aux=torch.ones(4), softcap=50.0)


def test_attention_dropout_has_no_effect_at_evaluation_and_is_refused_where_it_would_have_one():
    model = tiny_model(NAMED["Mistral, a shorter window"])
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert len(decoding.generate(model.eval(), [[3, 4, 5]], end=-1, max_tokens=2)[0]) == 2
    with pytest.raises(ModelError, match="uses dropout, which is not computed here"):
        decoding.generate(model.train(), [[3, 4, 5]], end=-1, max_tokens=2)


# ---------------------------------------------------------------- groups of target modules


def test_merged_layers_stand_for_their_parts_and_a_part_of_them_is_refused():
    phi3 = tiny_model(NAMED["Phi-3"])
    assert step.resolve_targets(phi3, "all") == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    with pytest.raises(ModelError, match=r"qv means q_proj, v_proj.*has no q_proj, v_proj in every layer; it has .*"
                                         r"qkv_proj.*Set target_modules to attention or mlp or all\."):  # fmt: skip
        step.resolve_targets(phi3, "qv")


def test_a_group_that_experts_hide_is_refused():
    with pytest.raises(ModelError, match=r"mixtral.*Set target_modules to qv or attention\."):
        step.resolve_targets(tiny_model(NAMED["Mixtral"]), "mlp")


def test_a_group_that_only_some_layers_have_is_refused():
    mixed = tiny_model(Case("", "lfm2", {"layer_types": ["conv", "full_attention"]}))
    with pytest.raises(ModelError, match="has no q_proj, v_proj in every layer"):
        step.resolve_targets(mixed, "qv")


def test_the_groups_of_a_model_like_llama_are_the_names_themselves():
    for kind in EXACT[:2]:
        assert {group: step.resolve_targets(tiny_model(kind), group) for group in step.TARGET_MODULES} == (
            step.TARGET_MODULES
        )


# ---------------------------------------------------------------- folders


def folder_of(path, config) -> str:
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_model_that_reads_more_than_text_is_refused(kind, tmp_path):
    with pytest.raises(ModelError, match=f"is of the architecture {kind}, which reads more than text. Use a"):
        base_model.model_shell(folder_of(tmp_path, AutoConfig.for_model(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_model_without_the_parts_that_are_read_is_refused(kind, tmp_path):
    with pytest.raises(ModelError, match=f"architecture {kind}, which has no intermediate_size"):
        base_model.model_shell(folder_of(tmp_path, AutoConfig.for_model(kind)))


@pytest.mark.parametrize("text", [None, "{", "[]", json.dumps({"model_type": "unheard"}), json.dumps({"a": 1})])
def test_a_folder_that_is_no_model_is_refused_with_what_it_must_hold(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for read in (base_model.model_shell, lambda folder: base_model.load_model(folder, torch.float32)):
        with pytest.raises(ModelError, match=r"cannot be loaded \(\w+: .*It must hold config\.json, safetensors"):
            read(str(tmp_path))
