"""Each check of the preflight passes on what is right and stops, with the remedy, on what is wrong."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from test_adapter_options import CHAT, BaseTokenizer

from telco_nb.engine import runner
from telco_nb.engine.archive import Failure
from telco_nb.lora import base_model, chat_template, device, kernels, packing, preflight, step, trainer
from telco_nb.lora.errors import PreflightError
from tests.unit.lora.test_gpu_step import tiny_qwen2


def test_an_implausible_base_loss_stops_before_training():
    preflight.check_base_loss(3.9)
    for loss in (11.0, 0.1, float("nan")):
        with pytest.raises(PreflightError, match="check base_model, its chat template and dtype"):
            preflight.check_base_loss(loss)


def test_an_end_token_that_the_base_model_never_saw_stops_before_training():
    """The packaged model knows its end token; with an untrained embedding of that token, it does not."""
    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    chat = [{"role": "user", "content": "What is a PUK?"}, {"role": "assistant", "content": "It unlocks a SIM card."}]
    examples = [packing.encode_conversation(tokenizer, chat, "c", 512)]
    step.prepare_step(base)
    preflight.check_end(trainer.answer_losses(base, examples, 512)["c"][-1], base.config.vocab_size)
    with torch.no_grad():
        torch.manual_seed(0)
        base.get_input_embeddings().weight[chat_template.end_token_id(tokenizer)].normal_(0, 0.02)
    loss = trainer.answer_losses(base, examples, 512)["c"][-1]
    with pytest.raises(PreflightError, match="does not know this token, and its answers would run on"):
        preflight.check_end(loss, base.config.vocab_size)


def adapted(dtype, **options):
    tuned = tiny_qwen2(dtype, **options)
    step.prepare_step(tuned)
    made = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 60)]
    return tuned, [packing.Example(str(len(ids)), ids, [-100] * 4 + ids[4:]) for ids in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["HeadLoss", "RMSNorm", "AdaptedLinears", "SegmentAttention"])
def test_a_wrong_factor_in_a_backward_that_is_written_out_stops_before_training(monkeypatch, part, dtype):
    tuned, examples = adapted(dtype)
    backward = getattr(kernels, part).backward

    def longer(*arguments):
        return tuple(1.1 * g if isinstance(g, torch.Tensor) else g for g in backward(*arguments))

    monkeypatch.setattr(getattr(kernels, part), "backward", staticmethod(longer))
    with pytest.raises(PreflightError, match=r"gradients.* Set fused_step to false"):
        preflight.check_backward(tuned, examples)
    assert kernels.is_fused(tuned)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_backward_passes_and_the_check_leaves_no_trace(options, dtype):
    tuned, examples = adapted(dtype, **options)
    before, state, fused = (
        {n: p.clone() for n, p in tuned.named_parameters()},
        torch.get_rng_state(),
        "use_dora" not in options,
    )
    found = preflight.check_backward(tuned, examples)
    assert all(value <= most for value, most in zip(found, preflight.BACKWARD_TOLERANCE[dtype], strict=True))
    assert max(found) > 0 and kernels.is_fused(tuned) == fused
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in tuned.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Lossy(BaseTokenizer):
    """Its token ids do not give all of the text back."""

    def apply_chat_template(self, chat, tokenize=True, **options):
        made = super().apply_chat_template(chat, tokenize, **options)
        return made if tokenize else f"{made} lost"


class Rewriting(BaseTokenizer):
    """A template that drops what was said before, as templates of reasoning models do."""

    def apply_chat_template(self, chat, **options):
        return super().apply_chat_template(chat[-1:] if len(chat) > 2 else chat, **options)


def test_a_tokenizer_that_loses_text_stops_before_training():
    packing.encode_conversation(BaseTokenizer(), CHAT, "c", 99)
    with pytest.raises(PreflightError, match="would not read what was written"):
        packing.encode_conversation(Lossy(), CHAT, "c", 99)


def test_a_template_that_rewrites_earlier_turns_stops_before_training():
    with pytest.raises(PreflightError, match="rewrites earlier turns"):
        packing.encode_conversation(Rewriting(), CHAT, "c", 99)


NEEDED = {"weights": 4e9, "adapters": 1e9, "row": 8e9}


@pytest.mark.parametrize(("free", "tokens"), [(20e9, 8192), (12.5e9, 5120), (10e9, 3072)])
def test_as_many_tokens_are_computed_at_once_as_fit(free, tokens):
    assert preflight.fitting_tokens(NEEDED, 8192, 1024, free) == pytest.approx(tokens, abs=1)


def test_a_device_without_room_stops_before_loading():
    with pytest.raises(
        PreflightError, match=r"training needs about 6.0 GB for a conversation of 1024 tokens, and 5.0 GB"
    ):
        preflight.fitting_tokens(NEEDED, 8192, 1024, 5e9)


def test_weights_that_do_not_fit_in_float32_stop_before_they_are_loaded_to_answer():
    shell = torch.nn.Linear(1_000_000, 1000, bias=False, device="meta")  # 4 GB in float32
    preflight.check_merging(shell, 5.01e9)
    with pytest.raises(PreflightError, match=r"the weights need 4.0 GB in float32.* 4.9 GB are free"):
        preflight.check_merging(shell, 4.9e9)


def test_free_memory_is_what_this_machine_has_left():
    assert device.free_memory() / 1e9 > 0.3

    def is_less_beside(size: int) -> bool:
        free = device.free_memory()
        with mmap.mmap(-1, size) as fresh:  # an array might get pages that this process already has
            fresh.write(b"1" * size)
            return device.free_memory() < free - 0.5 * size

    assert any(is_less_beside(1 << 28) for _ in range(5)), "other processes may free some meanwhile, not five times"


@pytest.mark.parametrize("name", ["PreflightError", "ModelError"])
def test_a_run_that_a_preflight_ended_has_exit_code_3(name):
    unfit = SimpleNamespace(status="failed", failure=Failure("error", f"{name}: no room", 3))
    other = SimpleNamespace(status="failed", failure=Failure("error", "ValueError: x", 3))
    blocked = SimpleNamespace(status="blocked", failure=None)
    assert runner.exit_code([unfit, blocked], stopped=False) == runner.UNFIT
    assert runner.exit_code([unfit, other], stopped=False) == runner.FAILED
