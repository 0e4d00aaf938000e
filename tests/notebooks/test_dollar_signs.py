"""JupyterLab takes what stands between two dollar signs for mathematics; texts of cards and answers stay text."""

import ast
import html
import json

import pandas as pd
import shipped
from bs4 import BeautifulSoup
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from tiny_chat import tiny_tokenizer

from telco_nb import ROOT, notebook
from telco_nb.corpus import pages
from telco_nb.lora import packing
from telco_nb.study import params
from telco_nb.study.record import JOB_VARIABLE

PRICES = "It costs $25 a month and *never* more than $40."
TALK = [{"role": "user", "content": PRICES}, {"role": "assistant", "content": PRICES}]


def functions(step: str, **names) -> dict:
    """The functions of a notebook, with the names that they need."""
    cells = json.loads((ROOT / "notebooks" / f"{step}.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        defined = [node for node in ast.parse("".join(cell["source"])).body if isinstance(node, ast.FunctionDef)]
        exec(compile(ast.Module(defined, []), step, "exec"), names)
    return names


def test_prices_in_the_texts_of_a_card_are_no_mathematics():
    card = shipped.cards()[0]
    facts = [fact.model_copy(update={"text": PRICES}) for fact in card.facts]
    problem = card.problems[0].model_copy(update={"tells": PRICES, "done": PRICES, "cause": PRICES, "says": [PRICES]})
    shown = functions("01_glossary")
    texts = [shown["card_in_full"](card.model_copy(update={"definition": PRICES, "facts": facts}))]
    texts += [shown["problem_in_full"](problem)]
    for text, times in zip(texts, (1 + len(facts), 4), strict=True):
        assert BeautifulSoup(markdown2html_mistune(text), "html.parser").get_text().count(PRICES) == times
        assert text.count("$") == text.count(r"\$") == 2 * times


def test_prices_in_conversations_answers_and_tokens_are_no_mathematics():
    row = {"messages": TALK, "reference": PRICES, "answer": PRICES}
    row |= {"context": "usual", "split": "test", "scenario_id": "s", "term_id": "", "problem_id": ""}
    card = shipped.cards()[0]
    card = card.model_copy(update={"term": PRICES})
    row |= {"term_id": card.id, "problem_id": card.problems[0].id}
    example = packing.encode_conversation(tiny_tokenizer("chatml"), TALK, "c", 999)
    made = [pages.conversation_html(row), pages.side_by_side({PRICES: row}), pages.browser_html([row], [card], {})]
    made += [packing.example_html(tiny_tokenizer("chatml"), example)]
    made += [functions("04_energy", HTML=str, html=html, scope="c01")["in_columns"](row)]
    for text in made:
        page = BeautifulSoup(text, "html.parser")
        assert page.get_text().count("$") >= 4
        for ignored in page.find_all(class_="mathjax_ignore"):
            ignored.extract()
        assert "$" not in page.get_text(), text


def test_prices_in_a_table_are_no_mathematics(tmp_path, monkeypatch):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    with pd.option_context("display.html.use_mathjax", True):
        notebook.open_run("01_glossary", params.declared("01_glossary"))
        page = BeautifulSoup(pd.DataFrame({"text": [PRICES]})._repr_html_(), "html.parser")
    assert "mathjax_ignore" in page.table["class"]
