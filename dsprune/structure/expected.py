"""What gates keep on average, where each is the probability that its unit is kept, independently of the others.

For gates in {0, 1} these are the numbers of units that are left.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsprune.structure.gating import by_head

__all__ = ["expected_alive", "expected_heads", "expected_rows", "expected_units", "expected_writes"]


def expected_rows(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Chance that an output row is written, the sublayer being there: [L, d] for `attn` and `ffn`."""
    return {kind: full[f"{kind}_row"] * full["hidden"] for kind in ("attn", "ffn")}


def expected_writes(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Chance that a sublayer is there and has a row to write: [L] for `attn` and `ffn`."""
    return {kind: full[kind] * (1 - (1 - rows).prod(-1)) for kind, rows in expected_rows(full).items()}


def expected_units(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expected number of units by kind and layer, coarse gates included: [L] each."""
    num_heads = full["head"].shape[-1]
    per_head = {kind: by_head(full[kind], num_heads).sum(-1) for kind in ("qk_dim", "vo_dim")}
    writes = expected_writes(full)
    return {
        "qk_dim": writes["attn"] * (expected_heads(full) * per_head["qk_dim"]).sum(-1),
        "vo_dim": writes["attn"] * (full["head"] * per_head["vo_dim"]).sum(-1),
        "ffn_dim": writes["ffn"] * full["ffn_dim"].sum(-1),
    }


def expected_heads(full: Mapping[str, Tensor]) -> Tensor:
    """Chance that a head (or group) has a value dimension: [L, heads]."""
    head = full["head"]
    return head * (1 - (1 - by_head(full["vo_dim"], head.shape[-1])).prod(-1))


def expected_alive(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Chance that a sublayer has a unit and a row: [L] each."""
    writes = expected_writes(full)
    return {
        "attn": writes["attn"] * (1 - (1 - expected_heads(full)).prod(-1)),
        "ffn": writes["ffn"] * (1 - (1 - full["ffn_dim"]).prod(-1)),
    }
