"""settings/*.json: the published values, typed here from the papers' tables and configurations."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

import lra_data
import pretrain
from config import Config
from sgconv import PUBLISHED

FOLDER = Path(__file__).parent.parent / "settings"
FILES = {path.stem: json.loads(path.read_text("utf-8")) for path in FOLDER.glob("*.json")}
OUR_OWN = ("small", "laptop")

# 2310.02980v4, configurations of its code: d_model, layers, heads, d_ff, pooling of Table 4.
TRANSFORMER = {
    "listops": (512, 6, 8, 2048, "mean"),
    "text": (512, 6, 8, 2048, "mean"),
    "retrieval": (128, 4, 4, 512, "mean"),
    "image": (64, 3, 4, 128, "max"),
    "pathfinder32": (128, 4, 8, 128, "mean"),
    "pathfinder128": (128, 4, 4, 128, "max"),
    "scifar": (256, 6, 4, 512, "mean"),
    "speech": (128, 4, 4, 128, "max"),
}
# Table 4: rates of fine-tuning and pretraining, masked, then masked with rotary positions.
TRANSFORMER_RATES = {
    "listops": ((1e-4, 1e-3), (1e-4, 1e-3)),
    "text": ((1e-4, 5e-4), (5e-4, 5e-4)),
    "retrieval": ((5e-4, 5e-3), (5e-4, 5e-3)),
    "image": ((1e-3, 1e-3), (1e-3, 1e-3)),
    "pathfinder32": ((5e-4, 1e-3), (5e-4, 1e-3)),
    "pathfinder128": ((5e-4, 5e-4), (5e-4, 1e-3)),
    "speech": ((1e-3, 1e-3), None),
}
# Table 5: fine-tuning rate, its batch, pretraining rate, its batch.
PRETRAINED = {
    "s4": {
        "listops": (1e-3, 16, 1e-3, 128),
        "text": (5e-4, 16, 5e-4, 8),
        "retrieval": (5e-4, 256, 5e-4, 8),
        "image": (1e-3, 512, 1e-3, 32),
        "pathfinder32": (1e-3, 64, 1e-3, 8),
        "pathfinder128": (1e-3, 64, 1e-3, 8),
    },
    "diagonal": {
        "listops": (5e-4, 16, 1e-3, 128),
        "text": (1e-3, 16, 5e-4, 8),
        "image": (1e-3, 64, 1e-3, 32),
        "pathfinder128": (5e-4, 64, 5e-4, 8),
    },
}
S4_SIZES = {  # layers, d_model, dropout
    "listops": (8, 128, 0.0),
    "text": (6, 256, 0.0),
    "retrieval": (6, 256, 0.0),
    "image": (6, 512, 0.1),
    "pathfinder32": (6, 256, 0.0),
    "pathfinder128": (6, 256, 0.0),
}
# S4's code, V3: layers, d_model, dropout, rate, batch, epochs, decay, steps an epoch of our split.
SCRATCH = {
    "listops-s4-scratch": (8, 128, 0.0, 0.01, 50, 40, 0.05, 1_920),
    "text-s4-scratch": (6, 256, 0.0, 0.01, 16, 32, 0.05, 1_407),
    "retrieval-s4-scratch": (6, 256, 0.0, 0.01, 64, 20, 0.05, 2_299),
    "image-s4-scratch": (6, 512, 0.1, 0.01, 50, 200, 0.05, 900),
    "pathfinder32-s4-scratch": (6, 256, 0.0, 0.004, 64, 200, 0.03, 2_500),
    "pathfinder128-s4-scratch": (6, 256, 0.0, 0.001, 16, 50, 0.05, 10_000),
    "scifar-s4": (6, 512, 0.1, 0.01, 50, 200, 0.05, 900),
    "speech-s4": (6, 128, 0.0, 0.01, 16, 40, 0.05, 5_303),
}
# SGConv's code, branch preview: the same columns, kernel_dim, warmup in steps (None: not known).
SGCONV = {
    "listops": (8, 128, 0.0, 0.01, 50, 40, 0.05, 1_920, 1, None),
    "text": (6, 256, 0.0, 0.01, 16, 32, 0.05, 1_407, 2, None),
    "retrieval": (6, 256, 0.0, 0.01, 64, 20, 0.05, 2_299, 1, 2_500),
    "image": (6, 512, 0.2, 0.01, 50, 200, 0.05, 900, 32, None),
    "pathfinder32": (6, 256, 0.2, 0.004, 64, 200, 0.03, 2_500, 32, None),
    "pathfinder128": (6, 256, 0.0, 0.004, 64, 50, 0.03, 2_500, 64, 10_000),
}
MASK_RATIO = {"listops": 0.10, "text": 0.15, "retrieval": 0.15, "image": 0.50}
MASK_RATIO |= {"pathfinder32": 0.50, "pathfinder128": 0.50, "scifar": 0.50, "speech": 0.25}
# Training examples of lra_data; pretraining reads both documents of a pair.
EXAMPLES = {"listops": 96_000, "text": 22_500, "retrieval": 147_086, "image": 45_000}
EXAMPLES |= {"pathfinder32": 160_000, "pathfinder128": 160_000, "scifar": 45_000}
EXAMPLES |= {"speech": 84_843}


def settings(name):
    return FILES[name]["settings"]


def holds(name, **expected):
    assert {k: settings(name).get(k) for k in expected} == expected, name


def is_published(name):
    return not name.startswith("lattice") and not name.endswith(OUR_OWN)


def test_no_file_is_missing_and_none_is_outside_the_tables():
    expected = {f"{task}-transformer" for task in TRANSFORMER} | set(SCRATCH)
    expected |= {
        f"{task}-transformer-rope" for task, (_, rope) in TRANSFORMER_RATES.items() if rope
    }
    expected |= {f"{task}-{model}" for model, rows in PRETRAINED.items() for task in rows}
    expected |= {f"{task}-sgconv" for task in SGCONV}
    assert {name for name in FILES if is_published(name)} == expected
    ours = {name for name in FILES if not is_published(name)}
    assert {"listops-s4-laptop", "listops-transformer-small", "lattice-transformer"} <= ours
    assert all(FILES[name]["source"].startswith("Ours") for name in ours)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_complete(name):
    content = FILES[name]
    assert list(content) == ["source", "departures", "settings", "sources"]
    assert list(content["sources"]) == list(content["settings"]), "a value without its source"
    texts = [content["source"], *content["departures"], *content["sources"].values()]
    assert all(isinstance(text, str) and len(text) >= 4 for text in texts)
    chosen = content["settings"]
    assert chosen["task"] in lra_data.TASKS and name.split("-")[1] == chosen["model"]
    assert chosen["task"].startswith(name.split("-")[0])


@pytest.mark.parametrize("name", sorted(FILES))
def test_config_takes_a_file_as_it_is(name):
    chosen = settings(name)
    assert set(chosen) <= {f.name for f in fields(Config)}
    config = Config(**chosen, device="cpu")
    assert {k: getattr(config, k) for k in chosen} == chosen


@pytest.mark.parametrize("task", TRANSFORMER)
def test_transformers(task):
    d_model, layers, heads, d_ff, pooling = TRANSFORMER[task]
    sizes = dict(d_model=d_model, n_layers=layers, n_heads=heads, d_ff=d_ff, dropout=0.0)
    sizes |= dict(schedule="constant", weight_decay=0.1 if task == "text" else 0.0)
    rotary = task in ("scifar", "speech")
    holds(f"{task}-transformer", **sizes, pooling=pooling, rope=rotary)
    plain, rope = TRANSFORMER_RATES.get(task, (None, None))
    if plain:
        holds(f"{task}-transformer", finetune_lr=plain[0], pretrain_lr=plain[1])
    else:
        assert FILES[f"{task}-transformer"]["sources"]["pretrain_lr"].startswith("ours")
    if rope:
        holds(f"{task}-transformer-rope", **sizes, pooling="mean" if task == "image" else pooling)
        holds(f"{task}-transformer-rope", rope=True, finetune_lr=rope[0], pretrain_lr=rope[1])
    local = any("local" in text for text in FILES[f"{task}-transformer"]["departures"])
    assert local == (task in ("pathfinder128", "speech"))
    steps = settings(f"{task}-transformer")["finetune_steps"]
    assert 2_000 <= settings(f"{task}-transformer")["warmup"] * steps <= 5_000


@pytest.mark.parametrize("model, task", [(m, task) for m in PRETRAINED for task in PRETRAINED[m]])
def test_pretrained_state_spaces(model, task):
    rate, batch, pretrain_rate, pretrain_batch = PRETRAINED[model][task]
    layers, d_model, dropout = S4_SIZES[task]
    name = f"{task}-{model}"
    holds(name, finetune_lr=rate, batch_size=batch, pretrain_lr=pretrain_rate)
    holds(name, pretrain_batch_size=pretrain_batch, weight_decay=0.05, dropout=dropout)
    holds(name, n_layers=layers, d_model=d_model, d_state=64 if model == "s4" else 1024)
    if model == "s4":
        holds(name, dt_min=1e-4 if task == "pathfinder128" else 1e-3, dt_max=0.1)


@pytest.mark.parametrize("name", SCRATCH)
def test_s4_from_scratch(name):
    layers, d_model, dropout, rate, batch, epochs, decay, epoch = SCRATCH[name]
    holds(name, objective="none", n_layers=layers, d_model=d_model, dropout=dropout, d_state=64)
    holds(name, finetune_lr=rate, batch_size=batch, weight_decay=decay, schedule="cosine")
    holds(name, finetune_steps=epochs * epoch, dt_max=0.1)
    holds(name, dt_min=1e-4 if name.startswith("pathfinder128") else 1e-3)
    holds(name, pooling="last" if name.startswith("pathfinder32") else "mean")


@pytest.mark.parametrize("task", SGCONV)
def test_sgconv(task):
    layers, d_model, dropout, rate, batch, epochs, decay, epoch, width, warmup = SGCONV[task]
    name = f"{task}-sgconv"
    holds(name, objective="none", n_layers=layers, d_model=d_model, dropout=dropout)
    holds(name, finetune_lr=rate, batch_size=batch, weight_decay=decay, kernel_dim=width)
    holds(name, finetune_steps=epochs * epoch, schedule="cosine")
    if warmup:
        assert round(settings(name)["warmup"] * epochs * epoch / 100) == warmup / 100
    kernel = {"pathfinder32": "pathfinder", "pathfinder128": "pathx"}.get(task, task)
    assert PUBLISHED[kernel]["kernel_dim"] == width  # decay and start come from there


@pytest.mark.parametrize("name", [n for n in sorted(FILES) if is_published(n)])
def test_pretraining_of_published_files(name):
    task, chosen = name.split("-")[0], settings(name)
    if chosen["objective"] == "none":
        assert not [key for key in chosen if key.startswith("pretrain")]
        return
    l1 = task in ("image", "scifar", "speech")
    holds(name, objective="masked", mask_ratio=MASK_RATIO[task], loss="l1" if l1 else "ce")
    examples = {"pretrain": EXAMPLES[task] * (2 if task == "retrieval" else 1)}
    examples["finetune"] = EXAMPLES[task]
    batch = {"pretrain": chosen.get("pretrain_batch_size", chosen["batch_size"])}
    batch["finetune"] = chosen["batch_size"]
    for stage, n in examples.items():  # at most 200 epochs a stage (C.1)
        epochs, rest = divmod(chosen[f"{stage}_steps"], 200)
        assert rest == 0 and (epochs - 1) * batch[stage] < n <= epochs * batch[stage]


@pytest.mark.parametrize("task", ["text", "retrieval", "image"])
def test_published_runs_read_characters_and_numbers(task):
    kind = {"image": "image-real"}.get(task, f"{task}-characters")
    names = [name for name in FILES if name.split("-")[0] == task]
    assert names and all(settings(name)["task"] == kind for name in names)


@pytest.mark.parametrize("model, arm", [("transformer", "Transformer"), ("s4", "S4")])
def test_lattice_files_are_the_demonstration(model, arm, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER.parent / "benchmarks")
    from demo import ARMS, DEMO

    expected = replace(DEMO, **ARMS[f"{arm}, pretrained"])
    holds(f"lattice-{model}", **{k: getattr(expected, k) for k in settings(f"lattice-{model}")})


def test_the_command_line_reads_a_file_and_flags_override_it(capsys):
    pretrain.main(["--settings", str(FOLDER / "listops-s4.json"), "--seed", "7", "--print-config"])
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "Table 5" in shown["pretrain_batch_size"] and " 128 " in shown["pretrain_batch_size"]
    assert " 7 " in shown["seed"] and "command line" in shown["seed"]
    assert "default" in shown["n_heads"]
