"""benchmarks/compare.py: arms are what was asked for, finished runs are kept, nonsense refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from settings import Config

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare
import demo
import fashion
import gpu
import measured


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: notes the runs, the accuracy follows from the seed."""
    seen = []

    def train(config, position):
        seen.append(Path(config.out).name)
        assert config.resume
        score = {"accuracy": 0.5 + 0.1 * config.seed}
        result = {"test": score, "finetune": score, "commit": "abc", "speed": {"seconds": 1.0}}
        result.update(parameters=3, config=compare.asdict(config))
        Path(config.out).mkdir(parents=True)
        Path(config.out, "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare.pretrain, "train", train)
    monkeypatch.setattr(compare, "side_by_side", lambda jobs, workers: [*map(compare.run, jobs)])
    return seen


def test_mean_and_spread_over_the_seeds_and_finished_runs_are_not_trained_again(trained, tmp_path):
    arms = {"a": Config(pretrained="w-{seed}.pt"), "b, wide": Config(d_model=128)}
    compare.compare(arms, [0], str(tmp_path))
    rows = compare.compare(arms, [0, 1, 3], str(tmp_path))
    assert trained == ["a-0", "b-wide-0", "a-1", "a-3", "b-wide-1", "b-wide-3"]
    assert rows["a"]["test"] == [50, 60, 80] and rows["a"]["mean"] == 63.33
    assert rows["a"]["spread"] == round(float(np.std([50, 60, 80], ddof=1)), 2)
    assert rows["a"]["validation"] == [50, 60, 80] and rows["a"]["settings"]["d_state"] == 64
    assert rows["a"]["settings"]["pretrained"] == "w-0.pt"
    assert rows["b, wide"]["settings"]["d_model"] == 128


def test_regression_is_judged_by_r2():
    score = {"r2": 0.5, "loss": 1.0}
    result = {"test": score, "finetune": score, "commit": "abc", "speed": {"seconds": 1.0}}
    row = compare.describe([{**result, "parameters": 3, "config": {}}])
    assert row["test"] == row["validation"] == [50]


def test_a_finished_run_with_other_settings_is_refused(trained, tmp_path):
    def run(**own):
        compare.compare({"a": Config(**own)}, [0], str(tmp_path))

    run()
    with pytest.raises(ValueError, match=r"a-0/result.json has other settings: d_model \d+ -> 8;"):
        run(d_model=8)
    (tmp_path / "a-0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"a-0/result.json is not the result of a run"):
        run()
    for names, seeds in [(["a b", "a-b"], [0]), (["a"], [0, 0])]:
        with pytest.raises(ValueError, match="would share a folder"):
            compare.compare(dict.fromkeys(names, Config()), seeds, str(tmp_path / "other"))
    assert trained == ["a-0"]


def test_own_data_chose_the_loss_of_a_finished_run(trained, tmp_path):
    path = tmp_path / "result.json"
    config = Config(task="my.csv", out=str(tmp_path))
    path.write_text(json.dumps({"config": compare.asdict(config) | {"loss": "ce"}}))
    assert compare.run(config)["config"]["loss"] == "ce"
    with pytest.raises(ValueError, match="has other settings: loss"):
        compare.run(Config(task="my.csv", out=str(tmp_path), loss="l1"))
    named = Config(task="my.csv", out=str(tmp_path), loss="l1", pretrained=str(tmp_path))
    weights = str(tmp_path / "pretrained.pt")
    stored = {"loss": "l1", "mask_ratio": 0.5, "pretrain_steps": 300, "pretrained": weights}
    path.write_text(json.dumps({"config": compare.asdict(named) | stored}))
    compare.run(named)


@pytest.mark.parametrize(
    "arms, message",
    [
        (["no name"], "expected 'name: --flag"),
        ([" : --model s4"], "expected 'name: --flag"),
        (["a: ", "a: --seed 1"], "two arms are called 'a'"),
        (["a: --check"], "no setting is called check"),
        (["a: --d-model 0"], "d_model 0"),
        (["a: "], "mixers.json was written by another script"),
    ],
)
def test_nonsense_on_the_command_line_is_refused_in_one_line(monkeypatch, arms, message):
    config = compare.parse_arms(["S4 wide: --model s4 --d-model 128"])["S4 wide"]
    assert (config.model, config.d_model) == ("s4", 128)
    flags = [word for arm in arms for word in ("--arm", arm)]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--name", "mixers", *flags])
    monkeypatch.setattr(compare, "compare", lambda *args: pytest.fail("it was run"))
    with pytest.raises(SystemExit, match=message):
        compare.main()


def test_learning_rates_are_chosen_on_validation_stage_by_stage(tmp_path, monkeypatch):
    seen = []

    def side_by_side(configs, workers):
        seen.extend(configs)
        results = []
        for config in configs:
            denoising = {"loss": abs(config.pretrain_lr - 2e-3)}
            finetuned = {"accuracy": -abs(config.finetune_lr - 3e-3), "loss": config.finetune_lr}
            results.append({"pretrain": denoising, "finetune": finetuned})
        return results

    monkeypatch.setattr(compare, "side_by_side", side_by_side)
    config = Config(pretrain_lr=9.0, finetune_lr=9.0, out=str(tmp_path), finetune_steps=7)
    best, scores = compare.tuned(config, (1e-3, 2e-3, 3e-3), 1)
    assert best == {"pretrain_lr": 2e-3, "finetune_lr": 3e-3}
    assert scores["pretrain"] == {1e-3: 1e-3, 2e-3: 0, 3e-3: 1e-3}
    assert [c.finetune_steps for c in seen] == [1] * 3 + [7] * 3
    assert [c.pretrained for c in seen[3:]] == [f"{tmp_path}-pretrain-0.002/pretrained.pt"] * 3
    assert len({c.out for c in seen}) == 6
    scratch = Config(objective="none", finetune_lr=9.0, out=str(tmp_path))
    assert compare.tuned(scratch, (1e-3, 3e-3), 1)[0] == {"finetune_lr": 3e-3}


def steps_of(config):
    first = 0 if config.objective == "none" else config.pretrain_steps
    return first + config.finetune_steps


def test_all_arms_of_fashion_mnist_take_the_steps_of_their_budget():
    rates = {}
    for model in fashion.MODELS:
        rates[model, "from scratch"] = {"finetune_lr": 1e-3}
        rates[model, "pretrained"] = {"pretrain_lr": 2e-3, "finetune_lr": 3e-3}
    steps = {}
    for arms, seeds in fashion.parts(rates):
        for name, config in arms.items():
            steps.setdefault((name.split(", ")[2], len(seeds)), set()).add(steps_of(config))
            assert config.finetune_lr == (3e-3 if "pretrained" in name else 1e-3)
            few = name.endswith("500 labels")
            assert config.labels == (500 if few else None)
            assert bool(config.pretrained) == (few and "pretrained" in name)
    few = ("1x and 500 labels", 3)
    assert steps == {("1x", 3): {2400}, few: {2400}, ("3x", 3): {7200}, ("10x", 1): {24000}}


@pytest.mark.parametrize("task", gpu.TASKS)
def test_all_arms_of_a_task_on_a_gpu_take_the_same_steps(task):
    steps = gpu.TASKS[task][1]
    for model in gpu.RATES:
        for how, objective in (("from scratch", "none"), ("pretrained", "masked")):
            config = gpu.arm(task, model, how, device="cpu")
            found = steps_of(config), config.batch_size, config.objective
            assert found == (steps, 128, objective)
    assert steps_of(gpu.arm(task, "s4", "pretrained", share=0.1)) == steps // 10


def test_arms_of_a_results_file_are_not_trained_again(tmp_path, monkeypatch):
    trained = []

    def compared(arms, seeds, folder, workers):
        (name,) = arms
        trained.append(name)
        assert arms[name].finetune_lr == 7
        run = tmp_path / folder / (name.replace(", ", "-").replace(" ", "-") + "-0")
        run.mkdir(parents=True, exist_ok=True)
        rows = [{"stage": "finetune", "step": 10, "loss": 1.0}]
        rows += [{"stage": "pretrain", "val_step": 20, "val_loss": 1.5}]
        rows += [{"stage": "finetune", "val_step": 30, "val_loss": 9, "val_accuracy": 0.25}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {name: {"mean": 1.0, "spread": None, "test": [1.0]}}

    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "tuned", lambda config, rates, workers: ({"finetune_lr": 7}, {}))
    monkeypatch.setattr(gpu, "compare", compared)
    path = tmp_path / "results/gpu_lra_fashion.json"
    gpu.train("fashion", 1, "cpu")
    stored = json.loads(path.read_text())
    curve = {"pretrain": {"20": 1.5}, "finetune": {"30": 0.25}}
    assert stored["arms"]["S4, pretrained"]["curve"] == curve
    del stored["arms"]["Transformer, from scratch"]
    path.write_text(json.dumps(stored))
    gpu.train("fashion", 1, "cpu")
    names = [f"{m}, {how}" for m in ("S4", "Transformer") for how in ("from scratch", "pretrained")]
    assert trained == [*names, "Transformer, from scratch"]


def test_a_step_that_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    ran = []

    def run(words, cwd):
        ran.append(words[1])
        return compare.argparse.Namespace(returncode=len(ran) == 1)

    monkeypatch.setattr(gpu, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "prepare", lambda args: gpu.RUNS.mkdir(exist_ok=True))
    monkeypatch.setattr(gpu, "train", lambda task, workers, device: ran.append(task))
    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tests", "peers", "listops", "--device", "cpu"])
    with pytest.raises(SystemExit, match="failed: tests; the same command tries them again"):
        gpu.main()
    gpu.main()
    assert ran == ["benchmarks/claims.py", "listops", "benchmarks/claims.py"]
    assert "peers: left out, it needs --s4" in capsys.readouterr().out


def test_only_processors_that_may_be_used_count(monkeypatch):
    """Containers and schedulers grant fewer than the machine has."""
    workers = []
    monkeypatch.setattr(demo, "usable_cpus", lambda: 3)
    monkeypatch.setattr(demo, "side_by_side", lambda jobs, n: workers.append(n) or [{}] * len(jobs))
    monkeypatch.setattr(demo, "table", lambda results: [])
    demo.demo(seed=0, out="no such folder")
    assert workers == [1 if demo.DEMO.device == "cuda" else 3]
    monkeypatch.setattr(measured, "usable_cpus", lambda: 3)
    assert ", 3 cores" in measured.hardware()
