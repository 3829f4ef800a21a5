"""Full fine-tuning of picks, and their common evaluation."""
