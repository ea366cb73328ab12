"""Where model and data of a run came from, and what they were: revisions, and hashes of their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import dsprune
from dsprune.config import RunConfig
from dsprune.consolidate import sha256
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.tasks import Encoded, TaskData

__all__ = ["Provenance", "collect_provenance"]


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint tells of its origins.

    Attributes:
        facts: for people: versions, sources, revisions, hashes.
        examples: digest of all training and evaluation examples as the model sees them; a run does not go on
            with others.
    """

    facts: dict[str, Any]
    examples: str


def collect_provenance(config: RunConfig, data: TaskData) -> Provenance:
    """Origins of what a run is about to use. On one rank."""
    examples = _digest(data.train, *data.evals.values())
    facts = {
        "dsprune": dsprune.__version__,
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "transformers": transformers.__version__,
        "model": _source(config.model.name, config.model.revision),
        "teacher": _source(config.teacher.path, None) if config.teacher.path else None,
        "data": {
            "task": config.task.name,
            "path": config.data.path,
            "revision": config.data.revision,
            "origins": list(data.origins),
            "examples_sha256": examples,
        },
    }
    return Provenance(facts, examples)


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """A model: the commit of a hub model, the hashes of a folder's weights."""
    source = resolve_source(name)
    folder = Path(source)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
        return {"source": source, "sha256": {path.name: sha256(path) for path in files}}
    config = read_model_config(source, revision)
    return {"source": source, "asked": revision, "commit": getattr(config, "_commit_hash", None)}


def _digest(*splits: Encoded) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"{split.name}/{len(split)}".encode())
        for tensor in split.tensors():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
