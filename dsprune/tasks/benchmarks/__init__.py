"""Tasks whose data, columns, labels and metrics are known by a name."""
