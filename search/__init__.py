"""The search room: command line, configuration, space, searcher, trial, sweep and promotion of picks.

It is a function as well: `paretoprune.search("my.pt", "data.yaml", trials=30)`, see `search.api.runs`.
"""
