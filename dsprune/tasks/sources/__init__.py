"""Where examples come from: files, folders, splits, their columns and the names of their labels."""
