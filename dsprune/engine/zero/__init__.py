"""Everything that talks to DeepSpeed. No other room imports it."""
