"""Ultralytics' models and files: loading, saving, tasks, logging, what their outputs mean."""
