"""benchmarks/compare.py: arms are what was asked for, finished runs are kept, nonsense refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare

from settings import Config


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: notes the runs, the accuracy follows from the seed."""
    seen = []

    def train(config, position):
        seen.append(config.out)
        settings = compare.asdict(config)
        accuracy = 0.5 + 0.1 * config.seed
        result = {"test": {"accuracy": accuracy}, "finetune": {"accuracy": accuracy}}
        result |= {"commit": "abc", "speed": {"seconds": 1.0}, "parameters": 3, "config": settings}
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


def test_what_is_finished_is_read_and_never_mistaken(trained, tmp_path):
    compare.compare({"a": Config()}, [0], str(tmp_path))
    compare.compare({"a": Config()}, [0, 1], str(tmp_path))
    assert [Path(out).name for out in trained] == ["a-0", "a-1"]
    with pytest.raises(ValueError, match=r"a-0/result.json was made with another d_model"):
        compare.compare({"a": Config(d_model=8)}, [0], str(tmp_path))
    (tmp_path / "a-0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"a-0/result.json is not the result of a run"):
        compare.compare({"a": Config()}, [0], str(tmp_path))


def test_two_runs_never_share_a_folder(trained, tmp_path):
    for arms, seeds in (({"a b": Config(), "a-b": Config()}, [0]), ({"a": Config()}, [0, 0])):
        with pytest.raises(ValueError, match="would share a folder"):
            compare.compare(arms, seeds, str(tmp_path))
    assert not trained


def test_arms_of_the_command_line(monkeypatch, capsys, tmp_path):
    name, config = compare.parse_arm("S4 wide: --model s4 --d-model 128")
    assert (name, config.model, config.d_model) == ("S4 wide", "s4", 128)
    for arm, message in (
        (["no name"], "expected 'name: --flag"),
        ([" : --model s4"], "expected 'name: --flag"),
        (["a: ", "a: --seed 1"], "two arms of one name"),
        (["a: --check"], "no setting is called check"),
        (["a: --d-model 0"], "d_model 0"),
    ):
        flags = [flag for text in arm for flag in ("--arm", text)]
        monkeypatch.setattr(sys, "argv", ["compare.py", "--name", "x", *flags])
        with pytest.raises(SystemExit, match=message):
            compare.main()


def test_a_pretrained_path_follows_the_seed(trained, tmp_path):
    rows = compare.compare({"a": Config(pretrained="w-{seed}.pt")}, [4], str(tmp_path))
    assert rows["a"]["settings"]["pretrained"] == "w-4.pt"
