"""Side-by-side measurements; each prints a table and writes JSON and Markdown below benchmarks/results/."""
