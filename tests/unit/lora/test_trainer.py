"""The packed step computes what a plain loop computes, and a killed training loses nothing."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import python_path
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerControl, TrainingArguments

from telco_nb import ROOT
from telco_nb.lora import base_model, chat_template, device, packing, preflight, step
from telco_nb.lora.errors import PreflightError
from telco_nb.lora.packing import IGNORE_INDEX, Example
from telco_nb.lora.step import SEGMENTED, TrainingError, token_losses
from telco_nb.lora.trainer import (
    SAVING_FREE_S,
    SAVING_SHARE,
    STEPS_TO_JUDGE,
    PackedTrainer,
    TrainingMonitor,
    answer_losses,
    constant_arguments,
    diverges,
    last_checkpoint,
    loss_curve,
)

CHATS = [
    [
        {"role": "user", "content": "My eSIM does not activate."},
        {"role": "assistant", "content": "Please scan it again."},
    ],
    [
        {"role": "user", "content": "What is jitter? My router app shows it in red."},
        {"role": "assistant", "content": "Jitter is how much the delay varies from packet to packet."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome.\n\nNext step: test again tonight."},
    ],
    [{"role": "user", "content": "PUK?"}, {"role": "assistant", "content": "It is on the card holder: eight digits."}],
]


@pytest.fixture(scope="module")
def real():
    base_model.silence_libraries()
    base, tokenizer = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    return base, tokenizer


@pytest.fixture(scope="module")
def examples(real):
    return [packing.encode_conversation(real[1], chat, f"chat{i}", 512) for i, chat in enumerate(CHATS)]


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.set_attn_implementation(SEGMENTED)
    return made


def fake_examples(n: int = 12) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        ids = rng.integers(0, 97, rng.integers(5, 20)).tolist()
        made.append(Example(f"e{i}", ids, [IGNORE_INDEX] * 3 + ids[3:]))
    return made


# ---------------------------------------------------------------- labels


def test_labels_cover_exactly_the_answers_and_their_end_tokens(real, examples):
    for example, chat in zip(examples, CHATS, strict=True):
        preflight.check_labels(real[1], example, chat)


def test_a_shifted_label_mask_is_caught(real, examples):
    broken = Example("x", examples[0].input_ids, [IGNORE_INDEX, *examples[0].labels[:-1]])
    with pytest.raises(PreflightError, match="labels cover"):
        preflight.check_labels(real[1], broken, CHATS[0])


def test_a_conversation_that_is_too_long_is_refused_and_never_cut(real):
    with pytest.raises(PreflightError, match=r"long has \d+ tokens, more than max_length 16"):
        packing.encode_conversation(real[1], CHATS[1], "long", 16)


def test_the_end_token_is_supervised_so_that_the_model_learns_to_stop(real, examples):
    end = chat_template.end_token_id(real[1])
    assert [e.labels.count(end) for e in examples] == [1, 2, 1]


# ---------------------------------------------------------------- packing


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(64, 200), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_conversation_once_and_within_the_budget(lengths, batch_tokens, seed):
    made = [Example(str(i), [1] * n, [IGNORE_INDEX] * n) for i, n in enumerate(lengths)]
    rows = packing.pack_rows(made, batch_tokens, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(made)))
    assert all(sum(lengths[i] for i in row) <= batch_tokens for row in rows)
    assert rows == packing.pack_rows(made, batch_tokens, seed)


def test_a_conversation_longer_than_the_budget_gets_its_own_row():
    made = [Example("a", [1] * 90, [IGNORE_INDEX] * 90), Example("b", [1] * 10, [IGNORE_INDEX] * 10)]
    assert sorted(packing.pack_rows(made, 64, 0)) == [[0], [1]]


# ---------------------------------------------------------------- exactness


def plain_loss(base, example: Example) -> torch.Tensor:
    """What transformers itself computes for one conversation: sum over supervised tokens."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    return base(input_ids=ids, labels=labels).loss * example.n_supervised


def test_the_packed_loss_equals_one_conversation_at_a_time_on_the_real_model(real, examples):
    base, _ = real
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        plain = [plain_loss(base, e).item() for e in examples]
    base.set_attn_implementation(SEGMENTED)
    packed = answer_losses(base, examples, 4096)
    assert [packed[e.conversation_id].sum() for e in examples] == pytest.approx(plain, rel=1e-5)
    assert [len(packed[e.conversation_id]) for e in examples] == [e.n_supervised for e in examples]


def test_the_packed_gradient_equals_the_plain_one():
    base, made = tiny(), fake_examples(6)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    row = packing.collate(made)
    token_losses(tuned, row).sum().backward()
    packed = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    base.set_attn_implementation("sdpa")
    sum(plain_loss(tuned, e) for e in made).backward()
    assert packed and set(packed) == {n for n, p in tuned.named_parameters() if p.requires_grad}
    for name, parameter in tuned.named_parameters():
        if name in packed:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_packed_attention_refuses_a_mask():
    row = packing.collate(fake_examples(2))
    with pytest.raises(TrainingError, match="no attention mask"):
        tiny()(input_ids=row["input_ids"], attention_mask=torch.ones_like(row["input_ids"]))


def test_the_trainer_divides_by_the_supervised_tokens_of_the_whole_window(tmp_path):
    made = fake_examples(8)
    rows = packing.PackedRows(made, 64, 0)
    tuned = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        total = sum(token_losses(tuned, row).sum().item() for row in rows)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, gradient_accumulation_steps=len(rows), per_device_train_batch_size=1,
        learning_rate=1e-3, disable_tqdm=True, **(constant_arguments() | {"save_strategy": "no"}),
    )  # fmt: skip
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
    trainer.train()
    logged = next(float(e["loss"]) for e in trainer.state.log_history if "loss" in e)
    assert logged == pytest.approx(total / sum(rows.supervised), rel=1e-4)


def test_the_base_checksum_ignores_the_adapter_and_sees_a_changed_weight():
    base = tiny()
    before = base_model.weights_checksum(base)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    assert base_model.weights_checksum(tuned) == before
    with torch.no_grad():
        weight = base.model.layers[0].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))  # the least change there is
    assert base_model.weights_checksum(tuned) != before


# ---------------------------------------------------------------- resume


class FakeMeter:
    def __init__(self):
        self.windows, self.open = 0, False

    def start(self):
        self.windows, self.open = self.windows + (not self.open), True

    def pause(self):
        self.open = False

    stop = pause

    def readings(self):
        return {"windows": self.windows}

    def restore(self, readings):
        self.windows = readings["windows"]


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder, kill_at=None, learning_rate=1e-2, micro_batch_tokens=None, callback=None, checkpoint_seconds=1e9):
    torch.manual_seed(1)
    base = tiny()
    base.name_or_path = "owner/model"  # as a model from the hub
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    rows = packing.PackedRows(fake_examples(), 48, 3, micro_batch_tokens)
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=3, per_device_train_batch_size=1, learning_rate=learning_rate, seed=3,
        disable_tqdm=True, **constant_arguments(),
    )  # fmt: skip
    watch = TrainingMonitor(FakeMeter(), checkpoint_seconds, rows, log=lambda _: None)
    callbacks = [watch] + ([Kill(kill_at)] if kill_at else []) + ([callback] if callback else [])
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder, rows.fingerprint))
    return {n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_" in n}, trainer, watch, rows


@pytest.mark.parametrize("kill_at", [2, 5, 7])
def test_a_killed_training_resumes_to_the_same_adapter_bit_for_bit(tmp_path, kill_at):
    whole, trainer, _, _ = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", kill_at)
    resumed, again, watch, rows = train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert watch.resumed == (kill_at >= len(rows))
    curves = [loss_curve(t.state.log_history, rows).train_loss.tolist() for t in (trainer, again)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("fault", ["unfinished", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_says_so(tmp_path, fault):
    _, _, _, rows = train(tmp_path)
    older, newer = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[-2:]
    broken = newer / ("progress.json" if fault == "unfinished" else fault)
    if fault == "unfinished":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:-200] if fault != "trainer_state.json" else b"{")
    said = []
    assert last_checkpoint(tmp_path, rows.fingerprint, said.append) == str(older)
    assert not newer.exists() and len(said) == 1 and newer.name in said[0]


def test_a_checkpoint_of_other_training_rows_is_not_gone_on_from(tmp_path):
    train(tmp_path)
    said = []
    other = packing.PackedRows(fake_examples(11), 48, 3)
    assert last_checkpoint(tmp_path, other.fingerprint, said.append) is None
    assert said and all("trained on other rows" in line for line in said)


def test_every_epoch_but_the_last_leaves_a_checkpoint_as_the_adapter_follows(tmp_path):
    _, trainer, _, _ = train(tmp_path)
    steps = sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert steps == [trainer.state.max_steps // 3, trainer.state.max_steps // 3 * 2]


def test_a_checkpoint_at_every_step_resumes_bit_for_bit_from_the_end_of_an_epoch_and_is_written_once(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("telco_nb.lora.trainer.SAVING_FREE_S", 1e9)
    written, save = [], PackedTrainer._save
    monkeypatch.setattr(PackedTrainer, "_save", lambda self, folder: save(self, folder) or written.append(folder))
    whole, trainer, _, rows = train(tmp_path / "whole", checkpoint_seconds=0)
    assert len(written) == len({*written}) >= trainer.state.max_steps - 1
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", len(rows) + 1, checkpoint_seconds=0)
    resumed, again, watch, _ = train(tmp_path / "cut", checkpoint_seconds=0)
    assert watch.first_step == len(rows)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    curves = [loss_curve(t.state.log_history, rows).train_loss.tolist() for t in (trainer, again)]
    assert curves[0] == curves[1]


class Clock:
    """A clock that stands still but for `sleep`."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


@pytest.mark.parametrize(("save_s", "written"), [(0.05, 51), (3.0, 41), (30.0, 4)])
def test_writing_checkpoints_takes_a_fiftieth_of_the_training_however_long_one_takes(
    tmp_path, monkeypatch, save_s, written
):
    """4 epochs of 1,500 steps of 1 s, a checkpoint each 120 s if it can be afforded."""
    clock, saves = Clock(), []
    monkeypatch.setattr("telco_nb.lora.trainer.time", clock)
    rows = packing.PackedRows(fake_examples(3), 48, 3)
    watch = TrainingMonitor(FakeMeter(), 120.0, rows, log=lambda _: None)
    state, control = SimpleNamespace(global_step=0, max_steps=6000, is_world_process_zero=True), TrainerControl()
    arguments = SimpleNamespace(output_dir=tmp_path)

    def save_if_wanted():
        if control.should_save:
            clock.now_s += save_s
            (tmp_path / f"checkpoint-{state.global_step}").mkdir()
            watch.on_save(arguments, state, control)
            saves.append(clock.now_s)
            control.should_save = False

    watch.on_train_begin(arguments, state, control)
    for number in range(1, 6001):
        watch.on_step_begin(arguments, state, control)
        clock.now_s, state.global_step = clock.now_s + 1.0, number
        watch.on_step_end(arguments, state, control)
        save_if_wanted()
        if number % 1500 == 0:
            control.should_save = True  # as the Trainer's own callback asks for
            watch.on_epoch_end(arguments, state, control)
            save_if_wanted()
        assert watch.saving_s <= save_s + SAVING_FREE_S + SAVING_SHARE * clock.now_s
    assert len(saves) == written
    assert watch.saving_s == pytest.approx(save_s * len(saves))


@pytest.mark.parametrize("save", ["ours", "transformers'"])
def test_no_checkpoint_asks_the_hub(tmp_path, monkeypatch, save):
    asked = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a, **_: asked.append(a) or False
    )
    if save != "ours":
        monkeypatch.delattr(PackedTrainer, "_save")
    train(tmp_path)
    assert [*{*asked}] == ([] if save == "ours" else [("owner/model", "config.json")])
    assert not list(tmp_path.glob("checkpoint-*/training_args.bin")) or save != "ours"


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        (np.linspace(3.9, 3.6, 40), False),
        (np.r_[np.linspace(3.9, 1.0, 20), np.full(20, 6.5)], True),  # up, and it stays there
        (np.r_[np.linspace(3.9, 2.0, 20), np.linspace(8.0, 2.0, 10), np.full(30, 1.9)], False),  # a spike, recovered
        (np.r_[np.linspace(3.9, 2.0, 20), np.full(20, 3.4)], True),  # most of the gain is lost
        (np.full(40, 4.2), True),  # never below the untuned model
        (np.full(19, 9.0), None),
    ],
)
def test_a_training_diverges_if_it_ends_without_half_of_what_it_had_gained(curve, found):
    noise = np.random.default_rng(0).normal(0, 0.1, len(curve))  # rows differ in difficulty
    assert diverges(curve + noise, untuned_loss=np.float64(3.9)) is found


@pytest.mark.nightly
@pytest.mark.parametrize(("rate", "found"), [(1e-3, False), (1e-1, True)])
def test_a_learning_rate_far_too_high_diverges_on_the_real_model_and_a_usual_one_does_not(
    tmp_path, examples, rate, found
):
    """Tiny random models do not diverge at any rate: their norms hold whatever the weights are."""
    base, _ = base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)
    torch.manual_seed(1)
    tuned = step.attach_adapters(base, LoraConfig(r=8, target_modules=step.TARGET_MODULES["all"]))
    step.prepare_step(tuned)
    rows = packing.PackedRows(examples, 64, 0)
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=8, per_device_train_batch_size=1, learning_rate=rate, seed=0,
        disable_tqdm=True, **(constant_arguments() | {"save_strategy": "no"}),
    )  # fmt: skip
    trainer = PackedTrainer(tuned, arguments, train_dataset=rows, data_collator=packing.only_row)
    trainer.train()
    curve = loss_curve(trainer.state.log_history, rows).train_loss
    assert len(curve) >= STEPS_TO_JUDGE and diverges(curve, curve.iloc[0]) is found


class NotANumber(TrainerCallback):
    """Makes an adapter weight NaN after the first step, as an update that overflows does."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 1:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_the_training_with_the_step_and_the_fix(tmp_path):
    """transformers' own filter would log the loss of step 2 as 0 and go on."""
    with pytest.raises(TrainingError, match=r"step 2: the .* is (nan|inf). Lower this configuration's learning_rate"):
        train(tmp_path, callback=NotANumber())
    assert not list(tmp_path.glob("checkpoint-*"))


# ---------------------------------------------------------------- disk


DISK_FULL = """
import resource, signal, sys
sys.path[:0] = ["tests/unit/lora", "tests/support"]
from pathlib import Path
from test_trainer import Kill, train
from telco_nb.lora.step import TrainingError
folder = Path(sys.argv[1])
class Full(Kill):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:  # from here on no file can grow beyond 2 kB
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    train(folder, callback=Full(7))
except TrainingError as error:
    print(error)
"""


def test_a_checkpoint_that_cannot_be_written_ends_with_the_folder_and_leaves_the_one_before(tmp_path):
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert "could not be written" in done.stdout and "Make room and run again" in done.stdout, done.stderr[-2000:]
    (left,) = (tmp_path / "run").glob("checkpoint-*")
    resumed, _, watch, _ = train(tmp_path / "run")
    assert watch.resumed and watch.first_step == int(left.name.split("-")[1])
    whole = train(tmp_path / "whole")[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---------------------------------------------------------------- arithmetic and display


def test_step_flops_follow_the_weights():
    base = tiny()
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    lora = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
    head = 97 * 32
    body = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" not in n) - head
    expected = 4 * body * 10 + 4 * head * 3 + 6 * lora * 10 + 6 * 32 * 2 * (36 + 16)
    assert step.step_flops(tuned, 10, 3, [6, 4]) == expected


def test_a_conversation_shown_in_the_notebook_is_escaped(real):
    chat = [{"role": "user", "content": "<script>alert(1)</script>"}, {"role": "assistant", "content": "<i>no</i>"}]
    shown = packing.example_html(real[1], packing.encode_conversation(real[1], chat, "x", 512))
    assert "<script" not in shown
    assert "<i>" not in shown


def test_readings_travel_with_the_checkpoint(tmp_path):
    train(tmp_path)
    found = sorted(tmp_path.glob("checkpoint-*/progress.json"))
    assert found and all(json.loads(p.read_text())["meter"]["windows"] >= 1 for p in found)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=12), processes=st.integers(1, 5))
def test_processes_share_a_row_out_evenly_and_nothing_is_lost_or_done_twice(lengths, processes):
    row = [Example(f"e{i}", [1] * n, [IGNORE_INDEX, *[1] * (n - 1)]) for i, n in enumerate(lengths)]
    shares = [packing.share_of_rank(row, process, processes) for process in range(processes)]
    learned = [example.conversation_id for share in shares for example in share if example.n_supervised]
    assert sorted(learned) == sorted(example.conversation_id for example in row)
    assert packing.share_of_rank(row, 0, 1) == row
    tokens = [sum(len(e.input_ids) for e in share if e.n_supervised) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert all(
        share and sum(e.n_supervised for e in share) in (0, sum(len(e.labels) - 1 for e in share)) for share in shares
    )


@pytest.mark.parametrize(
    ("bfloat16", "chosen"), [(95.0, torch.float32), (130.0, torch.float32), (460.0, torch.bfloat16)]
)
def test_bfloat16_is_chosen_only_where_it_is_clearly_faster(bfloat16, chosen, monkeypatch):
    speeds = {torch.float32: 100.0, torch.bfloat16: bfloat16}
    monkeypatch.setattr(device, "matmul_gflops", speeds.__getitem__)
    assert device.choose_dtype("auto") == (chosen, {"float32": 100.0, "bfloat16": bfloat16})
    assert device.choose_dtype("bfloat16")[0] == torch.bfloat16


def test_a_slow_first_measurement_does_not_choose_the_format(monkeypatch):
    measured = {torch.float32: iter([52.0, 190.0, 207.0, 200.0]), torch.bfloat16: iter([130.0, 128.0, 154.0, 120.0])}
    monkeypatch.setattr(device, "matmul_gflops", lambda dtype: next(measured[dtype]))
    assert device.choose_dtype("auto") == (torch.float32, {"float32": 207.0, "bfloat16": 154.0})
