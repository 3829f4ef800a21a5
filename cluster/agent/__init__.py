"""A device without Ray: the agent that runs there (one file, standard library), and the client that asks it."""
