"""Cuts to a budget, in one step or in several."""
