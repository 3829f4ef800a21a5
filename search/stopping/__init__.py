"""When a trial is stopped early."""
