"""The generator is deterministic, fills every phrase, keeps to the card and to its lengths."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from telco_nb import ROOT
from telco_nb.corpus import dataset, filters, scenarios, text_measures, variants
from telco_nb.corpus.cards import load_cards, unknown_figures

CARDS = load_cards(ROOT / "telco_nb" / "data" / "glossary.yaml")
BY_ID = {card.id: card for card in CARDS}
AXES = scenarios.load_axes(ROOT / "telco_nb" / "data" / "axes.yaml")
GRID = scenarios.build_scenarios(CARDS, AXES, seed=20260605)
SLICE = GRID[::41]  # 39 scenarios that meet every level of every axis
CONVERSATIONS = list(variants.generate_conversations(CARDS, SLICE, AXES, 20, seed=5))
SCRIPT = """
from telco_nb import ROOT
from telco_nb.corpus import cards, dataset, scenarios, variants
loaded = cards.load_cards(ROOT / "telco_nb/data/glossary.yaml")
axes = scenarios.load_axes(ROOT / "telco_nb/data/axes.yaml")
grid = scenarios.build_scenarios(loaded, axes, seed=20260605)[::41]
print(dataset.content_hash(variants.generate_conversations(loaded, grid, axes, 20, seed=5)))
"""


def answers(conversation):
    return [m["content"] for m in conversation["messages"] if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "4711", "LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.UTF-8", "PYTHONUTF8": "0"},
    ],
)
def test_the_same_seed_gives_the_same_bytes_in_another_process_hash_seed_and_locale(environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == dataset.content_hash(CONVERSATIONS)


def test_another_seed_gives_other_texts():
    other = list(variants.generate_conversations(CARDS, SLICE, AXES, 20, seed=6))
    same = sum(a["messages"] == b["messages"] for a, b in zip(CONVERSATIONS, other, strict=True))
    assert same < 0.01 * len(other)


def test_a_scenario_does_not_depend_on_which_others_are_generated():
    alone = list(variants.generate_conversations(CARDS, SLICE[7:8], AXES, 20, seed=5))
    assert alone == CONVERSATIONS[7 * 20 : 8 * 20]


def test_twenty_seeds_give_every_mood_with_every_opening_once():
    for scenario in SLICE:
        pairs = [variants.mood_and_opening(scenario, number, AXES) for number in range(20)]
        assert sorted(pairs) == sorted(product(AXES.moods, AXES.openings))


def test_turn_pairs_follow_the_fixed_table():
    counts = Counter(variants.turn_pairs(s, n, AXES) for s in GRID for n in range(20))
    for pairs in (1, 2, 3):
        share = AXES.turn_table.count(pairs) / len(AXES.turn_table)
        assert abs(counts[pairs] / counts.total() - share) < 0.01


def test_roles_alternate_and_the_agent_has_the_last_word():
    for conversation in CONVERSATIONS:
        roles = [m["role"] for m in conversation["messages"]]
        assert roles == ["user", "assistant"] * conversation["n_turns"]


def test_every_figure_in_an_answer_is_in_its_card():
    for conversation in CONVERSATIONS:
        for answer in answers(conversation):
            assert unknown_figures(answer, BY_ID[conversation["term_id"]]) == []


def test_answers_have_35_to_75_words_and_questions_at_least_12():
    lengths = [len(a.split()) for c in CONVERSATIONS for a in answers(c)]
    assert min(lengths) >= 35 and max(lengths) <= 75
    assert 50 <= sorted(lengths)[len(lengths) // 2] <= 60
    questions = [len(m["content"].split()) for c in CONVERSATIONS for m in c["messages"] if m["role"] == "user"]
    assert min(questions) >= 12 and max(questions) <= 52
    assert sum(length > 45 for length in questions) <= 0.01 * len(questions)


def plain(text, found={}):  # noqa: B006 - a cache
    """The text in lower case with every way of saying the same (bank `variants`) turned into one of them."""
    if not found:
        groups = []
        for key, others in variants.load_grammar()["variants"].items():
            forms = {form.lower() for form in (key, *others)}
            touching = [group for group in groups if group & forms]
            groups = [group for group in groups if not group & forms] + [forms.union(*touching)]
        found |= {form: min(group) for group in groups for form in group}
        found[None] = re.compile(rf"\b(?:{'|'.join(sorted((f for f in found if f), key=len, reverse=True))})\b")
    text = text.lower().rstrip(".")
    return found[None].sub(lambda match: found[match[0]], text)


def places(answer, texts):
    """For each of the card's texts its place in the answer, None where it is not said."""
    said = plain(answer)
    found = [said.find(plain(text)[1:]) for text in texts]  # the first letter may be in lower case there
    return [None if place < 0 else place for place in found]


def test_every_answer_states_a_next_step_last():
    for conversation in CONVERSATIONS:
        for answer in answers(conversation):
            *_, last = re.split(r"(?<=[.!?])\s", answer)
            assert "next step:" in last.lower() and last.count(",") >= 1, answer


def test_every_answer_says_something_that_stands_on_the_card():
    for conversation in CONVERSATIONS:
        card = BY_ID[conversation["term_id"]]
        parts = [sentence for _, text in card.agent_texts() for sentence in text_measures.sentences(text)]
        for answer in answers(conversation):
            assert any(place is not None for place in places(answer, parts)), answer


def test_steps_stand_in_the_cards_order_checks_before_fixes():
    several = 0
    for conversation in CONVERSATIONS:
        card = BY_ID[conversation["term_id"]]
        for answer in answers(conversation):
            found = [place for place in places(answer, [*card.diagnosis, *card.resolution]) if place is not None]
            assert found == sorted(found), answer
            several += len(found) > 1
    assert several > 100


def test_a_first_report_of_a_fault_gets_checks_and_a_repeated_one_a_fix_and_the_rule_for_escalation():
    seen = Counter()
    for conversation in CONVERSATIONS:
        if conversation["intent"] != "fault":
            continue
        card, answer = BY_ID[conversation["term_id"]], answers(conversation)[0]
        checks, fixes = (places(answer, part) for part in (card.diagnosis, card.resolution))
        if conversation["situation"] == "first_contact":
            assert sum(place is not None for place in checks) >= 2
            assert conversation["customer"] == "expert" or checks[0] is not None
        elif conversation["situation"] == "repeat_unresolved":
            assert any(place is not None for place in fixes) and places(answer, [card.escalate_when])[0] is not None
            assert all(place is None for place in checks)
        else:
            assert any(place is not None for place in checks) and any(place is not None for place in fixes)
        seen[conversation["situation"]] += 1
    assert len(seen) == 3


def test_a_wrong_belief_that_the_customer_holds_is_corrected_in_the_answer():
    held = 0
    for conversation in CONVERSATIONS:
        card, messages = BY_ID[conversation["term_id"]], conversation["messages"]
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            for wrong in card.wrong_beliefs:
                if wrong.belief in question["content"]:
                    held += 1
                    assert places(answer["content"], [wrong.correction])[0] is not None, (question, answer)
    assert held > 100


def test_every_variant_is_another_way_to_say_a_key_that_occurs_and_holds_no_figure():
    texts = " ".join(text for card in CARDS for _, text in card.agent_texts())
    for key, others in variants.load_grammar()["variants"].items():
        assert re.search(rf"\b{key}\b", texts, re.IGNORECASE), key
        assert others and key not in others and not re.search(r"\d", "".join(others))


def test_varying_keeps_figures_and_never_touches_because_of():
    writer = variants.Writer(CARDS[0], variants.load_grammar(), (1, "x", 0, 0), frozenset())
    said = {writer.vary("Because of rain it usually takes 10 ms, because it may.", str(i)) for i in range(60)}
    assert len(said) > 10
    assert all(text.startswith("Because of rain it ") and "10 ms" in text for text in said)


def test_conversations_of_a_scenario_repeat_each_other_less_than_independent_draws_would():
    for scenario in SLICE[:6]:
        rows = [variants.write_conversation(BY_ID[scenario.term_id], scenario, number, AXES, 5) for number in range(20)]
        writers = [variants.Writer(CARDS[0], {}, (5, scenario.scenario_id, n, 0), frozenset()) for n in range(20)]
        for writer, number in zip(writers, range(20), strict=True):
            writer.cycle = number // 5 + number % 5 * 4
        assert sorted(Counter(w.draw(6, "slot") for w in writers).values()) == [3, 3, 3, 3, 4, 4]
        assert len({row["messages"][0]["content"] for row in rows}) >= 19


def test_nothing_is_left_unfilled_and_punctuation_is_clean():
    for conversation in CONVERSATIONS:
        for message in conversation["messages"]:
            text = message["content"]
            assert not re.search(r"[{}]|  |\s[.,;]|[.]{2}|”\.\.", text), text


def test_the_term_or_an_alias_is_named_in_every_conversation():
    for conversation in CONVERSATIONS:
        text = " ".join(m["content"] for m in conversation["messages"])
        assert filters.mentions_term(text, BY_ID[conversation["term_id"]])


def test_every_bank_resolves_for_every_combination_of_levels():
    grammar = variants.load_grammar()
    banks = [name for name in grammar if name not in ("later_kinds", "jargon", "variants")]
    categories = {card.category for card in CARDS}
    per_turn = {"issue", "probe", "frame_later"}  # these need the kind of request
    for intent, situation, customer, mood, opening, category in product(
        *(AXES.ids(axis) for axis in scenarios.AXES), AXES.moods, AXES.openings, sorted(categories)
    ):
        levels = frozenset({intent, situation, customer, mood, opening, category})
        for bank in banks:
            if bank == "lead" and opening not in ("question", "complaint"):
                continue  # the other two openings have their own first sentence
            if bank not in per_turn:
                assert variants.resolve(grammar, bank, levels, kind="x")
        for kind in grammar["later_kinds"][intent]:
            assert variants.resolve(grammar, "probe", levels, kind) and variants.resolve(
                grammar, "frame_later", levels, kind
            )


def test_every_slot_of_every_phrase_is_a_bank_or_a_slot_of_the_writer():
    grammar = variants.load_grammar()
    from_card = {"term", "a_term", "name", "a_name", "belief", "fault", "dispute", "change", "options", "figure"}
    from_answer = {"step", "fact", "text", "escalate_when"}
    for bank, phrase in variants.all_phrases(grammar):
        for slot in re.findall(r"\{(\w+)\}", phrase):
            assert slot in grammar or slot in from_card | from_answer, (bank, slot)


def test_a_phrase_with_a_digit_is_refused_naming_its_bank(tmp_path):
    path = tmp_path / "grammar.yaml"
    path.write_text('lead:\n  calm: ["within 24 hours"]\n')
    with pytest.raises(ValueError, match=r"lead\.calm"):
        variants.load_grammar(path)


def test_a_novice_does_not_write_jargon_where_the_card_has_plain_words():
    marks = [mark.lower() for mark in variants.load_grammar()["jargon"]]
    for conversation in CONVERSATIONS:
        if (conversation["customer"], conversation["intent"]) == ("novice", "fault"):
            reports = BY_ID[conversation["term_id"]].fault_reports
            fitting = [text for text in reports if not any(mark in text.lower() for mark in marks)]
            first = conversation["messages"][0]["content"]
            assert not fitting or any(place is not None for place in places(first, fitting))


@given(number=st.integers(0, 19), index=st.integers(0, len(GRID) - 1), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_seed_and_scenario_gives_a_conversation_that_passes_all_filters(number, index, seed):
    scenario = GRID[index]
    card = BY_ID[scenario.term_id]
    assert filters.reject_reason(variants.write_conversation(card, scenario, number, AXES, seed), card) is None


@pytest.mark.parametrize(
    ("term_id", "name", "expected"),
    [
        ("router", "router", "a router"), ("latency", "latency", "latency"), ("esim", "eSIM", "an eSIM"),
        ("sla", "SLA", "an SLA"), ("sla", "service level agreement", "a service level agreement"),
        ("credit_limit", "credit limit", "a credit limit"), ("technician_visit", "engineer visit", "an engineer visit"),
        ("iccid", "ICCID", "the ICCID"),
    ],
)  # fmt: skip
def test_names_get_the_article_that_the_definition_uses(term_id, name, expected):
    assert variants.with_article(name, BY_ID[term_id]) == expected


@pytest.mark.parametrize(
    ("change", "gaps"),
    [
        (lambda a: a["axes"]["intent"].append(LEVEL), ["later_kinds: no entry for intent 'returns'", "ask: no entry"]),
        (lambda a: a["axes"]["situation"].append(LEVEL), ["situation: no entry for situation 'returns'"]),
        (lambda a: a["axes"]["customer"].append(LEVEL), ["issue.meaning: no entry for customer 'returns'"]),
        (lambda a: a["moods"].append("sad"), ["lead.question: no entry for mood 'sad'", "thanks: no entry"]),
        (lambda a: a["openings"].append("fax"), ["first_turn: no entry for opening 'fax'"]),
        (lambda a: a.update(moods=["sad"]), ["lead_short: its entries (calm, worried, frustrated"]),
    ],
)
def test_levels_without_phrases_are_refused_naming_bank_and_level(tmp_path, change, gaps):
    raw = yaml.safe_load((ROOT / "telco_nb" / "data" / "axes.yaml").read_text())
    change(raw)
    path = tmp_path / "axes.yaml"
    path.write_text(yaml.safe_dump(raw))
    axes = scenarios.load_axes(path)
    with pytest.raises(ValueError, match="the grammar lacks phrases") as error:
        next(variants.generate_conversations(CARDS, scenarios.build_scenarios(CARDS, axes, 1), axes, 1, seed=1))
    assert all(gap in str(error.value) for gap in gaps), error.value


LEVEL = {"id": "returns", "label": "returns", "wording": "sends {term} back"}


def test_a_grammar_of_ones_own_serves_levels_of_ones_own(tmp_path):
    raw = yaml.safe_load((ROOT / "telco_nb" / "data" / "axes.yaml").read_text())
    raw["moods"] = ["calm", "sad"]
    grammar = yaml.safe_load(variants.GRAMMAR_PATH.read_text())
    for bank in (*grammar["lead"].values(), grammar["lead_short"], grammar["paste"], grammar["thanks"]):
        bank["sad"] = ["I am sad. “{snippet}”" if bank is grammar["paste"] else "I am so sad."]
    for bank in grammar["acknowledge"].values():
        bank["sad"] = ["I am sorry to hear that."]
    (tmp_path / "axes.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "grammar.yaml").write_text(yaml.safe_dump(grammar))
    axes = scenarios.load_axes(tmp_path / "axes.yaml")
    grid = scenarios.build_scenarios(CARDS[:4], axes, 1)
    rows = list(variants.generate_conversations(CARDS, grid, axes, 2, seed=1, grammar_path=tmp_path / "grammar.yaml"))
    sad = [row for row in rows if row["mood"] == "sad"]
    assert sad and any("I am so sad." in row["messages"][0]["content"] for row in sad)


def test_another_domains_glossary_gives_its_own_gated_study():
    """From the table to samples, as 01_glossary and 02_synth go: nothing in the code is about telecom."""
    folder = ROOT / "tests" / "unit" / "corpus" / "data"
    cards, axes = load_cards(folder / "home_insurance.csv"), scenarios.load_axes(folder / "home_insurance_axes.yaml")
    grid = scenarios.build_scenarios(cards, axes, seed=1)
    asked = list(variants.generate_conversations(cards, grid, axes, 8, seed=1))
    kept, _, _ = dataset.apply_filters(asked, cards)
    assert len(grid) == 4 * 12 and len(asked) == 384 and len(kept) > 0.9 * len(asked)
    assert dataset.leak_gates(kept, dataset.count_leaks(kept))["passed"].all()
    assert (
        len(dataset.sample_split(kept, "train", 12, seed=1)) == 12
        and len(dataset.test_prompts(kept, None, seed=1)) == 5
    )
    assert not re.search(r"\b(?:SIM|network|router|broadband|phone number)\b", json.dumps(kept))
