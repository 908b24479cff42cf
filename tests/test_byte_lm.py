"""The byte language model of benchmarks/byte_lm.py: golden losses and the paper's counts."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structured_ffn import BlockDense, BlockShuffle, LowRank, rel_err

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

from byte_lm import LM, LMConfig, count, guided_fraction, rope  # noqa: E402


def in_print(value, printed):
    """Whether value rounds to what the paper prints, with as many digits."""
    digits = len(f"{printed:g}".split("e")[0].replace(".", ""))
    return float(f"{value:.{digits - 1}e}") == pytest.approx(printed, rel=1e-9)


def test_golden_losses():
    golden = json.loads((TESTS / "golden/structured_ffn.json").read_text())
    losses = make_golden.structured_ffn_losses()
    assert rel_err(np.array(losses), np.array(golden["losses"])) < 1e-9


def test_a_change_shows_from_its_position_on():
    config = LMConfig(32, 3, 4, d_head=6, n_kv_heads=2, vocab_size=13, linear=partial(LowRank, R=8))
    model = make_golden.closed_form(LM(config))
    tokens = torch.arange(12).view(1, 12)
    changed = tokens.clone()
    changed[0, 7] = 0
    y = model(tokens)
    assert y.shape == (1, 12, 13)
    assert torch.equal(model(changed)[:, :7], y[:, :7])
    assert rel_err(model(changed)[:, 7:], y[:, 7:]) > 1e-3


def test_rope_by_hand():
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 3, 4)
    angle = torch.arange(3)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    want = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert rel_err(rope(x)[0, 0], want) < 1e-12


def test_sizes_of_the_default_model():
    config = LMConfig()
    assert config.sizes() == (256, 16, 4)
    assert count(config, L=64) == {"ffn": 98304, "params": 163840, "flops": 1130496}


# size: model, optimizer steps of 2^19 tokens, FFN and model weights in millions, training FLOPs
# (paper, section 4.1 and table 1)
DENSE = {
    "s": (LMConfig(768, 12, 12, vocab_size=32000), 4196, 56.6, 109.5, 1.695e18),
    "m": (LMConfig(1024, 24, 16, vocab_size=32000), 12779, 201.3, 334.8, 1.548e19),
    "l": (LMConfig(1536, 24, 12, vocab_size=32000), 27809, 453.0, 728.6, 7.035e19),
    "xl": (LMConfig(2048, 24, 16, vocab_size=32000), 48637, 805.3, 1273.5, 2.102e20),
}


@pytest.mark.parametrize("size", DENSE)
def test_published_dense_models(size):
    config, steps, ffn, params, train = DENSE[size]
    counts = count(config)
    assert in_print(counts["ffn"] / 1e6, ffn)
    assert in_print(counts["params"] / 1e6, params)
    assert counts["flops"] * steps * 2**19 == pytest.approx(train, rel=5e-4)


XL = [  # layer, FFN and model weights in millions, training FLOPs (table 1)
    (partial(LowRank, R=1024), 516, 985, 1.66e20),
    (partial(BlockDense, R=1536, n_blocks=4), 486, 955, 1.61e20),
    (partial(BlockShuffle, n_blocks=2), 516, 985, 1.66e20),
    (partial(LowRank, R=512), 275, 744, 1.29e20),
    (partial(BlockDense, R=768, n_blocks=4), 260, 728, 1.27e20),
    (partial(BlockShuffle, n_blocks=4), 275, 744, 1.29e20),
]


@pytest.mark.parametrize(("make", "ffn", "params", "train"), XL, ids=str)
def test_published_structured_models(make, ffn, params, train):
    config = replace(DENSE["xl"][0], linear=make)
    steps = DENSE["xl"][1]
    counts = count(config)
    with torch.device("meta"):
        model = LM(config)
    assert round(counts["ffn"] / 1e6) == ffn
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == params  # biases, norms too
    assert in_print(counts["flops"] * steps * 2**19, train)


def test_published_wide_and_structured_models():
    """Weights and training FLOPs of the figure "wide and structured"."""
    m = LMConfig(1024, 24, 8, 4864, 64, 4, 32000, partial(LowRank, R=512))
    l = LMConfig(1536, 24, 6, 7424, 128, 2, 32000, partial(LowRank, R=768))
    for config, params, train, tokens in (
        (m, 219.2, 1.551e19, 10.6e9),
        (l, 464.0, 7.032e19, 23.4e9),
    ):
        counts = count(config)
        assert counts["params"] / 1e6 == pytest.approx(params, abs=0.05)
        assert counts["flops"] * tokens == pytest.approx(train, rel=0.01)


GUIDED = {  # share of guided steps of LowRank and BlockShuffle, of BlockDense, its blocks and rank
    "s": (0.301, 0.301, 2, 256),
    "m": (0.380, 0.395, 4, 384),
    "l": (0.413, 0.413, 2, 512),
    "xl": (0.432, 0.449, 4, 768),
}


@pytest.mark.parametrize("size", GUIDED)
def test_published_shares_of_guided_steps(size):
    low, block, B, R = GUIDED[size]
    dense = DENSE[size][0]
    for make, share in (
        (partial(LowRank, R=dense.d_model // 4), low),
        (partial(BlockShuffle, n_blocks=4), low),
        (partial(BlockDense, R=R, n_blocks=B), block),
    ):
        assert round(guided_fraction(replace(dense, linear=make), dense), 3) == share


def test_counts_are_those_of_the_built_model():
    config = LMConfig(32, 3, 2, vocab_size=50, linear=partial(LowRank, R=8))
    model = LM(config)
    with FlopCounterMode(display=False) as counter:
        for block in model.blocks:
            block.ffn(torch.zeros(1, 12, 32))
    assert counter.get_total_flops() == 2 * 12 * count(config)["ffn"]
    matrices = [p.numel() for p in model.parameters() if p.dim() > 1]
    assert sum(matrices) == count(config)["params"]
