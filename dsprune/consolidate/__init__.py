"""What comes out: checkpoints to compact model folders, offline, in bounded memory. No DeepSpeed, no engine."""

from dsprune.consolidate import modeling_dsprune
from dsprune.consolidate.compact import apply_selection, load_compact
from dsprune.consolidate.export import ConsolidationReport, consolidate, open_checkpoint
from dsprune.consolidate.manifest import find_checkpoint, read_manifest

# With dsprune imported, compact folders load through the Auto classes without `trust_remote_code`.
modeling_dsprune.register()

__all__ = [
    "ConsolidationReport",
    "apply_selection",
    "consolidate",
    "find_checkpoint",
    "load_compact",
    "open_checkpoint",
    "read_manifest",
]
