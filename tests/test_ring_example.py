"""examples/ring_training.py: the losses of two processes are those of one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def losses(*launcher):
    command = [sys.executable, *launcher, str(ROOT / "examples/ring_training.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall("loss (.*)", done.stdout)]  # gloo may print too


@pytest.mark.dist
def test_two_processes_train_as_one():
    one = losses()
    two = losses("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert len(one) == 20 and one[-1] < 0.5 * one[0]
    assert two == pytest.approx(one, rel=1e-4)
