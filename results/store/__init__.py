"""Records, the run folder and its files."""
