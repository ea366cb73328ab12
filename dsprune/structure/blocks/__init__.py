"""Blocks of weight matrices as units: their grid, what they cost, gates on them, the final choice of them."""
