"""What bad input gets: one clear line on rank 0, nothing on the others, the right exit code on all, and no training."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForSequenceClassification, RobertaConfig, RobertaModel

from tests.helpers.folders import tiny_folder, tiny_recipe
from tests.helpers.models import SIZES
from tests.helpers.world import run_world

pytestmark = pytest.mark.dist


def _ds_config(folder: Path, content: dict, of: str = "student") -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return f"deepspeed.{of}={path}"


def _data(folder: Path, train: str, validation: str | None = None) -> tuple[str, ...]:
    """SST-2 from a folder of csv files with this content."""
    data = folder / "data"
    data.mkdir()
    (data / "train.csv").write_text(train)
    (data / "validation.csv").write_text(validation or GOOD)
    return ("task.name=sst2", f"data.path={data}")


GOOD = "sentence,label\n" + "\n".join(f"a fine film number {i},{i % 2}" for i in range(20)) + "\n"


def _teacher(folder: Path, **changes) -> str:
    target = Path(shutil.copytree(folder / "dense", folder / "teacher-model"))
    config = json.loads((target / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], **changes}
    (target / "config.json").write_text(json.dumps(config))
    return f"teacher.path={target}"


def _fine_tuned(folder: Path, *labels: str, without: str = "") -> str:
    target = Path(shutil.copytree(folder / "dense", folder / "fine-tuned"))
    config = AutoConfig.from_pretrained(target, id2label=dict(enumerate(labels)))
    BertForSequenceClassification(config).save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    tensors.pop(without, None)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return f"model.name={target}"


def _roberta(folder: Path) -> str:
    """A model whose table of 64 positions begins behind the padding token's id."""
    target = Path(shutil.copytree(folder / "dense", folder / "roberta"))
    config = RobertaConfig(**{**SIZES, "vocab_size": 60, "max_position_embeddings": 64}, pad_token_id=1)
    RobertaModel(config).save_pretrained(target)
    return f"model.name={target}"


def _quantized(folder: Path) -> str:
    """A model as bitsandbytes would have written its configuration."""
    target = Path(shutil.copytree(folder / "dense", folder / "model-4bit"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": FOUR_BITS}))
    return f"model.name={target}"


def _teacher_with_vocabulary(folder: Path, change) -> str:
    """A teacher whose tokenizer numbers tokens as `change` has it."""
    override = _teacher(folder, **LABELS)
    path = folder / "teacher-model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = change(content["model"]["vocab"])
    path.write_text(json.dumps(content))
    return override


def _swapped(vocabulary: dict[str, int]) -> dict[str, int]:
    first, second = list(vocabulary)[5:7]
    return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}


def _without_tokenizer(folder: Path) -> str:
    override = _teacher(folder, **LABELS, vocab_size=1000)
    for path in (folder / "teacher-model").glob("tokenizer*"):
        path.unlink()
    return override


def _untokenized(folder: Path) -> str:
    target = Path(shutil.copytree(folder / "dense", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    return f"model.name={target}"


def _already_pruned(folder: Path, what: str, *, pickled: bool = False) -> str:
    """Weights without a head and some neurons in the second layer, under the dense configuration."""
    target = folder / "pruned"
    override = _teacher(folder, **LABELS) if what == "teacher.path" else ""
    shutil.copytree(folder / ("teacher-model" if override else "dense"), target)
    weights = load_file(target / "model.safetensors")
    for name in ("query", "key", "value"):
        for part in ("weight", "bias"):
            place = f"encoder.layer.1.attention.self.{name}.{part}"
            weights[place] = weights[place][:24].clone()
    (target / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, target / "pytorch_model.bin")
    else:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return f"{what}={target}"


LABELS = {"id2label": {"0": "contradicts", "1": "follows"}, "label2id": {"contradicts": 0, "follows": 1}}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
PRUNED = "is [24] in its files and [32] by its config.json, and 5 more differ"


def _unwritable(folder: Path) -> str:
    (folder / "file").write_text("")
    return f"output={folder / 'file' / 'run'}"


CASES = {
    "unknown key": (64, "unknown key 'prune.targte': did you mean 'target'", lambda f: ("prune.targte=0.5",)),
    "wrong type": (64, "'batch.size' = 'many'", lambda f: ("batch.size=many",)),
    "not an override": (64, "not of the form key=value", lambda f: ("target",)),
    "unknown method": (64, "did you mean 'cofi'", lambda f: ("method.name=coffi",)),
    "unknown method option": (64, "unknown key 'method.lrr'", lambda f: ("method.lrr=1",)),
    "unknown task": (64, "sst2", lambda f: ("task.name=sst22",)),
    "unknown metric": (64, "bleu", lambda f: ("task.metric=bleu",)),
    "sparsity of 1": (64, "'prune.target'", lambda f: ("prune.target=1.0",)),
    "negative sparsity": (64, "'prune.target'", lambda f: ("prune.target=-0.1",)),
    "target out of reach": (
        64,
        "out of reach",
        lambda f: ("prune.target=0.999", "prune.target_of=total", 'method.gates=["head", "ffn_dim"]'),
    ),
    "bad duration": (64, "expected a duration", lambda f: ("prune.duration=10",)),
    "no room for warm-up": (64, "leave no step", lambda f: ("prune.duration=4 steps",)),
    "stages out of order": (64, "in this order", lambda f: ('stages=["recover", "prune"]',)),
    "unknown model": (64, "nowhere", lambda f: ("model.name=./nowhere",)),
    "package not installed": (64, "not installed", lambda f: ("model.name=package:no_such_package/model",)),
    "longer than the model's positions": (64, "64 positions", lambda f: ("task.max_length=512",)),
    "longer than the positions that are not padding's": (
        64,
        "has 62 positions (of 64, the first 2 are the padding's): set it to 62",
        lambda f: (_roberta(f), "task.max_length=63"),
    ),
    "timed longer than the model's positions": (64, "eval.bench_length = 65", lambda f: ("eval.bench_length=65",)),
    "longer than the teacher's positions": (
        64,
        "the teacher has 16 positions",
        lambda f: (_teacher(f, **LABELS, max_position_embeddings=16),),
    ),
    "no tokenizer": (64, "none of tokenizer.json, vocab.txt is there", lambda f: (_untokenized(f),)),
    "quantized model": (65, "model-4bit': its weights are quantized (bitsandbytes)", lambda f: (_quantized(f),)),
    "quantized teacher": (
        65,
        "teacher-model': its weights are quantized (bitsandbytes)",
        lambda f: (_teacher(f, **LABELS, quantization_config=FOUR_BITS),),
    ),
    "teacher with other numbers for tokens": (
        65,
        "has another vocabulary",
        lambda f: (_teacher_with_vocabulary(f, _swapped),),
    ),
    "teacher with fewer tokens": (
        65,
        "has another vocabulary",
        lambda f: (_teacher_with_vocabulary(f, lambda v: dict(list(v.items())[:-3])),),
    ),
    "teacher with a smaller embedding": (65, "gives ids up to", lambda f: (_teacher(f, **LABELS, vocab_size=20),)),
    "teacher without a tokenizer and of another size": (
        65,
        "beside the teacher lies no tokenizer",
        lambda f: (_without_tokenizer(f),),
    ),
    "model already pruned": (65, PRUNED, lambda f: (_already_pruned(f, "model.name"),)),
    "model already pruned, pickled": (65, PRUNED, lambda f: (_already_pruned(f, "model.name", pickled=True),)),
    "teacher already pruned": (65, PRUNED, lambda f: (_already_pruned(f, "teacher.path"),)),
    "autocast beside bf16": (
        64,
        "torch_autocast and bf16 are both enabled",
        lambda f: (
            _ds_config(f, {"torch_autocast": AUTOCAST, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}),
        ),
    ),
    "autocast in float16": (
        64,
        "deepspeed.teacher: torch_autocast.dtype is float16",
        lambda f: (_ds_config(f, {"torch_autocast": {**AUTOCAST, "dtype": "float16"}}, of="teacher"),),
    ),
    "autocast without a dtype": (
        64,
        "torch_autocast.dtype is none",
        lambda f: (_ds_config(f, {"torch_autocast": {"enabled": True}}),),
    ),
    "unknown teacher layer": (64, "from 1 to 2", lambda f: ("distill.teacher_layers=[1, 3]",)),
    "batch does not divide": (64, "does not divide", lambda f: ("batch.size=9",)),
    "misspelt DeepSpeed key": (64, "zero_optimization", lambda f: (_ds_config(f, {"zero_optimisation": {}}),)),
    "DeepSpeed batch that differs": (64, "train_batch_size", lambda f: (_ds_config(f, {"train_batch_size": 3}),)),
    "DeepSpeed section that is no object": (64, "'bf16' is true", lambda f: (_ds_config(f, {"bf16": True}),)),
    "DeepSpeed clipping of another stage": (
        64,
        "the recipe (clip) says 0.5",
        lambda f: (_ds_config(f, {"gradient_clipping": 1.0}), "recover.clip=0.5"),
    ),
    "half precision at stage 0": (
        64,
        "bf16 at ZeRO stage 0",
        lambda f: (_ds_config(f, {"bf16": {"enabled": True}}),),
    ),
    "fp16 on CPU": (64, "no GPU", lambda f: ("deepspeed.student=zero2_fp16",)),
    "teacher at stage 2": (64, "use stage 0", lambda f: ("deepspeed.teacher=zero2",)),
    "prune before teacher": (64, "run stage 'teacher' first", lambda f: ('stages=["prune"]',)),
    "unknown family": (65, "mpnet", lambda f: (_other_family(f),)),
    "teacher with other labels": (
        65,
        "label",
        lambda f: (_teacher(f, id2label={"0": "yes", "1": "no"}, label2id={"yes": 0, "no": 1}),),
    ),
    "teacher with more labels": (
        65,
        "3 labels",
        lambda f: (_teacher(f, id2label={str(i): f"LABEL_{i}" for i in range(3)}),),
    ),
    "teacher without its classifier": (
        65,
        "2 weights are not there, the first is classifier.bias",
        lambda f: (_teacher(f, id2label={"0": "follows", "1": "contradicts"}),),
    ),
    "model with other labels": (
        65,
        "(yes, no) are not the task's (contradicts, follows)",
        lambda f: (_fine_tuned(f, "yes", "no"),),
    ),
    "model whose weights are not all there": (
        65,
        "1 weights are not there, the first is bert.pooler.dense.bias",
        lambda f: (_fine_tuned(f, "follows", "contradicts", without="bert.pooler.dense.bias"),),
    ),
    "missing column": (65, "sentence", lambda f: _data(f, GOOD.replace("sentence", "text"))),
    "empty split": (65, "validation", lambda f: _data(f, GOOD, "sentence,label\n")),
    "data of one's own with a single label": (
        65,
        "column 'label' holds one label alone, 1",
        lambda f: (*_data(f, "text,label\nfine,1\ngood,1.0\n"), "task.name=text_classification"),
    ),
    "label that is none of the task's": (
        65,
        "expected one of negative, positive, or a number from 0 to 1, found 'neutral'; the column holds 0, 1, neutral",
        lambda f: _data(f, GOOD + "one more,neutral\n"),
    ),
    "label out of range": (65, "label", lambda f: _data(f, GOOD + "one more,7\n")),
    "no data": (65, "no data here", lambda f: ("task.name=sst2", f"data.path={_empty(f)}")),
    "density out of reach": (64, "gates qk_dim, vo_dim, ffn_dim can remove at most", lambda f: ("prune.target=0.999",)),
    "pruning that never ends": (64, "leave a step after the end", lambda f: ("method.end=0.99",)),
    "factors larger than the embedding": (64, "are larger than that", lambda f: ("prune.embedding_rank=64",)),
    "answers that are not at their offsets": (65, "answer_start", lambda f: _squad(f, shift=1)),
    "tags that occur in one split only": (65, "I-LOC", lambda f: _tags(f, [5, 6])),
    "tags that are not the teacher's": (
        65,
        "are not the task's",
        lambda f: (
            *_tags(f, [5, 0]),
            _teacher(
                f,
                architectures=["BertForTokenClassification"],
                id2label={str(i): f"T{i}" for i in range(9)},
                label2id={f"T{i}": i for i in range(9)},
            ),
        ),
    ),
    "blocks larger than a matrix": (
        64,
        "larger than a matrix of",
        lambda f: ("blocks.duration=2 steps", "blocks.shape=[64, 64]"),
    ),
    "output under a file": (73, "is a file", lambda f: (_unwritable(f),)),
}


GRAIN = ("density out of reach", "pruning that never ends")
"""Cases on the recipe of GRAIN; all others are on that of CoFi."""


def _squad(folder: Path, *, shift: int) -> tuple[str, ...]:
    """Questions whose answers begin `shift` characters before they are said to."""
    rows = [
        {
            "id": str(i),
            "title": "",
            "context": f"Ann met Bob in room {i}.",
            "question": "Who met Bob?",
            "answers": {"text": ["Ann"], "answer_start": [shift]},
        }
        for i in range(20)
    ]
    return _jsonl(folder, "squad", rows, rows)


def _tags(folder: Path, first: list[int]) -> tuple[str, ...]:
    """Sentences of two tagged words; the validation split begins with these tags."""
    rows = [{"id": str(i), "tokens": ["Paris", "calls"], "ner_tags": [5, 0]} for i in range(20)]
    return _jsonl(folder, "conll2003", rows, [{"id": "20", "tokens": ["New", "York"], "ner_tags": first}, *rows])


def _jsonl(folder: Path, task: str, train: list[dict], validation: list[dict]) -> tuple[str, ...]:
    data = folder / "data"
    data.mkdir()
    for name, rows in (("train", train), ("validation", validation), ("test", train)):
        (data / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return (f"task.name={task}", "task.stride=8", f"data.path={data}")


def _empty(folder: Path) -> Path:
    path = folder / "no data here"
    path.mkdir()
    return path


def _other_family(folder: Path) -> str:
    path = Path(shutil.copytree(folder / "dense", folder / "mpnet"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mpnet", "architectures": ["MPNetModel"]}))
    return f"model.name={path}"


def _run_all(cases):
    """Every case on this rank: exit code and what was said."""
    from dsprune.cli import guarded
    from dsprune.run.launch import execute

    results = []
    for recipe, overrides in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = guarded(lambda recipe=recipe, overrides=overrides: execute(recipe, overrides))
        results.append((code, said.getvalue()))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    dense = tiny_folder(tmp_path_factory.mktemp("model") / "dense")
    cases = []
    for name, (_, _, make) in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        shutil.copytree(dense, folder / "dense")
        recipe = tiny_recipe(folder, method="grain" if name in GRAIN else "cofi")
        cases.append((str(recipe), make(folder)))
    ranks = run_world(_run_all, 2, cases, timeout=300)
    runs = [Path(recipe).parent / "run" for recipe, _ in cases]
    return {name: (ranks[0][i], ranks[1][i], runs[i]) for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(results, name):
    code, message, _ = CASES[name]
    (first_code, first), (second_code, second), run = results[name]
    assert (first_code, second_code) == (code, code), first + second
    lines = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, first
    assert message in lines[0]
    assert "Traceback" not in first
    assert "error: " not in second, "only rank 0 speaks"
    assert not list(run.glob("*/checkpoints/*")), "training began"


def test_all_mistakes_are_told_at_once(tmp_path):
    recipe = tiny_recipe(tmp_path)
    overrides = ("prune.targte=0.5", "batch.size=0", "method.lrr=1", "task.nam=x")
    ((code, said),) = run_world(_run_all, 1, [(str(recipe), overrides)])[0]
    assert code == 64
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 4


def test_unknown_recipe_suggests_a_known_one():
    ((code, said),) = run_world(_run_all, 1, [("cofi_sst", ())])[0]
    assert code == 64
    assert "did you mean 'cofi_sst2'" in said
