"""The ranks of a run: how they meet, agree, stop, and tell where they are."""
