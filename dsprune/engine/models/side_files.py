"""What belongs to a model beside its weights and its configuration, and is in every folder that a run leaves.

Which files these are is known from what transformers writes and reads: settings of generation, chat templates, the
vocabulary in the tokenizer's own formats, processors. Never weights, never code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    FEATURE_EXTRACTOR_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

__all__ = ["copy_side_files"]

PROCESSOR_FILES = (
    PROCESSOR_NAME,
    FEATURE_EXTRACTOR_NAME,
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
)
TEMPLATE_FILES = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE)
VOCABULARY_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Vocabularies of the supported families in their first formats, which other runtimes read. A tokenizer that is loaded
tells of its own class alone, and the class that serves a folder need not be the one that its files were made for."""


def copy_side_files(
    tokenizer_source: str, model_source: str, tokenizer: PreTrainedTokenizerBase, out: Path, *, revision: str | None
) -> None:
    """Write everything that belongs to a model beside its weights and its configuration into a folder.

    Args:
        tokenizer_source: folder or hub id that the tokenizer came from.
        model_source: folder or hub id that the weights came from; it has the say on how the model generates.
        tokenizer: that the model was trained with; written as it is now.
        out: an existing folder.
        revision: of the hub, for `tokenizer_source`, and for `model_source` where it is the same.
    """
    vocabulary = {name for cls in type(tokenizer).__mro__ for name in getattr(cls, "vocab_files_names", {}).values()}
    names = {*PROCESSOR_FILES, *TEMPLATE_FILES, *TOKENIZER_FILES, *VOCABULARY_FILES, *vocabulary}
    _copy(tokenizer_source, revision, sorted({*names, GENERATION_CONFIG_NAME}), out)
    if model_source != tokenizer_source:
        _copy(model_source, None, [GENERATION_CONFIG_NAME], out)
    tokenizer.save_pretrained(out)


def _copy(source: str, revision: str | None, names: list[str], out: Path) -> None:
    templates = f"{CHAT_TEMPLATE_DIR}/*.jinja"
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*names, templates]))
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    for path in sorted(folder.glob(templates)):
        (out / CHAT_TEMPLATE_DIR).mkdir(exist_ok=True)
        shutil.copyfile(path, out / CHAT_TEMPLATE_DIR / path.name)
