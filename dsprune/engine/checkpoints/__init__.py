"""Checkpoints while training: saved whole, found, verified, resumed, converted."""
