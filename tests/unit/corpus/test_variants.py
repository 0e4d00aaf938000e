"""The variants are deterministic, hold nothing but sentences of their own problem, and keep its order and safety."""

import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import shipped
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import python_path, watched

from telco_nb import ROOT
from telco_nb.corpus import dataset, filters, scenarios, variants
from telco_nb.corpus.cards import Problem, unknown_figures
from telco_nb.corpus.text_measures import capitalised

PHRASES = variants.phrases()
UNTOUCHED = ("plain", "terse", "polite", "worried", "kind", "two_problems")  # manners that type without a slip
SCRIPT = """
from telco_nb import ROOT
from telco_nb.corpus import cards, dataset, scenarios, variants
loaded = cards.load_cards(ROOT / "telco_nb/data/cards")[::13]
contexts = scenarios.load_contexts(ROOT / "telco_nb/data/contexts.yaml")
grid = scenarios.build_scenarios(loaded, contexts, [])
print(dataset.content_hash(variants.write_variants(loaded, grid, contexts, range(1, 20))))
"""


@pytest.fixture(scope="module")
def rows():
    return shipped.variant_rows()


def problem_of(row) -> Problem:
    return shipped.by_id()[row["term_id"]].by_problem[row["problem_id"]]


def answers(row):
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def ended(text):
    return text if text.rstrip().endswith((".", "?", "!", "…")) else f"{text.rstrip()}."


def filled(bank, **slots):
    return [phrase.format(**slots) for phrase in PHRASES[bank]]


def protective(problem):
    """The ways to say the protective step; with a condition each names it."""
    first = problem.first
    if first is None:
        return []
    if first.when is None:
        return [ended(text) for text in first.say]
    return filled("precaution", When=capitalised(first.when), do=first.do.rstrip("."))


def sayable(problem):
    """All that an agent may say about a problem, longest first; nothing of another problem."""
    texts = [ended(text) for step in problem.steps for text in step.say] + [ended(fact) for fact in problem.facts]
    texts += protective(problem) + (problem.ask.say if problem.ask else []) + PHRASES["identity"]
    texts += filled("done", done=problem.done.rstrip("."))
    texts += filled("hand_over", escalate=problem.escalate_when.rstrip("."))
    return sorted(set(texts), key=len, reverse=True)


def said_steps(row):
    """(place in all answers, step, sentence) of each step that a row says, in the card's order."""
    text = "\n".join(answers(row))
    for step in problem_of(row).steps:
        for sentence in map(ended, step.say):
            if sentence in text:
                yield text.index(sentence), step, sentence


# --- the same bytes ----------------------------------------------------------------------------------


def test_there_are_19_variants_of_each_of_1560_scenarios(rows):
    assert len(rows) == 1560 * 19 == 29640 and len({row["conversation_id"] for row in rows}) == 29640
    assert set(Counter(row["scenario_id"] for row in rows).values()) == {19}
    assert len(rows) + len(shipped.gold_rows()) == 31200
    assert all(tuple(row) == filters.CONVERSATION_KEYS and row["origin"] == "variant" for row in rows)
    split = {s.scenario_id: s.split for s in shipped.grid()}
    assert all(row["split"] == split[row["scenario_id"]] for row in rows)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "4711", "LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.UTF-8", "PYTHONUTF8": "0"},
    ],
)
def test_the_same_cards_give_the_same_bytes_in_another_process_hash_seed_and_locale(rows, environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=watched() | environment | {"PYTHONPATH": python_path(ROOT), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    terms = {card.id for card in shipped.cards()[::13]}
    assert not terms & set(shipped.PARAMS["unseen_terms"])  # the other process has no unseen terms
    assert done.stdout.strip() == dataset.content_hash(row for row in rows if row["term_id"] in terms)


def test_a_terms_variants_do_not_depend_on_other_terms(rows):
    grid = [s for s in shipped.grid() if s.term_id == "puk"]
    alone = list(variants.write_variants([shipped.by_id()["puk"]], grid, shipped.contexts(), range(1, 20)))
    assert alone == [row for row in rows if row["term_id"] == "puk"]


# --- what the agent says -----------------------------------------------------------------------------


def test_an_agent_says_nothing_but_sentences_of_its_own_problem_and_the_small_phrases(rows):
    known = {}
    for row in rows:
        name = row["term_id"], row["problem_id"]
        if name not in known:
            known[name] = sayable(problem_of(row))
        for answer in answers(row):
            rest = answer
            for text in known[name]:
                rest = rest.replace(text, "")
            assert not rest.strip(), (row["conversation_id"], rest)


def test_an_unconditional_protective_step_begins_the_first_answer_and_a_conditional_one_is_named_there(rows):
    seen = Counter()
    for row in rows:
        if first := problem_of(row).first:
            assert answers(row)[0].startswith(tuple(protective(problem_of(row)))), row["conversation_id"]
            if first.when:
                assert first.when[1:] in answers(row)[0] and first.do.rstrip(".") in answers(row)[0]
            seen[first.when is None] += 1
    assert min(seen.values()) > 1000


def test_the_steps_are_said_once_and_in_the_cards_order(rows):
    several = 0
    for row in rows:
        places, steps, _ = zip(*said_steps(row), strict=True) if any(said_steps(row)) else ((), (), ())
        assert list(places) == sorted(places), row["conversation_id"]
        assert len({id(step) for step in steps}) == len(steps), row["conversation_id"]
        assert list(steps) == problem_of(row).steps[: len(steps)], row["conversation_id"]
        several += len(steps) > 1
    assert several > 15000


def test_before_a_step_that_needs_identity_the_agent_asks_for_it_or_the_step_makes_it_its_condition(rows):
    seen = Counter()
    for row in rows:
        text, asked = "\n".join(answers(row)), False
        for place, step, sentence in said_steps(row):
            if step.needs_identity:
                asked = asked or bool(variants.NAMES_IDENTIFICATION.search(sentence))
                before = text[:place]
                assert asked or any(phrase in before for phrase in PHRASES["identity"]), (row["conversation_id"], text)
                seen[asked] += 1
    assert min(seen.values()) > 500


@pytest.mark.parametrize("text", PHRASES["identity"] + [
    "After the check I send the form.", "Once I know it is you, I change it.", "With your identity confirmed, I see.",
    "You are identified by video or in a shop.", "As you are signed in, I can open the job.",
])  # fmt: skip
def test_what_makes_identification_a_condition_is_recognised(text):
    assert variants.NAMES_IDENTIFICATION.search(text)


@pytest.mark.parametrize("text", [
    "I have marked this as confidential.", "Verification texts that were charged in error are credited.",
    "Use your passport, since it is accepted most widely.", "The codes of all lines stand in the company portal.",
    "The device has an identifier.", "Please check it once more.",
])  # fmt: skip
def test_words_that_only_look_like_identification_are_not(text):
    assert not variants.NAMES_IDENTIFICATION.search(text)


def test_identification_is_asked_for_once(rows):
    for row in rows:
        assert sum(answer.count(phrase) for answer in answers(row) for phrase in PHRASES["identity"]) <= 1


def test_a_step_of_another_problem_does_not_count_as_identification():
    """Three `needs_identity` steps without a word about it get one request, before the first of them."""
    problem = shipped.by_id()["puk"].problems[0]
    bare = problem.steps[0].model_copy(update={"say": ["I move the money."], "needs_identity": True})
    named = bare.model_copy(update={"say": ["That needs no identity check."], "needs_identity": False})
    other = bare.model_copy(update={"say": ["I move the SIM too."]})
    agent = variants.Agent(
        problem.model_copy(update={"first": None, "ask": None, "facts": [], "steps": [named, bare, other]}),
        variants.Draw("key", 0),
    )
    text = agent.first_answer() + " " + " ".join(agent.next_answer(turn) for turn in range(1, 4) if agent.steps_left())
    request = next(phrase for phrase in PHRASES["identity"] if phrase in text)
    assert text.split() == f"That needs no identity check. {request} I move the money. I move the SIM too.".split()


def test_no_variant_holds_a_never_text(rows):
    """Two of these texts are parts of sentences that say the opposite; these stand on the cards."""
    harmless = {("puk", "your PUK is"): "where your PUK is shown", ("sla", "nothing is due"): "not mean nothing is due"}
    for row in rows:
        for answer in answers(row):
            for text in problem_of(row).never:
                rest = answer.replace(harmless.get((row["term_id"], text), text + "?"), "")
                assert text.rstrip(".").lower() not in rest.lower(), (row["conversation_id"], text)


def test_a_question_of_the_agent_is_the_last_thing_it_says_or_comes_before_the_steps(rows):
    asks = 0
    for row in rows:
        problem = problem_of(row)
        for question in problem.ask.say if problem.ask else ():
            for answer in answers(row):
                if question in answer:
                    asks += 1
                    before = answer[: answer.index(question)].strip()
                    assert answer.endswith(question) or before in ("", *protective(problem)), answer
    assert asks > 10000


def test_a_step_that_asks_something_ends_the_answer():
    problem = shipped.by_id()["emergency_call"].by_problem["call_failed_now"]
    step = problem.steps[0].model_copy(update={"say": ["What is the place?"], "needs_identity": False})
    after = step.model_copy(update={"say": ["Stay on the line."]})
    asking = problem.model_copy(update={"first": None, "ask": None, "facts": ["A fact."], "steps": [step, after]})
    agent = variants.Agent(asking, variants.Draw("key", 0))
    assert agent.first_answer() == "What is the place?" and agent.next_answer(1).startswith("Stay on the line.")


def test_every_figure_in_an_answer_is_in_its_card(rows):
    checked = {(row["term_id"], answer) for row in rows for answer in answers(row)}
    assert [a for term, a in checked if unknown_figures(a, shipped.by_id()[term])] == []


def test_nothing_is_left_unfilled_and_the_agents_punctuation_is_clean(rows):
    for row in rows:
        for message in row["messages"]:
            assert not re.search(r"[{}]|  ", message["content"])
        for answer in answers(row):
            assert not re.search(r"\s[.,;]|[.]{2}|”\.\.", answer), answer


def test_answers_have_a_median_of_40_to_65_words_and_at_most_120(rows):
    lengths = sorted(len(answer.split()) for row in rows for answer in answers(row))
    assert 40 <= lengths[len(lengths) // 2] <= 65 and lengths[0] >= 5 and lengths[-1] <= 120


# --- what the customer says --------------------------------------------------------------------------


def test_roles_alternate_and_the_agent_has_the_last_word(rows):
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * row["n_turns"]


def test_two_fifths_have_one_exchange_two_fifths_two_and_the_manners_are_equally_frequent(rows):
    planned = [variants.conversation_plan(s, n) for s in shipped.grid() for n in range(1, 20)]
    turns = Counter(pairs for _, pairs in planned)
    for pairs, share in ((1, 0.4), (2, 0.4), (3, 0.1), (4, 0.1)):
        assert abs(turns[pairs] / len(planned) - share) < 0.01
    manners = Counter(row["manner"] for row in rows)
    assert set(manners) == set(variants.MANNERS)
    assert max(manners.values()) - min(manners.values()) < 0.05 * len(rows) / len(manners)
    short = sum(row["n_turns"] < pairs for row, (_, pairs) in zip(rows, planned, strict=True))
    assert short < 0.03 * len(rows)  # a card with few steps has no more to say


def test_the_customer_begins_with_a_phrasing_of_the_problem(rows):
    for row in rows:
        if row["manner"] in UNTOUCHED:
            opening = row["messages"][0]["content"]
            assert any(ended(said) in opening for said in problem_of(row).says), opening


def test_a_held_out_scenarios_phrasings_are_its_own(rows):
    held = {s.scenario_id for s in shipped.grid() if s.split in ("val", "test")}
    said = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row["manner"] in UNTOUCHED:
            opening = row["messages"][0]["content"]
            longest = max((t for t in problem_of(row).says if ended(t) in opening), key=len)
            said[row["term_id"], row["problem_id"]][row["scenario_id"] in held].add(longest)
    reserved = [found[True] for found in said.values() if True in found]
    assert len(reserved) == 288 and {len(own) for own in reserved} == {variants.RESERVED_SAYS}
    assert not any(found[True] & found[False] for found in said.values())


def test_a_clause_of_the_context_is_added_in_its_own_context_alone(rows):
    clauses = {context.id: context.clauses for context in shipped.contexts()}
    seen = Counter()
    for row in rows:
        for name, own in clauses.items():
            if row["manner"] in UNTOUCHED and any(clause in row["messages"][0]["content"] for clause in own):
                assert name == row["context"]
                seen[name] += 1
    assert set(seen) == {name for name, own in clauses.items() if own}


def test_every_later_message_of_the_customer_reacts_to_the_answer_before_it(rows):
    seen = Counter()
    for row in rows:
        for turn, message in enumerate(row["messages"][2::2], 1):
            key = f"{row['scenario_id']}.{int(row['conversation_id'][-2:])}.{turn}"
            fitting = [
                bank
                for bank in ("asks_next", "not_yet", "asks_done", "asks_hand_over")
                if message["content"] in [variants.typed(phrase, row["manner"], key) for phrase in PHRASES[bank]]
            ]
            assert len(fitting) == 1, message
            reply = row["messages"][2 * turn + 1]["content"]
            if fitting == ["asks_done"]:
                assert problem_of(row).done.rstrip(".") in reply
            elif fitting == ["asks_hand_over"]:
                assert problem_of(row).escalate_when.rstrip(".") in reply
            else:
                assert any(ended(text) in reply for step in problem_of(row).steps for text in step.say)
            seen[fitting[0]] += 1
    assert min(seen.values()) > 500 and len(seen) == 4


FIGURES = st.lists(
    st.sampled_from([
        "the", "router", "says", "error", "don’t", "restart;", "5G", "4,5", "3.50", "£12.99", "10:30", "100%", "Wi-Fi",
        "6", "IPv6", "WPA3", "n78", "*#06#", "20", "ms.", "2026-07-01,", "0800", "EUR", "7.",
    ]),
    min_size=1, max_size=20,
).map(" ".join)  # fmt: skip


@given(text=FIGURES, manner=st.sampled_from(variants.MANNERS), key=st.text(max_size=4))
@settings(max_examples=300, deadline=None)
def test_typing_keeps_every_figure_and_every_word_with_a_digit(text, manner, key):
    def figures(words):
        return [word.lower().strip(".,;:!") for word in words.split() if re.search(r"\d", word)]

    assert figures(variants.typed(text, manner, key)) == figures(text)


@given(text=FIGURES, manner=st.sampled_from(variants.MANNERS), key=st.text(max_size=4))
@settings(max_examples=100, deadline=None)
def test_typing_keeps_the_number_of_words_and_is_the_same_again(text, manner, key):
    typed = variants.typed(text, manner, key)
    assert len(typed.split()) == len(text.split()) and typed == variants.typed(text, manner, key)


# --- variety -----------------------------------------------------------------------------------------


def test_the_variants_of_a_problem_go_through_the_options_of_a_slot_in_turn():
    draws = [variants.Draw("puk.need_puk", number) for number in range(60)]
    for n in (2, 3, 6, 7):
        counts = Counter(draw.index(n, "slot") for draw in draws)
        assert len(counts) == n and max(counts.values()) - min(counts.values()) <= 1


def test_no_option_is_chosen_twice_in_a_conversation_while_another_is_left():
    draw = variants.Draw("key", 3)
    assert len({draw.choose(["a", "b", "c"], slot) for slot in ("x", "y", "z")}) == 3


def test_few_variants_of_a_scenario_begin_with_the_same_message(rows):
    first = defaultdict(set)
    for row in rows:
        first[row["scenario_id"]].add(row["messages"][0]["content"])
    assert sum(map(len, first.values())) > 0.98 * len(rows)


@given(number=st.integers(1, 99), index=st.integers(0, 1559), attempt=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_any_number_and_scenario_gives_a_conversation_that_passes_all_filters(number, index, attempt):
    scenario = shipped.grid()[index]
    card = shipped.by_id()[scenario.term_id]
    context = next(context for context in shipped.contexts() if context.id == scenario.context)
    assert filters.reject_reason(variants.write_variant(card, scenario, context, number, attempt), card) is None


def test_the_phrases_hold_no_figure_and_only_slots_that_are_filled():
    slots = {"done": {"done"}, "hand_over": {"escalate"}, "precaution": {"When", "do"}}
    for bank, own in PHRASES.items():
        for phrase in own:
            assert set(re.findall(r"\{(\w+)\}", phrase)) == slots.get(bank, set()), phrase
            assert not re.search(r"\d", phrase)


def test_two_held_out_scenarios_of_one_problem_have_phrasings_of_their_own_too():
    card = shipped.cut(shipped.by_id()["puk"], 1)
    grid = scenarios.build_scenarios([card], shipped.contexts(), [])
    assert {s.split for s in grid} == {"train", "val", "test"}
    said = defaultdict(set)
    for row in variants.write_variants([card], grid, shipped.contexts(), range(20)):
        if row["manner"] in UNTOUCHED:
            said[row["split"]] |= {t for t in card.problems[0].says if ended(t) in row["messages"][0]["content"]}
    assert len(said["val"]) == len(said["test"]) == 2
    assert sum(map(len, said.values())) == len(set().union(*said.values()))


def test_cards_with_one_problem_and_one_context_have_variants_too():
    cards = [shipped.cut(card, 1, ("usual",)) for card in shipped.cards()[:5]]
    contexts = shipped.contexts()[:1]
    grid = scenarios.build_scenarios(cards, contexts, [])
    made = list(variants.write_variants(cards, grid, contexts, range(4)))
    assert len(made) == 20
    assert all(filters.reject_reason(row, shipped.by_id()[row["term_id"]]) is None for row in made)
