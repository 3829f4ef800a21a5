"""The commands, grouped by what they work on: models, runs, picks, the machine."""
