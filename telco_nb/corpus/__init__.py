"""Notebooks 01 and 02: cards, scenarios, conversations, filters, splits."""
