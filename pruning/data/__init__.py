"""Datasets as Ultralytics reads them: checks, identity, calibration images."""
