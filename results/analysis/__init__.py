"""What a run's records say, as values and tables."""
