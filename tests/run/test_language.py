"""A language model from random weights to a compact one, in one launch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dsprune.config import load_config
from dsprune.errors import ArchitectureError, ConfigError, DspruneError
from dsprune.measure.bench import count_macs
from dsprune.methods import method_options
from tests.helpers.folders import encoder_decoder_recipe, language_recipe, tiny_recipe
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _execute(recipe, *overrides):
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    return guarded(lambda: execute(str(recipe), overrides))


def test_a_decoder_is_trained_pruned_and_exported(tmp_path):
    """Held to multiply-adds: what is exported multiplies as little as was asked, counted on a forward pass."""
    recipe = language_recipe(tmp_path)
    assert run_world(_execute, 2, recipe, "prune.target_of=macs") == [0, 0]
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    dense, compact = report["dense"], report["compact"]
    vocabulary = json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"]
    assert 1 < dense["metrics"]["perplexity"] < vocabulary
    assert dense["metrics"]["word_perplexity"] > dense["metrics"]["perplexity"]
    assert report["landing"]["measured"] >= 0.5
    length = load_config(str(recipe), method_options=method_options).task.max_length
    assert report["landing"]["of"] == f"the multiply-adds at length {length}"
    model = AutoModelForCausalLM.from_pretrained(run / "recovered")
    whole = AutoModelForCausalLM.from_pretrained(run / "teacher" / "model")
    assert report["landing"]["measured"] == pytest.approx(1 - count_macs(model, length) / count_macs(whole, length))
    assert sum(p.numel() for p in model.parameters()) == compact["parameters"]["total"]
    best = json.loads((run / "teacher" / "done.json").read_text())["metrics"]
    assert best["perplexity"] == pytest.approx(dense["metrics"]["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method", "tied"),
    [("seq2seq", "cofi", False), ("span_corruption", "grain", True)],
)
def test_an_encoder_decoder_is_trained_pruned_and_exported(task, method, tied, tmp_path):
    sizes = {} if tied else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    recipe = encoder_decoder_recipe(tmp_path, task=task, method=method, **sizes)
    overrides = ["prune.embedding_rank=0", "distill.teacher_layers=[1, 2, 3, 4]", "batch.eval=16"]
    if task == "seq2seq":
        overrides += ["task.max_target_length=12", "data.max_eval_examples=16"]
    assert run_world(_execute, 2, recipe, *overrides) == [0, 0]
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    metric = {"seq2seq": "rougeL", "span_corruption": "perplexity"}[task]
    best = json.loads((run / "teacher" / "done.json").read_text())["metrics"]
    assert report["dense"]["metrics"][metric] == pytest.approx(best[metric], rel=1e-4)
    assert report["landing"]["measured"] >= 0.5
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "recovered")
    assert sum(p.numel() for p in model.parameters()) == report["compact"]["parameters"]["total"]
    assert (model.lm_head.weight is model.shared.weight) == tied
    dense = AutoModelForSeq2SeqLM.from_pretrained(run / "teacher" / "model")
    assert sum(p.numel() for p in dense.parameters()) == report["dense"]["parameters"]["total"]
    words = torch.tensor([[5, 6, 7, 8]])
    assert model.generate(input_ids=words, max_new_tokens=4, do_sample=False).shape[1] <= 5


def _preflight(recipe, *overrides):
    from dsprune.run.preflight import preflight

    return preflight(load_config(str(recipe), overrides, method_options=method_options), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prune.start=pretrained",), "there are no pretrained weights for the student"),
        (("task.max_length=100",), "task.max_length = 100: the model has 64 positions"),
        (("distill.top_k=100000",), "give fewer, or leave it out"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(tmp_path, overrides, message):
    with pytest.raises(DspruneError, match=message):
        _preflight(language_recipe(tmp_path), *overrides)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (language_recipe, ("task.name=seq2seq",), "model '.*dense': .*"),
        (language_recipe, ("task.name=span_corruption",), "model '.*dense': .*"),
        (tiny_recipe, ("task.name=seq2seq", "data.dataset=x"), "model '.*dense': .*"),
        (lambda folder: encoder_decoder_recipe(folder, task="lm"), (), "model '.*dense': .*"),
        (
            lambda folder: encoder_decoder_recipe(folder, task="seq2seq"),
            ("distill.attentions=1",),
            r"distill\.attentions = 1: the layers of an encoder-decoder",
        ),
        (
            lambda folder: encoder_decoder_recipe(folder, task="seq2seq"),
            ("prune.embedding_rank=4",),
            "the output head of .* is the word embedding",
        ),
    ],
    ids=["decoder writes", "decoder fills", "encoder writes", "encoder-decoder reads on", "maps", "factored"],
)
def test_tasks_and_models_that_do_not_go_together(tmp_path, recipe, overrides, message):
    with pytest.raises(DspruneError, match=message) as caught:
        _preflight(recipe(tmp_path), *overrides)
    assert "\n" not in str(caught.value)


def test_logits_over_labels_have_no_top(tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.top_k: for logits over a vocabulary"):
        _preflight(tiny_recipe(tmp_path), "distill.top_k=2")


def test_random_weights_are_asked_for_or_refused(tmp_path):
    from dsprune.engine.models.load import load_model

    task = _preflight(language_recipe(tmp_path)).task
    with pytest.raises(ConfigError, match=r"to begin with random weights, say model\.from_scratch=true"):
        load_model(str(tmp_path / "dense"), task, {}, fresh_head=True)
    assert load_model(str(tmp_path / "dense"), task, {}, from_scratch=True).num_parameters() > 0


def test_a_model_without_a_head_for_text_is_refused(tmp_path):
    from dsprune.engine.models.load import load_model

    task = _preflight(language_recipe(tmp_path)).task
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    config.tie_word_embeddings = False
    AutoModel.from_config(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ArchitectureError, match=r"1 weights are not there, the first is lm_head\.weight"):
        load_model(str(tmp_path / "headless"), task, {})


def test_a_head_of_its_own_is_counted_as_one(tmp_path):
    """The configuration ties it; the files have it apart."""
    recipe = language_recipe(tmp_path)
    tied = _preflight(recipe).structure
    folder = tmp_path / "dense"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own = _preflight(recipe, "model.from_scratch=false").structure
    assert (tied.tied, own.tied) == (True, False)
    assert "lm_head.weight" in own.params


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    recipe = language_recipe(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    config.vocab_size += 1
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(ArchitectureError, match="compares their probabilities token by token"):
        _preflight(recipe, f"teacher.path={tmp_path / 'other'}")
