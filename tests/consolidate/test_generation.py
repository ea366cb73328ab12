"""Compact decoders write what masked ones write: with the key/value cache, left padding and layers of unequal sizes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsprune.consolidate import apply_selection, consolidate, load_compact
from dsprune.structure import Selection, analyze, attach_gates
from tests.helpers.checkpoints import write_run
from tests.helpers.models import DECODERS, ENCODER_DECODERS, tiny_batch, tiny_model
from tests.helpers.selections import awkward_gates, random_gates
from tests.helpers.stranger import run_stranger

CASES = (
    "a whole layer gone",
    "only the last attention left",
    "coarse gates off",
    "a head without queries",
    "everything gone",
    "hard 1",
    "soft 2",
)
LENGTH = 8


def _prompts():
    batch = tiny_batch()
    mask = batch["attention_mask"].flip(1)  # padding on the left
    return {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}


def _write(model, **options):
    """Tokens and logits of greedy decoding."""
    out = model.generate(
        **_prompts(),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("empty", ["identity", "bias"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_masked_and_compact_decoders_write_the_same(name, empty):
    model = tiny_model(name)
    structure = analyze(model)
    cases = dict(awkward_gates(structure)) | {"hard 1": random_gates(structure, 1)}
    cases["soft 2"] = random_gates(structure, 2, soft=True)
    for label in CASES:
        selection = Selection.from_gates(structure, cases[label], empty=empty)
        compact = apply_selection(model, selection)
        gating = attach_gates(model, structure, empty=empty)
        gating.set(selection.gates)
        tokens, logits = _write(model)
        gating.remove()
        for options in ({}, {"use_cache": False}):
            ours, theirs = _write(compact, **options)
            assert torch.equal(ours, tokens), label
            torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5, msg=label)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_every_attention_implementation_writes_the_same(name, attention, tmp_path):
    model = tiny_model(name)
    structure = analyze(model)
    compact = apply_selection(model, Selection.from_gates(structure, random_gates(structure, 2)))
    compact.save_pretrained(tmp_path)
    loaded = load_compact(tmp_path, attn_implementation=attention).eval()
    assert torch.equal(_write(loaded)[0], _write(compact)[0])


STRANGERS = ("llama-biased", "qwen3", "gpt2", "t5", "flan-t5")

STRANGER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
root, names = sys.argv[1], sys.argv[2:]
prompts = load_file(f"{root}/prompts.safetensors")
for name in names:
    folder = f"{root}/{name}"
    auto = AutoModelForSeq2SeqLM if name.endswith("t5") else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = model.generate(**prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    model.save_pretrained(f"{folder}-again")
    again = auto.from_pretrained(f"{folder}-again", trust_remote_code=True).eval()
    batch = prompts | ({"decoder_input_ids": prompts["input_ids"]} if name.endswith("t5") else {})
    with torch.no_grad():
        assert bare(**batch).last_hidden_state.shape[-1] == model.config.hidden_size
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    model.train().gradient_checkpointing_enable()
    model(**prompts, labels=prompts["input_ids"]).loss.backward()
    assert all(param.grad is not None for param in model.parameters())
    save_file({"tokens": tokens}, f"{folder}.safetensors")
"""


def test_strangers_can_generate(tmp_path):
    for name in STRANGERS:
        model = tiny_model(name)
        structure = analyze(model)
        gates = random_gates(structure, 2)
        if len(structure.stacks) > 1:  # the last cross attention, so that the encoder is read and learns
            gates["attn"][-1] = 1
        selection = Selection.from_gates(structure, gates)
        consolidate(write_run(tmp_path / f"run-{name}", model, selection=selection), tmp_path / name)
    save_file(_prompts(), tmp_path / "prompts.safetensors")
    run_stranger(STRANGER, tmp_path, tmp_path, *STRANGERS)
    for name in STRANGERS:
        ours = _write(load_compact(tmp_path / name).eval())[0]
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["tokens"], ours)
