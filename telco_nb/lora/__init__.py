"""Notebooks 03 and 04: base model, packed rows, training step, decoding, energy."""
