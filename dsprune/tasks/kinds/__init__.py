"""Kinds of tasks: how examples become inputs, what a model answers, how that is scored; with data of one's own."""
