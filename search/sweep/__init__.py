"""One sweep: what is checked before it, its state, Ray Tune's view of it, what ends it."""
