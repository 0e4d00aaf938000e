"""Errors of side commands: one line, the documented exit code, and nothing lost."""

import os

import pytest
import typer

from telco_nb.commands import votes
from telco_nb.commands.common import CommandError, errors_as_exit_codes
from telco_nb.commands.export_folder import whole_folder
from telco_nb.engine import runner
from telco_nb.lora.errors import ModelError, PreflightError


@pytest.mark.parametrize("kind", [PreflightError, ModelError])
def test_a_model_that_cannot_be_used_ends_a_command_with_exit_code_3(kind, capsys):
    with pytest.raises(typer.Exit) as ended, errors_as_exit_codes("chat"):
        raise kind("the adapter does not fit. Train again.")
    assert ended.value.exit_code == runner.UNFIT
    assert capsys.readouterr().err == "chat: the adapter does not fit. Train again.\n"


def test_an_earlier_export_is_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "c01-peft"
    for text in ("old", "new"):
        with whole_folder(folder, "card.md", replace=True) if text == "old" else _failing(folder, monkeypatch) as new:
            (new / "card.md").write_text(text)
    assert (folder / "card.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["c01-peft"]


class _failing:
    """`whole_folder` whose second rename, of the new folder, fails."""

    def __init__(self, folder, monkeypatch):
        self.inner, self.rename = whole_folder(folder, "card.md", replace=True), os.replace
        monkeypatch.setattr(os, "replace", self._replace)

    def _replace(self, source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        self.rename(source, target)

    def __enter__(self):
        return self.inner.__enter__()

    def __exit__(self, *error):
        with pytest.raises(OSError, match="No space left"):
            self.inner.__exit__(*error)


def test_a_folder_in_place_of_the_file_of_pairs_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(votes, "open_study", lambda *words: None)
    with pytest.raises(CommandError, match=r"is a folder\. Name a file"):
        votes.export_pairs(tmp_path, tmp_path, 10, 1)
