"""Export to another runtime's format, and the check of what came out."""
