"""Recovery without a gradient step."""
