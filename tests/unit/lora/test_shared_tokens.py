"""What 03 shares between configurations is what each would compute alone, and follows all that decides about it."""

import pandas as pd
import pytest
from tiny_chat import KINDS, tiny_tokenizer

from telco_nb.lora import packing, preflight
from telco_nb.lora.chat_template import tokenizer_hash
from telco_nb.lora.errors import PreflightError

CHATS = [
    [{"role": "user", "content": "No signal, 5€ lost."}, {"role": "assistant", "content": "Restart the phone."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}] * 2,
]
FRAME = pd.DataFrame({"conversation_id": ["a", "b"], "messages": CHATS})


def once(name, make, **decides):
    return make()


@pytest.mark.parametrize("answers_only", [True, False])
def test_the_shared_tokens_are_those_of_encoding_alone(answers_only):
    tokenizer = tiny_tokenizer("chatml")
    pairs = list(zip(FRAME["conversation_id"], FRAME["messages"], strict=True))
    alone = packing.encode_conversations(tokenizer, pairs, 500, answers_only)
    shared = preflight.encode_once(once, "train", tokenizer, FRAME, 500, answers_only)
    assert shared == alone and packing.fingerprint([shared]) == packing.fingerprint([alone])
    assert all(type(token) is int for example in shared for token in (*example.input_ids, *example.labels))


def test_only_checked_conversations_are_shared():
    made = []
    with pytest.raises(PreflightError, match="more than max_length 20"):
        preflight.encode_once(
            lambda _, make, **__: made.append(make()), "train", tiny_tokenizer("chatml"), FRAME, 20, True
        )
    assert made == []


def test_each_tokenizer_has_a_hash_of_its_own_that_loading_it_again_keeps(tmp_path):
    hashes = {kind: tokenizer_hash(tiny_tokenizer(kind)) for kind in KINDS}
    assert len(set(hashes.values())) == len(KINDS)
    assert hashes == {kind: tokenizer_hash(tiny_tokenizer(kind)) for kind in KINDS}


@pytest.mark.parametrize("change", ["template", "end", "token"])
def test_a_changed_tokenizer_has_another_hash(change):
    changed = tiny_tokenizer("chatml base")
    if change == "template":
        changed.chat_template = changed.chat_template.replace("\n", " ")
    elif change == "end":
        changed.eos_token = "<|im_end|>"
    else:
        changed.add_tokens(["hello"])
    assert tokenizer_hash(changed) != tokenizer_hash(tiny_tokenizer("chatml base"))
