"""pretrain.py on three processes, which share sequences or examples: it trains as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sequence_worker

import lra_data
import pretrain

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", str(ROOT / "tests/sequence_worker.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize("name", sequence_worker.CASES)
def test_all_steps_are_those_of_one_process(name, ranks, monkeypatch, tmp_path):
    """Losses and correct answers of every step and every evaluation, in both stages."""
    monkeypatch.setattr(lra_data, "load", lra_data.load)  # as they were, afterwards
    monkeypatch.setattr(pretrain, "Run", pretrain.Run)
    sequence_worker.prepare()
    options = {**sequence_worker.CASES[name], "sequence_parallel": None, "accumulate": 1}
    alone = sequence_worker.trajectory(tmp_path, options)
    assert len(alone) == (92 if "regression" in name else 42) and alone[0] != alone[18]
    for rank in ranks:
        assert rank[name] == pytest.approx(alone, rel=1e-10, abs=1e-12, nan_ok=True)


@pytest.mark.dist
def test_a_resumed_run_of_three_processes_ends_in_the_same_bits(ranks):
    assert all(rank["resumed"] for rank in ranks)
