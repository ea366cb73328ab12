"""Models that the methods' authors' own code left, as compact folders: `dsprune import`."""

from dsprune.migrate.adoption import METHODS, Origin, adopt

__all__ = ["METHODS", "Origin", "adopt"]
