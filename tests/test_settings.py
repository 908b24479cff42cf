"""settings.py: the published values, typed here from the papers' tables and configurations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import lra_data
import pretrain
import settings
from batches import fitted
from settings import Config, published, resolve

ROOT = Path(__file__).parent.parent
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


def values(name):
    return {key: value for key, (value, _) in published(name)[0].items()}


def holds(name, **expected):
    found = vars(Config(**values(name)))
    assert {key: found[key] for key in expected} == expected, name


def is_published(name):
    return not name.startswith("lattice") and not name.endswith(OUR_OWN)


def test_no_row_is_missing_and_none_is_outside_the_tables():
    expected = {f"{task}-transformer" for task in TRANSFORMER} | set(SCRATCH)
    expected |= {f"{t}-transformer-rope" for t, rates in TRANSFORMER_RATES.items() if rates[1]}
    expected |= {f"{task}-{model}" for model, rows in PRETRAINED.items() for task in rows}
    expected |= {f"{task}-sgconv" for task in SGCONV}
    assert {name for name in settings.NAMES if is_published(name)} == expected
    assert len(settings.NAMES) == 52


@pytest.mark.parametrize("name", settings.NAMES)
def test_a_row_has_a_source_for_every_value(name):
    found, departures = published(name)
    assert all(len(source) > 4 for _, source in found.values())
    assert is_published(name) or found["warmup"][1].startswith("ours")
    assert bool(departures) or not is_published(name)
    chosen = values(name)
    assert chosen["task"] in lra_data.TASKS and chosen["task"].startswith(name.split("-")[0])
    assert chosen["model"] == name.split("-")[1]
    holds(name, **chosen)  # Config takes them as they are


@pytest.mark.parametrize("task", TRANSFORMER)
def test_transformers(task):
    d_model, layers, heads, d_ff, pooling = TRANSFORMER[task]
    sizes = dict(d_model=d_model, n_layers=layers, n_heads=heads, d_ff=d_ff, dropout=0.0)
    sizes |= dict(schedule="constant", weight_decay=0.1 if task == "text" else 0.0)
    holds(f"{task}-transformer", **sizes, pooling=pooling, rope=task in ("scifar", "speech"))
    plain, rope = TRANSFORMER_RATES.get(task, (None, None))
    if plain:
        holds(f"{task}-transformer", finetune_lr=plain[0], pretrain_lr=plain[1])
    else:
        assert published(f"{task}-transformer")[0]["pretrain_lr"][1].startswith("ours")
    if rope:
        holds(f"{task}-transformer-rope", **sizes, pooling="mean" if task == "image" else pooling)
        holds(f"{task}-transformer-rope", rope=True, finetune_lr=rope[0], pretrain_lr=rope[1])
    local = "local" in published(f"{task}-transformer")[1]
    assert local == (task in ("pathfinder128", "speech"))
    chosen = values(f"{task}-transformer")
    assert 2_000 <= chosen["warmup"] * chosen["finetune_steps"] <= 5_000


@pytest.mark.parametrize("model, task", [(m, task) for m in PRETRAINED for task in PRETRAINED[m]])
def test_pretrained_state_spaces(model, task):
    rate, batch, pretrain_rate, pretrain_batch = PRETRAINED[model][task]
    layers, d_model, dropout, *_ = SCRATCH[f"{task}-s4-scratch"]
    name = f"{task}-{model}"
    holds(name, finetune_lr=rate, batch_size=batch, pretrain_lr=pretrain_rate)
    holds(name, pretrain_batch_size=pretrain_batch, weight_decay=0.05, dropout=dropout)
    holds(name, n_layers=layers, d_model=d_model, d_state=64 if model == "s4" else 1024)
    holds(name, dt_min=1e-4 if task == "pathfinder128" else 1e-3, dt_max=0.1, pooling="mean")


def is_from_scratch(name, layers, d_model, dropout, rate, batch, epochs, decay, epoch):
    holds(name, objective="none", n_layers=layers, d_model=d_model, dropout=dropout)
    holds(name, finetune_lr=rate, batch_size=batch, weight_decay=decay, schedule="cosine")
    holds(name, finetune_steps=epochs * epoch, eval_every=epoch)


@pytest.mark.parametrize("name", SCRATCH)
def test_s4_from_scratch(name):
    is_from_scratch(name, *SCRATCH[name])
    holds(name, d_state=64, dt_min=1e-4 if name.startswith("pathfinder128") else 1e-3, dt_max=0.1)
    holds(name, pooling="last" if name.startswith("pathfinder32") else "mean")


@pytest.mark.parametrize("task", SGCONV)
def test_sgconv(task):
    *row, width, warmup = SGCONV[task]
    name = f"{task}-sgconv"
    is_from_scratch(name, *row)
    holds(name, kernel_dim=width)
    chosen = values(name)
    if warmup:
        assert round(chosen["warmup"] * chosen["finetune_steps"] / 100) == warmup / 100
    assert settings.KERNELS[chosen["task"]]["kernel_dim"] == width


def test_sgconv_kernels_of_image_and_path_x():
    """arXiv:2210.09298, the code of its authors: all others halve per scale from N(0, 1)."""
    pathx = dict(kernel_dim=64, first_factor=2, decay="ramp_decay", init="cosine_init")
    for task, kernel in settings.KERNELS.items():
        if task.startswith("image"):
            assert kernel == dict(kernel_dim=32, decay="power_law_decay")
        elif task in ("pathx", "pathfinder128"):
            assert kernel == pathx
        else:
            assert list(kernel) == ["kernel_dim"]


@pytest.mark.parametrize("name", [n for n in settings.NAMES if is_published(n)])
def test_pretraining_of_published_rows(name):
    task = name.split("-")[0]
    chosen = values(name)
    if chosen["objective"] == "none":
        assert not [key for key in chosen if key.startswith("pretrain")]
        return
    l1 = task in ("image", "scifar", "speech")
    holds(name, objective="masked", mask_ratio=MASK_RATIO[task], loss="l1" if l1 else "ce")
    examples = {"pretrain": EXAMPLES[task] * (2 if task == "retrieval" else 1)}
    examples["finetune"] = EXAMPLES[task]
    batch = {"pretrain": chosen.get("pretrain_batch_size", chosen["batch_size"])}
    batch["finetune"] = chosen["batch_size"]
    epoch = {stage: chosen[f"{stage}_steps"] / 200 for stage in examples}  # at most 200 (C.1)
    for stage, n in examples.items():
        assert epoch[stage] == math.ceil(n / batch[stage])
    holds(name, eval_every=max(epoch["finetune"], epoch["pretrain"] // 5))


@pytest.mark.parametrize("task", ["text", "retrieval", "image"])
def test_published_runs_read_characters_and_numbers(task):
    kind = {"image": "image-real"}.get(task, f"{task}-characters")
    names = [name for name in settings.NAMES if name.split("-")[0] == task]
    assert names and all(values(name)["task"] == kind for name in names)


@pytest.mark.parametrize("model, arm", [("transformer", "Transformer"), ("s4", "S4")])
def test_lattice_rows_are_the_demonstration(model, arm, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from demo import ARMS, DEMO

    expected = vars(replace(DEMO, **ARMS[f"{arm}, pretrained"]))
    holds(f"lattice-{model}", **{key: expected[key] for key in values(f"lattice-{model}")})


def test_every_task_has_its_own_mask_ratio_and_loss():
    """By exact name: a task of one's own called "pathology" takes the default."""
    assert set(lra_data.TASKS) <= set(settings.DENOISING)
    for task, (ratio, _) in settings.DENOISING.items():
        prefix = [name for name in MASK_RATIO if task.startswith(name)]
        expected = MASK_RATIO[prefix[0]] if prefix else {"lattice": 0.3}.get(task, 0.5)
        assert Config(task=task).mask_ratio == ratio == expected
        l1 = task in ("image-real", "scifar", "speech", "speech-8k")
        assert Config(task=task).loss == ("l1" if l1 else "ce")
    own, origin = resolve({"task": "pathology.csv"})
    assert (own.mask_ratio, own.loss) == (None, None)  # see batches.fitted
    assert origin["loss"] == "your own data: (0.15, 'ce') if symbols, (0.5, 'l1') if values"


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"model": "rnn"}, "model 'rnn'.*transformer"),
        ({"out": ""}, "out '': expected a value"),
        ({"mask_ratio": 1.5}, "mask_ratio 1.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": True}, "batch_size True: expected int"),
        ({"causal": True}, "looks both ways"),
        ({"labels": 0}, "labels 0: expected a positive number"),
        ({"dropout": float("nan")}, "dropout nan: expected a fraction below 1"),
        ({"dropout": 1}, "dropout 1: expected a fraction below 1"),
        ({"warmup": 1}, "warmup 1: expected a fraction below 1"),
        ({"seed": -1}, "seed -1: expected 0 or more$"),
        ({"weight_decay": -1.0}, "weight_decay -1.0: expected 0 or more"),
        ({"pretrain_lr": 1e38}, "pretrain_lr 1e\\+38: expected a positive number up to 1e\\+30"),
        ({"dt_min": 1e-320}, "dt_min 1e-320: expected a positive number"),
        ({"pictures": 2**63}, "pictures 9223372036854775808: expected a positive number up to"),
        ({"weight_decay": 1e38}, "weight_decay 1e\\+38: expected 0 or more, up to 1e\\+06"),
        ({"model": "s4", "rope": True}, "'s4' has no rope"),
        ({"pooling": "max", "sequence_parallel": "ring"}, "use pooling 'mean'"),
        ({"dropout": 0.1, "sequence_parallel": "ulysses"}, "dropout 0"),
        ({"sequence_parallel": "stripes"}, "stripes"),
    ],
)
def test_bad_settings_are_refused_with_their_numbers(bad, message):
    with pytest.raises(ValueError, match=message):
        Config(**bad)


def test_print_config_says_where_each_value_comes_from(capsys):
    """Also for another machine, which has CUDA."""
    given = ["--settings", "listops-s4", "--seed", "7", "--device", "cuda"]
    given += ["--objective", "causal"]
    pretrain.main([*given, "--print-config"])
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "Table 5" in shown["pretrain_batch_size"] and " 128 " in shown["pretrain_batch_size"]
    assert " 7 " in shown["seed"] and "command line" in shown["seed"]
    assert "default" in shown["n_heads"] and "C.3" in shown["mask_ratio"]
    assert "follows from other settings" in shown["causal"]
    assert "batch norm" in shown["differs"]
    pretrain.main(["--settings", "lattice-s4", "--print-config"])
    shown = capsys.readouterr().out
    assert shown.endswith("differs from the source: -\n") and "task lattice: ours" in shown


def test_the_path_of_a_former_file_is_a_name_of_its_row_unless_it_exists(tmp_path):
    path = tmp_path / "settings" / "listops-s4.json"
    expected, _ = resolve({"settings": "listops-s4"})
    for former in ("settings/listops-s4.json", str(path)):
        assert resolve({"settings": former})[0] == expected
    path.parent.mkdir()
    path.write_text('{"settings": {"seed": 5}}')
    assert resolve({"settings": str(path)})[0].seed == 5


@pytest.mark.parametrize(("n", "steps"), [(10, 300), (1200, 30 * 19), (100_000, 3000)])
def test_own_data_are_pretrained_for_30_epochs_unless_steps_are_given(n, steps):
    about = {"mean": None, "train": [n, 20], "n_channels": None, "vocab_size": 256}
    about |= {"min_len": 3, "max_len": 20}
    config = Config(task="my.csv", device="cpu")
    assert fitted(config, about).pretrain_steps == steps
    assert fitted(replace(config, pretrain_steps=7), about).pretrain_steps == 7
    assert Config(task="text").pretrain_steps == 3000


def test_each_stage_has_its_own_settings():
    config = Config(pretrain_lr=0.1, finetune_lr=0.2, pretrain_steps=3, finetune_steps=4)
    assert [config.lr(stage) for stage in pretrain.STAGES] == [0.1, 0.2]
    assert [config.steps(stage) for stage in pretrain.STAGES] == [3, 4]


def test_settings_without_effect_in_a_run_are_named():
    given = ["n_heads", "d_state", "kernel_dim", "clip", "pretrain_lr", "mask_ratio", "loss"]
    assert settings.idle(given, Config()) == ["d_state", "kernel_dim"]
    assert settings.idle(given, Config(model="s4d")) == ["n_heads", "kernel_dim"]
    scratch = Config(model="sgconv", objective="none")
    assert settings.idle(given, scratch) == ["n_heads", "d_state", *given[-3:]]
    assert settings.idle(["pretrain_steps"], Config(pretrained="a.pt")) == ["pretrain_steps"]
    assert settings.idle([], Config(pretrained="a.pt", random_init=True)) == ["random_init"]


def test_help_tells_the_defaults():
    text = " ".join(settings.parser().format_help().split())
    assert "over all processes (default: 64)" in text and "None" not in text
    assert "caches (default: data)" in text


def test_a_flag_goes_before_a_file_before_a_default(tmp_path):
    path = tmp_path / "a.json"
    values = {"model": "s4", "d_model": 32, "clip": 2, "data_dir": "données"}
    content = json.dumps({"settings": values, "sources": {"model": "é 5"}}, ensure_ascii=False)
    path.write_text(content, "utf-8-sig")  # with a byte-order mark
    config, origin = resolve({"settings": str(path), "d_model": 48})
    assert (config.model, origin["model"]) == ("s4", f"{path}: é 5")
    assert (config.d_model, origin["d_model"]) == (48, "command line")
    assert (config.clip, origin["clip"]) == (2, f"{path}: no source")
    assert (config.batch_size, origin["batch_size"]) == (64, "default")
    assert config.data_dir == "données"


def test_the_config_of_a_run_is_a_file_of_settings(tmp_path):
    config = Config(model="s4", out=str(tmp_path), overwrite=True, device="cpu")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**vars(config), "data": {"name": "lattice"}}))
    again, _ = resolve({"settings": str(path), "resume": True})
    assert again == replace(config, overwrite=False, resume=True)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a file of settings"),
        ("[]", "not a file of settings"),
        ('{"settings": {"d_modle": 3}}', "a.json: no setting is called d_modle"),
        ('{"settings": {"d_model": "wide"}}', "d_model 'wide': expected int"),
        ('{"settings": {"seed": null}}', "seed None: expected int"),
        ('{"settings": {"seed": 1}, "sources": [1]}', "not a file of settings"),
    ],
)
def test_a_bad_file_of_settings_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        resolve({"settings": str(path)})


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no settings 'listops-s5'.*listops-s4"):
        resolve({"settings": "listops-s5"})
