"""What an exported folder says to somebody who has transformers and no dsprune: predictions by the names of labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dsprune.tasks.kinds.tokens import entity_scores
from tests.helpers.stranger import run_stranger

PREDICT = """
import json, os, sys
import torch
import transformers
from transformers import AutoTokenizer
transformers.logging.set_verbosity_error()
out, head, inputs, *folders = sys.argv[1:]
texts = json.loads(open(inputs).read())
said = {}
for folder in folders:
    auto = getattr(transformers, f"AutoModel{head}")
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    card = os.path.join(folder, "README.md")
    if os.path.exists(card):  # says how both are loaded
        code = open(card).read().partition("```python")[2].partition("```")[0]
        exec(code.replace("THIS_FOLDER", folder))
    model.eval()
    said[folder] = []
    for text in texts:
        words = {"is_split_into_words": True} if isinstance(text[0], list) else {}
        encoded = tokenizer(*text, truncation=True, max_length=32, return_tensors="pt", **words)
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        if words:
            names, seen = ["O"] * len(text[0]), set()
            for place, word in enumerate(encoded.word_ids()):
                if word is not None and word not in seen:
                    seen.add(word)
                    names[word] = model.config.id2label[int(logits[place].argmax())]
            said[folder].append(names)
        elif model.config.num_labels == 1:
            said[folder].append(float(logits))
        else:
            said[folder].append(model.config.id2label[int(logits.argmax())])
open(out, "w").write(json.dumps(said))
"""


def predict(folders: Sequence[Path], texts: Sequence[Sequence[Any]], head: str, work: Path) -> dict[Path, list[Any]]:
    """What models of plain transformers say of each example: the name of a label, one for each word, or a number.

    Args:
        folders: of the models.
        texts: of each example: one text, two, or a list of words.
        head: as tasks name it.
        work: folder for files.
    """
    (work / "texts.json").write_text(json.dumps([list(text) for text in texts]))
    run_stranger(PREDICT, work, work / "said.json", head, work / "texts.json", *folders)
    said = json.loads((work / "said.json").read_text())
    return {folder: said[str(folder)] for folder in folders}


def measure(metric: str, truth: Sequence[Any], said: Sequence[Any], positive: str | None = None) -> float:
    """A metric of predictions by name.

    Args:
        metric: as tasks name it.
        truth: names of labels, lists of them, or numbers.
        said: likewise.
        positive: the label that F1 is about.
    """
    scorers: Mapping[str, Any] = {
        "accuracy": accuracy_score,
        "mcc": matthews_corrcoef,
        "pearson": lambda a, b: pearsonr(a, b).statistic,
        "spearman": lambda a, b: spearmanr(a, b).statistic,
    }
    if metric == "f1":
        if truth and isinstance(truth[0], list):
            return entity_scores(said, truth)["f1"]
        return float(f1_score(truth, said, pos_label=positive))
    return float(scorers[metric](truth, said))


PERPLEXITY = """
import json, sys
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
out, batch, *folders = sys.argv[1:]
batch, said = load_file(batch), {}
labels = batch.pop("labels")
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), ignore_index=-100)
    said[folder] = float(loss.exp())
open(out, "w").write(json.dumps(said))
"""


def perplexities(folders: Sequence[Path], batch: Mapping[str, Any], work: Path) -> dict[Path, float]:
    """Perplexity per token of models of plain transformers.

    Args:
        folders: of the models.
        batch: arguments of the model, and `labels`: the token that follows each, -100 where none is wanted.
        work: folder for files.
    """
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, work / "batch.safetensors")
    run_stranger(PERPLEXITY, work, work / "said.json", work / "batch.safetensors", *folders)
    said = json.loads((work / "said.json").read_text())
    return {folder: said[str(folder)] for folder in folders}


WRITE = """
import json, sys
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
transformers.logging.set_verbosity_error()
out, batch, count, *folders = sys.argv[1:]
batch, said = load_file(batch), {}
for folder in folders:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    written = model.generate(**batch, max_new_tokens=int(count), do_sample=False, num_beams=1)
    said[folder] = tokenizer.batch_decode(written, skip_special_tokens=True)
open(out, "w").write(json.dumps(said))
"""


def write(folders: Sequence[Path], batch: Mapping[str, Any], count: int, work: Path) -> dict[Path, list[str]]:
    """Texts that encoder-decoders of plain transformers write, with the settings of generation in their folders.

    Args:
        folders: of the models.
        batch: arguments of the model.
        count: tokens at which writing stops.
        work: folder for files.
    """
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, work / "batch.safetensors")
    run_stranger(WRITE, work, work / "said.json", work / "batch.safetensors", count, *folders)
    said = json.loads((work / "said.json").read_text())
    return {folder: said[str(folder)] for folder in folders}
