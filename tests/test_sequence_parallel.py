"""pretrain.py --sequence-parallel: one sequence over several processes trains as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sequence_worker

from config import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_ten_steps_are_those_of_one_process(world, tmp_path):
    """Losses and right answers of both stages, Transformer, S4, S4D and SGConv, padded batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), str(ROOT / "tests/sequence_worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "seen")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(world)]
    assert all(rank == ranks[0] for rank in ranks)
    for name, options in sequence_worker.CASES.items():
        alone = sequence_worker.trajectory(options | {"sequence_parallel": None})
        assert len(alone) == 40 and alone[0] != alone[18]
        assert ranks[0][name] == pytest.approx(alone, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "s4", "sequence_parallel": "ring"}, "ulysses"),
        ({"pooling": "max", "sequence_parallel": "ring"}, "max"),
        ({"dropout": 0.1, "sequence_parallel": "ulysses"}, "0.1"),
        ({"sequence_parallel": "stripes"}, "stripes"),
    ],
)
def test_what_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        Config(**options)
