"""Model families as data."""

from dsprune.arch.spec import FamilySpec, StackSpec, SublayerSpec, family_for, list_families, load_family

__all__ = ["FamilySpec", "StackSpec", "SublayerSpec", "family_for", "list_families", "load_family"]
