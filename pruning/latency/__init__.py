"""Latency beside the unpruned network: measurement, statistics, prediction; the runtimes."""
