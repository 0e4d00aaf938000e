"""Parameter files: what is refused, and with which words."""

import math
import re
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from telco_nb.analysis.seeds import LEAST_DF
from telco_nb.lora.step import TARGET_MODULES
from telco_nb.study import params
from telco_nb.study.params import ParameterError, config_of, drift_name, load_study, repeat_name, split_run
from telco_nb.study.plan import plan_jobs, run_order, unused_parameters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(params.PARAMS_DIR, tmp_path / "params")
    return tmp_path / "params"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("profile", sorted(path.stem for path in (params.PARAMS_DIR / "profiles").glob("*.yaml")))
def test_a_shipped_profile_names_the_commit_of_a_model_from_the_hub(profile):
    values = load_study(profile).base
    is_hub_id = "/" in values["base_model"]
    assert bool(re.fullmatch("[0-9a-f]{40}", values["base_model_revision"] or "")) is is_hub_id


@pytest.mark.parametrize("profile", ["smoke", "laptop", "overnight", "card", "paper"])
def test_every_shipped_profile_loads(profile):
    study = load_study(profile)
    assert study.configs and study.base["profile"] == profile


def test_the_sixteen_configurations_are_an_orthogonal_array():
    study = load_study("laptop")
    factors = ["target_modules", "rank", "epochs", "learning_rate"]
    rows = [tuple(study.lora[c][f] for f in factors) for c in study.configs]
    assert len(rows) == len(set(rows)) == 16
    for i in range(4):
        for j in range(i):
            pairs = [(row[i], row[j]) for row in rows]
            assert len({pairs.count(pair) for pair in pairs}) == 1, (factors[i], factors[j])


def test_the_papers_profile_has_its_ranks_and_2_4_and_7_target_modules_in_a_balanced_design():
    study = load_study("paper")
    modules = {name: len(TARGET_MODULES[name]) for name in ("qv", "attention", "all")}
    rows = [study.lora[config] for config in study.configs]
    factors = [(row["rank"], modules[row["target_modules"]], row["epochs"], row["learning_rate"]) for row in rows]
    assert len(rows) == len(set(factors)) == 16
    assert {row[0] for row in factors} == {16, 32} and {row[1] for row in factors} == {2, 4, 7}
    for i, j in combinations(range(4), 2):  # proportional frequencies: no factor says anything about another
        pairs = [(row[i], row[j]) for row in factors]
        for a, b in pairs:
            alone = sum(row[i] == a for row in factors) * sum(row[j] == b for row in factors)
            assert pairs.count((a, b)) * 16 == alone
    trained = [job.parameters["rank"] for job in plan_jobs(study) if job.step == "03_train"]
    assert len(trained) == 21 and set(trained) == {16, 32}


def test_a_folder_of_configurations_that_does_not_exist_is_refused_by_name(folder):
    edit(folder / "profiles" / "paper.yaml", "lora_folder: lora-paper", "lora_folder: lora-mine")
    with pytest.raises(ParameterError, match=r"configs: there is no .*lora-mine/p01\.yaml. Known: none"):
        load_study("paper", folder)


def test_second_seeds_are_answered_and_judged_but_not_shown_to_voters(folder):
    text = (folder / "judges" / "panel.yaml").read_text()
    study = load_study("overnight", folder)
    assert study.repeats == [f"{c}-seed1" for c in ("c01", "c02", "c06", "c08", "c11", "c15")]
    jobs = {job.id: job for job in plan_jobs(study)}
    assert all(f"{run}/04_energy" in jobs for run in study.repeats)
    judge = jobs["judge-checklist/05_judge"]
    assert judge.parameters["configs"] == [*study.configs, *study.repeats]
    assert {f"{run}/04_energy" for run in study.repeats} < set(judge.depends)
    assert "language_model_panel" in text and study.values("judge-panel")["configs"] == study.configs


def trained(folder: Path) -> list[str]:
    return [job.scope for job in plan_jobs(load_study("laptop", folder)) if job.step == "03_train"]


def test_configurations_train_in_an_order_drawn_with_the_seed_and_repeats_after_them(folder):
    first, study = trained(folder), load_study("laptop", folder)
    assert first == trained(folder) and first[:16] != study.configs == sorted(first[:16])
    assert first[16:] == [*study.repeats, "c01-drift"]
    edit(folder / "base.yaml", "seed: 20260605", "seed: 1")
    assert trained(folder) != first


@pytest.mark.parametrize("n", [1, 3, 4, 7, 16, 21])
def test_each_block_of_the_order_has_one_configuration_of_each_part_of_the_design(n):
    configs, size, firsts = [f"c{i:02d}" for i in range(n)], math.isqrt(n), set()
    parts = [configs[i : i + size] for i in range(0, n, size)]
    for seed in range(20):
        order, place = run_order(list(configs), seed), 0
        assert sorted(order) == configs
        for i in range(size):
            wanted = [j for j, part in enumerate(parts) if i < len(part)]
            block = order[place : place + len(wanted)]
            assert sorted(configs.index(config) // size for config in block) == wanted
            place += len(block)
        firsts.add(order[0])
    assert n < 4 or len(firsts) > 3, "an order that is always the same is no lot"


def test_the_configuration_that_shows_the_drift_is_trained_first_and_with_its_seed_once_more_last(folder):
    study = load_study("laptop", folder)
    order, last = trained(folder), study.values("c01-drift")
    assert (order[0], order[-1]) == ("c01", "c01-drift") and order.count("c01") == 1
    assert last | {"scope": "c01"} == study.values("c01")
    jobs = {job.id: job for job in plan_jobs(study)}
    assert "c01-drift/04_energy" not in jobs and "c01-drift/03_train" in jobs["study/06_analysis"].depends
    assert load_study("laptop", folder, ["c02", "c03"]).drift_runs == []


def test_a_drift_of_a_configuration_that_does_not_exist_is_refused(folder):
    edit(folder / "profiles" / "laptop.yaml", "drift_config: c01", "drift_config: c99")
    with pytest.raises(ParameterError, match=r"drift_config: there is no .*c99\.yaml. Known: c01"):
        load_study("laptop", folder)


def test_what_a_wall_meter_shows_is_typed_into_the_notebook_and_no_file(folder):
    edit(folder / "base.yaml", "idle_share: 0.3", "external_wh: 3.0\nidle_share: 0.3")
    with pytest.raises(ParameterError, match=r"base\.yaml:\d+: external_wh: unknown key here"):
        load_study("laptop", folder)


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_lora_alpha_is_twice_the_rank_everywhere(profile):
    study = load_study(profile)
    assert all(study.lora[c]["lora_alpha"] == 2 * study.lora[c]["rank"] for c in study.configs)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("learning_rate: 1e-4", "Write 1.0e-4"),
        ("learning_rate: yes", "Write true or false"),
        ("rank: 016", "Write 16 without the leading zero"),
        ("rank: 1:30", "base-60"),
        ("rank: 8.0", "valid integer"),
        ("rank: '8'", "valid integer"),
        ("rank: true", "valid integer"),
        ("rank: 0", "greater than or equal to 1"),
        ("learning_rate: null", "valid number"),
        ("target_modules: everything", "'qv'"),
        ("rank: [8]", "valid integer"),
        ("rank: {a: 1}", "flat keys"),
        ("ranks: 8", "unknown key"),
        ("glossary_path: other.yaml", "unknown key"),
        ("rank: 8\nrank: 8", "stands twice"),
        ("rank: [", "not readable as YAML"),
        ("- 1", "mapping"),
    ],
)
def test_a_faulty_line_is_refused_with_file_key_and_fix(folder, text, fix):
    (folder / "lora" / "c03.yaml").write_text(text + "\n")
    with pytest.raises(ParameterError) as error:
        load_study("laptop", folder)
    assert "c03.yaml" in str(error.value) and fix in str(error.value)
    key = text.split(":")[0]
    assert text in ("- 1", "rank: [") or key in str(error.value)  # these two have no readable key


def test_a_missing_profile_names_those_that_exist(folder):
    with pytest.raises(
        ParameterError, match=r"profiles/nope\.yaml: no such file.*card, laptop, overnight, paper, paper-pilot, smoke"
    ):
        load_study("nope", folder)


def test_a_missing_value_names_the_key_and_where_to_add_it(folder):
    edit(folder / "base.yaml", "max_length: 512", "# max_length: 512")
    with pytest.raises(ParameterError, match=r"max_length: no value is given. Add the key to params/base\.yaml"):
        load_study("laptop", folder)


def test_an_unknown_configuration_or_judge_is_refused(folder):
    edit(folder / "base.yaml", "judges: [checklist]", "judges: [checklist, oracle]")
    with pytest.raises(ParameterError, match=r"judges: there is no .*oracle\.yaml. Known: checklist"):
        load_study("laptop", folder)


def test_two_equal_configurations_are_refused(folder):
    shutil.copy(folder / "lora" / "c02.yaml", folder / "lora" / "c17.yaml")
    with pytest.raises(ParameterError, match=r"c17\.yaml: the same configuration as c02\.yaml"):
        load_study("laptop", folder)


def test_a_configuration_listed_twice_is_refused(folder):
    edit(folder / "profiles" / "smoke.yaml", "configs: [c01,", "configs: [c01, c01,")
    with pytest.raises(ParameterError, match="configs: c01 is listed twice"):
        load_study("smoke", folder)


def test_watts_out_of_order_are_refused(folder):
    edit(folder / "base.yaml", "cpu_watts_per_core_low: 2.0", "cpu_watts_per_core_low: 7.0")
    with pytest.raises(ParameterError, match="low <= mid <= high"):
        load_study("laptop", folder)


def test_a_whole_number_is_accepted_where_a_float_is_meant(folder):
    edit(folder / "base.yaml", "weight_decay: 0.0", "weight_decay: 0")
    assert load_study("laptop", folder).base["weight_decay"] == 0


def test_every_given_parameter_is_declared_by_a_notebook_and_the_other_way_round():
    study = load_study("laptop")
    assert unused_parameters(study) == []
    assert len(plan_jobs(study)) == 3 + 2 * 16 + 2 * len(study.repeats) + len(study.drift_runs) + 1 + 1


def test_the_notebooks_defaults_are_the_smoke_values():
    study = load_study("smoke")
    for job in plan_jobs(study):
        if job.scope in ("shared", "c01", "judge-checklist", "study"):
            assert params.declared(job.step) == job.parameters, job.id


def test_no_secret_can_be_a_parameter():
    words = ("key", "token_", "secret", "password")
    assert not [n for n in params.Parameters.model_fields if any(w in n for w in words)]


def test_base_yaml_explains_every_key():
    lines = (params.PARAMS_DIR / "base.yaml").read_text().splitlines()
    keys = yaml.safe_load("\n".join(lines))
    assert set(keys) == set(params.Parameters.model_fields) - params.RUNNER_KEYS - {"profile"}


@pytest.mark.parametrize(
    "name",
    [
        "tie", "untuned", "gold", "reference", "template", "echo", "nearest", "shared", "study", "report", "judge-x",
        "votes", "store", "c01-seed9", "c01-seedx", "a-seed", "c01-drift", "C01", "c 1", "c01.x", "-c",
    ],
)  # fmt: skip
def test_a_configuration_whose_name_means_something_else_is_refused_with_its_file(folder, name):
    (folder / "lora" / f"{name}.yaml").write_text("rank: 3\n")
    with pytest.raises(ParameterError, match=rf"{name}\.yaml: a configuration cannot be called"):
        load_study("laptop", folder)


def test_a_missing_file_of_claims_is_refused_before_anything_runs(folder):
    edit(folder / "base.yaml", "claims_path: params/claims.yaml", "claims_path: params/nothing.yaml")
    with pytest.raises(ParameterError, match=r"nothing\.yaml: no such file"):
        load_study("laptop", folder)


def test_the_second_seeds_of_the_night_are_balanced_over_the_factors():
    study = load_study("overnight")
    rows = [study.lora[config] for config in study.base["repeat_configs"]]
    assert len(rows) == 6 and {row["target_modules"] for row in rows} == {"qv", "attention", "mlp", "all"}
    for factor in ("rank", "epochs", "learning_rate"):
        levels = [row[factor] for row in rows]
        assert {levels.count(level) for level in levels} == {3}, factor


def test_a_judges_name_is_never_taken_for_a_seed(folder):
    shutil.copy(folder / "judges" / "checklist.yaml", folder / "judges" / "my-seedling.yaml")
    edit(folder / "judges" / "my-seedling.yaml", "judge: checklist", "judge: my-seedling")
    edit(folder / "base.yaml", "judges: [checklist]", "judges: [my-seedling]")
    assert load_study("smoke", folder).values("judge-my-seedling")["judge"] == "my-seedling"


def test_the_name_of_a_repeat_is_put_together_and_taken_apart_in_one_way():
    assert split_run(repeat_name("c06", 1)) == ("c06", 1) and config_of("c06-seed12") == "c06"
    assert split_run(drift_name("c06")) == ("c06", None) and config_of("c06-drift") == "c06"
    for name in ("c06", "untuned", "judge-my-seedling", "judge-a-drift", "c06-seedx"):
        assert split_run(name) == (name, None)


@pytest.mark.parametrize("profile", ["laptop", "overnight", "card", "paper"])
def test_a_shipped_study_repeats_as_many_runs_as_tell_the_luck_of_training(profile):
    base = load_study(profile).base
    assert len(base["repeat_configs"]) * len(base["repeat_seeds"]) >= LEAST_DF


def test_a_seed_of_a_repeat_is_held_to_the_rules_of_a_seed(folder):
    edit(folder / "profiles" / "laptop.yaml", "repeat_seeds: [1]", "repeat_seeds: [-2]")
    with pytest.raises(ParameterError, match="seed: Input should be greater than or equal to 0, got -2"):
        load_study("laptop", folder)


def test_an_offline_judge_with_an_endpoint_is_refused_before_anything_runs(folder):
    edit(folder / "judges" / "checklist.yaml", "judge_endpoint: null", "judge_endpoint: http://127.0.0.1:8000/v1")
    with pytest.raises(ParameterError, match=r"checklist\.yaml: judge_endpoint: a checklist judge works offline"):
        load_study("smoke", folder)
