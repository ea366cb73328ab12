"""Will it fit: memory of a run, told from shapes alone, before anything is loaded."""
