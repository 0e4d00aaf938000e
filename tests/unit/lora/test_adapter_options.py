"""Every training option changes what it names, on tiny random models of the real architectures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback import python_path
from peft import LoraConfig, PeftModel
from ports import free_port
from test_kernels import adapted, fake_examples, plain_step, relative, tiny
from transformers import TrainingArguments

from telco_nb import ROOT
from telco_nb.lora import base_model, chat_template, decoding, kernels, packing, step
from telco_nb.lora.errors import ModelError
from telco_nb.lora.step import TrainingError
from telco_nb.lora.trainer import PackedTrainer, constant_arguments

ALL = step.TARGET_MODULES["all"]


def attached(kind: str = "qwen2", checkpointing: bool = False, **options):
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ALL} | options
    return step.attach_adapters(tiny(kind), LoraConfig(**options), checkpointing)


def trained(tuned, folder: Path, steps: int = 6) -> list[float]:
    """Losses of a short training with the packed step."""
    step.prepare_step(tuned)
    rows = packing.PackedRows(fake_examples((9, 17, 5, 12)), 64, 0)
    fixed = constant_arguments() | {"save_strategy": "no"}
    arguments = TrainingArguments(output_dir=folder, max_steps=steps, learning_rate=0.02, disable_tqdm=True, **fixed)
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
    trainer.train()
    return [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]


OPTIONS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "bias": {"bias": "all"},
    "layers": {"layers_to_transform": [1]},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_each_option_trains_and_its_adapter_gives_the_same_logits_again(options, tmp_path):
    tuned = attached(**options)
    losses = trained(tuned, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.05
    tuned.eval().save_pretrained(tmp_path / "adapter")
    kernels.unfuse(tuned)
    step.causal_model(tuned).set_attn_implementation("sdpa")
    again = decoding.merge_adapter(tiny("qwen2"), tmp_path / "adapter", torch.float32)
    ids = torch.tensor([[3, 5, 8, 13]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_an_adapter_is_merged_bit_for_bit_as_peft_does_it(options, tmp_path):
    made = attached(init_lora_weights=False, **options)
    kernels.unfuse(made)
    made.save_pretrained(tmp_path)
    wanted = PeftModel.from_pretrained(tiny("qwen2"), str(tmp_path)).merge_and_unload().to(torch.bfloat16).state_dict()
    found = decoding.merge_adapter(tiny("qwen2"), tmp_path, torch.bfloat16).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not all(torch.equal(tiny("qwen2").to(torch.bfloat16).state_dict()[name], found[name]) for name in wanted)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_a_strength_scales_the_update_of_every_adapted_layer_and_touches_nothing_else(options, tmp_path):
    made = attached(init_lora_weights=False, **options)
    kernels.unfuse(made)
    made.save_pretrained(tmp_path)
    base = tiny("qwen2").state_dict()
    full, half, none = (
        decoding.merge_adapter(tiny("qwen2"), tmp_path, torch.float32, strength=s).state_dict() for s in (1.0, 0.5, 0.0)
    )
    for name, weight in base.items():
        torch.testing.assert_close(half[name] - weight, (full[name] - weight) / 2, rtol=1e-4, atol=1e-6)
        assert torch.equal(none[name], weight)
    assert sum(not torch.equal(full[name], base[name]) for name in base) == len(ALL) * 2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}], ids=str)
def test_an_adapter_that_is_not_plain_lora_is_not_scaled(options, tmp_path):
    made = attached(init_lora_weights=False, **options)
    kernels.unfuse(made)
    made.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not plain LoRA, so it cannot be scaled. Use adapter_strengths: \[1.0\]"):
        decoding.merge_adapter(tiny("qwen2"), tmp_path, torch.float32, strength=0.5)


def test_only_the_named_layers_get_adapters_and_an_unknown_layer_is_refused():
    names = [n for n, p in attached(layers_to_transform=[1]).named_parameters() if p.requires_grad]
    assert names and all(".layers.1." in n for n in names)
    with pytest.raises(TrainingError, match=r"layers_to_transform: \[2\] are not among this model's layers, 0 to 1"):
        attached(layers_to_transform=[0, 2])


def test_rslora_scales_by_the_root_of_the_rank():
    layers = [
        attached(use_rslora=rslora).get_submodule("base_model.model.model.layers.0.mlp.up_proj") for rslora in (0, 1)
    ]
    assert [layer.scaling["default"] for layer in layers] == [8 / 4, 8 / 4**0.5]  # peft's default lora_alpha is 8


def test_trained_biases_do_not_count_in_the_checksum_but_other_weights_do(tmp_path):
    tuned = attached(bias="all")
    before = {b: base_model.weights_checksum(tuned, biases=b) for b in (True, False)}
    trained(tuned, tmp_path)
    assert base_model.weights_checksum(tuned, biases=True) != before[True]
    assert base_model.weights_checksum(tuned, biases=False) == before[False]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_train_on_this_device(quantization, tmp_path):
    base_model.silence_libraries()
    tiny("llama").save_pretrained(tmp_path / "base")
    loaded, _ = _load_without_tokenizer(tmp_path / "base", quantization)
    torch.manual_seed(1)
    tuned = step.attach_adapters(loaded, LoraConfig(r=4, target_modules=ALL))
    losses = trained(tuned, tmp_path / "run")
    assert step.prepare_step(tuned) == "plain"
    assert losses[-1] < losses[0] - 0.05
    unquantised = step.attach_adapters(tiny("llama"), LoraConfig(r=4, target_modules=ALL))
    assert step.step_flops(tuned, 10, 3, [6, 4]) == step.step_flops(unquantised, 10, 3, [6, 4]), (
        "packed weights count as well"
    )


def _load_without_tokenizer(folder: Path, quantization: str):
    from transformers import AutoModelForCausalLM

    config = base_model.quantization_config(quantization, torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": base_model.torch_device()}
    ), None


def test_quantisation_without_its_library_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes, which is not installed\. Use none"):
        base_model.quantization_config("nf4", torch.float32)


def test_the_memory_estimate_counts_the_weights_that_loading_makes(tmp_path):
    base = tiny("qwen2")
    base.save_pretrained(tmp_path)
    estimate = base_model.memory_estimate(
        base_model.model_shell(str(tmp_path)), torch.float32, "none", ALL, rank=4, row_tokens=64
    )
    assert estimate["weights"] == 4 * sum(p.numel() for p in base.parameters())
    assert estimate["adapters"] == 16 * attached().get_nb_trainable_parameters()[0]
    assert (
        base_model.memory_estimate(base_model.model_shell(str(tmp_path)), torch.float32, "nf4", ALL, 4, 64)["weights"]
        < estimate["weights"]
    )


# ---------------------------------------------------------------- labels and end tokens


class BaseTokenizer:
    """A base model's tokenizer: one id a word, a template that ends turns with 1, an end of text 2."""

    eos_token_id, all_special_ids = 2, [1, 2]

    def apply_chat_template(self, chat, tokenize=True, add_generation_prompt=False, return_dict=False, **_):
        ids = [i for m in chat for i in (10 + len(m["role"]), *(20 + len(w) for w in m["content"].split()), 1)]
        ids = [*ids, 10 + len("assistant")] if add_generation_prompt else ids
        return ids if tokenize else self.decode(ids)

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[int(word) for word in text.split() if word.isdigit()] for text in texts]}

    def decode(self, ids):
        return " ".join(map(str, ids))


CHAT = [{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "ccc dddd"}]


def test_a_base_model_learns_to_end_with_a_token_that_it_knows():
    tokenizer = BaseTokenizer()
    assert (chat_template.turn_end_id(tokenizer), chat_template.end_token_id(tokenizer)) == (1, 2)
    example = packing.encode_conversation(tokenizer, CHAT, "c", 99)
    assert [x for x in example.labels if x != packing.IGNORE_INDEX] == [23, 24, 2]
    assert example.input_ids[-1] == 2 and example.input_ids.count(1) == 2  # other turns end as the template says


def test_without_assistant_only_loss_every_token_but_the_first_is_labelled():
    example = packing.encode_conversation(BaseTokenizer(), CHAT, "c", 99, assistant_only=False)
    assert example.labels == [packing.IGNORE_INDEX, *example.input_ids[1:]]


# ---------------------------------------------------------------- attention by device, several processes


def test_the_attention_for_packed_rows_is_chosen_by_device_and_format(monkeypatch):
    cpu, gpu, short = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    assert step.attention_kernel(cpu, short) == "loop"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert step.attention_kernel(gpu, short) == "varlen"
    assert step.attention_kernel(gpu, torch.float32) == "loop"  # FlashAttention takes 16 bits only
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert step.attention_kernel(gpu, short) == "loop"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(step, "varlen_attn", None)
    assert step.attention_kernel(gpu, short) == "loop"


def test_varlen_is_called_with_the_bounds_of_the_segments(monkeypatch):
    """The call, replayed by a reference with varlen_attn's contract; the kernel itself needs a GPU."""

    def reference(q, k, v, bounds, _, longest, __, window_size, scale, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and longest == max(bounds.diff())
        parts = zip(*(t.transpose(0, 1)[None].split(bounds.diff().tolist(), 2) for t in (q, k, v)), strict=True)
        made = [
            torch.nn.functional.scaled_dot_product_attention(*p, is_causal=True, scale=scale, enable_gqa=True)
            for p in parts
        ]
        return torch.cat(made, 2)[0].transpose(0, 1)

    tuned = adapted("qwen2")
    wanted = plain_step(tuned, fake_examples())
    step.causal_model(tuned).set_attn_implementation(step.SEGMENTED)
    monkeypatch.setattr(step, "varlen_attn", reference)
    monkeypatch.setattr(step, "attention_kernel", lambda *_: "varlen")
    tuned.zero_grad()
    step.token_losses(tuned, packing.collate(fake_examples())).mean().backward()
    found = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    assert relative(found, wanted[1]) < 1e-4


def test_a_process_beside_several_gpus_uses_one(tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, per_device_train_batch_size=1, **constant_arguments())
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 4  # what transformers finds on such a machine
    step.prepare_step(tuned := attached())
    rows = packing.PackedRows(fake_examples((9, 17, 5, 12)), 64, 0)
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 1


WORKER = """
import json, sys, torch
sys.path.insert(0, "tests/unit/lora")
from pathlib import Path
from test_adapter_options import attached
from test_kernels import fake_examples
from transformers import TrainingArguments
from telco_nb.lora import packing, step, trainer
folder = Path(sys.argv[1])
tuned = attached()
step.prepare_step(tuned)
rows = packing.PackedRows(fake_examples((30, 22, 27, 25)), 32, 0)
fixed = trainer.constant_arguments() | {"save_strategy": "no"}
arguments = TrainingArguments(output_dir=folder, max_steps=2, learning_rate=0.02, disable_tqdm=True, max_grad_norm=1.0,
    per_device_train_batch_size=1, gradient_accumulation_steps=2, **fixed)
made = trainer.PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
made.train()
if made.is_world_process_zero():
    weights = [p.detach().double().sum().item() for p in tuned.parameters() if p.requires_grad]
    losses = [e["loss"] for e in made.state.log_history if "loss" in e]
    (folder / "found.json").write_text(json.dumps(losses + weights))
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # gloo aborts a process whose peer has gone
    torch.distributed.destroy_process_group()
"""


@pytest.mark.nightly  # test_data_parallel.py takes the same steps with two processes in every run
def test_two_processes_train_what_one_trains(tmp_path):
    """torchrun with gloo: each of the two accumulated rows of a step is shared out to the processes."""
    found = {}
    several = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "worker.py").write_text(WORKER)
        launch = [*several, str(free_port())] if processes == 2 else []
        command = [sys.executable, *launch, str(folder / "worker.py"), str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT, ROOT / "tests/support")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found[processes] = [float(x) for x in json.loads((folder / "found.json").read_text())]
    assert found[2] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
