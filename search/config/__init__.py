"""A run's configuration: its sections, the file, the inputs it names."""
