"""The stages of a run, one a file, each finished once."""
