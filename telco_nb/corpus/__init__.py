"""Cards, scenarios, conversations, filters and splits: the code of notebooks 01 and 02."""
