"""What to try next: initial plans, the Optuna study, the Gaussian process behind it, its observations."""
