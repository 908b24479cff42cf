"""What one rank does in tests/test_sequence_parallel.py: torchrun ... sequence_worker.py FILE."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist_attention
import lra_data
import pretrain

SMALL = {"d_model": 8, "n_heads": 2, "d_ff": 8, "d_state": 4, "kernel_dim": 8, "batch_size": 6}
SMALL |= {"precision": "float64", "device": "cpu"}
CASES = {
    "transformer, masked, ring": {"sequence_parallel": "ring"},
    "transformer, causal, RoPE, ring": {
        "sequence_parallel": "ring",
        "objective": "causal",
        "rope": True,
    },
    "transformer, masked, ulysses": {"sequence_parallel": "ulysses"},
    "s4, masked, ulysses": {"sequence_parallel": "ulysses", "model": "s4"},
    "s4d, masked, ulysses": {"sequence_parallel": "ulysses", "model": "s4d"},
    "sgconv, causal, ulysses": {
        "sequence_parallel": "ulysses",
        "model": "sgconv",
        "objective": "causal",
    },
}


def trajectory(options, steps=10):
    """Losses of ten steps of pretraining and ten of fine-tuning; half the examples are padded."""
    config = pretrain.Config(**SMALL, **options)
    data = lra_data.load("lattice", n_train=32, n_val=8, n_test=8)
    train = pretrain.Resident(data.train, data, "cpu")
    train.lengths = np.where(np.arange(len(train)) % 2, train.lengths, train.lengths * 2 // 3)
    model = pretrain.initial_model(config, data)
    losses = []
    for stage in pretrain.STAGES:
        pretrain.seeded(config, 1)
        head = pretrain.build_head(stage, config, train).double()
        groups = [*model.param_groups(1e-2, 0.01), {"params": list(head.parameters()), "lr": 1e-2}]
        optimiser = torch.optim.AdamW(groups)
        for step in range(steps):
            generator = pretrain.seeded(config, 2, step)
            index = np.arange(step, step + config.batch_size)
            batch = pretrain.make_batch(train, index, stage, config, generator)
            optimiser.zero_grad()
            loss, right, count = pretrain.gradients(model, head, batch, config)
            optimiser.step()
            losses += [float(loss) / count, float(right)]
    return losses


def main(path):
    with dist_attention.process_group(timeout=120) as (rank, _, _):
        seen = {name: trajectory(options) for name, options in CASES.items()}
        Path(f"{path}.{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist_attention.guarded(main, *sys.argv[1:])
