"""The Pareto front, picks from it, and how certain an order is."""
