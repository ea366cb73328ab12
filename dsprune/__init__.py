"""dsprune: structured pruning of transformers at the scale of a cluster, on DeepSpeed.

The public names of the library. Importing them needs neither DeepSpeed nor a GPU; once `dsprune` is
imported, compact folders load through `transformers`' Auto classes without `trust_remote_code`.

    structure = analyze(model)              # a model's prunable spaces
    gating = attach_gates(model, structure) # gates on a live model
    CostModel(structure).parameters(gates)  # what a choice costs
    selection = Selection.from_gates(structure, gates)
    compact = apply_selection(model, selection)
    consolidate("runs/demo", "compact")     # checkpoint -> Hugging Face folder
    model = load_compact("compact")
"""

from dsprune.arch import list_families
from dsprune.consolidate import apply_selection, consolidate, load_compact
from dsprune.errors import DspruneError
from dsprune.structure import CostModel, Selection, Structure, analyze, attach_gates, ones

__version__ = "0.1.0"

__all__ = [
    "CostModel",
    "DspruneError",
    "Selection",
    "Structure",
    "__version__",
    "analyze",
    "apply_selection",
    "attach_gates",
    "consolidate",
    "list_families",
    "load_compact",
    "ones",
]
