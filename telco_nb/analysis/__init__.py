"""Notebook 06: statistics, findings, figures."""
