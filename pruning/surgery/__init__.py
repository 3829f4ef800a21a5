"""Removal of channels, and the proof that the network computes what it should."""
