"""Static rules for the six notebooks: what a reader may rely on without running them."""

import ast
import json
from itertools import pairwise

import papermill
import pytest

from telco_nb.study import params
from telco_nb.study.plan import STEPS

NOTEBOOKS = sorted(params.NOTEBOOKS_DIR.glob("*.ipynb"))


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_lengths(path) -> list[int]:
    """Lines of every code cell but that of the parameters, which has one line for each of them."""
    cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]
    return [len(cell["source"]) for cell in cells if "parameters" not in cell["metadata"].get("tags", [])]


def test_at_most_one_code_cell_in_ten_has_more_than_12_lines():
    lengths = [n for path in NOTEBOOKS for n in code_lengths(path)]
    assert sum(n > 12 for n in lengths) <= len(lengths) / 10


def test_the_main_line_of_05_has_at_most_28_cells():
    titles = ["".join(cell["source"]) for cell in load(params.NOTEBOOKS_DIR / "05_judge.ipynb")["cells"]]
    assert next(i for i, title in enumerate(titles) if title.startswith("## Second looks")) <= 28


def test_there_are_exactly_the_six_notebooks_of_the_plan():
    assert [p.stem for p in NOTEBOOKS] == list(STEPS)


def test_every_loading_of_a_base_model_names_its_revision():
    """Else a hub model is the newest one in one cell and the pinned one in another."""
    loaders = ("load_model", "model_shell", "load_tokenizer", "TrainingSpec")
    found = 0
    for path in NOTEBOOKS:
        cells = ["".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "code"]
        for node in (node for cell in cells for node in ast.walk(ast.parse(cell.replace("%", "#")))):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if isinstance(node, ast.Call) and name in loaders:
                found += 1
                assert "base_model_revision" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
    assert found >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_there_is_one_title_and_no_level_of_headings_is_skipped(self, path):
        text = "\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        levels = [len(line.split()[0]) for line in text.splitlines() if line.startswith("#")]
        assert levels.count(1) == 1 and all(low <= high + 1 for high, low in pairwise(levels))

    def test_no_outputs_and_no_counts_are_stored(self, path):
        for cell in load(path)["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_the_first_cell_asks_a_question_and_says_what_it_reads_writes_and_takes(self, path):
        first = load(path)["cells"][0]
        text = "".join(first["source"])
        assert first["cell_type"] == "markdown"
        assert text.startswith("# ") and text.splitlines()[0].endswith("?")
        assert all(f"**{word}**" in text for word in ("Reads", "Writes", "Takes"))

    def test_papermill_knows_every_parameter_so_that_no_log_calls_one_unknown(self, path, caplog):
        """It reads none from a line whose comment holds a sign of equality."""
        assert set(papermill.inspect_notebook(str(path))) == set(params.declared(path.stem)) and not caplog.text

    def test_parameters_setup_and_results_are_tagged_once_in_this_order(self, path):
        tags = [t for c in load(path)["cells"] for t in c["metadata"].get("tags", []) if t != "interactive"]
        assert tags == ["parameters", "setup", "results"]

    def test_every_parameter_is_a_commented_literal(self, path):
        for line in params.parameters_cell(path).splitlines():
            assert "  # " in line, line
        assert params.declared(path.stem)

    def test_code_cells_are_short(self, path):
        assert max(code_lengths(path)) <= 20

    def test_no_line_is_wider_than_120_columns(self, path):
        wide = [line for cell in load(path)["cells"] for line in cell["source"] if len(line.rstrip("\n")) > 120]
        assert wide == []

    def test_code_never_asks_for_input_and_never_runs_a_shell(self, path):
        for cell in load(path)["cells"]:
            if cell["cell_type"] == "code":
                tree = ast.parse("".join(cell["source"]))
                names = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
                assert not names & {"input", "exec", "eval", "__import__"}

    def test_interactive_cells_do_nothing_in_batch(self, path):
        for cell in load(path)["cells"]:
            if "interactive" in cell["metadata"].get("tags", []):
                (only,) = ast.parse("".join(cell["source"])).body
                assert isinstance(only, ast.If) and ast.unparse(only.test) == "not run.batch" and not only.orelse

    def test_no_more_than_two_code_cells_follow_each_other_without_prose(self, path):
        run = 0
        for cell in load(path)["cells"]:
            run = run + 1 if cell["cell_type"] == "code" and not cell["metadata"].get("tags") else 0
            assert run <= 2, "".join(cell["source"])[:80]

    def test_links_to_neighbours_resolve(self, path):
        import re

        text = "\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#]+\.ipynb)\)", text):
            assert (path.parent / target).is_file(), target
