"""A recipe's run, from its data to its card."""
