"""What a run leaves behind: records, Pareto front, selection, figures and the report. Plain data in, no torch."""
