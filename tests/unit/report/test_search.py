"""What of a notebook's page can be searched."""

from pathlib import Path

from telco_nb.report import search
from telco_nb.report.files import Page

PAGE = Page("c01", "03_train", False, Path("c01/03_train.ipynb"))


def test_a_page_is_cut_at_its_headings_and_its_code_is_left_out():
    body = (
        "<h1>What does it learn?</h1><p>First &amp; last.</p>"
        "<details class='code'><summary>code</summary><pre>loss.backward()</pre></details>"
        '<h2 id="part-1">The <em>loss</em></h2><table><tr><td>1.5</td><td>nats</td></tr></table>'
        '<h2 id="part-2">Record</h2><details class="code"><pre>run.finish()</pre></details>'
    )
    common = {"page": "c01-03_train.html", "step": "03_train", "scope": "c01"}
    assert search.parts_of(PAGE, body) == [
        common | {"anchor": "", "title": "", "text": "What does it learn? First & last."},
        common | {"anchor": "part-1", "title": "The loss", "text": "1.5 nats"},
    ]


def test_a_failed_attempt_is_called_one():
    failed = Page("c01", "03_train", True, Path("c01/03_train.failed.ipynb"))
    assert search.parts_of(failed, "<p>It ended here.</p>")[0]["step"] == "03_train (failed)"
