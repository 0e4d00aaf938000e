"""Notebook 05: judges, protocol, gate, store of verdicts, ranking."""
