"""The official figures of predictions."""
