"""The runner: what runs, in which order, in which process, and how its record is kept."""
