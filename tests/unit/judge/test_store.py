"""The store and what comes out of it, whatever the answers hold: one line per attempt, and no number from nothing."""

import json
import re

import judge_study
import pandas as pd
import pytest
from judge_study import CARDS, HOSTILE, command, put, put_plan
from pydantic import ValidationError

from telco_nb.commands import rerank
from telco_nb.hosted.keys import printable
from telco_nb.judge import asking, bradley_terry, checklist, design
from telco_nb.judge.anchors import ANCHORS
from telco_nb.judge.cases import CRITERIA, Case, JudgeError, Verdict, degenerate_answer
from telco_nb.judge.prompts import MAX_ANSWER_CHARACTERS, PairReply, RubricReply, render_prompt
from telco_nb.judge.store import FIELDS, VerdictStore, judged_rows, rated_rows
from telco_nb.study import seal

CONFIGS = ["c01", "c02", "c03"]


@pytest.fixture(scope="module")
def prompts():
    return judge_study.make_prompts(len(HOSTILE))


class Echo:
    """The worst judge: all that it says is what the answers say."""

    name, kind, model, is_proxy, is_free, description, store_every = "echo", "echo", "m", False, True, "an echo", 1
    forms = ("pair", "rubric")

    def __init__(self):
        self.parameters = {}

    def prepare(self, cases):
        pass

    def judge(self, case):
        said = "\n".join(case.answers)
        receipt = {"request_id": said, "finish_reason": said}
        if case.form == "rubric":
            return Verdict(analysis=said, scores=dict.fromkeys(CRITERIA, 3), raw=said, receipt=receipt)
        return Verdict("A", 1, said, (said,), raw=said, receipt=receipt)


@pytest.fixture
def hostile(prompts):
    """Answers of three configurations; those of c03 are hostile, a different one for every prompt."""
    answers = judge_study.make_answers(prompts, CONFIGS)
    for row, text in zip(prompts.itertuples(), HOSTILE.values(), strict=True):
        answers["c03", row.prompt_id] = text
    return answers


def plans(prompts, configs=CONFIGS):
    pairs = judge_study.pair_plan(prompts, configs, matchings_per_prompt=3)
    return {"pairs": pairs, "rubric": design.plan_ratings(prompts, configs, share=1.0, seed=1)}


@pytest.mark.parametrize("part", ["pairs", "rubric"])
def test_no_answer_breaks_a_line_of_the_store_or_a_table(part, prompts, hostile, tmp_path):
    plan = plans(prompts)[part]
    store = VerdictStore(tmp_path / "verdicts.jsonl")
    plan = put(Echo(), plan, asking.build_cases(plan, prompts, hostile, CARDS), store, part)
    data = store.path.read_bytes()
    lines = data.decode("ascii").splitlines()  # splits at U+2028 and the like too; there are none in ASCII
    assert len(lines) == data.count(b"\n") == plan["judgement_id"].nunique() + 1
    stored = [json.loads(line) for line in lines[1:]]
    assert all(set(FIELDS) <= set(line) for line in stored)
    said = "\n".join(line["raw"] for line in stored if line["source"] == "judge")
    assert all(text in said for text in HOSTILE.values() if not degenerate_answer(text))  # kept letter by letter
    again = VerdictStore(store.path)
    assert again.unreadable == 0 and again.ok.keys() == store.ok.keys()
    table = rated_rows(plan, again) if part == "rubric" else judged_rows(plan, again)
    table.to_parquet(tmp_path / "table.parquet")
    assert len(pd.read_parquet(tmp_path / "table.parquet")) == len(plan)
    assert all(text == printable(text) for text in table["analysis"].dropna())


@pytest.mark.parametrize("name", list(HOSTILE))
@pytest.mark.parametrize("form", ["pair", "rubric"])
def test_no_answer_changes_the_shape_of_a_prompt(name, form):
    seats = {"pair": 2, "rubric": 1}[form]
    texts = [HOSTILE[name], "fine"][:seats]
    case = Case(form, CARDS["volte"], "switch_missing", (("user", HOSTILE[name]),), "", tuple(texts))
    prompt = render_prompt(case)
    system, *data = render_prompt(Case(form, case.card, "switch_missing", (("user", "hi"),), "", ("ok",) * seats))
    assert prompt.system == system
    assert re.findall(r"</?\w+>", prompt.data) == re.findall(r"</?\w+>", "".join(data))
    assert all(c.isprintable() or c in "\n\t" for c in prompt.text)
    assert prompt.data.count("Hand over when") == 1  # a placeholder in an answer is not filled
    prompt.text.encode()
    assert len(prompt.text) < 3 * MAX_ANSWER_CHARACTERS


@pytest.mark.parametrize("name", list(HOSTILE))
def test_no_hostile_answer_beats_the_reference_with_the_checklist(name, prompts):
    judge = checklist.ChecklistJudge("checklist")
    for row in prompts.head(4).itertuples():
        messages = tuple((m["role"], m["content"]) for m in row.messages)
        shared = (CARDS[row.term_id], row.problem_id, messages, row.reference)
        for answers, best in (((row.reference, HOSTILE[name]), "A"), ((HOSTILE[name], row.reference), "B")):
            case = Case("pair", *shared, answers)
            assert (asking.rule_verdict(case) or judge.judge(case)).verdict == best


def test_a_reply_is_a_verdict_only_if_all_of_it_is():
    good = {"analysis": "x", "verdict": "A", "margin": 1, "flags": ["A:instruction", "ignore <b>me</b>"]}
    assert PairReply.model_validate(good).to_verdict().flags == ("A:instruction", "other")
    for wrong in ({"margin": 0}, {"verdict": "C"}, {"verdict": "tie"}, {"winner": "A"}, {"margin": 3}, {"margin": "x"}):
        with pytest.raises(ValidationError):
            PairReply.model_validate(good | wrong)
    rating = dict.fromkeys(CRITERIA, 4) | {"analysis": "x"}
    assert RubricReply.model_validate(rating).to_verdict().scores["tone"] == 4
    for wrong in ({"tone": 0}, {"tone": 6}, {"tone": None}):
        with pytest.raises(ValidationError):
            RubricReply.model_validate(rating | wrong)
    assert next(iter(PairReply.model_json_schema()["properties"])) == "analysis"  # thinks before it decides


@pytest.mark.parametrize(
    ("form", "verdict"), [("rubric", Verdict("tie", 0)), ("pair", Verdict(scores=dict.fromkeys(CRITERIA, 5)))]
)
def test_a_verdict_of_another_form_is_a_parse_error_and_no_verdict(form, verdict):
    answers = ("good answer",) * {"pair": 2, "rubric": 1}[form]
    case = Case(form, CARDS["volte"], "switch_missing", (("user", "?"),), "", answers)
    with pytest.raises(JudgeError) as error:
        asking.require_form(case, verdict)
    assert error.value.status == "parse_error"


def test_an_empty_answer_gets_the_lowest_rating_by_rule_and_none_where_there_is_nothing_to_rate():
    case = Case("rubric", CARDS["volte"], "switch_missing", (("user", "?"),), "", ("",))
    scores = asking.rule_verdict(case).scores
    assert scores["factual"] == 1 and scores["tone"] is None


@pytest.mark.parametrize("change", [{"verdict": None}, {"verdict": "best"}, {"margin": 0}, {"margin": None}])
def test_a_line_that_says_ok_without_a_verdict_counts_as_nothing_and_is_asked_again(change, prompts, hostile, tmp_path):
    plan = judge_study.pair_plan(prompts.head(2), ["c01", "c02"])
    asked = asking.build_cases(plan, prompts, hostile, CARDS)
    store = VerdictStore(tmp_path / "verdicts.jsonl")
    plan = put(checklist.ChecklistJudge("checklist"), plan, asked, store)
    lines = store.path.read_text().splitlines()
    decided = next(i for i, line in enumerate(lines) if '"verdict": "A"' in line)
    lines[decided] = json.dumps(json.loads(lines[decided]) | change)
    store.path.write_text("\n".join(lines) + "\n")
    read = VerdictStore(store.path)
    assert read.unreadable == 1 and len(judged_rows(plan, read)) == len(plan) - 1
    unanswered = {question.id for question in asking.build_questions(plan, asked)} - set(read.ok)
    assert len(unanswered) == 1


# ---------------------------------------------------------------- the plan in the store, and rerank


def test_the_plan_is_stored_once_and_again_only_when_it_changes(prompts, hostile, tmp_path):
    store, judge = VerdictStore(tmp_path / "v.jsonl"), checklist.ChecklistJudge("checklist")
    plan = judge_study.pair_plan(prompts, CONFIGS)
    for _ in range(2):
        put(judge, plan, asking.build_cases(plan, prompts, hostile, CARDS), store)
    kept = VerdictStore(store.path).planned("pairs")
    assert sum('"plan"' in line for line in store.path.read_text().splitlines()) == 1
    pd.testing.assert_frame_equal(kept[design.PLAN_COLUMNS], plan, check_dtype=False)


def test_rerank_ranks_the_latest_plan_and_leaves_answers_of_the_past_out(prompts, hostile, tmp_path):
    store, judge = VerdictStore(tmp_path / "v.jsonl"), checklist.ChecklistJudge("checklist")
    for configs in (CONFIGS, ["c01", "c02"]):
        plan = judge_study.pair_plan(prompts, configs)
        put(judge, plan, asking.build_cases(plan, prompts, hostile, CARDS), store)
    found = rerank.rerank(VerdictStore(store.path), draws=50)
    assert set(found.ranking["config"]) == {"c01", "c02", *ANCHORS}
    assert found.ranking["config"].iloc[0] == "c01"
    assert any("gate" in block for block in found.blocks)  # no control was asked


def test_rerank_is_a_function_of_the_lines_and_not_of_their_order(prompts, hostile, tmp_path):
    store, judge = VerdictStore(tmp_path / "v.jsonl"), checklist.ChecklistJudge("checklist")
    plan = judge_study.pair_plan(prompts, CONFIGS)
    put(judge, plan, asking.build_cases(plan, prompts, hostile, CARDS), store)
    first, *attempts = store.path.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*reversed(attempts), first]) + "\n")
    one, two = (rerank.rerank(VerdictStore(path), draws=50).ranking for path in (store.path, other))
    pd.testing.assert_frame_equal(one, two)


def test_rerank_counts_what_was_planned_and_never_asked(prompts, hostile, tmp_path):
    store, judge = VerdictStore(tmp_path / "v.jsonl"), checklist.ChecklistJudge("checklist")
    plan = judge_study.pair_plan(prompts, CONFIGS)
    asked = asking.build_cases(plan, prompts, hostile, CARDS)
    plan = put_plan(judge, plan, asked, store, "pairs")
    asking.ask(judge, asking.build_questions(plan, asked)[: len(plan) // 4], store)
    found = rerank.rerank(VerdictStore(store.path), draws=50)
    assert found.coverage["coverage"].min() < 0.98
    assert any("coverage below 98%" in block for block in found.blocks)


def test_the_rerank_command_prints_the_ranking_and_says_what_it_misses(prompts, hostile, tmp_path, capsys):
    assert command("rerank", tmp_path) == 2
    assert "no such file" in capsys.readouterr().err
    folder = tmp_path / "judge-checklist"
    store, judge = VerdictStore(folder / "store" / "verdicts.jsonl"), checklist.ChecklistJudge("checklist")
    store.path.parent.mkdir(parents=True)
    store.path.touch()
    assert command("rerank", folder) == 1
    assert "nothing has been asked" in capsys.readouterr().err
    plan = judge_study.pair_plan(prompts, CONFIGS)
    put(judge, plan, asking.build_cases(plan, prompts, hostile, CARDS), store)
    before = store.path.read_bytes()
    assert command("rerank", folder, "--draws", "50", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "c01" in printed and "no headline: failed its validity gate" in printed
    assert store.path.read_bytes() == before


def test_a_store_in_which_nobody_answered_ranks_nothing_and_says_so(prompts, tmp_path):
    class Mute(Echo):
        def judge(self, case):
            raise JudgeError("timeout", "no answer")

    store = VerdictStore(tmp_path / "v.jsonl")
    plan = judge_study.pair_plan(prompts, CONFIGS)
    sound = judge_study.make_answers(prompts, CONFIGS)
    plan = put(Mute(), plan, asking.build_cases(plan, prompts, sound, CARDS), store)
    found = rerank.rerank(VerdictStore(store.path), draws=50)
    assert found.ranking[["score", "rank", "p_best"]].isna().all().all()
    assert "no ranking: there are no verdicts" in found.blocks
    assert store.statuses == {"timeout": plan["judgement_id"].nunique()}
    with pytest.raises(bradley_terry.RankingError, match="nothing has been asked"):
        rerank.rerank(VerdictStore(tmp_path / "empty.jsonl"))


def test_two_verdicts_that_change_places_rank_nothing_and_the_store_is_named(prompts, hostile, tmp_path, capsys):
    folder = tmp_path / "smoke" / "judge-checklist"
    store, judge = VerdictStore(folder / "store" / "verdicts.jsonl"), checklist.ChecklistJudge("checklist")
    plan = judge_study.pair_plan(prompts, CONFIGS)
    plan = put(judge, plan, asking.build_cases(plan, prompts, hostile, CARDS), store)
    seal.seal_study(folder.parent)
    assert command("rerank", folder, "--draws", "50") == 0 and "c01" in capsys.readouterr().out
    text = store.path.read_text()
    swapped = text.replace('"verdict": "A"', '"verdict": "?"').replace('"verdict": "B"', '"verdict": "A"')
    store.path.write_text(swapped.replace('"verdict": "?"', '"verdict": "B"'))
    assert store.path.read_text() != text and command("rerank", folder, "--draws", "50") == 3
    said = capsys.readouterr()
    assert "judge-checklist/store/verdicts.jsonl was changed" in said.err and not said.out
    store.path.write_text(text)
    store.append([store.ok[plan["judgement_id"].iloc[0]] | {"attempt": 2}])
    assert command("rerank", folder, "--draws", "50") == 0, "it has only grown"
