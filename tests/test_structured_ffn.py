"""structured_ffn.py: golden values, exact properties, errors, guide, pre-merge and command line."""

import copy
import itertools
import json
import math
import random
import re
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear
from torch.utils.flop_counter import FlopCounterMode

import structured_ffn
from structured_ffn import (
    KINDS,
    BlockDense,
    BlockShuffle,
    Grid,
    Guide,
    LowRank,
    StructuredFFN,
    alpha_at,
    block_shuffle_ref,
    convert,
    ffn_factory,
    ffn_weights,
    from_linear,
    grid_linear,
    grid_linear_slow,
    main,
    match,
    merged,
    paper_matrix,
    rel_err,
    self_check,
)

GOLDEN = Path(__file__).resolve().parent / "golden/structured_ffn.json"
MAKERS = {
    "LowRank": partial(LowRank, R=6),
    "BlockDense": partial(BlockDense, R=8, n_blocks=4),
    "BlockShuffle": partial(BlockShuffle, n_blocks=2),
}
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def build(make, d_in=16, d_out=24):
    """A layer in float64 with every number random."""
    torch.manual_seed(0)
    layer = make(d_in, d_out).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def wave(*shape, phase=0.0):
    return torch.cos(1.3 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def baddbmm_flop(y, a, b, *args, **kwargs):
    return 2 * math.prod(a) * b[-1]  # shapes: (n, T, K) x (n, K, S)


def flops(call):
    """FLOPs by torch's own counter, which does not know baddbmm in place."""
    mapping = {torch.ops.aten.baddbmm_: baddbmm_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def test_block_shuffle_never_copies_its_result():
    layer = BlockShuffle(16, 24, n_blocks=2)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile:
        layer(torch.randn(7, 16))
    copied = [e.input_shapes[0] for e in profile.events() if e.name == "aten::clone"]
    assert copied  # the regrouping copies (7, 16)
    assert 7 * 24 not in map(math.prod, copied)


# ---------------------------------------------------------------- the matrices


def test_block_shuffle_by_hand():
    """Blocks are outer products: W[a, b] = (column b of U[a]) (row a of V[b])."""
    V = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    U = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [1.0, 1.0]]])
    by_hand = torch.tensor([[1, 2, 0, 0], [2, 4, 5, 6], [0, 0, 21, 24], [3, 4, 7, 8]]).float()
    V4 = V[:, :, None]  # rank 1
    U4 = U[..., None]
    assert torch.equal(grid_linear(torch.eye(4), V4, U4).T, by_hand)
    assert torch.equal(grid_linear_slow(torch.eye(4), V4, U4).T, by_hand)
    rows = by_hand[[0, 2, 1, 3]]  # the second shuffle: output s 2 + a
    assert np.array_equal(block_shuffle_ref(V.numpy(), U.numpy()), rows.numpy())


def test_golden_matrices():
    golden = json.loads(GOLDEN.read_text())
    layers = [LowRank(4, 6, 3), BlockDense(4, 6, 4, 2), BlockShuffle(4, 6, 2)]
    eye = torch.eye(4).double()
    for name, layer in zip(("low_rank", "block_dense", "grid"), layers, strict=True):
        layer = layer.double()
        layer.V.data = wave(*layer.V.shape)
        layer.U.data = wave(*layer.U.shape, phase=1.0)
        assert rel_err(layer.dense_weight(), golden[name]) < 1e-12
        assert rel_err(layer(eye).T - layer.bias[:, None], golden[name]) < 1e-12
    W = block_shuffle_ref(wave(2, 2, 2).numpy(), wave(2, 3, 2, phase=1.0).numpy())
    assert rel_err(W, golden["block_shuffle"]) < 1e-12


@pytest.mark.parametrize("sizes", [(12, 24, 2), (24, 12, 2), (16, 16, 4), (36, 18, 3)], ids=str)
def test_block_shuffle_is_that_of_the_paper_but_for_the_second_shuffle(sizes):
    layer = build(lambda *_: BlockShuffle(*sizes))
    assert rel_err(layer.dense_weight(), paper_matrix(layer)) < 1e-12


def random_grids(n=24):
    draw = random.Random(0)
    for _ in range(n):
        n_in, n_out = draw.randint(1, 4), draw.randint(1, 4)
        P, S = draw.randint(1, 6), draw.randint(1, 6)
        R = n_in * n_out * draw.randint(1, min(P, S))
        yield n_in * P, n_out * S, n_in, n_out, R, draw.random() < 0.5


@pytest.mark.parametrize("sizes", list(random_grids()), ids=str)
def test_random_shapes(sizes):
    """forward == einsum == numpy, any leading sizes, one token and none; counts are exact."""
    d_in, d_out, n_in, n_out, R, _ = sizes
    layer = build(lambda *_: Grid(*sizes))
    W = torch.zeros(n_out, d_out // n_out, n_in, d_in // n_in, dtype=torch.float64)
    for a, b in itertools.product(range(n_out), range(n_in)):
        W[a, :, b] = layer.U[a, :, b].detach() @ layer.V[b, a].detach()
    W = W.view(d_out, d_in)
    assert rel_err(layer.dense_weight(), W) < 1e-12
    weights = layer.V.numel() + layer.U.numel()
    assert weights == R * (d_in // n_in + d_out // n_out)
    for lead in ((5,), (1,), (2, 3), ()):
        x = randn(*lead, d_in)
        want = linear(x, W, layer.bias)
        assert rel_err(layer(x), want) < 1e-12
        assert rel_err(grid_linear_slow(x, layer.V, layer.U), x @ W.T) < 1e-12
        assert flops(lambda x=x: layer(x)) == 2 * math.prod(lead) * weights
    assert layer(randn(0, d_in)).shape == (0, d_out)
    assert layer(randn(2, 0, d_in)).shape == (2, 0, d_out)
    x = randn(d_in, 7).T
    assert rel_err(layer(x), linear(x, W, layer.bias)) < 1e-12


@kinds
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)], ids=str)
def test_gradients_are_those_of_the_dense_layer(make, shape):
    layer = build(make, *shape)
    x = randn(3, shape[0]).requires_grad_()
    leaves = [x, *layer.parameters()]
    g = randn(3, shape[1])
    dense = torch.autograd.grad(linear(x, layer.dense_weight(), layer.bias), leaves, g)
    fast = torch.autograd.grad(layer(x), leaves, g)
    for got, want in zip(fast, dense, strict=True):
        assert rel_err(got, want) < 1e-12


def test_block_shuffle_has_full_rank_in_blocks_of_low_rank():
    W = BlockShuffle(16, 24, 2).dense_weight()
    blocks = W.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2)
    assert torch.linalg.matrix_rank(W) == 16
    assert (torch.linalg.matrix_rank(blocks) == 4).all()


# ---------------------------------------------------------------- initialization, projection


def test_low_rank_starts_at_the_best_approximation_of_a_dense_start():
    torch.manual_seed(3)
    low = LowRank(32, 96, 8)
    torch.manual_seed(3)
    left, sigma, right = torch.linalg.svd(0.02 * torch.randn(96, 32), full_matrices=False)
    assert rel_err(low.dense_weight(), (left[:, :8] * sigma[:8]) @ right[:8]) < 1e-5
    U, V = low.U[0, :, 0], low.V[0, 0]
    assert rel_err(U.T @ U, torch.diag(sigma[:8])) < 1e-5
    assert rel_err(V @ V.T, torch.diag(sigma[:8])) < 1e-5


def test_blocks_start_orthonormal():
    layers = (BlockDense(32, 96, 16, 4), BlockShuffle(32, 96, 4), BlockShuffle(96, 32, 4))
    for layer, gain in zip(layers, (16 / 96, 32 / 96, 1.0), strict=True):
        for block in [*layer.V.flatten(1, 2), *layer.U.flatten(2)]:
            assert rel_err(torch.linalg.svdvals(block), torch.ones(min(block.shape))) < 1e-5
        # mean square of the output of a unit input
        mean_square = layer.dense_weight().square().sum().item() / layer.d_out
        assert mean_square == pytest.approx(gain, rel=1e-5)
        assert not layer.bias.any()


@kinds
def test_reset_leaves_nothing_of_what_was_there(make):
    layer = make(16, 24)
    nn.init.constant_(layer.bias, 7)
    nn.init.zeros_(layer.U)
    layer.reset_parameters()
    assert not layer.bias.any() and layer.dense_weight().any()


@kinds
def test_projection_is_the_best_in_frobenius_norm(make):
    """What is left of each block are its singular values beyond the rank (Eckart, Young)."""
    torch.manual_seed(0)
    dense = nn.Linear(16, 24).double()
    layer = from_linear(dense, make)
    n_in, n_out, c, _ = layer.V.shape
    blocks = dense.weight.detach().unflatten(0, (n_out, -1)).unflatten(2, (n_in, -1))
    rest = torch.linalg.svdvals(blocks.transpose(1, 2))[..., c:].square().sum()
    error = (layer.dense_weight() - dense.weight).square().sum()
    assert rel_err(error, rest) < 1e-10
    assert torch.equal(layer.bias, dense.bias)
    assert layer.U.dtype == torch.float64
    assert from_linear(nn.Linear(16, 24, bias=False), make).bias is None


# ---------------------------------------------------------------- conversion


def ffns(n=3, **options):
    """A small network of FFNs."""
    torch.manual_seed(0)
    return nn.Sequential(*[StructuredFFN(16, 32, **options) for _ in range(n)])


def test_convert_replaces_what_is_picked():
    model = ffns().double()
    x = randn(5, 16)
    before = model(x)
    exact = copy.deepcopy(model)
    errors = convert(exact, partial(LowRank, R=16), lambda name: ".fc" in name)
    assert len(errors) == 6 and max(errors.values()) < 1e-12
    assert rel_err(exact(x), before) < 1e-10
    errors = convert(model, partial(BlockShuffle, n_blocks=2), lambda name: name == "1.fc1")
    assert list(errors) == ["1.fc1"] and 0.1 < errors["1.fc1"] < 0.9
    assert isinstance(model[1].fc1, BlockShuffle) and isinstance(model[0].fc1, nn.Linear)


def test_a_shared_layer_is_converted_and_merged_once():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [*convert(model, partial(LowRank, R=4), lambda name: True)] == ["0"]
    assert model[0] is model[2] and isinstance(model[0], LowRank)
    frozen = merged(model, max_tokens=5)
    assert frozen[0] is frozen[2] and frozen[0].max_tokens == 5


def tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    return model


def encoder(layers=2):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


SHARED = "other code reads the weights of "


@pytest.mark.parametrize(
    ("model", "pick", "message"),
    [
        (nn.Linear(16, 24), "", "got 0 inside the model"),
        (nn.Sequential(nn.ReLU()), "", "got 0 inside the model"),
        (tied(), "", SHARED + r"\['0', '1'\]"),
        (encoder(), "linear1", SHARED + r"\['layers.0.linear1', 'layers.1.linear1'\]"),
        (encoder(), "1.linear2", SHARED + r"\['layers.1.linear2'\]"),
        (encoder(1), "out_proj", SHARED + r"\['layers.0.self_attn.out_proj'\]"),
        (nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)], nn.Linear(16, 3)), "", "1 to 3"),
    ],
)
def test_convert_refuses_before_it_changes_anything(model, pick, message):
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, partial(LowRank, R=4), lambda name: pick in name)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_a_layer_converted_from_zero_learns_and_keeps_what_is_frozen():
    model = nn.Sequential(nn.Linear(16, 16)).half().requires_grad_(False)
    nn.init.zeros_(model[0].weight)
    assert convert(model, partial(LowRank, R=4), lambda name: True) == {"0": 0.0}
    layer = model[0]
    assert not any(p.requires_grad for p in layer.parameters()) and not layer.dense_weight().any()
    layer.requires_grad_()
    layer(torch.eye(16).half()).sum().backward()
    assert layer.U.grad.abs().sum() > 0


# ---------------------------------------------------------------- errors, planner


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BlockDense(100, 64, 16, 8), "d_in 100, .*multiples of 8, 1 and 8"),
        (lambda: BlockDense(64, 64, 18, 8), "R 18: .*multiples of 8, 1 and 8"),
        (lambda: BlockShuffle(64, 250, 4), "d_out 250, .*multiples of 4, 4 and 16"),
        (lambda: BlockShuffle(72, 288, 4), "R 72: .*multiples of 4, 4 and 16"),
        (lambda: LowRank(8, 32, 9), "R 9: .* R from 1 to 8"),
        (lambda: LowRank(8, 32, 0), "R 0: .* R from 1 to 8"),
        (lambda: BlockShuffle(8, 32, 0), "multiples of 0"),
        (lambda: match(64, 256, "lowrank", 1.5), "R 80: .* R from 1 to 64"),
        (lambda: match(64, 256, "blockdense", 0.3, n_blocks=5), "multiples of 5, 1 and 5"),
        (lambda: match(60, 240, "blockshuffle", 0.31), "ratio 0.31: nearest is .*0.625"),
        (lambda: match(64, 256, "blockshuffle", math.nan), "ratio nan"),
        (lambda: match(64, 256, "blockshuffle", math.inf), "ratio inf"),
        (lambda: Guide(nn.Linear(4, 4), 10), "no structured layers"),
        (lambda: Guide(LowRank(4, 4, 1), -1), "n_steps of at least 0, got 0 and -1"),
        (lambda: Guide(LowRank(4, 4, 1), math.nan), "n_steps of at least 0, got 0 and nan"),
        (lambda: Guide(LowRank(4, 4, 1), 10, t=-1), "t .*of at least 0, got -1 and 10"),
        (lambda: LowRank(8, 8, 2)(torch.zeros(0, 16)), r"n_in P\), .*\(0, 16, torch.float32\)"),
    ],
)
def test_errors_carry_the_numbers(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@kinds
def test_a_weight_that_does_not_fit_is_not_projected(make):
    for shape in ((16, 24), (1, 16), (24, 1), (2, 24, 16)):  # one row would broadcast
        with pytest.raises(RuntimeError):
            make(16, 24).project_(torch.zeros(shape))


@kinds
def test_numbers_of_another_dtype_are_not_converted(make):
    layer = make(16, 24)
    right = {"x": torch.zeros(2, 16), "V": layer.V, "U": layer.U, "bias": layer.bias}
    for name in right:
        wrong = {**right, name: right[name].double()}
        with pytest.raises((ValueError, RuntimeError)):
            grid_linear(**wrong)


def test_match_finds_the_published_sizes():
    assert match(np.int64(2048), np.int64(8192), "lowrank", 0.625).keywords == {"R": 1024}
    assert match(2048, 8192, "lowrank", 0.3125).keywords == {"R": 512}
    assert match(2048, 8192, "blockshuffle", 0.625).keywords == {"n_blocks": 2}
    assert match(2048, 8192, "blockshuffle", 0.32).keywords == {"n_blocks": 4}
    assert match(2048, 8192, "blockdense", 0.5859375).keywords == {"R": 1536, "n_blocks": 4}
    for kind in KINDS:
        share = ffn_weights(match(768, 3072, kind, 0.32), 768, 3072) / (2 * 768 * 3072)
        assert share == pytest.approx(0.32, rel=0.03)
    # from 64 on a multiple of 8: wanted are c = 102.4, 204.8, 25.6, 6.4
    for d, c in ((1024, 104), (2048, 208), (256, 26), (64, 6)):
        assert match(d, 4 * d, "blockdense", 0.3125).keywords["R"] == 4 * c


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_the_factory_leaves_the_first_block_dense(kind):
    ffn = ffn_factory(kind, ratio=0.3125)
    blocks = [ffn(32, 128) for _ in range(3)]
    layer = KINDS.get(kind, nn.Linear)
    assert [type(f.fc1) for f in blocks] == [type(f.fc2) for f in blocks]
    assert [type(f.fc1) for f in blocks] == [nn.Linear, layer, layer]
    assert nn.Sequential(*blocks)(torch.zeros(2, 5, 32)).shape == (2, 5, 32)


def test_ffn_by_its_formula():
    ffn = StructuredFFN(8, 24, partial(BlockDense, R=4, n_blocks=2)).double()
    x = randn(2, 3, 8)
    h = gelu(x @ ffn.fc1.dense_weight().T, approximate="tanh")
    assert rel_err(ffn(x), h @ ffn.fc2.dense_weight().T) < 1e-12


# ---------------------------------------------------------------- self-guided training


@kinds
def test_guide_starts_at_the_structured_layer(make):
    layer = build(make)
    x = randn(5, 16)
    want = layer(x)
    Guide(layer, 10)
    assert rel_err(layer.W, layer.dense_weight()) < 1e-12
    for layer.alpha in (1.0, 0.7, 0.3, 0.0):
        assert rel_err(layer(x), want) < 1e-12


@kinds
def test_guide_mixes_outputs_and_gradients(make):
    """Gradients scale with 1 - alpha (V, U) and alpha (W); the bias counts once."""
    layer = build(make)
    x = randn(5, 16)
    structured = layer(x).detach()
    Guide(layer, 10)
    nn.init.normal_(layer.W)
    dense = linear(x, layer.W, layer.bias).detach()
    leaves = [layer.V, layer.U, layer.W, layer.bias]

    def grads(alpha):
        layer.alpha = alpha
        return torch.autograd.grad(layer(x), leaves, wave(5, 24))

    V0, U0, W0, bias0 = grads(0.0)
    V1, U1, W1, _ = grads(1.0)
    assert not W0.any() and not V1.any() and not U1.any()
    for alpha in (0.25, 0.6):
        V, U, W, bias = grads(alpha)
        assert rel_err(layer(x), alpha * dense + (1 - alpha) * structured) < 1e-12
        assert rel_err(V, (1 - alpha) * V0) < 1e-12
        assert rel_err(U, (1 - alpha) * U0) < 1e-12
        assert rel_err(W, alpha * W1) < 1e-12
        assert rel_err(bias, bias0) < 1e-12


def test_schedule():
    at = {0: 1, 1: 0.9998, 25: 0.8536, 50: 0.5, 75: 0.1464, 99: 0.0002, 100: 0, 150: 0}
    assert {t: round(alpha_at(t, 100), 4) for t in at} == at
    assert np.mean([alpha_at(t, 1000) for t in range(1000)]) == pytest.approx(0.5, abs=1e-3)


def test_coins_fall_with_probability_alpha():
    n = 400
    layers = nn.ModuleList(build(MAKERS["LowRank"]) for _ in range(8))
    guide = Guide(layers, n, stochastic=True, seed=5)
    optimizer = torch.optim.SGD(layers.parameters())
    coins = []
    for _ in range(n):
        coins.append([layer.coin for layer in layers])
        guide.step(optimizer)
    alphas = np.array([alpha_at(t, n) for t in range(n)])
    for half in (slice(0, n // 2), slice(n // 2, n)):
        deviation = np.sqrt(8 * np.sum((alphas * (1 - alphas))[half]))
        assert abs(np.sum(coins[half]) - 8 * np.sum(alphas[half])) < 3 * deviation
    assert any(len(set(row)) == 2 for row in coins)  # layers have their own coins
    Guide(layers, n, stochastic=True, seed=6, t=n // 2)
    assert [layer.coin for layer in layers] != coins[n // 2]


def test_a_coin_leaves_the_guide_out_of_training_not_of_evaluation():
    layer = build(MAKERS["LowRank"])
    x = randn(2, 16)
    structured = layer(x)
    Guide(layer, 10, stochastic=True)
    nn.init.normal_(layer.W)
    layer.alpha = 0.5
    layer.coin = True
    guided = layer(x)
    layer.coin = False
    assert torch.equal(layer(x), structured)  # not (1 - alpha) U V x
    assert flops(lambda: layer(x)) == 2 * 2 * (layer.U.numel() + layer.V.numel())
    assert rel_err(guided, structured) > 0.1
    assert torch.equal(layer.eval()(x), guided)


def train(model, guide, optimizer, first, last):
    for t in range(first, last):
        x = wave(6, 16, phase=t)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guide.step(optimizer)
    return loss.item()


def test_the_guide_leaves_the_model_and_the_optimizer():
    """Also where the loop keeps a list of parameters and does not clear gradients."""
    model = ffns(linear=partial(LowRank, R=4)).double()
    names = set(model.state_dict())
    guide = Guide(model, 3)
    kept = [*model.parameters()]
    guides = [layer.W for layer in guide.layers]
    assert len(guides) == 6 and len(model.state_dict()) == len(names) + 6
    optimizer = torch.optim.AdamW(kept)
    for t in range(5):
        model(wave(6, 16)).square().sum().backward()
        by_list = nn.utils.clip_grad_norm_(kept, 1e9)
        assert by_list == nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        assert all((W in optimizer.state) == (t < 3) for W in guides)
        assert guide.step(optimizer) == (t == 2)
    assert set(model.state_dict()) == names
    assert optimizer.param_groups[0]["params"] == [*model.parameters()]
    assert not any(W.grad is not None for W in guides)


@pytest.mark.parametrize("stop", [7, 14])
def test_resume_in_the_middle_is_exact(stop, tmp_path):
    """A run stopped while guided (7) or after (14) ends as the one that was not stopped."""

    def start(t=0):
        model = ffns(linear=partial(BlockShuffle, n_blocks=2)).double()
        guide = Guide(model, 12, stochastic=True, seed=2, t=t)
        return model, guide, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, guide, optimizer = start()
    train(model, guide, optimizer, 0, stop)
    t = torch.tensor(guide.t)
    state = {"model": model.state_dict(), "t": t, "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    want = train(model, guide, optimizer, stop, 20)

    state = torch.load(tmp_path / "state.pt")
    model, guide, optimizer = start(state["t"])
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(model, guide, optimizer, stop, 20) == want


def test_a_guide_used_out_of_order_is_refused():
    layer = LowRank(16, 16, 4)
    early = torch.optim.AdamW(layer.parameters())
    guide = Guide(layer, 1)
    with pytest.raises(ValueError, match="make the optimizer after the guide"):
        guide.step(early)
    with pytest.raises(ValueError, match="a guide that is not finished"):
        Guide(layer, 3)
    late = torch.optim.AdamW(layer.parameters())
    assert guide.step(late) and not guide.step(late)
    assert layer.W is None
    Guide(layer, 3)


@pytest.fixture
def one_rank(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stochastic", [False, True])
def test_data_parallel_training_goes_on_after_the_guide(stochastic, one_rank):
    """Wrapped again at the end of the guide; stochastic guiding wants unused parameters instead."""
    wrap = partial(nn.parallel.DistributedDataParallel, find_unused_parameters=stochastic)
    losses = []
    for parallel in (False, True):
        model = ffns(linear=partial(LowRank, R=4)).double()
        guide = Guide(model, 3, stochastic)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = wrap(model) if parallel else model
        for t in range(6):
            loss = (run(wave(6, 16, phase=t)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if guide.step(optimizer) and parallel and not stochastic:
                run = wrap(model)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


# ---------------------------------------------------------------- pre-merge


def test_a_guided_layer_is_merged_with_its_guide():
    layer = build(MAKERS["BlockShuffle"])
    Guide(layer, 10, t=4)
    nn.init.normal_(layer.W)
    x = randn(5, 16)
    want = layer.eval()(x)
    assert rel_err(linear(x, layer.dense_weight(), layer.bias), want) < 1e-12
    for max_tokens in (4, 5):
        assert rel_err(merged(layer, max_tokens)(x), want) < 1e-12
        assert rel_err(merged(merged(layer, 4), max_tokens)(x), want) < 1e-12


@kinds
def test_merged_serves_few_tokens_by_the_dense_product_and_is_exact(make):
    layer = build(make)
    x = randn(9, 16)
    want = layer(x)
    frozen = merged(layer, max_tokens=8)
    factors = 2 * (layer.U.numel() + layer.V.numel())
    assert flops(lambda: frozen(x[:8])) == 8 * 2 * 16 * 24
    assert flops(lambda: frozen(x)) == flops(lambda: frozen(x.view(3, 3, 16))) == 9 * factors
    assert rel_err(frozen(x), want) < 1e-12
    assert rel_err(frozen(x[:8]), want[:8]) < 1e-12
    assert frozen(x[0]).shape == (24,)


def test_merged_is_a_frozen_copy_of_the_whole_model():
    model = ffns(linear=partial(BlockShuffle, n_blocks=2)).double()
    before = copy.deepcopy(model.state_dict())
    x = randn(3, 16)
    want = model(x)
    frozen = merged(model, max_tokens=100)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert rel_err(frozen(x), want) < 1e-12  # nothing is shared with the model


# ---------------------------------------------------------------- surroundings


@kinds
def test_guided_training_reads_no_number_back_from_the_device(make):
    """The meta device has none: where a GPU would make the host wait, this step fails."""
    with torch.device("meta"):
        layer = make(16, 24)
        guide = Guide(layer, 2, stochastic=True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(torch.empty(3, 16)).square().sum().backward()
            optimizer.step()
            guide.step(optimizer)
    assert layer.W is None and layer.V.grad.is_meta


@kinds
def test_compiles_into_one_graph(make):
    """Guided too, and without a new graph for every alpha."""
    layer = build(make)
    x = randn(7, 16)
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


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_self_check(dtype, limit):
    rows = self_check(dtype)
    assert len(rows) == 15
    assert all(row[1] <= row[2] == limit for row in rows)


@pytest.mark.parametrize("factor", [0.0, 1.01, math.nan])
@pytest.mark.parametrize(
    ("name", "row"), [("grid_linear", "forward"), ("grid_linear_slow", "einsum")]
)
def test_self_check_can_fail(name, row, factor, monkeypatch):
    good = getattr(structured_ffn, name)
    monkeypatch.setattr(structured_ffn, name, lambda *a: factor * good(*a))
    failed = {name for name, error, limit in self_check() if not error <= limit}
    assert {f"{kind}: {row}" for kind in MAKERS} <= failed


def test_zeros_and_other_shapes_are_not_compared():
    for b in (torch.zeros(3), torch.ones(1)):
        with pytest.raises(AssertionError):
            rel_err(torch.zeros(3), b)


def test_one_failed_row_fails_the_check(capsys, monkeypatch):
    rows = {torch.float64: [("a", math.nan, 1.0), ("b", 0.0, 1.0)], torch.float32: []}
    monkeypatch.setattr(structured_ffn, "self_check", lambda dtype, device: rows[dtype])
    assert main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert printed.count(" FAILED\n") == printed.count(" ok\n") == 1


@pytest.mark.parametrize("flags", [["--check"], pytest.param([], marks=pytest.mark.slow)])
def test_whole_file_runs(flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["structured_ffn.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(structured_ffn.__file__, run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "FAILED" not in printed
    assert printed.count(" ok\n") == (30 if flags else 31)
    if not flags:
        plain, guided = re.search(r"another: (\S+), guided (\S+)", printed).groups()
        assert 0.03 < float(plain) < 0.1 and 0.01 < float(guided) < 0.04
