"""The code in a worker process, the transfer of its files, and the checks of its nodes."""
