"""What runs in a worker process, and how its files and nodes come."""
