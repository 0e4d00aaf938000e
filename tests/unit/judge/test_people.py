"""Judges outside: which blind pairs they get, what a votes file may hold, and how votes become a judge like others."""

import json
from collections import Counter

import judge_study
import numpy as np
import pandas as pd
import pytest
from judge_study import CARDS

from telco_nb.commands import rerank
from telco_nb.hosted.keys import printable
from telco_nb.judge import asking, bias, blind_pairs, checklist, gate, panel, people, votes_file
from telco_nb.judge.blind_pairs import KEY_COLUMNS, json_lines, make_export
from telco_nb.judge.store import VerdictStore, judged_rows
from telco_nb.judge.votes_file import VotesError, one_vote_each, read_votes
from telco_nb.study import params

CONFIGS = ["c01", "c02", "c03", "c04"]
LOOP = "Please wait a moment. " * 12


@pytest.fixture(scope="module")
def material():
    """40 prompts; every third answer of c04 loops."""
    prompts = judge_study.make_prompts(40).assign(test_set=["test"] * 20 + ["noisy"] * 10 + ["unseen"] * 10)
    answers = judge_study.make_answers(prompts, CONFIGS)
    answers |= {("c04", prompt_id): LOOP for prompt_id in prompts["prompt_id"].iloc[::3]}
    return blind_pairs.make_material(prompts, answers, CARDS, CONFIGS, seed=7)


@pytest.fixture(scope="module")
def export(material):
    return make_export(material, 200, seed=1)


def careful(material, export):
    """What a careful rater would vote: the checklist's own choice on every pair."""
    judge, votes = checklist.ChecklistJudge("x"), []
    rows = {row["pair_id"]: row for row in export.key if row["pair_id"]}
    plan = pd.DataFrame(rows.values())
    cases = asking.build_cases(plan, material.prompts, material.answers, material.cards)
    for pair_id, case in zip(rows, cases, strict=True):
        verdict = judge.judge(case)
        choice = {"A": "a", "B": "b", "tie": "tie"}[verdict.verdict]
        votes.append({"pair_id": pair_id, "vote": choice, "margin": verdict.margin, "rater": "ann", "reason": "read"})
    return votes


@pytest.fixture(scope="module")
def voted(material, export):
    return careful(material, export)


def written(tmp_path, rows, name="votes.jsonl"):
    path = tmp_path / name
    path.write_bytes(json_lines(rows))
    return path


def add(tmp_path, material, export, rows, judge=None, keys=None):
    """Import votes into a store of their own; the store and what was added."""
    judge = judge or people.HumanJudge("human-ann")
    store = VerdictStore(tmp_path / f"{judge.name}.jsonl")
    lines = one_vote_each(read_votes(written(tmp_path, rows)))
    found = people.check_votes(judge, lines, keys or [export.key], material, store)
    store.path.write_bytes(found.stored())
    return VerdictStore(store.path), found


# ---------------------------------------------------------------- what is exported


def test_an_export_names_no_configuration_and_no_control(material, export):
    assert all(set(pair) == {"pair_id", "conversation", "card", "answer_a", "answer_b"} for pair in export.pairs)
    text = json.dumps(export.pairs)
    names = [*CONFIGS, "control:", *gate.GATE, *material.prompts["prompt_id"]]
    assert not [name for name in names if ("_" in name and name in text) or f'"{name}"' in text]
    assert len({pair["pair_id"] for pair in export.pairs}) == len(export.pairs) == 200


def test_the_key_says_which_answer_is_whose(material, export):
    by_id = {row["pair_id"]: row for row in export.key}
    for pair in export.pairs:
        row = by_id[pair["pair_id"]]
        assert (pair["answer_a"], pair["answer_b"]) == tuple(map(printable, material.texts(row)))
        assert set(row) == set(KEY_COLUMNS)


def test_15_per_cent_are_controls_of_all_kinds_and_5_per_cent_repeats_with_exchanged_seats(material, export):
    shown = [row for row in export.key if row["pair_id"]]
    assert Counter(row["purpose"] for row in shown) == {"ranking": 130, "anchor": 30, "control": 30, "swap": 10}
    kinds = Counter(row["control"] for row in shown if row["control"])
    assert set(kinds) == set(material.controls["control"]) and max(kinds.values()) - min(kinds.values()) <= 1
    first = {
        (r["prompt_id"], r["config_first"], r["config_second"]): r["position"] for r in shown if r["order"] == "ab"
    }
    for row in (row for row in shown if row["purpose"] == "swap"):
        assert row["position"] - first[row["prompt_id"], row["config_second"], row["config_first"]] >= 20


def test_15_per_cent_set_a_configuration_beside_a_text_that_needs_no_training_in_turn_and_in_both_seats(material):
    prompts, small = material.prompts, make_export(material, 200, seed=1)
    everything = blind_pairs.anchor_rows(material, 10_000, np.random.default_rng(0), set())
    names = {"untuned", "reference", "template", "echo", "nearest"}
    assert len({tuple(row.values()) for row in everything}) == len(everything) == 5 * len(CONFIGS) * len(prompts)
    for name in (*names, *CONFIGS):
        first, second = (sum(row[seat] == name for row in everything) for seat in ("config_first", "config_second"))
        assert first == pytest.approx(second, abs=2 * len(CONFIGS)), name
    rows = [row for row in small.key if row["purpose"] == "anchor"]
    met = Counter(name for row in rows for name in (row["config_first"], row["config_second"]))
    assert {name for name in met if name not in CONFIGS} == names
    for group in (names, CONFIGS):
        counts = [met[name] for name in group]
        assert max(counts) - min(counts) <= 5 and min(counts) >= 3
    assert sum(row["config_first"] in names for row in rows) == pytest.approx(len(rows) / 2, abs=4)
    places = [row["position"] for row in rows]
    assert min(places) < 20 and max(places) > 180, "from beginning to end: a rater may stop anywhere"


def test_the_same_seed_gives_the_same_export_and_another_seed_another_one(material, export):
    assert make_export(material, 200, seed=1) == export
    other = make_export(material, 200, seed=2)
    assert other.name != export.name and {p["pair_id"] for p in other.pairs}.isdisjoint(
        p["pair_id"] for p in export.pairs
    )


def test_before_any_ranking_every_pair_of_configurations_meets_equally_often_and_in_both_seats(material, export):
    rows = [row for row in export.key if row["purpose"] == "ranking"]  # those by rule are drawn like the others
    met = Counter(tuple(sorted((row["config_first"], row["config_second"]))) for row in rows)
    assert len(met) == 6 and max(met.values()) - min(met.values()) <= 1
    first = Counter(row["config_first"] for row in rows)
    assert all(abs(first[config] - len(rows) / 4) <= 2 for config in CONFIGS)


def test_prompts_and_test_sets_are_spread_evenly_over_every_stretch(material):
    rows = make_export(material, 60, seed=3).key
    ranking = [row["prompt_id"] for row in rows if row["purpose"] == "ranking"]
    sets = material.prompts.set_index("prompt_id")["test_set"]
    assert max(Counter(ranking).values()) <= 2
    assert Counter(sets[ranking[:20]]) == pytest.approx({"test": 10, "noisy": 5, "unseen": 5}, abs=1)


def test_close_scores_are_asked_first_and_every_configuration_is_asked_all_the_same(material):
    rng = np.random.default_rng(0)
    sure = {"c01": 6.0, "c02": 3.0, "c03": 0.1, "c04": 0.0}
    draws = pd.DataFrame({config: rng.normal(score, 0.3, 400) for config, score in sure.items()})
    worth = blind_pairs.worth_of_pairs([draws], CONFIGS)
    assert worth[2, 3] > 0.9 and worth[0, 1] < 0.01 and np.allclose(worth, worth.T)
    drawn = make_export(material, 100, seed=1, score_draws=[draws]).key
    rows = [row for row in drawn if row["purpose"] == "ranking"]
    met = Counter(tuple(sorted((row["config_first"], row["config_second"]))) for row in rows)
    assert met["c03", "c04"] == 40  # on all prompts
    assert max(met.values()) == 40 and {c for pair in met for c in pair} == set(CONFIGS)
    assert {tuple(sorted((r["config_first"], r["config_second"]))) for r in rows[:4]} == {("c03", "c04")}


def test_a_pair_is_worth_a_vote_where_judges_contradict_each_other_or_do_not_know_a_configuration():
    up = pd.DataFrame({"c01": [1.0, 1.1], "c02": [0.0, 0.1], "c03": [-5.0, -5.1]})
    down = pd.DataFrame({"c01": [0.0, 0.1], "c02": [1.0, 1.1], "c03": [-5.0, -5.1]})
    worth = blind_pairs.worth_of_pairs([up, down], CONFIGS)
    assert worth[0, 1] == 1 and worth[0, 2] == 0 and worth[0, 3] == 1
    assert blind_pairs.worth_of_pairs([], CONFIGS) is None
    assert blind_pairs.worth_of_pairs([up * np.nan], CONFIGS) is None


def test_answers_that_lose_by_rule_are_not_shown_and_count_all_the_same(material, export, voted, tmp_path):
    assert not any(LOOP.strip() in json.dumps(pair) for pair in export.pairs if "control" not in pair)
    by_rule = [row for row in export.key if row["pair_id"] is None]
    assert len(by_rule) > 10 and all("c04" in (row["config_first"], row["config_second"]) for row in by_rule)
    store, _ = add(tmp_path, material, export, voted)
    rules = [line for line in store.ok.values() if line["source"] == "rule"]
    assert len(rules) > 10 and all(line["verdict"] != "tie" for line in rules)


# ---------------------------------------------------------------- votes become a judge


def test_votes_become_a_judge_whose_gate_swaps_and_ranking_are_computed_like_any_others(
    material, export, voted, tmp_path
):
    store, found = add(tmp_path, material, export, voted)
    distinct = {(row["sha256_first"], row["sha256_second"]) for row in export.key if row["pair_id"]}
    assert found.n_new == len(distinct) and found.n_known == 200 - len(distinct) and set(store.statuses) == {"ok"}
    result = rerank.rerank(store, draws=100)
    assert result.validity["passed"] and result.blocks == []
    ranked = result.ranking.set_index("config")["score"]
    assert [name for name in ranked.index if name in CONFIGS] == CONFIGS
    assert min(ranked["reference"], ranked["c01"]) > ranked["template"], "all stand on one scale"
    pairs = judged_rows(store.planned("pairs"), store)
    swaps = bias.bias_observations(pairs)["swap_consistent"].dropna()
    assert len(swaps) == 10 and swaps.mean() == 1
    assert pairs["margin"].isin([0, 1, 2]).all() and (pairs["margin"] == 2).any()


def test_a_rater_who_votes_at_random_does_not_pass_the_gate_and_its_power_is_told(material, export, voted, tmp_path):
    rng = np.random.default_rng(1)
    random = [row | {"vote": str(rng.choice(["a", "b"])), "margin": 1} for row in voted]
    store, _ = add(tmp_path, material, export, random)
    validity = rerank.rerank(store, draws=50).validity
    (together,) = [control for control in validity["controls"] if control["control"] == gate.TOGETHER]
    assert not validity["passed"] and not together["passed"] and together["n"] >= 24
    assert validity["passes_all_good"] >= 0.8 and validity["passes_all_poor"] < 0.3


def test_without_planted_controls_the_gate_is_not_passed_and_says_why(material, export, voted, tmp_path):
    # A made-up answer can be the text of a control: then its pair is that control's question.
    texts = {(row["sha256_first"], row["sha256_second"]) for row in export.key if row["control"]}
    control = {row["pair_id"] for row in export.key if (row["sha256_first"], row["sha256_second"]) in texts}
    store, _ = add(tmp_path, material, export, [row for row in voted if row["pair_id"] not in control])
    result = rerank.rerank(store, draws=50)
    assert result.validity["passed"] is False and "failed its validity gate" in result.blocks[0]
    assert all("no verdict" in c["detail"] and c["value"] is None for c in result.validity["controls"])
    assert result.ranking["score"].notna().all()  # shown, without a headline


@pytest.mark.parametrize("how", ["skip", "left out"])
def test_a_pair_that_was_shown_and_not_decided_counts_as_not_judged(material, export, voted, tmp_path, how):
    rows = [r | {"vote": "skip", "margin": None} for r in voted[:40]] * (how == "skip") + voted[40:]
    store, _ = add(tmp_path, material, export, rows)
    result = rerank.rerank(store, draws=50)
    assert result.coverage["coverage"].min() < 0.98 and any("coverage below" in block for block in result.blocks)


def test_pairs_after_the_last_vote_were_not_shown(material, export, voted, tmp_path):
    in_order = sorted(voted, key=lambda row: [p["pair_id"] for p in export.pairs].index(row["pair_id"]))
    store, _ = add(tmp_path, material, export, in_order[:150])
    assert rerank.rerank(store, draws=50).coverage["coverage"].min() == 1
    assert len(store.planned("pairs")) < len(export.key) - 30


def test_importing_again_changes_nothing_and_a_changed_vote_is_refused(material, export, voted, tmp_path):
    store, _ = add(tmp_path, material, export, voted)
    before = store.path.read_bytes()
    store, found = add(tmp_path, material, export, voted)
    assert found.n_new == 0 and found.lines == [] and store.path.read_bytes() == before
    changed = [voted[0] | {"vote": "tie" if voted[0]["vote"] != "tie" else "a", "margin": None}, *voted[1:]]
    with pytest.raises(VotesError, match=r"votes.jsonl:1: vote: .* differs from the vote imported earlier"):
        add(tmp_path, material, export, changed)


def test_a_vote_whose_line_feed_a_kill_cut_off_outlives_the_next_import_and_half_a_vote_does_not(
    material, export, voted, tmp_path
):
    store, _ = add(tmp_path, material, export, voted[:40])
    whole, number = store.path.read_bytes(), len(store.ok)
    store.path.write_bytes(whole[:-1])
    assert len(add(tmp_path, material, export, voted[:40])[0].ok) == number
    store.path.write_bytes(whole[:-9])
    store, found = add(tmp_path, material, export, voted[:40])
    assert len(found.lines) == 1 and len(store.ok) == number and store.unreadable == 0


def test_a_second_export_adds_to_the_first_and_the_first_vote_on_a_question_counts(material, export, voted, tmp_path):
    add(tmp_path, material, export, voted)
    other = make_export(material, 200, seed=2)
    keys = [export.key, other.key]
    store, found = add(tmp_path, material, other, careful(material, other), keys=keys)
    assert found.n_new > 100 and found.n_known > 0 and found.n_new + found.n_known == 200
    assert len(store.planned("pairs")) > 250 and rerank.rerank(store, draws=50).coverage["coverage"].min() == 1


def test_a_vote_on_an_answer_that_has_changed_is_refused(material, export, voted, tmp_path):
    changed = {key: text + " Thank you." if key[0] == "c01" else text for key, text in material.answers.items()}
    with pytest.raises(VotesError, match="has changed since the export; export again"):
        add(tmp_path, material._replace(answers=changed), export, voted)


def test_after_new_answers_the_old_questions_leave_the_plan(material, export, voted, tmp_path):
    add(tmp_path, material, export, voted)
    answers = {key: text + " Thank you." if key[0] == "c01" else text for key, text in material.answers.items()}
    new = blind_pairs.make_material(
        material.prompts, {k: v for k, v in answers.items() if ":" not in k[0]}, CARDS, CONFIGS, 7
    )
    later = make_export(new, 200, seed=1)
    store, _ = add(tmp_path, new, later, careful(new, later), keys=[export.key, later.key])
    assert rerank.rerank(store, draws=50).coverage["coverage"].min() == 1


def test_a_panel_of_language_models_says_how_its_verdicts_were_made(material, export, voted, tmp_path):
    values = params.load_study("smoke").values("judge-panel")
    params.validate(values, "panel.yaml")
    judge = panel.open_judge(values, tmp_path)
    store, _ = add(tmp_path, material, export, voted, judge)
    line = next(line for line in store.ok.values() if line["source"] == "votes")
    assert line["judge_kind"] == "language_model_panel" and line["model_asked"] is None
    assert line["parameters"]["model"] == "not known to this record" and "one by one" in line["parameters"]["made_by"]
    assert line["analysis"] == "read"
    assert not judge.is_proxy and panel.judge_label(judge) == "panel"


def test_a_panel_must_give_a_reason_with_each_vote_and_a_person_need_not(material, export, voted, tmp_path):
    bare = [{name: value for name, value in vote.items() if name != "reason"} for vote in voted]
    store, _ = add(tmp_path, material, export, bare)
    assert any(line["source"] == "votes" for line in store.ok.values())
    with pytest.raises(VotesError, match=r"votes\.jsonl:1: reason: a vote of a language_model_panel needs one"):
        add(tmp_path, material, export, bare, people.LanguageModelPanelJudge("panel"))


def test_a_person_needs_the_name_of_a_person_and_no_outside_judge_has_a_model():
    for kind, name, model in (
        (people.HumanJudge, "ann", None),
        (people.HumanJudge, "human-ann", "gpt"),
        (people.LanguageModelPanelJudge, "panel", "gpt"),
    ):
        with pytest.raises(ValueError, match=r"human-<rater>|remove judge_model"):
            kind(name, model)


def test_a_judge_without_votes_cannot_be_run_and_the_fix_is_named(tmp_path):
    with pytest.raises(VotesError, match=r"python -m telco_nb votes import"):
        people.shown_pairs(VerdictStore(tmp_path / "none.jsonl"), "pairs")


# ---------------------------------------------------------------- the votes file

ROWS = [{"pair_id": "aaa", "vote": "a", "margin": 2, "seconds": 3.5, "reason": "short; and right", "rater": "ann"},
        {"pair_id": "bbb", "vote": "tie", "rater": "ann"}]  # fmt: skip
TABLE = 'pair_id,vote,margin,seconds,reason,rater\naaa,a,2,3.5,"short; and right",ann\nbbb,tie,,,,ann\n'


def jsonl():
    return "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("v.jsonl", jsonl().encode()),
        ("byte order mark.jsonl", b"\xef\xbb\xbf" + jsonl().encode()),
        ("utf 16.jsonl", jsonl().encode("utf-16")),
        ("blank lines.jsonl", ("\n" + jsonl().replace("\n", "\r\n\r\n") + "  \n").encode()),
        ("no end.jsonl", jsonl().rstrip().encode()),
        ("exported fields.jsonl", jsonl().replace('"vote"', '"answer_a": "x", "card": "y", "vote"').encode()),
        ("v.csv", TABLE.encode()),
        ("UPPER.CSV", TABLE.replace("vote", "Vote").replace(",a,", ",A,").replace("tie", "TIE").encode()),
        ("mark.csv", b"\xef\xbb\xbf" + TABLE.encode()),
        ("sep.csv", b"sep=;\r\n" + TABLE.replace(",", ";").replace("\n", "\r\n").encode()),
        ("comma for a point.csv", TABLE.replace(",", ";").replace("3.5", "3,5").encode()),
        ("tabs.tsv", TABLE.replace(",", "\t").encode()),
        ("utf 16.csv", TABLE.encode("utf-16")),
        ("blank lines.csv", TABLE.replace("\n", "\n\n,,,,,\n").encode()),
    ],
)  # fmt: skip
def test_a_votes_file_is_read_as_spreadsheets_and_programs_write_it(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    votes = [line.vote for line in read_votes(tmp_path / name)]
    assert [vote.model_dump(exclude_none=True) for vote in votes] == ROWS


BAD = [
    ({"vote": "left"}, "vote: "),
    ({"vote": None}, "vote: "),
    ({"vote": True}, "vote: "),
    ({"margin": 3}, "margin: "),
    ({"margin": 0}, "margin: "),
    ({"margin": True}, "margin: "),
    ({"seconds": float("inf")}, "seconds: "),
    ({"seconds": float("nan")}, "seconds: "),
    ({"seconds": -1}, "seconds: "),
    ({"seconds": 10**400}, "seconds: "),
    ({"seconds": "fast"}, "seconds: "),
    ({"time": "2026-02-30"}, "time: "),
    ({"time": "2026-13-01T10:00:00"}, "time: "),
    ({"time": "31.03.2026"}, "time: "),
    ({"time": "9999-01-01"}, "time: "),
    ({"rater": "../x"}, "rater: "),
    ({"reason": "x" * 2001}, "reason: "),
    ({"reason": 5}, "reason: "),
    ({"winner": "c01"}, "winner: "),
    ({"pair_id": 7}, "pair_id: "),
    ('{"pair_id": "ccc", "vote": "a", "vote": "b"}', "the line: "),
    ("{half a line", "the line: "),
    ("[1, 2]", "the line: "),
    ("[" * 100_000, "the line: "),
    ('{"pair_id": "ccc", "vote": "a", "seconds": 1e999}', "seconds: "),
    ('{"vote": "a"}', "pair_id: "),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[str(change)[:40] for change, _ in BAD])
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, change, named):
    bad = change if isinstance(change, str) else json.dumps({"pair_id": "ccc", "vote": "a", **change})
    path = tmp_path / "ann.jsonl"
    path.write_text(jsonl() + bad + "\n")
    with pytest.raises(VotesError, match="Nothing was imported") as error:
        read_votes(path)
    assert f"ann.jsonl:3: {named}" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("seconds", ["Infinity", "nan", "-3", "1e999", "soon"])
def test_impossible_seconds_in_a_table_are_named_by_row(tmp_path, seconds):
    path = tmp_path / "ann.csv"
    path.write_text(f"pair_id,vote,seconds\naaa,a,2\nbbb,b,{seconds}\n")
    with pytest.raises(VotesError, match=r"ann.csv:3: seconds: "):
        read_votes(path)


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("v.jsonl", b"", "holds no vote"),
        ("v.jsonl", b"\n\n", "holds no vote"),
        ("v.csv", b"", "table is empty"),
        ("v.csv", b"pair_id,vote\n", "holds no vote"),
        ("v.csv", b'pair_id,vote\na,"b\n', "quotation marks"),
        ("v.csv", b"pair_id,vote,vote\na,b,a\n", "given 2 times"),
        ("v.jsonl", jsonl().encode() + b'{"pair_id": "\xff"}', ", line 3: this is not a text in UTF-8"),
        ("v.csv", b"PK\x03\x04\xff\xfe", "not a text in UTF-8"),
    ],
)
def test_a_file_that_is_none_of_votes_is_refused_as_a_whole(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VotesError, match=named):
        read_votes(tmp_path / name)


def test_two_different_votes_on_one_pair_are_refused_with_both_lines_and_the_same_one_twice_counts_once():
    def line(number, **fields):
        return votes_file.Line(f"f:{number}", votes_file.Vote(**({"pair_id": "aaa", "vote": "a"} | fields)))

    assert one_vote_each([line(1), line(2, margin=1), line(3, vote="skip")]) == [line(1)]
    assert one_vote_each([line(1, vote="skip"), line(2, vote="b")]) == [line(2, vote="b")]
    for other in ({"vote": "b"}, {"vote": "tie"}, {"margin": 2}):
        with pytest.raises(VotesError, match=r"f:2: vote: .*f:1"):
            one_vote_each([line(1), line(2, **other)])


def test_a_file_with_an_unknown_pair_is_refused(material, export, voted, tmp_path):
    with pytest.raises(VotesError, match=r"votes.jsonl:2: pair_id: 'feedfeedfeed' is no pair"):
        add(tmp_path, material, export, [voted[0], {"pair_id": "feedfeedfeed", "vote": "a"}])
