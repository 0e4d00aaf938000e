"""The estimate of a training's memory against what a step would hold, counted on fake tensors: no weights, no time."""

import shutil
import weakref

import pytest
import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from telco_nb.lora import base_model, kernels, packing, pointwise, step
from telco_nb.lora.packing import IGNORE_INDEX, Example

TOKENS, RANK = 208, 16  # of a conversation
PACKAGED = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
PAPER = {  # Qwen2.5-3B, and above the packaged model, both with fewer layers, which are all alike
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 5,
    "num_attention_heads": 16, "num_key_value_heads": 2,
}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """The most bytes that arrays made within this context take at one time."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.alive, self.now, self.peak = known, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return

        def forget(_: object) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, forget)
        self.now += size


class OneCall(torch.autograd.Function):
    """What varlen_attn holds for the backward pass: its inputs, its result, and a number for each head and token."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:2]))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@pytest.fixture(autouse=True)
def own_masks(monkeypatch):
    """A fake mask must not stay in the cache for a real step."""
    monkeypatch.setattr(kernels, "_causal_mask", kernels._causal_mask.__wrapped__)


@pytest.fixture
def gpu_path(monkeypatch):
    """Fake tensors lie on the processor, and are as many and as long as on a GPU."""
    monkeypatch.setitem(kernels.HEAD_CHUNK, "cpu", kernels.HEAD_CHUNK["cuda"])
    monkeypatch.setitem(step.ROW_MULTIPLE, "cpu", step.ROW_MULTIPLE["cuda"])
    monkeypatch.setattr(kernels, "has_block_attention", lambda device: False)
    monkeypatch.setattr(step, "attention_kernel", lambda device, dtype: "varlen")
    monkeypatch.setattr(step, "varlen_attn", lambda q, k, v, *bounds, **options: OneCall.apply(q, k, v))


def shell_of(shape: dict, dtype: torch.dtype):
    with torch.device("meta"):
        return Qwen2ForCausalLM._from_config(Qwen2Config(**shape, tie_word_embeddings=True), dtype=dtype)


def give_fake_weights(model) -> None:
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))
        for name, old in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(old.shape, dtype=old.dtype, device="cpu"))


def row_of(conversations: int, mode: FakeTensorMode) -> dict:
    hidden = round(0.46 * TOKENS)
    labels = [IGNORE_INDEX] * hidden + [5] * (TOKENS - hidden)
    row = packing.collate([Example(str(i), [5] * TOKENS, labels) for i in range(conversations)])
    return {name: mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for name, part in row.items()}


def counted_bytes(shape: dict, dtype: torch.dtype, conversations: int, fused: bool, lora: dict, checkpointing: bool):
    """The peak of a forward and backward pass, without the weights and the adapters' gradients."""
    tuned = step.attach_adapters(shell_of(shape, dtype), LoraConfig(r=RANK, **lora), checkpointing).train()
    with FakeTensorMode() as mode:
        give_fake_weights(tuned)
        step.prepare_step(tuned, fused)
        weights = [p.untyped_storage() for p in tuned.parameters()]  # held, so that no key is used twice
        row = row_of(conversations, mode)
        with LiveBytes({storage._cdata for storage in weights}) as live:
            step.token_losses(tuned, row).sum().backward()
    return live.peak - sum(4 * p.numel() for p in tuned.parameters() if p.requires_grad)


def estimated_bytes(shape: dict, dtype: torch.dtype, tokens: int, lora: dict, checkpointing: bool) -> float:
    needed = base_model.memory_estimate(
        shell_of(shape, dtype), dtype, "none", lora["target_modules"], RANK, tokens, "lora_dropout" in lora,
        checkpointing,
    )  # fmt: skip
    return needed["row"] + needed["head"]


OPTIONS = {
    "all": ("all", {}),
    "qv": ("qv", {}),
    "dropout": ("all", {"lora_dropout": 0.05}),
    "dropout of qv": ("qv", {"lora_dropout": 0.05}),
}
CHECKPOINTING = {"target_modules": step.TARGET_MODULES["all"]}, True


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def option(request):
    targets, lora = request.param
    return {"target_modules": step.TARGET_MODULES[targets]} | lora, False


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_estimate_of_a_row_on_a_gpu_is_what_it_holds_within_15_percent(gpu_path, option, fused):
    held = counted_bytes(PAPER, torch.bfloat16, 39, fused, *option)
    assert estimated_bytes(PAPER, torch.bfloat16, 39 * TOKENS, *option) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_a_row_on_a_processor_is_what_it_holds_within_15_percent(option, dtype):
    held = counted_bytes(PACKAGED, dtype, 8, True, *option)
    assert estimated_bytes(PACKAGED, dtype, 8 * TOKENS, *option) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_with_checkpointing_the_estimate_of_a_row_on_a_gpu_is_what_it_holds_within_15_percent(gpu_path, fused):
    """In the shape of Qwen2.5-3B with all its layers, whose inputs are what is kept."""
    shape = PAPER | {"num_hidden_layers": 36}
    held = counted_bytes(shape, torch.bfloat16, 39, fused, *CHECKPOINTING)
    assert estimated_bytes(shape, torch.bfloat16, 39 * TOKENS, *CHECKPOINTING) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_checkpointing_the_estimate_of_a_row_on_a_processor_is_what_it_holds_within_15_percent(dtype):
    held = counted_bytes(PACKAGED, dtype, 8, True, *CHECKPOINTING)
    assert estimated_bytes(PACKAGED, dtype, 8 * TOKENS, *CHECKPOINTING) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("tokens", [64, 208, 1000])
def test_with_checkpointing_fewer_tokens_need_no_more_than_their_share_of_the_estimate(tokens):
    """`preflight.fitting_tokens` takes the row as proportional; the head's logits hide a part of a short row."""
    whole = estimated_bytes(PACKAGED, torch.float32, 8 * TOKENS, *CHECKPOINTING)
    head = estimated_bytes(PACKAGED, torch.float32, 0, *CHECKPOINTING)
    part = estimated_bytes(PACKAGED, torch.float32, tokens, *CHECKPOINTING)
    assert head < part <= head + (whole - head) * tokens / (8 * TOKENS)


def kept_arrays(function) -> float:
    """Arrays of the inputs' size that `function` of two tensors keeps for the backward pass."""
    gate, up = (torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        function(gate * 1, up * 1)
    return sum(kept.values()) / (gate.numel() * gate.itemsize)


@pytest.mark.nightly  # as all tests that compile
@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "clang"))), reason="no C compiler")
def test_a_compiled_swiglu_keeps_one_array_less():
    assert kept_arrays(torch.compile(pointwise.swiglu, **pointwise.COMPILER)) == 2


def test_swiglu_keeps_three_arrays_and_the_estimate_of_a_compiled_step_is_one_of_them_less(monkeypatch):
    assert kept_arrays(pointwise.swiglu) == 3
    arguments = torch.bfloat16, "none", step.TARGET_MODULES["all"], RANK, 1000
    rows = {}
    for compiled in (False, True):
        monkeypatch.setattr(pointwise, "is_compiled", lambda device, compiled=compiled: compiled)
        rows[compiled] = base_model.memory_estimate(shell_of(PAPER, torch.bfloat16), *arguments, fused=True)["row"]
    assert rows[False] - rows[True] == 1000 * PAPER["num_hidden_layers"] * PAPER["intermediate_size"] * 2
    assert not [p for p in shell_of(PAPER, torch.bfloat16).parameters() if not p.requires_grad]


@pytest.mark.parametrize("why", ["not asked for", "dropout", "int8", "Qwen3"])
def test_the_estimate_of_a_step_that_is_not_fused_counts_all_that_transformers_keeps(monkeypatch, why):
    """A step of transformers and peft is not compiled, whatever was asked for: less memory would be promised."""
    monkeypatch.setattr(pointwise, "is_compiled", lambda device: True)
    shell = shell_of(PAPER, torch.bfloat16)
    if why == "Qwen3":
        with torch.device("meta"):
            shell = Qwen3ForCausalLM(Qwen3Config(**PAPER))
    quantization = "int8" if why == "int8" else "none"
    arguments = torch.bfloat16, quantization, step.TARGET_MODULES["all"], RANK, 1000, why == "dropout"
    found = base_model.memory_estimate(shell, *arguments, fused=why != "not asked for")
    monkeypatch.setattr(pointwise, "is_compiled", lambda device: False)
    assert found == base_model.memory_estimate(shell, *arguments, fused=True)


def test_the_estimate_of_the_compiled_step_is_near_what_an_h100_held(monkeypatch):
    """bench/README.md: 36.1 GB held in the shape of Qwen2.5-3B, rank 16 on all layers, rows of 8,192 tokens."""
    monkeypatch.setattr(pointwise, "is_compiled", lambda device: True)
    shell = shell_of(PAPER | {"num_hidden_layers": 36}, torch.bfloat16)
    needed = base_model.memory_estimate(shell, torch.bfloat16, "none", step.TARGET_MODULES["all"], 16, 8192, fused=True)
    assert sum(needed.values()) == pytest.approx(36.1e9, rel=0.15)
