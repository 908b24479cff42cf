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
        seen.append(config.out)
        accuracy = 0.5 + 0.1 * config.seed
        result = {
            "test": {"accuracy": accuracy},
            "finetune": {"accuracy": accuracy},
            "commit": "abc",
            "speed": {"seconds": 1.0},
            "parameters": 3,
            "config": compare.asdict(config),
        }
        Path(config.out).mkdir(parents=True)
        Path(config.out, "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare.pretrain, "train", train)
    monkeypatch.setattr(compare, "side_by_side", lambda jobs, workers: [*map(compare.run, jobs)])
    return seen


def test_mean_and_spread_over_the_seeds(trained, tmp_path):
    arms = {"a": Config(), "b, wide": Config(d_model=128)}
    rows = compare.compare(arms, [0, 1, 3], str(tmp_path))
    assert rows["a"]["test"] == [50, 60, 80] and rows["a"]["mean"] == 63.33
    assert rows["a"]["spread"] == round(float(np.std([50, 60, 80], ddof=1)), 2)
    assert rows["b, wide"]["settings"]["d_model"] == 128 and len(trained) == 6


def test_finished_runs_are_not_trained_again(trained, tmp_path):
    compare.compare({"a": Config()}, [0], str(tmp_path))
    compare.compare({"a": Config()}, [0, 1], str(tmp_path))
    assert [Path(out).name for out in trained] == ["a-0", "a-1"]


def test_a_finished_run_with_other_settings_is_refused(trained, tmp_path):
    compare.compare({"a": Config()}, [0], str(tmp_path))
    with pytest.raises(ValueError, match=r"a-0/result.json has other settings: d_model \d+ -> 8;"):
        compare.compare({"a": Config(d_model=8)}, [0], str(tmp_path))
    (tmp_path / "a-0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"a-0/result.json is not the result of a run"):
        compare.compare({"a": Config()}, [0], str(tmp_path))


@pytest.mark.parametrize("names, seeds", [(["a b", "a-b"], [0]), (["a"], [0, 0])])
def test_two_runs_never_share_a_folder(trained, tmp_path, names, seeds):
    with pytest.raises(ValueError, match="would share a folder"):
        compare.compare(dict.fromkeys(names, Config()), seeds, str(tmp_path))
    assert not trained


def test_an_arm_is_a_name_and_flags_of_pretrain():
    name, config = compare.parse_arm("S4 wide: --model s4 --d-model 128")
    assert (name, config.model, config.d_model) == ("S4 wide", "s4", 128)


@pytest.mark.parametrize(
    "arms, message",
    [
        (["no name"], "expected 'name: --flag"),
        ([" : --model s4"], "expected 'name: --flag"),
        (["a: ", "a: --seed 1"], "two arms are called 'a'"),
        (["a: --check"], "no setting is called check"),
        (["a: --d-model 0"], "d_model 0"),
    ],
)
def test_nonsense_on_the_command_line_is_refused_in_one_line(monkeypatch, arms, message):
    flags = [word for arm in arms for word in ("--arm", arm)]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--name", "x", *flags])
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
    arms = []
    for model in gpu.RATES:
        for how in ("from scratch", "pretrained"):
            arms.append(gpu.arm(task, model, how, device="cpu"))
    assert {steps_of(config) for config in arms} == {gpu.TASKS[task][1]}
    assert {config.batch_size for config in arms} == {128}
    assert [config.objective for config in arms] == ["none", "masked"] * 2
    assert steps_of(gpu.arm(task, "s4", "pretrained", share=0.1)) == gpu.TASKS[task][1] // 10


def test_a_step_that_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "prepare", lambda args: gpu.RUNS.mkdir(exist_ok=True))
    monkeypatch.setattr(gpu, "train", lambda task, workers, device: ran.append(task))

    class Done:
        returncode = 0

    def run(words, cwd):
        ran.append(" ".join(words[1:3]))
        Done.returncode = len(ran) == 1
        return Done

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tests", "peers", "listops", "--device", "cpu"])
    with pytest.raises(SystemExit, match="failed: tests; the same command tries them again"):
        gpu.main()
    gpu.main()
    assert ran == ["benchmarks/claims.py gpu-tests", "listops", "benchmarks/claims.py gpu-tests"]
    assert "peers: left out, it needs --s4" in capsys.readouterr().out


def test_a_pretrained_path_follows_the_seed(trained, tmp_path):
    rows = compare.compare({"a": Config(pretrained="w-{seed}.pt")}, [4], str(tmp_path))
    assert rows["a"]["settings"]["pretrained"] == "w-4.pt"


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
