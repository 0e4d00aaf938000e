"""The fused functions compute what transformers and peft compute, and stand aside where they cannot."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from telco_nb.lora import base_model, kernels, packing, pointwise, step
from telco_nb.lora.packing import IGNORE_INDEX, Example

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(kind: str = "llama"):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mistake
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made


def adapted(kind: str = "llama", **options):
    options = {"r": 4, "target_modules": step.TARGET_MODULES["all"], "init_lora_weights": False} | options
    torch.manual_seed(1)
    return get_peft_model(tiny(kind), LoraConfig(**options)).train()


def fake_examples(lengths: tuple[int, ...] = (9, 17, 5)) -> list[Example]:
    torch.manual_seed(2)
    rows = [torch.randint(0, 97, (n,)).tolist() for n in lengths]
    return [Example(f"e{i}", ids, [IGNORE_INDEX] * 2 + ids[2:]) for i, ids in enumerate(rows)]


def plain_step(tuned, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of transformers and peft, one conversation at a time, logits everywhere.

    The cross-entropy is in float64: F.cross_entropy's own float32 softmax on a CPU is off by about 3e-6.
    """
    tuned.zero_grad()
    step.causal_model(tuned).set_attn_implementation("eager")
    total, count = 0.0, sum(e.n_supervised for e in examples)
    for e in examples:
        logits = tuned(input_ids=torch.tensor([e.input_ids])).logits[0, :-1].double()
        loss = F.cross_entropy(logits, torch.tensor(e.labels[1:]), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}


def packed_step(tuned, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    tuned.zero_grad()
    loss = step.token_losses(tuned, packing.collate(examples)).mean()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the second."""
    assert set(found) == set(wanted)
    flat = [torch.cat([g[n].double().flatten() for n in wanted]) for g in (found, wanted)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["qv", "attention", "mlp", "all"])
def test_the_fused_step_has_the_loss_and_gradient_of_the_plain_one(kind, targets):
    tuned = adapted(kind, target_modules=step.TARGET_MODULES[targets], use_rslora=kind == "qwen2")
    wanted = plain_step(tuned, fake_examples())
    assert step.prepare_step(tuned) == "fused"
    found = packed_step(tuned, fake_examples())
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert wanted[1] and relative(found[1], wanted[1]) < 1e-4


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["fused", "plain"])
def test_plain_token_losses_are_those_of_the_packed_step_and_leave_the_model_as_it_was(options):
    tuned, examples = adapted("qwen2", **options), fake_examples()
    kind = step.prepare_step(tuned)
    packed = step.token_losses(tuned, packing.collate(examples)).detach().numpy()
    plain = torch.cat([step.plain_token_losses(tuned, example) for example in examples]).detach().numpy()
    assert plain.dtype == np.float32 and kind == ("plain" if options else "fused")
    np.testing.assert_allclose(packed, plain, atol=1e-4)
    assert kernels.is_fused(tuned) == (kind == "fused")
    assert step.causal_model(tuned).config._attn_implementation == step.SEGMENTED
    assert np.array_equal(step.token_losses(tuned, packing.collate(examples)).detach().numpy(), packed)


@pytest.mark.parametrize("block", [1, 4, 16, 17])
def test_blocks_of_queries_and_chunks_of_the_head_change_nothing(block, monkeypatch):
    tuned, examples = adapted(), fake_examples((9, 17, 5, 3, 16, 40))
    wanted = plain_step(tuned, examples)
    monkeypatch.setattr(kernels, "QUERY_BLOCK", block)
    monkeypatch.setattr(kernels, "HEAD_CHUNK", {"cpu": block})
    assert step.prepare_step(tuned) == "fused"
    found = packed_step(tuned, examples)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert relative(found[1], wanted[1]) < 1e-4


def test_the_fused_step_is_exact_on_the_real_model_and_ragged_conversations():
    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    questions = ["Why is my bill higher this month? " * n for n in (1, 9, 4)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}] for q in questions]
    examples = [packing.encode_conversation(tokenizer, chat, f"c{i}", 512) for i, chat in enumerate(chats)]
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=16, target_modules=step.TARGET_MODULES["all"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wanted = plain_step(tuned, examples)
    assert step.prepare_step(tuned) == "fused"
    found = packed_step(tuned, examples)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert relative(found[1], wanted[1]) < 1e-4


def test_only_some_layers_may_carry_adapters():
    tuned = adapted(layers_to_transform=[1])
    wanted = plain_step(tuned, fake_examples())
    assert step.prepare_step(tuned) == "fused"
    assert relative(packed_step(tuned, fake_examples())[1], wanted[1]) < 1e-4


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"bias": "lora_only", "target_modules": ["q_proj"]}], ids=str
)
def test_what_cannot_be_fused_is_left_to_peft_and_still_exact(options):
    tuned = adapted("qwen2", **options).eval()  # eval: dropout draws nothing
    wanted = plain_step(tuned, fake_examples())
    assert step.prepare_step(tuned) == "plain"
    found = packed_step(tuned, fake_examples())
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert relative(found[1], wanted[1]) < 1e-4


def bfloat16_error(kind: str) -> float:
    """How far the gradients of a step in bfloat16, of this kind, are from plain ones in float32."""
    exact, tuned = plain_step(adapted(), fake_examples())[1], adapted()
    for name, parameter in tuned.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    assert step.prepare_step(tuned, fused=kind != "plain") == kind
    found = packed_step(tuned, fake_examples())[1]
    assert all(g.dtype == torch.float32 for g in found.values())
    return relative(found, exact)


def test_in_bfloat16_the_fused_step_strays_no_further_than_autocast():
    assert bfloat16_error("fused") < max(0.02, 1.5 * bfloat16_error("plain"))


@pytest.fixture
def compile_on_a_processor(monkeypatch):
    """A function after whose call all pointwise parts are compiled, the rotary embedding included, in half a minute."""
    if not any(map(shutil.which, ("gcc", "clang"))):
        pytest.skip("no C compiler")

    def forget() -> None:
        pointwise.compiler_fault.cache_clear()
        pointwise._compiled.cache_clear()

    def compile_now() -> None:
        forget()
        monkeypatch.setattr(pointwise, "COMPILED_ON", {"cpu"})
        monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)

    yield compile_now
    forget()
    torch.compiler.reset()


@pytest.mark.nightly
def test_in_bfloat16_the_compiled_step_strays_no_further_than_autocast(compile_on_a_processor):
    autocast = bfloat16_error("plain")
    compile_on_a_processor()
    assert bfloat16_error("compiled") < max(0.02, 1.5 * autocast)
    assert pointwise._compiled.cache_info().currsize == 5, "both norms, SwiGLU, losses and rotary embedding"


def test_with_activation_checkpointing_the_gradient_is_the_same():
    tuned = adapted()
    step.prepare_step(tuned)
    wanted = packed_step(tuned, fake_examples())[1]
    step.causal_model(tuned).gradient_checkpointing_enable({"use_reentrant": False})
    tuned.enable_input_require_grads()
    assert relative(packed_step(tuned, fake_examples())[1], wanted) < 1e-6


def test_a_fused_model_still_generates_and_unfused_is_as_before():
    tuned = adapted().eval()
    prompt = torch.tensor([[5, 7, 11]])
    wanted = tuned.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    names = list(tuned.state_dict())
    step.prepare_step(tuned)
    assert kernels.is_fused(tuned)
    step.causal_model(tuned).set_attn_implementation("sdpa")
    assert torch.equal(tuned.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), wanted)
    assert list(tuned.state_dict()) == names
    kernels.unfuse(tuned)
    assert not kernels.is_fused(tuned)


def test_a_conversation_longer_than_the_fused_attention_takes_gets_the_plain_one(monkeypatch):
    tuned = adapted()
    wanted = plain_step(tuned, fake_examples())
    step.prepare_step(tuned)
    monkeypatch.setattr(kernels, "LONGEST_SEGMENT", 10)
    assert relative(packed_step(tuned, fake_examples())[1], wanted[1]) < 1e-4


def test_the_fused_model_can_be_copied_with_its_adapter(tmp_path):
    tuned = adapted()
    step.prepare_step(tuned)
    packed_step(tuned, fake_examples())
    tuned.save_pretrained(tmp_path)
    twin = adapted()
    before = copy.deepcopy(twin.state_dict())
    twin.load_adapter(tmp_path, "default")
    assert all(torch.equal(tuned.state_dict()[n], twin.state_dict()[n]) for n in before)
