"""A tokenizer of bytes with the control tokens and the chat template of a known model, built without any download."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # it takes a system message and drops its text
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
KINDS = {  # template, control tokens with those that are not marked as special, end of text
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], ["<think>"], "<|im_end|>"),
    "chatml base": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], [], "<|endoftext|>"),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        [],
        "<|end_of_text|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<eos>"], ["<start_of_turn>", "<end_of_turn>", "\n\n"], "<eos>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], ["[INST]", "[/INST]"], "</s>"),
}


def tiny_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of `KINDS`; `template` replaces its chat template."""
    own, special, others, end = KINDS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in others])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, clean_up_tokenization_spaces=False)
    made.chat_template = template or own
    return made
