"""Surgery and recovery: everything that touches a network."""
