"""One run, from a command line to its report: stages, their order, and what stands in the run folder meanwhile."""
