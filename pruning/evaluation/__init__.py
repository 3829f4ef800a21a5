"""Accuracy, and how certain a difference in it is."""
