"""The strategies side by side."""
