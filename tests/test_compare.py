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
