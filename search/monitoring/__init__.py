"""Progress, status, trackers, interrupts."""
