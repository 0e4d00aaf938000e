"""Answers: batching changes nothing, and a model that does not stop is not hidden."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from telco_nb.lora import base_model, chat_template, decoding, packing, trainer, unpacked


@pytest.fixture(scope="module")
def real():
    base_model.silence_libraries()
    return base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)


@pytest.fixture
def prompts():
    texts = ["Hi", "My phone shows no signal since yesterday evening. What should I check first?", "What is a PUK?"]
    return pd.DataFrame(
        {"prompt_id": ["a", "b", "c"], "messages": [[{"role": "user", "content": text}] for text in texts]}
    )


def test_batched_answers_equal_one_at_a_time_in_float32(real, prompts):
    base, tokenizer = real
    together = decoding.answer_prompts(base, tokenizer, prompts, max_tokens=12, batch_size=3)
    alone = decoding.answer_prompts(base, tokenizer, prompts, max_tokens=12, batch_size=1)
    assert together.answer.tolist() == alone.answer.tolist()
    assert together.prompt_id.tolist() == ["a", "b", "c"]


def single(base, tokenizer, messages, **options) -> list[int]:
    """transformers' own generate for one prompt."""
    chat = chat_template.fit_messages(tokenizer, messages)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    end = chat_template.end_token_id(tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": end} | options
    return base.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()


def test_batched_answers_are_what_generate_writes_for_each_prompt_alone(real, prompts):
    base, tokenizer = real
    given = decoding.answer_prompts(base, tokenizer, prompts, max_tokens=12, batch_size=3)
    wanted = [tokenizer.decode(single(*real, m), skip_special_tokens=True).strip() for m in prompts.messages]
    assert given.answer.tolist() == wanted


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPT_IDS = [[3, 4], [5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [2, 15, 16, 17]]


def test_rows_that_end_leave_the_batch_and_the_others_go_on_unchanged():
    base = tiny()
    free = decoding.generate(base, PROMPT_IDS, end=-1, max_tokens=20)
    end = free[0][4]  # a token that some rows write early and others late or never
    cut = decoding.generate(base, PROMPT_IDS, end=end, max_tokens=20)
    assert cut == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert len(set(map(len, cut))) > 1


def test_a_sampled_answer_depends_on_the_seed_and_not_on_its_batch(real, prompts):
    options = {"max_tokens": 6, "temperature": 0.8}
    together = decoding.answer_prompts(*real, prompts, batch_size=3, seed=1, **options)
    alone = decoding.answer_prompts(*real, prompts, batch_size=1, seed=1, **options)
    other = decoding.answer_prompts(*real, prompts, batch_size=3, seed=2, **options)
    assert together.answer.tolist() == alone.answer.tolist() != other.answer.tolist()


def test_answering_leaves_the_attention_function_as_it_was():
    base = tiny()
    before = base.config._attn_implementation
    decoding.generate(base, PROMPT_IDS, end=0, max_tokens=2)
    assert base.config._attn_implementation == before


def test_an_answer_cut_at_the_limit_is_marked_so(real, prompts):
    given = decoding.answer_prompts(*real, prompts.tail(1), max_tokens=3, batch_size=1)
    assert given.finish_reason.tolist() == ["length"] and given.n_tokens.tolist() == [3]


def test_the_bfloat16_copy_is_the_float32_weights_cast(real):
    folder = Path(base_model.resolve_model(base_model.PACKAGED_MODEL))
    assert (folder / base_model.BFLOAT16 / "model.safetensors").is_file()
    found, wanted = (
        base_model.load_model(base_model.PACKAGED_MODEL, torch.bfloat16)[0].state_dict(),
        real[0].state_dict(),
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(torch.bfloat16)) for name in wanted)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the packaged model in a cache of its own, with small files instead of weights."""
    monkeypatch.setenv("TELCO_NB_CACHE", str(tmp_path))
    monkeypatch.setattr(base_model, "unpack_gguf", lambda gguf, folder: folder.with_name("anew"))
    monkeypatch.setattr(unpacked, "_right", set())
    folder = base_model.packaged_folder()
    (folder / base_model.BFLOAT16).mkdir(parents=True)
    for name in ("model.safetensors", "config.json", f"{base_model.BFLOAT16}/model.safetensors"):
        (folder / name).write_bytes(name.encode() * 1000)
    unpacked.write_record(folder, {"source": "a.gguf"})
    return folder


def resolved() -> str:
    unpacked._right.clear()  # as in a new process
    return base_model.resolve_model(base_model.PACKAGED_MODEL)


def slow_unpacking(gguf: Path, folder: Path) -> None:
    """Stands in for the unpacking: notes that it has begun, and takes as long as others need to begin as well."""
    with (gguf.parent / "begun").open("a") as stream:
        stream.write("x")
    time.sleep(0.5)
    (folder / base_model.BFLOAT16).mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    unpacked.write_record(folder, {"source": gguf.name})


def test_of_several_processes_that_need_a_model_one_unpacks_it_and_sweeps_what_killed_ones_left(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "_write_unpacked", slow_unpacking)
    monkeypatch.setattr(unpacked, "_right", set())
    folder, others = tmp_path / "cache" / "model-1", tmp_path / "cache" / ".model-2.7.tmp"
    for left in (folder.with_name(".model-1.12.tmp"), folder.with_name(".model-1.a1b2c3d4"), others):
        (left / "bfloat16").mkdir(parents=True)
    work = (tmp_path / "model.gguf", folder)
    work[0].touch()
    processes = [
        multiprocessing.get_context("fork").Process(target=base_model.unpack_gguf, args=work) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and (tmp_path / "begun").read_text() == "x"
    assert sorted(p.name for p in folder.parent.iterdir()) == [".model-2.7.tmp", "model-1", "model-1.lock"]


def test_an_unpacking_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(gguf, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "_write_unpacked", full)
    with pytest.raises(OSError, match="No space"):
        base_model.unpack_gguf(tmp_path / "a.gguf", tmp_path / "cache" / "a")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a.lock"]


@pytest.mark.parametrize("fault", ["no copy", "no hashes"])
def test_a_cache_of_an_older_version_is_unpacked_anew(cache, fault):
    assert resolved() == str(cache)
    if fault == "no copy":
        shutil.rmtree(cache / base_model.BFLOAT16)
    else:
        (cache / unpacked.RECORD).write_text("{}")
    assert resolved() == str(cache.with_name("anew"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", f"{base_model.BFLOAT16}/model.safetensors"])
def test_one_flipped_byte_in_the_unpacked_model_is_refused_even_with_its_old_time(cache, name):
    state, data = (cache / name).stat(), bytearray((cache / name).read_bytes())
    data[500] ^= 1
    (cache / name).write_bytes(data)
    os.utime(cache / name, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(base_model.ModelError, match=f"{name} was changed. Delete the folder"):
        resolved()
    base_model.preload()
    assert not any(str(cache) in key for key in base_model._preloaded)


def test_a_missing_or_added_file_of_the_unpacked_model_is_refused_by_name(cache):
    (cache / "adapter_config.json").write_text("{}")
    with pytest.raises(base_model.ModelError, match=r"adapter_config\.json does not belong there"):
        resolved()
    (cache / "adapter_config.json").unlink()
    (cache / "config.json").unlink()
    with pytest.raises(base_model.ModelError, match=r"config\.json is missing"):
        resolved()


def test_a_right_copy_is_hashed_once_and_then_known_by_its_stamp(cache, monkeypatch):
    read = []
    monkeypatch.setattr(unpacked, "sha256", lambda path, true=unpacked.sha256: read.append(path.name) or true(path))
    resolved()
    assert read == []
    (cache / "config.json").write_bytes((cache / "config.json").read_bytes())  # the same bytes, another time
    resolved()
    resolved()
    assert read == ["config.json"]


def test_merging_the_adapter_gives_the_same_logits(real, tmp_path):
    base, tokenizer = real
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    ids = tokenizer("Which router do I have?", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = tuned(ids).logits
    tuned.unload()
    merged = decoding.merge_adapter(
        base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)[0], tmp_path, torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-3, atol=2e-3)
    assert [p.name for p in tmp_path.glob("adapter_model*")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_what_no_adapter_has_changed_is_mapped_from_the_copy_and_nothing_else(real, tmp_path, options):
    tuned = get_peft_model(
        base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)[0],
        LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, **options),
    )
    tuned.save_pretrained(tmp_path)
    name = "model.layers.3.self_attn.v_proj.weight"
    untuned = base_model.load_model(base_model.PACKAGED_MODEL, torch.bfloat16)[0].get_parameter(name)
    for adapter in (tmp_path, None):
        plain = decoding.merge_adapter(
            base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)[0], adapter, torch.bfloat16
        )
        found = decoding.merge_adapter(
            base_model.load_model(base_model.PACKAGED_MODEL, torch.float32)[0],
            adapter,
            torch.bfloat16,
            base_model.PACKAGED_MODEL,
        )
        wanted = plain.state_dict()
        assert found.state_dict().keys() == wanted.keys()
        assert torch.equal(found.get_parameter(name), untuned) == (adapter is None)
        assert all(torch.equal(weight, wanted[name]) for name, weight in found.state_dict().items())


def test_a_preloaded_model_is_handed_out_once_as_its_user_may_change_it(real, monkeypatch):
    monkeypatch.setattr(base_model, "_preloaded", {})
    base_model.preload()
    first, second = (base_model.load_model(base_model.PACKAGED_MODEL, torch.float32) for _ in range(2))
    assert not {*map(str, base_model._preloaded)} & {str(base_model.packaged_folder())}
    assert first[0] is not second[0] and first[1] is not second[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_batches_hold_every_prompt_once_shortest_first():
    made = decoding.length_batches([[0] * n for n in (5, 2, 9, 1)], 3)
    assert made == [[3, 1, 0], [2]]


def test_answers_and_losses_are_the_same_where_memory_holds_one_conversation_at_a_time(real, monkeypatch):
    """Memory runs out for more than one: the batch is halved, and nothing is lost or changes its place."""
    model, tokenizer = real
    messages = [[{"role": "user", "content": "My router is slow. " * n}] for n in (4, 1, 3, 2, 1)]
    prompts = pd.DataFrame({"prompt_id": list("abcde"), "messages": messages})
    wanted = decoding.answer_prompts(model, tokenizer, prompts, max_tokens=6, batch_size=1)
    real_generate, real_losses, sizes = decoding.generate, trainer.token_losses, []

    def generate(model, batch, *options):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_generate(model, batch, *options)

    def token_losses(model, row):
        if len(row["segments"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_losses(model, row)

    monkeypatch.setattr(decoding, "generate", generate)
    found = decoding.answer_prompts(model, tokenizer, prompts, max_tokens=6, batch_size=5)
    assert sizes[0] == 5 and found.drop(columns="seconds").equals(wanted.drop(columns="seconds"))
    chats = [[*m, {"role": "assistant", "content": "Restart it."}] for m in prompts["messages"]]
    examples = [packing.encode_conversation(tokenizer, chat, str(i), 256) for i, chat in enumerate(chats)]
    losses = trainer.answer_losses(model, examples, 1)
    monkeypatch.setattr(trainer, "token_losses", token_losses)
    halved = trainer.answer_losses(model, examples, 1024)
    assert set(halved) == set(losses) and all((halved[i] == losses[i]).all() for i in losses)
