"""What comes out: checkpoints to compact model folders, offline, in bounded memory. No DeepSpeed, no engine."""

from dsprune.consolidate import modeling_dsprune, verify
from dsprune.consolidate.compact import (
    EMBEDDING_RANK,
    apply_blocks,
    apply_selection,
    is_stock,
    kept_heads,
    load_compact,
    without_weights,
)
from dsprune.consolidate.export import ConsolidationReport, consolidate, open_checkpoint
from dsprune.consolidate.manifest import FORMAT, check_files, find_checkpoint, read_manifest, render_manifest, sha256
from dsprune.consolidate.modeling_dsprune import factor_embedding
from dsprune.consolidate.shards import ShardedTensors, open_moments, open_shards
from dsprune.consolidate.stored import check_stored_shapes
from dsprune.consolidate.tied_heads import auto_with_own_head, own_head_keys, with_own_head

# With dsprune imported, compact folders load through the Auto classes without `trust_remote_code`.
modeling_dsprune.register()

__all__ = [
    "EMBEDDING_RANK",
    "FORMAT",
    "ConsolidationReport",
    "ShardedTensors",
    "apply_blocks",
    "apply_selection",
    "auto_with_own_head",
    "check_files",
    "check_stored_shapes",
    "consolidate",
    "factor_embedding",
    "find_checkpoint",
    "is_stock",
    "kept_heads",
    "load_compact",
    "open_checkpoint",
    "open_moments",
    "open_shards",
    "own_head_keys",
    "read_manifest",
    "render_manifest",
    "sha256",
    "verify",
    "with_own_head",
    "without_weights",
]
