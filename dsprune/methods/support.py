"""Which method prunes which family, and why not where it does not.

The reasons are those that refuse a run before it starts: they stand with the families (`FamilySpec.refusal`),
and the table of the README is made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsprune.arch import FamilySpec, list_families, load_family
from dsprune.methods import method_class

__all__ = ["VARIANTS", "Variant", "families_table", "refusal"]


@dataclass(frozen=True)
class Variant:
    """A method with options that decide what it gates; no method name is step 2 of MLPruning, the blocks."""

    title: str
    method: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("CoFi", "cofi"),
    Variant("GRAIN", "grain"),
    Variant('GRAIN, `units = "heads"`', "grain", {"units": "heads"}),
    Variant("MLPruning", "mlpruning"),
    Variant("MLPruning, `[blocks]`", None),
    Variant("Fisher", "fisher"),
)


def refusal(variant: Variant, family: FamilySpec) -> str | None:
    """Why a method cannot prune a family; None where it can."""
    if variant.method is None:
        return family.blocks_refusal
    cls = method_class(variant.method)
    return family.refusal(cls.kinds_of(cls.Options(**variant.options)))


def families_table() -> str:
    """Families and methods as a Markdown table, with the reasons for its gaps below."""
    header = ["family", "model types", "heads", *(variant.title for variant in VARIANTS)]
    rows, reasons = [], []
    for name in list_families():
        family = load_family(name)
        cells = []
        for variant in VARIANTS:
            reason = refusal(variant, family)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        rows.append([name, ", ".join(family.model_types), ", ".join(family.heads), *cells])
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*(f"| {line} |" for line in lines), *([""] if notes else []), *notes])
