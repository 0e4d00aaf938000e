"""Every filter refuses what it names, whatever the row looks like, and lets sound conversations through."""

import copy

import pytest
import shipped
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb.corpus import dataset, filters

CARDS, BY_ID = shipped.cards(), shipped.by_id()
SOUND = shipped.gold_rows()[::97]
ROW = next(row for row in shipped.gold_rows() if row["scenario_id"] == "puk.need_puk.usual")
CARD = BY_ID["puk"]


def user(text):
    return lambda c: c["messages"][0].update(content=text)


def agent(text):
    return lambda c: c["messages"][1].update(content=text)


def everything(text):
    return lambda c: [message.update(content=text) for message in c["messages"]]


def refused(change):
    conversation = copy.deepcopy(ROW)
    change(conversation)
    return filters.reject_reason(conversation, CARD)


NAMED = f"I have a question about {CARD.term} and how it works for me. "
ELSEWHERE = "A tortoise dreams of beech woods while its keeper paints the old fence green in the sun. "
LOOPING = f"The {CARD.term} works like this. " * 6


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("schema", lambda c: c.pop("manner")),
        ("schema", lambda c: c.update(n_turns="1")),
        ("schema", lambda c: c.update(n_turns=True)),
        ("schema", lambda c: c.update(n_turns=5)),
        ("schema", lambda c: c.update(split="dev")),
        ("schema", lambda c: c.update(term_id="no_such_term")),
        ("schema", lambda c: c.update(problem_id="no_such_problem")),
        ("schema", lambda c: c.update(origin=None)),
        ("schema", lambda c: c.update(messages=[])),
        ("schema", lambda c: c.update(messages=["hello"])),
        ("schema", lambda c: c["messages"][0].update(role=None)),
        ("schema", user(" ")),
        ("schema", user("broken \ud800 text")),
        ("schema", lambda c: c["messages"][0].update(name="Ann")),
        ("finish_reason", lambda c: c.update(finish_reason="length")),
        ("finish_reason", lambda c: c.update(finish_reason=None)),
        ("roles", lambda c: c["messages"].reverse()),
        ("roles", lambda c: c["messages"].append({"role": "user", "content": "Hello again."})),
        ("off_problem", everything(ELSEWHERE)),
        ("language", user(f"Bonjour, je ne comprends pas {CARD.term} sur ma facture de ce mois-ci.")),
        ("language", agent(f"{CARD.term} 的意思很简单，请按照下面的步骤操作。")),
        ("length", user(NAMED + "and then there is more of it " * 100)),
        ("length", everything("PUK or not?")),
        ("loop", agent(LOOPING)),
        ("boilerplate", agent(f"As an AI language model, I can say that {CARD.term} is a thing you may know already.")),
        ("boilerplate", agent(f"Dear [Customer Name], your {CARD.term} is fine and you can use it as you did before.")),
        ("boilerplate", agent(f"I can’t help with that request, but {CARD.term} is what you asked me about before.")),
        ("unlisted_figure", agent(f"{CARD.term} takes 777 ms, and that is all there is to say about it today.")),
        ("personal_data", user(NAMED + "Call me on 0171 234 5678.")),
        ("personal_data", user(NAMED + "Write to anna.smith@web.de please.")),
        ("personal_data", agent(f"Your {CARD.term} is fine, the password is Tiger2024! and you can use it as before.")),
    ],
)  # fmt: skip
def test_a_damaged_conversation_is_refused_for_its_reason(reason, change):
    assert refused(change)[0] == reason


def test_sound_conversations_pass_with_and_without_a_normal_finish():
    for conversation in SOUND:
        card = BY_ID[conversation["term_id"]]
        assert filters.reject_reason(conversation, card) is None
        for finish in ("stop", "STOP", "end"):
            assert filters.reject_reason(conversation | {"finish_reason": finish}, card) is None


# --- secrets -----------------------------------------------------------------------------------------


def test_a_customer_may_post_a_made_up_secret_because_the_agent_must_react_to_it():
    assert refused(user(NAMED + "My PIN is 4921, does that help?")) is None
    assert refused(user(NAMED + "My password is Tiger2024!")) is None


def test_an_agent_may_not_say_a_secret_not_even_the_customers_own():
    def change(conversation):
        user(NAMED + "My PIN is 4921, does that help?")(conversation)
        agent(f"Thank you, your PIN is 4921, and with the {CARD.term} you can go on as you did before.")(conversation)

    assert refused(change) == ("personal_data", "secret")


def test_other_personal_data_of_the_customer_is_refused_and_its_text_is_not_repeated():
    reason, detail = refused(user(NAMED + "My PIN is 4921, call me on 0171 234 5678."))
    assert (reason, detail) == ("personal_data", "telephone")


# --- about something else ----------------------------------------------------------------------------


def test_a_conversation_about_something_else_is_refused_with_the_names_that_it_lacks():
    def change(conversation):
        user("Which oven temperature suits a sponge cake, and how thick should the batter be?")(conversation)
        agent("Bake it gently in the middle of the oven until a skewer comes out clean, then cool it on a rack.")(
            conversation
        )
        conversation.update(messages=conversation["messages"][:2], n_turns=1)

    reason, detail = refused(change)
    assert reason == "off_problem" and "none of PUK, PUK code" in detail


def test_the_name_of_the_term_or_a_fifth_of_its_words_are_enough():
    text = ELSEWHERE
    assert refused(everything(text))[0] == "off_problem"
    assert (refused(everything(text + "puk code")) or ("",))[0] != "off_problem"
    assert (refused(everything(text + "SIM locked, ten attempts, the holder is lost")) or ("",))[0] != "off_problem"


def test_a_term_is_found_as_a_whole_word_in_any_case():
    assert filters.mentions_term("my puk?", CARD) and filters.mentions_term("the SIM unblocking code", CARD)
    assert not filters.mentions_term("that is pukka", CARD)


# --- language ----------------------------------------------------------------------------------------


def test_what_a_customer_types_badly_is_still_english():
    for text in [
        "ONT LOS light red.", "VoLTE off?", "No dial tone, ONT power green, LOS red blinking.",
        "Restarted router twice. Same fault. WAN disconnected.", "eSIM QR code expired, new handset, urgent!",
        "Port forwarding behind CGNAT: possible?", "APN MMS PUK PIN IMEI ok", "pls hlp wifi dead agn!!",
        "DHCP lease fails, PPPoE up, DNS timeout, NXDOMAIN everywhere.", "Roaming in Spain: data add-on 5 GB?",
    ]:  # fmt: skip
        assert filters.is_english(text), text


@pytest.mark.parametrize(
    "text",
    [
        "Guten Tag, mein Router verliert ständig die Verbindung.", "Hola, mi móvil no tiene señal en casa desde ayer.",
        "Il mio telefono non riceve chiamate da ieri sera.", "Mijn internet werkt niet meer sinds gisteren.",
        "Mój router nie łączy się z siecią od wczoraj.", "Olá, a minha fatura está errada, podem corrigir?",
        "Hej, mitt mobilnät fungerar inte hemma längre.", "我的手机没有信号",
        "Мой телефон не видит сеть со вчерашнего дня.",
        "Min internetforbindelse er langsom, og det har den været hele ugen.",
    ],
)  # fmt: skip
def test_other_languages_are_not_english(text):
    assert not filters.is_english(text)


def test_no_gold_message_and_no_text_of_a_card_is_taken_for_another_language():
    texts = [m["content"] for row in shipped.gold_rows() for m in row["messages"]]
    texts += [text for card in CARDS for _, _, text in card.agent_texts()]
    texts += [text for card in CARDS for problem in card.problems for text in problem.says]
    assert [text for text in texts if not filters.is_english(text)] == []


# --- rows of any shape -------------------------------------------------------------------------------

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*filters.CONVERSATION_KEYS, "finish_reason"])


@given(row=junk)
@settings(max_examples=100, deadline=None)
def test_any_row_is_refused_by_schema_and_never_raises(row):
    _, rejects, counts = dataset.apply_filters([row], CARDS)
    assert counts["schema"] == 1 and rejects.iloc[0]["conversation"]


@given(field=fields, value=junk)
@settings(max_examples=300, deadline=None)
def test_one_field_of_any_content_never_raises(field, value):
    kept, rejects, _ = dataset.apply_filters([ROW | {field: value}], CARDS)
    assert len(kept) + len(rejects) == 1


@given(content=junk, role=junk)
@settings(max_examples=100, deadline=None)
def test_a_message_of_any_content_never_raises(content, role):
    row = ROW | {"messages": [{"role": role, "content": content}, *ROW["messages"][1:]]}
    kept, rejects, _ = dataset.apply_filters([row], CARDS)
    assert len(kept) + len(rejects) == 1


@given(text=st.text(max_size=60), place=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_message_of_any_text_never_raises(text, place):
    row = copy.deepcopy(ROW)
    row["messages"][place]["content"] = text
    kept, rejects, _ = dataset.apply_filters([row], CARDS)
    assert len(kept) + len(rejects) == 1


def test_a_loop_is_measured_by_repeated_four_word_sequences():
    assert filters.repeated_ngram_share("one two three four five") == 0
    assert filters.repeated_ngram_share("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert filters.repeated_ngram_share("well " * 10) == pytest.approx(1 - 1 / 7)
