"""structured_ffn.py: golden values, exact properties, errors, guide, pre-merge and command line."""

import copy
import json
import math
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear, silu
from torch.utils.flop_counter import FlopCounterMode

import structured_ffn
from attention import Transformer, TransformerConfig
from structured_ffn import (
    KINDS,
    LM,
    PUBLISHED,
    BlockDense,
    BlockShuffle,
    Grid,
    Guide,
    LMConfig,
    LowRank,
    StructuredFFN,
    alpha_at,
    block_shuffle_ref,
    convert,
    count,
    ffn_factory,
    ffn_weights,
    from_linear,
    grid_linear,
    grid_matrix_ref,
    grid_to_paper,
    guided_fraction,
    match,
    paper_to_grid,
    rel_err,
    self_check,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/structured_ffn.json").read_text())
MAKERS = {
    "LowRank": partial(LowRank, R=6, std=1.0),
    "BlockDense": partial(BlockDense, R=8, n_blocks=4),
    "BlockShuffle": partial(BlockShuffle, n_blocks=2),
    "both shuffles": partial(BlockShuffle, n_blocks=2, shuffle_out=True),
}
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def build(make, d_in=16, d_out=24, seed=0):
    torch.manual_seed(seed)
    layer = make(d_in, d_out).double()
    nn.init.normal_(layer.bias)
    return layer


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def wave(*shape, phase=0.0):
    return torch.cos(1.3 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


# ---------------------------------------------------------------- the matrices


def test_block_shuffle_by_hand():
    """Blocks are outer products: W[a, b] = (column b of U[a]) (row a of V[b])."""
    V = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    U = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [1.0, 1.0]]])
    by_hand = torch.tensor([[1, 2, 0, 0], [2, 4, 5, 6], [0, 0, 21, 24], [3, 4, 7, 8]]).float()
    assert torch.equal(torch.from_numpy(grid_matrix_ref(V.numpy(), U.numpy())).float(), by_hand)
    assert torch.equal(grid_linear(torch.eye(4), V, U).T, by_hand)
    rows = by_hand[[0, 2, 1, 3]]  # the second shuffle: output s 2 + a
    assert np.array_equal(block_shuffle_ref(V.numpy(), U.numpy()), rows.numpy())


@pytest.mark.parametrize(
    ("name", "layer", "V", "U"),
    [
        ("low_rank", LowRank(4, 6, 3), (3, 4), (6, 3)),
        ("block_dense", BlockDense(4, 6, 4, 2), (2, 2, 2), (6, 4)),
        ("grid", BlockShuffle(4, 6, 2), (2, 2, 2), (2, 3, 2)),
        ("block_shuffle", BlockShuffle(4, 6, 2, shuffle_out=True), (2, 2, 2), (2, 3, 2)),
    ],
)
def test_golden_matrices(name, layer, V, U):
    V, U = wave(*V), wave(*U, phase=1.0)
    if name == "block_shuffle":
        V, U = paper_to_grid(V, U)
    layer = layer.double()
    with torch.no_grad():
        layer.V.copy_(V.view(layer.V.shape))
        layer.U.copy_(U.view(layer.U.shape))
    want = torch.tensor(GOLDEN[name], dtype=torch.float64)
    assert rel_err(layer.dense_weight(), want) < 1e-12
    assert rel_err(layer(torch.eye(4).double()).T, want) < 1e-12


def random_grids(n=24):
    draw = random.Random(0)
    for _ in range(n):
        n_in, n_out = draw.randint(1, 4), draw.randint(1, 4)
        P, S = draw.randint(1, 6), draw.randint(1, 6)
        yield n_in * P, n_out * S, n_in, n_out, draw.randint(1, min(P, S)), draw.random() < 0.5


@pytest.mark.parametrize("sizes", list(random_grids()), ids=str)
def test_random_shapes(sizes):
    """forward == materialised == numpy, any leading sizes, one token and none; counts exact."""
    *grid, bias = sizes
    torch.manual_seed(1)
    layer = Grid(*grid, bias=bias).double()
    if bias:
        nn.init.normal_(layer.bias)
    d_in, d_out, n_in, n_out, c = grid
    W = torch.from_numpy(grid_matrix_ref(layer.V.detach().numpy(), layer.U.detach().numpy()))
    assert rel_err(layer.dense_weight(), W) < 1e-12
    weights = layer.V.numel() + layer.U.numel()
    assert weights == n_in * n_out * c * (d_in // n_in + d_out // n_out)
    for lead in ((5,), (1,), (2, 3), ()):
        x = torch.randn(*lead, d_in, dtype=torch.float64)
        want = linear(x, W, layer.bias)
        assert rel_err(layer(x), want) < 1e-12
        with torch.no_grad():
            assert rel_err(layer(x), want) < 1e-12
            assert flops(partial(layer, x)) == 2 * math.prod(lead) * weights
    for x in (torch.randn(0, d_in).double(), torch.randn(2, 0, d_in).double()):
        assert layer(x).shape == (*x.shape[:-1], d_out)
    x = torch.randn(d_in, 7).double().T
    assert rel_err(layer(x), linear(x, W, layer.bias)) < 1e-12


@kinds
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)], ids=str)
def test_gradients(make, shape):
    layer = build(make, *shape)
    x = torch.randn(3, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    g = torch.randn(3, shape[1]).double()
    dense = torch.autograd.grad(
        x @ layer.dense_weight().T + layer.bias, [x, *layer.parameters()], g
    )
    fast = torch.autograd.grad(layer(x), [x, *layer.parameters()], g)
    assert max(rel_err(a, b) for a, b in zip(fast, dense, strict=True)) < 1e-12


@pytest.mark.parametrize("shape", [(12, 24, 2), (24, 12, 2), (16, 16, 4), (36, 18, 3)], ids=str)
def test_paper_layout(shape):
    """The map between the paper's factors and the grid is exact both ways."""
    d_in, d_out, B = shape
    Q = min(d_in, d_out) // B
    V, U = torch.randn(B, Q, d_in // B).double(), torch.randn(B, d_out // B, Q).double()
    want = block_shuffle_ref(V.numpy(), U.numpy())
    layer = BlockShuffle(d_in, d_out, B, shuffle_out=True).double()
    with torch.no_grad():
        for p, q in zip((layer.V, layer.U), paper_to_grid(V, U), strict=True):
            p.copy_(q)
    x = torch.randn(4, d_in).double()
    assert rel_err(layer(x), x @ torch.from_numpy(want).T) < 1e-12
    assert all(
        torch.equal(p, q) for p, q in zip(grid_to_paper(layer.V, layer.U), (V, U), strict=True)
    )
    plain = BlockShuffle(d_in, d_out, B).double()
    plain.load_state_dict(layer.state_dict())
    shuffled = plain.dense_weight().unflatten(0, (B, -1)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(shuffled, layer.dense_weight())


def test_special_cases_and_ranks():
    torch.manual_seed(0)
    a, b = BlockDense(12, 20, 6, 1, bias=False), LowRank(12, 20, 6, bias=False)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.dense_weight(), b.dense_weight())
    rank = torch.linalg.matrix_rank
    assert rank(b.dense_weight()) == 6
    assert rank(BlockDense(16, 24, 8, 4).dense_weight()) == 8
    shuffle = BlockShuffle(16, 24, 2)
    assert rank(shuffle.dense_weight()) == 16
    blocks = shuffle.dense_weight().unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2)
    assert (rank(blocks) == 4).all()


# ---------------------------------------------------------------- initialisation, projection


def test_initialisation():
    torch.manual_seed(3)
    low = LowRank(32, 96, 8)
    torch.manual_seed(3)
    drawn = 0.02 * torch.randn(96, 32)
    left, sigma, right = torch.linalg.svd(drawn, full_matrices=False)
    assert rel_err(low.dense_weight(), (left[:, :8] * sigma[:8]) @ right[:8]) < 1e-5
    balance = torch.diag(sigma[:8])
    assert rel_err(low.U[0].T @ low.U[0], balance) < 1e-5
    assert rel_err(low.V[0] @ low.V[0].T, balance) < 1e-5
    for layer, gain in (
        (BlockDense(32, 96, 16, 4), 16 / 96),
        (BlockShuffle(32, 96, 4), 32 / 96),
        (BlockShuffle(96, 32, 4), 1.0),
    ):
        for block in (*layer.V, *layer.U):
            assert rel_err(torch.linalg.svdvals(block), torch.ones(min(block.shape))) < 1e-5
        # mean square of the output of a unit input
        assert layer.dense_weight().square().sum().item() / layer.d_out == pytest.approx(
            gain, rel=1e-5
        )
        assert not layer.bias.any()


@kinds
def test_projection_is_the_best_in_frobenius_norm(make):
    """What is left of each block are its singular values beyond the rank (Eckart, Young)."""
    torch.manual_seed(0)
    dense = nn.Linear(16, 24).double()
    layer = from_linear(dense, make)
    W = dense.weight.detach()
    if layer.shuffle_out:
        W = W.unflatten(0, (-1, layer.n_out)).transpose(0, 1).flatten(0, 1)
    blocks = W.unflatten(0, (layer.n_out, -1)).unflatten(2, (layer.n_in, -1)).transpose(1, 2)
    rest = torch.linalg.svdvals(blocks)[..., layer.c :].square().sum()
    error = (layer.dense_weight() - dense.weight).square().sum()
    assert rel_err(error, rest) < 1e-10
    assert torch.equal(layer.bias, dense.bias)
    assert layer.U.dtype == torch.float64


def test_convert():
    torch.manual_seed(0)
    model = LM(LMConfig(16, 3, 2, vocab_size=11)).double()
    tokens = torch.arange(10).view(1, 10)
    before = model(tokens)
    exact = copy.deepcopy(model)
    errors = convert(exact, partial(LowRank, R=16), lambda name: ".ffn." in name)
    assert len(errors) == 6 and max(errors.values()) < 1e-12
    assert rel_err(exact(tokens), before) < 1e-10
    errors = convert(model, partial(BlockShuffle, n_blocks=2), lambda n: n == "blocks.1.ffn.fc1")
    assert list(errors) == ["blocks.1.ffn.fc1"] and 0.1 < errors["blocks.1.ffn.fc1"] < 0.9
    assert isinstance(model.blocks[1].ffn.fc1, BlockShuffle)
    with pytest.raises(ValueError, match="none"):
        convert(model, partial(LowRank, R=2), lambda name: False)


# ---------------------------------------------------------------- errors, planner, counters


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BlockDense(100, 64, 16, 8), "d_in 100 .* 8: 96 and 104 are"),
        (lambda: BlockDense(64, 64, 18, 8), "R 18 .* 8: 16 and 24 are"),
        (lambda: BlockShuffle(64, 250, 4), "d_out 250 .* 4: 248 and 252 are"),
        (lambda: BlockShuffle(72, 288, 4), r"min\(d_in, d_out\) 72 .* 16: 64 and 80 are"),
        (lambda: LowRank(8, 32, 9), "rank 9 of a 32 x 8 block must be between 1 and 8"),
        (lambda: LowRank(8, 32, 0), "rank 0"),
        (lambda: LowRank(8, 32, 4)(torch.zeros(2, 9)), r"x \(2, 9\).* d_in 8"),
        (lambda: LowRank(8, 32, 4).project_(torch.zeros(8, 32)), r"\(8, 32\), expected \(32, 8\)"),
        (lambda: match(64, 256, "butterfly", 0.5), "butterfly"),
        (lambda: match(64, 256, "lowrank", 1.5), "1.5"),
        (lambda: match(60, 240, "blockshuffle", 0.31), "ratio 0.31: the nearest, .*0.625"),
        (lambda: Guide(nn.Linear(4, 4), 10), "0 Grid layers"),
        (lambda: Guide(LowRank(4, 4, 2), 0), "n_steps 0"),
        (lambda: LMConfig(d_model=10, n_heads=4).sizes(), "d_model 10 .* n_heads 4"),
        (lambda: paper_to_grid(torch.zeros(4, 6, 2), torch.zeros(4, 3, 6)), "Q 6 .* 4: 4 and 8"),
    ],
)
def test_errors_carry_the_numbers(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_match():
    """The published shares, and the sizes that the paper uses for them."""
    assert match(2048, 8192, "lowrank", 0.625).keywords == {"R": 1024}
    assert match(2048, 8192, "lowrank", 0.3125).keywords == {"R": 512}
    assert match(2048, 8192, "blockshuffle", 0.625).keywords == {"n_blocks": 2}
    assert match(2048, 8192, "blockshuffle", 0.32).keywords == {"n_blocks": 4}
    assert match(2048, 8192, "blockdense", 0.5859375).keywords == {"R": 1536, "n_blocks": 4}
    # c = 102.4, 204.8, 25.6, 6.4: multiples of 8, where 2 % allow it, then of 4, 2, 1
    for d, c in ((1024, 104), (2048, 208), (256, 26), (64, 6)):
        assert match(d, 4 * d, "blockdense", 0.3125).keywords["R"] == 4 * c
    for kind in KINDS:
        share = ffn_weights(match(768, 3072, kind, 0.32), 768, 3072) / (2 * 768 * 3072)
        assert share == pytest.approx(0.32, rel=0.03)


# size: FFN and model weights in millions, training FLOPs (paper, section 4.1 and table 1)
DENSE = {
    "s": (56.6, 109.5, 1.695e18),
    "m": (201.3, 334.8, 1.548e19),
    "l": (453.0, 728.6, 7.035e19),
    "xl": (805.3, 1273.5, 2.102e20),
}
XL = [  # layer, FFN and model weights in millions, training FLOPs (table 1)
    (partial(LowRank, R=1024), 516, 985, 1.66e20),
    (partial(BlockDense, R=1536, n_blocks=4), 486, 955, 1.61e20),
    (partial(BlockShuffle, n_blocks=2), 516, 985, 1.66e20),
    (partial(LowRank, R=512), 275, 744, 1.29e20),
    (partial(BlockDense, R=768, n_blocks=4), 260, 728, 1.27e20),
    (partial(BlockShuffle, n_blocks=4), 275, 744, 1.29e20),
]


def in_print(value, printed):
    """value rounds to what is printed with as many digits."""
    digits = len(f"{printed:g}".split("e")[0].replace(".", ""))
    return float(f"{value:.{digits - 1}e}") == pytest.approx(printed, rel=1e-9)


@pytest.mark.parametrize("size", DENSE)
def test_published_dense(size):
    config, steps = PUBLISHED[size]
    ffn, params, train = DENSE[size]
    counts = count(config)
    assert in_print(counts["ffn"] / 1e6, ffn) and in_print(counts["params"] / 1e6, params)
    assert counts["flops"] * steps * 2**19 == pytest.approx(train, rel=5e-4)


@pytest.mark.parametrize(("make", "ffn", "params", "train"), XL, ids=str)
def test_published_xl(make, ffn, params, train):
    config, steps = PUBLISHED["xl"]
    config = replace(config, linear=make)
    counts = count(config)
    assert round(counts["ffn"] / 1e6) == ffn
    with torch.device("meta"):  # the paper's table counts biases and norms too
        assert round(sum(p.numel() for p in LM(config).parameters()) / 1e6) == params
    assert in_print(counts["flops"] * steps * 2**19, train)


def test_published_exact():
    """Counted by hand for s: 12 x 8 D^2 + 12 x 4 D^2 + 32000 D, and its LowRank 32 %."""
    config, _ = PUBLISHED["s"]
    assert count(config) == {"ffn": 56623104, "params": 109510656, "flops": 770310144}
    low = count(replace(config, linear=partial(LowRank, R=192)))
    assert low["ffn"] == 8 * 768**2 + 11 * 10 * 768 * 192 == 20938752
    assert low["flops"] == 770310144 - 6 * (56623104 - 20938752)


@pytest.mark.parametrize(
    ("config", "params", "train", "tokens"),
    [
        (
            LMConfig(1024, 24, 8, 4864, 64, 4, 32000, partial(LowRank, R=512)),
            219.2,
            1.551e19,
            10.6e9,
        ),
        (
            LMConfig(1536, 24, 6, 7424, 128, 2, 32000, partial(LowRank, R=768)),
            464.0,
            7.032e19,
            23.4e9,
        ),
    ],
    ids=["m", "l"],
)
def test_published_wide(config, params, train, tokens):
    """Wide and structured: weights, and the dense model's FLOPs over more tokens."""
    counts = count(config)
    assert counts["params"] / 1e6 == pytest.approx(params, abs=0.05)
    assert counts["flops"] * tokens == pytest.approx(train, rel=0.01)


@pytest.mark.parametrize("size", "s m l xl".split())
def test_published_guided_fractions(size):
    """The fraction that spends the dense model's FLOPs, 32 % layers."""
    dense, _ = PUBLISHED[size]
    D = dense.d_model
    low = guided_fraction(replace(dense, linear=partial(LowRank, R=D // 4)), dense)
    assert round(low, 3) == {"s": 0.301, "m": 0.380, "l": 0.413, "xl": 0.432}[size]
    shuffle = guided_fraction(replace(dense, linear=partial(BlockShuffle, n_blocks=4)), dense)
    assert shuffle == low
    B, R = {"s": (2, 256), "m": (4, 384), "l": (2, 512), "xl": (4, 768)}[size]
    block = guided_fraction(replace(dense, linear=partial(BlockDense, R=R, n_blocks=B)), dense)
    assert round(block, 3) == {"s": 0.301, "m": 0.395, "l": 0.413, "xl": 0.449}[size]


def test_flops_of_a_whole_model():
    """torch counts what the formula says; attention left out."""
    config = LMConfig(32, 3, 2, vocab_size=50, linear=partial(BlockShuffle, n_blocks=4))
    model, L = LM(config), 12
    counted = flops(lambda: [block.ffn(torch.zeros(1, L, 32)) for block in model.blocks])
    assert counted == 2 * L * count(config)["ffn"]
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert total == count(config)["params"]


# ---------------------------------------------------------------- self-guided training


@kinds
def test_guide_starts_at_the_structured_layer(make):
    layer = build(make)
    x = torch.randn(5, 16).double()
    want = layer(x)
    guide = Guide(layer, 10)
    assert rel_err(layer.W, layer.dense_weight()) < 1e-12
    for layer.alpha in (1.0, 0.7, 0.3, 0.0):
        assert rel_err(layer(x), want) < 1e-12
    assert guide.layers == [layer]


@kinds
def test_guide_mixes(make):
    """alpha 0 and 1 are the two layers; gradients scale with 1 - alpha and alpha; bias once."""
    layer = build(make)
    x = torch.randn(5, 16).double()
    structured = layer(x).detach()
    Guide(layer, 10)
    nn.init.normal_(layer.W)
    dense = linear(x, layer.W, layer.bias).detach()
    leaves = [layer.V, layer.U, layer.W, layer.bias]

    def grads(alpha):
        layer.alpha = alpha
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, leaves, wave(5, 24))

    (y0, g0), (y1, g1) = grads(0.0), grads(1.0)
    assert rel_err(y0, structured) < 1e-12 and rel_err(y1, dense) < 1e-12
    assert not g0[2].any() and not g1[0].any() and not g1[1].any()
    for alpha in (0.25, 0.6):
        y, g = grads(alpha)
        assert rel_err(y, alpha * dense + (1 - alpha) * structured) < 1e-12
        scaled = [(1 - alpha) * g0[0], (1 - alpha) * g0[1], alpha * g1[2], g0[3]]
        for got, full in zip(g, scaled, strict=True):
            assert rel_err(got, full) < 1e-12


def test_schedule():
    at = {0: 1, 1: 0.9998, 25: 0.8536, 50: 0.5, 75: 0.1464, 99: 0.0002, 100: 0, 150: 0}
    for t, alpha in at.items():
        assert round(alpha_at(t, 100), 4) == alpha
    assert np.mean([alpha_at(t, 1000) for t in range(1000)]) == pytest.approx(0.5, abs=1e-3)


def test_stochastic_guide():
    """Guided with probability alpha, unscaled otherwise; all ranks agree; evaluation is fixed."""
    layers = nn.ModuleList(build(MAKERS["LowRank"]) for _ in range(8))
    twins = copy.deepcopy(layers)
    x = torch.randn(2, 16).double()
    structured = [layer(x) for layer in layers]
    n = 400
    guide, twin = (
        Guide(layers, n, stochastic=True, seed=5),
        Guide(twins, n, stochastic=True, seed=5),
    )
    coins, expected, variance = [], 0.0, 0.0
    for t in range(n):
        coins.append([layer.coin for layer in layers])
        assert coins[-1] == [layer.coin for layer in twins]
        expected += 8 * alpha_at(t, n)
        variance += 8 * alpha_at(t, n) * (1 - alpha_at(t, n))
        guide.step(), twin.step()
    assert abs(np.sum(coins) - expected) < 3 * variance**0.5
    assert any(len(set(row)) == 2 for row in coins)  # layers have their own coins
    guide = Guide(layers, n, stochastic=True)
    for layer, plain in zip(layers, structured, strict=True):
        nn.init.normal_(layer.W)
        layer.alpha, layer.coin = 0.5, False
        assert rel_err(layer(x), plain) < 1e-12  # not (1 - alpha) U V x
        assert flops(partial(layer, x)) == 2 * 2 * (layer.U.numel() + layer.V.numel())
        layer.coin = True
        mixed = layer(x)
        assert rel_err(mixed, plain) > 0.1
        layer.eval().coin = False
        assert torch.equal(layer(x), mixed)


def test_guide_frees_itself():
    model = LM(LMConfig(16, 3, 2, vocab_size=11, linear=partial(LowRank, R=4)))
    names = set(model.state_dict())
    guide = Guide(model, 3)
    weights = [layer.W for layer in guide.layers]
    assert len(weights) == 4 and set(model.state_dict()) > names
    optimizer = torch.optim.AdamW(model.parameters())
    for t in range(4):
        assert (model.blocks[1].ffn.fc1.W is None) == (t == 3)
        optimizer.zero_grad()
        model(torch.arange(10).view(1, 10)).square().sum().backward()
        optimizer.step()
        if t < 3:
            assert all(w in optimizer.state for w in weights)
        guide.step(optimizer)
    assert set(model.state_dict()) == names
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(p is w for p in held for w in weights)
    assert not any(w in optimizer.state for w in weights)
    assert len(optimizer.state) == len(held) == len(list(model.parameters()))


def steps(model, guide, optimizer, first, last):
    for t in range(first, last):
        tokens = (torch.arange(24) * (t + 3) % 11).view(2, 12)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().roll(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guide.step(optimizer)
    return loss.item()


@pytest.mark.parametrize("stop", [7, 14])
def test_resume_in_the_middle_is_exact(stop, tmp_path):
    """A run stopped while guided (7) or after (14) ends as the one that was not stopped."""

    def start():
        torch.manual_seed(0)
        model = LM(LMConfig(16, 3, 2, vocab_size=11, linear=partial(BlockShuffle, n_blocks=2)))
        return model, Guide(model, 12, stochastic=True, seed=2)

    model, guide = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, guide, optimizer, 0, stop)
    parts = {"model": model, "guide": guide, "optimizer": optimizer}
    torch.save({k: v.state_dict() for k, v in parts.items()}, tmp_path / "state.pt")
    want = steps(model, guide, optimizer, stop, 20)

    state = torch.load(tmp_path / "state.pt")
    model, guide = start()
    for p in model.parameters():
        nn.init.zeros_(p)
    guide.load_state_dict(state["guide"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert steps(model, guide, optimizer, stop, 20) == want


# ---------------------------------------------------------------- pre-merge


@kinds
def test_merge_serves_few_tokens_and_is_exact(make):
    layer = build(make).eval()
    names = set(layer.state_dict())
    x = torch.randn(9, 16).double()
    want = layer(x)
    assert layer.merge(threshold=8) == 8 == layer.merge(threshold=8)
    structured, dense = 2 * (layer.U.numel() + layer.V.numel()), 2 * 16 * 24
    with torch.no_grad():
        assert flops(lambda: layer(x[:8])) == 8 * dense != 8 * structured
        assert flops(lambda: layer(x.view(3, 3, 16))) == 9 * structured
        assert rel_err(layer(x[:8]), want[:8]) < 1e-12
    assert set(layer.state_dict()) == names


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, foreach=False),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.1, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("which", ["U", "V"])
def test_no_stale_merge_after_an_optimizer_step(optimizer, which):
    """Even in evaluation mode and with gradients that no call of the layer made."""
    layer = build(MAKERS["BlockShuffle"]).eval()
    x = torch.randn(3, 16).double()
    layer.merge(threshold=100)
    p = getattr(layer, which)
    p.grad = torch.ones_like(p)
    optimizer([p]).step()
    with torch.no_grad():
        assert rel_err(layer(x), linear(x, layer.dense_weight(), layer.bias)) < 1e-12
    assert layer._merged is None


def changed_by_load(layer):
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})


def changed_by_data(layer):
    layer.V.data = layer.V.data * 2


def changed_in_training(layer):
    layer.train()
    layer.V.data.mul_(2)
    layer.eval()


@pytest.mark.parametrize("change", [changed_by_load, changed_by_data, changed_in_training])
def test_no_stale_merge_after_other_changes(change):
    layer = build(MAKERS["BlockDense"]).eval()
    x = torch.randn(3, 16).double()
    layer.merge(threshold=100)
    change(layer)
    with torch.no_grad():
        assert rel_err(layer(x), linear(x, layer.dense_weight(), layer.bias)) < 1e-12


def test_merge_gives_way():
    layer = build(MAKERS["LowRank"]).eval()
    x = torch.randn(3, 16).double()
    layer.merge(threshold=100)
    layer(x).sum().backward()  # recorded: through the factors
    assert layer.U.grad is not None and layer._merged is None
    layer.merge(threshold=100)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer))).float()
    with torch.no_grad():
        assert rel_err(twin(x.float()), layer(x)) < 1e-5
    Guide(layer, 5)
    assert layer._merged is None
    with pytest.raises(ValueError, match="guided"):
        layer.merge()


def test_threshold_is_measured_once(monkeypatch):
    """The two forms are timed for 1, 2, 4, ... tokens until the factors win."""
    asked = []

    def clock(calls):
        tokens = len(calls[1].args[0])
        asked.append(tokens)
        assert calls[0]().shape == calls[1]().shape == (tokens, 24)
        return (1.0, 2.0) if tokens < 16 else (2.0, 1.0)

    monkeypatch.setattr(structured_ffn, "seconds", clock)
    monkeypatch.setattr(structured_ffn, "_THRESHOLDS", {})
    layer = build(MAKERS["LowRank"]).eval()
    assert layer.merge() == 8 and asked == [1, 2, 4, 8, 16]
    assert build(MAKERS["LowRank"]).eval().merge() == 8 and len(asked) == 5
    monkeypatch.setattr(structured_ffn, "seconds", lambda calls: (1.0, 2.0))
    assert build(MAKERS["BlockDense"]).merge() == 4096
    monkeypatch.setattr(structured_ffn, "seconds", lambda calls: (2.0, 1.0))
    layer = build(MAKERS["BlockShuffle"]).eval()
    assert layer.merge() == 0 and layer._merged is None


def test_real_threshold():
    threshold = LowRank(64, 256, 16).eval().merge()
    assert threshold in (0, *(2**k for k in range(13)))


# ---------------------------------------------------------------- FFN, model, surroundings


@pytest.mark.parametrize("gated", [False, True])
def test_ffn(gated):
    ffn = StructuredFFN(8, 24, partial(BlockDense, R=4, n_blocks=2), gated).double()
    x = torch.randn(2, 3, 8).double()
    h = x @ ffn.fc1.dense_weight().T
    h = silu(h[..., :24]) * h[..., 24:] if gated else gelu(h, approximate="tanh")
    assert rel_err(ffn(x), h @ ffn.fc2.dense_weight().T) < 1e-12


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_in_the_transformer(kind):
    torch.manual_seed(0)
    config = TransformerConfig(d_model=32, n_layers=3, n_heads=2, vocab_size=11)
    model = Transformer(config, ffn=ffn_factory(kind, ratio=0.3125))
    ffns = [m for m in model.modules() if isinstance(m, StructuredFFN)]
    assert [type(f.fc1) for f in ffns] == [nn.Linear] + 2 * [KINDS.get(kind, nn.Linear)]
    y = model(torch.arange(10).view(1, 10))
    assert y.shape == (1, 10, 32)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    groups = model.param_groups(1e-3, 0.1)
    decayed = {id(p) for g in groups for p in g["params"] if g["weight_decay"]}
    for p in ffns[1].parameters():
        assert (id(p) in decayed) == (p.dim() > 1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_language_model_is_causal():
    torch.manual_seed(0)
    linear = partial(LowRank, R=8)
    model = LM(LMConfig(32, 3, 4, d_head=6, n_kv_heads=2, vocab_size=13, linear=linear)).double()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    tokens = torch.arange(12).view(1, 12)
    changed = tokens.clone()
    changed[0, 7] = 0
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert rel_err(b[:, 7:], a[:, 7:]) > 1e-3
    assert a.shape == (1, 12, 13)
    swapped = tokens[:, [1, 0, *range(2, 12)]]  # positions matter
    assert rel_err(model(swapped)[:, 5:], a[:, 5:]) > 1e-6


def test_golden_losses():
    assert rel_err(np.array(make_golden.structured_ffn_losses()), np.array(GOLDEN["losses"])) < 1e-9


@kinds
def test_other_types_and_meta(make):
    layer = build(make).float()
    x = torch.randn(7, 16)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                y = layer(x)
            assert y.dtype == torch.bfloat16 and rel_err(y, want) < 0.03
    assert rel_err(copy.deepcopy(layer).bfloat16()(x.bfloat16()), want) < 0.05
    with torch.device("meta"):
        assert make(16, 24)(torch.empty(3, 16)).shape == (3, 24)


@kinds
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over products
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # by torch.func itself
@pytest.mark.parametrize("recorded", [True, False])
def test_torch_func(make, recorded):
    """Gradients of each example, tangents, stacked weights: as by the materialised matrix."""
    layer = build(make)
    params = {k: p.detach() for k, p in layer.named_parameters()}
    x, v = torch.randn(2, 3, 5, 16).double()
    W, bias = layer.dense_weight().detach(), params["bias"]

    def call(params, x):
        return torch.func.functional_call(layer, params, (x,))

    def loss(params, x):
        return call(params, x).square().sum()

    with torch.set_grad_enabled(recorded):
        assert rel_err(torch.vmap(partial(call, params))(x), linear(x, W, bias)) < 1e-12
        y, tangent = torch.func.jvp(partial(call, params), (x,), (v,))
        assert rel_err(y, linear(x, W, bias)) < 1e-12
        assert rel_err(tangent, linear(v, W)) < 1e-12
        each = torch.vmap(torch.func.grad(loss), (None, 0))(params, x)
        assert rel_err(each["bias"], 2 * linear(x, W, bias).sum(1)) < 1e-12
        assert rel_err(each["V"].sum(0), torch.func.grad(loss)(params, x)["V"]) < 1e-12
        twice = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
        stacked = torch.vmap(call, (0, None))(twice, x)
        assert rel_err(stacked[1], linear(x, 4 * W, 2 * bias)) < 1e-12


@kinds
def test_result_is_contiguous_and_training_costs_three_forwards(make):
    layer = build(make)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            assert layer(x).view(14, 24).shape == (14, 24)
    cost = flops(lambda: layer(x).sum().backward())
    assert cost == 3 * 2 * 14 * (layer.V.numel() + layer.U.numel())


@pytest.mark.parametrize("recorded", [True, False])
def test_block_shuffle_never_copies_its_result(recorded):
    layer, x = build(MAKERS["BlockShuffle"]), torch.randn(7, 16).double()
    cpu = torch.profiler.ProfilerActivity.CPU
    with (
        torch.set_grad_enabled(recorded),
        torch.profiler.profile(activities=[cpu], record_shapes=True) as profile,
    ):
        layer(x)
    copied = [e.input_shapes[0] for e in profile.events() if e.name == "aten::clone"]
    assert copied and 7 * 24 not in map(math.prod, copied)  # the regrouping copies, (7, 16)


@kinds
def test_exports_with_any_number_of_tokens(make):
    layer, tokens = build(make).eval(), torch.export.Dim("tokens", min=2, max=64)
    example = torch.randn(5, 16).double()
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: tokens},), strict=False)
    x = torch.randn(9, 16).double()
    assert rel_err(program.module()(x), layer(x)) < 1e-12


@kinds
def test_factors_of_two_types_are_an_error(make):
    layer, x = build(make).float(), torch.randn(3, 16).bfloat16()
    layer.V.data = layer.V.data.bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        layer(x)


@kinds
def test_compiles_into_one_graph(make):
    """Guided too, and without a new graph for every alpha."""
    layer = build(make)
    x = torch.randn(7, 16).double()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    Guide(layer, 100)
    nn.init.normal_(layer.W)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for layer.alpha in (0.9, 0.8, 0.7, 0.6, 0.5):
        assert rel_err(compiled(x), layer(x)) < 1e-12
    assert len(graphs) <= 2


# ---------------------------------------------------------------- checks, command line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_self_check(dtype):
    rows = self_check(dtype)
    assert len(rows) > 30
    assert not [row for row in rows if not row[1] <= row[2]]


FAULTS = {
    "zeros": lambda y: y * 0,
    "one per cent": lambda y: y * 1.01,
    "shifted": lambda y: y.roll(1, -1),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_self_check_can_fail(fault, monkeypatch):
    good = structured_ffn.grid_linear
    monkeypatch.setattr(structured_ffn, "grid_linear", lambda *a, **k: fault(good(*a, **k)))
    failed = {name for name, error, limit in self_check() if not error <= limit}
    for kind in ("LowRank", "BlockDense", "BlockShuffle", "both shuffles"):
        assert f"{kind}: forward == numpy" in failed


def test_command_line():
    command = [sys.executable, "structured_ffn.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") > 30 and "FAIL" not in done.stdout


def test_command_line_refuses_what_it_cannot_check():
    command = [sys.executable, "structured_ffn.py", "--dtype", "int32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'int32'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_whole_file_runs():
    done = subprocess.run(
        [sys.executable, "structured_ffn.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target: ratio below 0.5   ok" in done.stdout and "BlockShuffle " in done.stdout


# ---------------------------------------------------------------- what users do to layers


def is_current(layer, d_in):
    x = torch.randn(3, d_in)
    with torch.no_grad():
        return rel_err(layer(x), x @ layer.dense_weight().T + layer.bias) < 1e-5


def test_a_merged_form_never_outlives_other_weights():
    """Freed memory is handed out again at the same address, with a fresh counter of writes."""
    for _ in range(30):
        layer = BlockShuffle(64, 256, 4).eval()
        layer.merge(100)
        for _ in range(2):
            layer.load_state_dict(BlockShuffle(64, 256, 4).state_dict(), assign=True)
        assert is_current(layer, 64)


def test_a_merged_form_is_not_loaded_with_weights_that_count_their_writes_from_new(tmp_path):
    layer = BlockShuffle(16, 24, 2).eval()
    layer.merge(100)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    loaded.load_state_dict(BlockShuffle(16, 24, 2).state_dict())
    assert is_current(loaded, 16)
    assert layer._merged is not None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_passes_by_the_merged_form():
    layer, x = build(MAKERS["BlockShuffle"]).eval(), torch.randn(5, 16).double()
    params = {k: p.detach() for k, p in layer.named_parameters()}
    layer.merge(100)

    def call(params):
        return torch.func.functional_call(layer, params, (x,))

    stacked = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    with torch.no_grad():
        assert rel_err(torch.vmap(call)(stacked)[0], layer.structured(x)) < 1e-12
        assert rel_err(torch.func.jvp(call, (params,), (params,))[0], layer.structured(x)) < 1e-12


def test_a_fused_step_drops_the_merged_form_of_whoever_shares_the_factors():
    layer = BlockShuffle(16, 24, 2).eval()
    layer.merge(100)
    other = copy.copy(layer)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    assert is_current(layer, 16) and is_current(other, 16)


def test_merging_and_guiding_under_autocast_keep_the_type_of_the_factors():
    layer = BlockShuffle(16, 24, 2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge(100)
    assert is_current(layer, 16)
    with torch.autocast("cpu", torch.bfloat16):
        Guide(layer, 3)
    assert layer.W.dtype == torch.float32


def test_layers_run_on_meta_and_in_inference_mode():
    with torch.device("meta"), torch.no_grad():
        assert BlockShuffle(16, 24, 2)(torch.empty(3, 16)).shape == (3, 24)
    with torch.inference_mode():
        layer = BlockShuffle(16, 24, 2).eval()
        layer.merge(100)
        assert rel_err(layer(torch.eye(16)) - layer.bias, layer.dense_weight().T) < 1e-5


def test_reset_leaves_nothing_of_what_was_there():
    for layer in (LowRank(16, 24, 4), BlockDense(16, 24, 4, 2).bfloat16(), BlockShuffle(16, 24, 2)):
        torch.nn.init.constant_(layer.bias, 7)
        layer.reset_parameters()
        assert not layer.bias.any() and layer.dense_weight().any()


def test_a_guide_used_out_of_order_is_refused():
    layer = LowRank(16, 16, 4)
    early = torch.optim.AdamW(layer.parameters())
    guide = Guide(layer, 3)
    with pytest.raises(ValueError, match="make it after the guide"):
        guide.step(early)
    with pytest.raises(ValueError, match="guided already"):
        Guide(layer, 3)
    state = guide.state_dict()
    guide.finish()
    with pytest.raises(ValueError, match="finished, the state is of step 0"):
        guide.load_state_dict(state)


def test_the_names_of_parameters_leave_the_optimiser_with_the_guide():
    layer = LowRank(16, 16, 4)
    guide = Guide(layer, 1)
    optimizer = torch.optim.AdamW(layer.named_parameters())
    guide.step(optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in layer.named_parameters()]


def test_convert_takes_all_or_nothing():
    make, everything = partial(LowRank, R=4), lambda name: True
    with pytest.raises(ValueError, match="accepted none"):
        convert(torch.nn.Linear(16, 24), make, everything)
    shared = torch.nn.Linear(16, 16)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    assert [*convert(model, make, everything)] == ["0", "2"]
    assert model[0] is model[2] and isinstance(model[0], LowRank)
    tied, odd = (
        torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, n)) for n in (16, 3)
    )
    tied[1].weight = tied[0].weight
    dense = lambda d_in, d_out, bias: torch.nn.Linear(d_in, d_out, bias)  # noqa: E731
    for model, builder, message in (
        (tied, make, "weight of 0, 1 belongs to another"),
        (odd, make, "between 1 and 3"),  # of its second layer
        (odd, dense, "expected a structured layer"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, builder, everything)
        assert all(type(m) is torch.nn.Linear for m in model)


def test_a_layer_converted_from_zero_learns_and_keeps_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    torch.nn.init.zeros_(model[0].weight)
    model.requires_grad_(False)
    assert convert(model, partial(LowRank, R=4), lambda name: True) == {"0": 0.0}
    layer = model[0]
    assert not any(p.requires_grad for p in layer.parameters()) and not layer.dense_weight().any()
    layer.requires_grad_()
    layer(torch.eye(16)).sum().backward()
    assert layer.U.grad.abs().sum() > 0


@pytest.mark.parametrize("call, message", [
    (lambda: LowRank(16, 24, 4.0), "4.0"),
    (lambda: BlockDense(16, 24, 4, 2.0), "whole number"),
    (lambda: match(64, 256, "blockdense", 0.3, n_blocks=-1), "-1"),
    (lambda: LMConfig(d_model=10, n_heads=2).sizes(), "d_head 5"),
    (lambda: structured_ffn.teacher_student(partial(LowRank, R=4), guide="stoch"), "'stoch'"),
])  # fmt: skip
def test_nonsense_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_match_keeps_the_rank_below_the_width():
    assert match(63, 18900, "lowrank", 1.0)(63, 18900).c == 63


def test_match_comes_as_near_as_the_blocks_allow():
    linear = match(64, 256, "blockdense", 0.82)
    assert abs(ffn_weights(linear, 64, 256) / (2 * 64 * 256) - 0.82) < 0.15 * 0.82
