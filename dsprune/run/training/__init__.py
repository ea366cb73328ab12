"""One training stage from its first step, or its newest checkpoint, to the checkpoint that it leaves."""
