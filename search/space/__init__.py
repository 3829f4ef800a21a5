"""The search space, its constraints, and the latency predicted in it."""
