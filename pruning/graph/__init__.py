"""Which channels belong together: tracing, the layer table, the geometry."""
