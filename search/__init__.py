"""The search room: command line, configuration, space, searcher, trial, sweep and promotion of picks."""
