"""structured_ffn.py: golden values, exact properties, errors, guide, pre-merge."""

import copy
import itertools
import json
import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.prune import l1_unstructured
from torch.utils.flop_counter import FlopCounterMode

import structured_ffn as sf
from structured_ffn import BlockDense, BlockShuffle, Grid, Guide, LowRank, StructuredFFN, rel_err

GOLDEN = Path(__file__).resolve().parent / "golden/structured_ffn.json"
MAKERS = {
    "LowRank": partial(LowRank, R=6),
    "BlockDense": partial(BlockDense, R=8, n_blocks=4),
    "BlockShuffle": partial(BlockShuffle, n_blocks=2),
}
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
low_rank = partial(LowRank, R=4)
block_shuffle = partial(BlockShuffle, n_blocks=2)


def build(make, *sizes):
    """A layer in float64 with every number random."""
    torch.manual_seed(0)
    layer = make(*sizes or (16, 24)).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def ffns(linear):
    """Three FFNs in float64."""
    torch.manual_seed(0)
    return nn.Sequential(*[StructuredFFN(16, 32, linear) for _ in range(3)]).double()


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def wave(*shape, phase=0.0):
    return torch.cos(1.3 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def baddbmm_flop(y, a, b, *args, **kwargs):
    return 2 * math.prod(a) * b[-1]  # shapes: (n, T, K) x (n, K, S)


def assert_linear(layer, x, W):
    """The output and all gradients of layer are those of nn.Linear with weight W."""
    leaves = [x, *layer.parameters()]
    results = []
    for y in (layer(x), linear(x, W, layer.bias)):
        g = wave(*y.shape)
        results.append([y, *torch.autograd.grad(y, leaves, g, retain_graph=True)])
    for got, want in zip(*results, strict=True):
        assert rel_err(got, want) < 1e-12


def flops(layer, x):
    """FLOPs by torch's own counter, which does not know baddbmm in place."""
    mapping = {torch.ops.aten.baddbmm_: baddbmm_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x)
    return counter.get_total_flops()


# ---------------------------------------------------------------- the matrices


def test_block_shuffle_by_hand():
    """Blocks are outer products: W[a, b] = (column b of U[a]) (row a of V[b])."""
    V = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    U = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [1.0, 1.0]]])
    by_hand = torch.tensor([[1, 2, 0, 0], [2, 4, 5, 6], [0, 0, 21, 24], [3, 4, 7, 8]]).float()
    for product in (sf.grid_linear, sf.grid_linear_slow):
        assert torch.equal(product(torch.eye(4), V[:, :, None], U[..., None]).T, by_hand)
    rows = by_hand[[0, 2, 1, 3]]  # the second shuffle: output s 2 + a
    assert np.array_equal(sf.block_shuffle_ref(V.numpy(), U.numpy()), rows.numpy())


def test_golden_matrices():
    golden = json.loads(GOLDEN.read_text())
    layers = [LowRank(4, 6, 3), BlockDense(4, 6, 4, 2), BlockShuffle(4, 6, 2)]
    for name, layer in zip(("low_rank", "block_dense", "grid"), layers, strict=True):
        layer = layer.double()
        layer.V.data = wave(*layer.V.shape)
        layer.U.data = wave(*layer.U.shape, phase=1.0)
        assert rel_err(layer.dense_weight(), golden[name]) < 1e-12
    W = sf.block_shuffle_ref(wave(2, 2, 2).numpy(), wave(2, 3, 2, phase=1.0).numpy())
    assert rel_err(W, golden["block_shuffle"]) < 1e-12


def random_grids(n=24):
    draw = random.Random(0)
    for _ in range(n):
        n_in, n_out = draw.randint(1, 4), draw.randint(1, 4)
        P, S = draw.randint(1, 6), draw.randint(1, 6)
        R = n_in * n_out * draw.randint(1, min(P, S))
        yield n_in * P, n_out * S, n_in, n_out, R, draw.random() < 0.5


@pytest.mark.parametrize("sizes", list(random_grids()), ids=str)
def test_random_shapes(sizes):
    """forward == einsum == loop, any leading sizes and strides; exact counts and gradients."""
    d_in, d_out, n_in, n_out, R, _ = sizes
    layer = build(Grid, *sizes)
    W = torch.zeros(n_out, d_out // n_out, n_in, d_in // n_in, dtype=torch.float64)
    for a, b in itertools.product(range(n_out), range(n_in)):
        W[a, :, b] = layer.U[a, :, b] @ layer.V[b, a]
    W = W.view(d_out, d_in)
    assert rel_err(layer.dense_weight(), W) < 1e-12
    weights = layer.V.numel() + layer.U.numel()
    assert weights == R * (d_in // n_in + d_out // n_out)
    for x in (randn(1, d_in), randn(2, 3, d_in), randn(d_in), randn(d_in, 7).T):
        assert_linear(layer, x.requires_grad_(), W)
        assert rel_err(sf.grid_linear_slow(x, layer.V, layer.U), x @ W.T) < 1e-12
        assert flops(layer, x) == 2 * x.numel() // d_in * weights
    assert layer(randn(2, 0, d_in)).shape == (2, 0, d_out)


def test_block_shuffle_never_copies_its_result():
    layer = block_shuffle(16, 24)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile:
        layer(torch.randn(7, 16))
    copied = [e.input_shapes[0] for e in profile.events() if e.name == "aten::clone"]
    assert copied  # the regrouping copies (7, 16)
    assert 7 * 24 not in map(math.prod, copied)


# ---------------------------------------------------------------- initialization, conversion


def test_low_rank_starts_at_the_best_approximation_of_a_dense_start():
    low = LowRank(32, 96, 8)
    nn.init.ones_(low.bias)
    torch.manual_seed(3)
    low.reset_parameters()
    torch.manual_seed(3)
    left, sigma, right = torch.linalg.svd(0.02 * torch.randn(96, 32), full_matrices=False)
    assert rel_err(low.dense_weight(), (left[:, :8] * sigma[:8]) @ right[:8]) < 1e-5
    assert rel_err(low.U[0, :, 0].T @ low.U[0, :, 0], torch.diag(sigma[:8])) < 1e-5
    assert rel_err(low.V[0, 0] @ low.V[0, 0].T, torch.diag(sigma[:8])) < 1e-5
    assert not low.bias.any()


def test_the_network_is_linear_gelu_linear():
    layer = StructuredFFN(8, 16, partial(LowRank, R=4))
    x = 3 * torch.randn(5, 8)
    hidden = layer.fc1(x).double()
    gelu = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert rel_err(layer(x), layer.fc2(gelu.float())) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_blocks_start_orthonormal(dtype, limit):
    for layer in (BlockDense(32, 96, 16, 4), BlockShuffle(32, 96, 4), BlockShuffle(96, 32, 4)):
        layer = layer.to(dtype)
        for p in layer.parameters():
            nn.init.ones_(p)
        layer.reset_parameters()
        for block in [*layer.V.flatten(1, 2), *layer.U.flatten(2)]:
            singular_values = torch.linalg.svdvals(block.float())
            assert rel_err(singular_values, torch.ones(min(block.shape))) < limit
        assert not layer.bias.any()


@kinds
def test_projection_is_the_best_in_frobenius_norm(make):
    """What is left of each block are its singular values beyond the rank (Eckart, Young)."""
    dense = build(nn.Linear)
    dense.weight.requires_grad_(False)
    layer = sf.from_linear(dense, make)
    n_in, n_out, c, _ = layer.V.shape
    blocks = dense.weight.unflatten(0, (n_out, -1)).unflatten(2, (n_in, -1))
    rest = torch.linalg.svdvals(blocks.transpose(1, 2))[..., c:].square().sum()
    error = (layer.dense_weight() - dense.weight).square().sum()
    assert rel_err(error, rest) < 1e-10
    assert torch.equal(layer.bias, dense.bias) and layer.bias.requires_grad
    assert layer.U.dtype == torch.float64 and not layer.U.requires_grad
    assert sf.from_linear(nn.Linear(16, 24, bias=False), make).bias is None
    for shape in ((16, 24), (1, 16), (24, 1), (2, 24, 16)):  # one row would broadcast
        with pytest.raises(RuntimeError):
            layer.project_(torch.zeros(shape))


def test_convert_replaces_what_is_picked():
    model = ffns(nn.Linear)
    x = randn(5, 16)
    before = model(x)
    exact = copy.deepcopy(model)
    errors = sf.convert(exact, partial(LowRank, R=16), lambda name: ".fc" in name)
    assert len(errors) == 6 and max(errors.values()) < 1e-12
    assert rel_err(exact(x), before) < 1e-10
    errors = sf.convert(model, block_shuffle, lambda name: name == "1.fc1")
    assert list(errors) == ["1.fc1"] and 0.1 < errors["1.fc1"] < 0.9
    assert isinstance(model[1].fc1, BlockShuffle) and isinstance(model[0].fc1, nn.Linear)


def test_a_shared_layer_is_converted_and_merged_once():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [*sf.convert(model, low_rank, lambda name: True)] == ["0"]
    assert model[0] is model[2] and isinstance(model[0], LowRank)
    frozen = sf.merged(model, max_tokens=5)
    assert frozen[0] is frozen[2] and frozen[0].max_tokens == 5


TIED = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
TIED[1].weight = TIED[0].weight
PRUNED = nn.Sequential(nn.Linear(16, 16))
l1_unstructured(PRUNED[0], "weight", amount=0.5)
ENCODER = nn.TransformerEncoderLayer(16, 2, 32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(16, 24), "pick accepts no nn.Linear"),
        (TIED, r"the weights of \['0', '1'\]"),
        (PRUNED, r"the weights of \['0'\]"),
        (ENCODER, r"the weights of \['self_attn.out_proj', 'linear1', 'linear2'\]"),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), "R from 1 to 3"),
    ],
)
def test_convert_refuses_before_it_changes_anything(model, message):
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        sf.convert(model, low_rank, lambda name: True)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize(("make", "device"), [(nn.Linear, "cpu"), (low_rank, "meta")])
def test_convert_needs_a_structured_layer_and_values(make, device):
    model = nn.Sequential(nn.Linear(16, 16, device=device))
    with pytest.raises(ValueError, match=r"make must build .* must have values"):
        sf.convert(model, make, lambda name: True)


def test_a_layer_converted_from_zero_learns():
    model = nn.Sequential(nn.Linear(16, 16)).half()
    nn.init.zeros_(model[0].weight)
    assert sf.convert(model, low_rank, lambda name: True) == {"0": 0.0}
    assert not model[0].dense_weight().any()
    model(torch.eye(16).half()).sum().backward()
    assert model[0].U.grad.any()


# ---------------------------------------------------------------- errors, planner


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BlockDense(100, 64, 16, 8), "d_in 100, .*multiples of 8, 1 and 8"),
        (lambda: BlockShuffle(64, 250, 4), "d_out 250, .*multiples of 4, 4 and 16"),
        (lambda: BlockShuffle(72, 288, 4), "R 72: .*multiples of 4, 4 and 16"),
        (lambda: LowRank(8, 32, 9), "R 9: .* R from 1 to 8"),
        (lambda: LowRank(8, 32, 0), "R 0: .* R from 1 to 8"),
        (lambda: BlockShuffle(8, 32, 0), "multiples of 0"),
        (lambda: sf.plan_linear(60, 240, "blockshuffle", 0.31), "ratio 0.31: nearest is .*0.625"),
        (lambda: sf.plan_linear(64, 256, "blockshuffle", math.nan), "ratio nan"),
        (
            lambda: sf.plan_linear(64, 256, "monarch", 0.3),
            "'monarch': .*'dense' or one of .*'lowrank'",
        ),
        (lambda: Guide(nn.Linear(4, 4), 10), "no trainable structured layers"),
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
def test_numbers_of_another_dtype_are_not_converted(make):
    layer = make(16, 24)
    right = {"x": torch.zeros(2, 16), "V": layer.V, "U": layer.U, "bias": layer.bias}
    for name in right:
        with pytest.raises((ValueError, RuntimeError)):
            sf.grid_linear(**{**right, name: right[name].double()})


def test_the_planner_finds_the_published_sizes():
    assert sf.plan_linear(np.int64(2048), np.int64(8192), "lowrank", 0.625).keywords == {"R": 1024}
    published = {
        ("lowrank", 0.3125): {"R": 512},
        ("blockshuffle", 0.625): {"n_blocks": 2},
        ("blockshuffle", 0.32): {"n_blocks": 4},
        ("blockdense", 0.5859375): {"R": 1536, "n_blocks": 4},
    }
    for (kind, ratio), sizes in published.items():
        assert sf.plan_linear(2048, 8192, kind, ratio).keywords == sizes
    for kind in sf.KINDS:
        share = sf.ffn_weights(sf.plan_linear(768, 3072, kind, 0.32), 768, 3072) / (2 * 768 * 3072)
        assert share == pytest.approx(0.32, rel=0.03)
    # from 64 on a multiple of 8: wanted are c = 102.4, 204.8, 25.6, 6.4
    for d, c in ((1024, 104), (2048, 208), (256, 26), (64, 6)):
        assert sf.plan_linear(d, 4 * d, "blockdense", 0.3125).keywords["R"] == 4 * c


@pytest.mark.parametrize("kind", ["dense", *sf.KINDS])
def test_the_factory_leaves_the_first_block_dense(kind):
    ffn = sf.ffn_factory(kind, ratio=0.3125)
    blocks = [ffn(32, 128) for _ in range(3)]
    layer = sf.KINDS.get(kind, nn.Linear)
    assert [type(f.fc1) for f in blocks] == [type(f.fc2) for f in blocks]
    assert [type(f.fc1) for f in blocks] == [nn.Linear, layer, layer]


# ---------------------------------------------------------------- self-guided training


@kinds
def test_guide_mixes_outputs_and_gradients(make):
    """Gradients scale with 1 - alpha (V, U) and alpha (W); the bias counts once."""
    layer = build(make)
    x = randn(5, 16).requires_grad_()
    W = layer.dense_weight()
    Guide(layer, 10)
    for layer.alpha in (0.0, 0.3, 1.0):
        assert rel_err(layer(x), linear(x, W, layer.bias)) < 1e-12  # the guide starts at U V
    nn.init.normal_(layer.guide)
    for layer.alpha in (0.25, 0.6):
        assert_linear(layer, x, layer.alpha * layer.guide + (1 - layer.alpha) * W)


def test_schedule():
    at = {0: 1, 1: 0.9998, 25: 0.8536, 50: 0.5, 75: 0.1464, 99: 0.0002, 100: 0, 150: 0}
    assert {t: round(sf.alpha_at(t, 100), 4) for t in at} == at


def test_coins_fall_with_probability_alpha():
    n = 400
    layers = nn.ModuleList(low_rank(16, 24) for _ in range(8))
    guide = Guide(layers, n, stochastic=True, seed=5)
    optimizer = torch.optim.SGD(layers.parameters())
    coins = []
    for _ in range(n):
        coins.append([layer.coin for layer in layers])
        guide.step(optimizer)
    alphas = np.array([sf.alpha_at(t, n) for t in range(n)])
    for half in (slice(0, n // 2), slice(n // 2, n)):
        deviation = np.sqrt(8 * np.sum((alphas * (1 - alphas))[half]))
        assert abs(np.sum(coins[half]) - 8 * np.sum(alphas[half])) < 3 * deviation
    assert any(len(set(row)) == 2 for row in coins)  # layers have their own coins
    Guide(layers, n, stochastic=True, seed=6, t=n // 2)
    assert [layer.coin for layer in layers] != coins[n // 2]


def test_a_coin_leaves_the_guide_out_of_training_not_of_evaluation():
    layer = build(low_rank)
    x = randn(2, 16)
    structured = layer(x)
    Guide(layer, 10, t=5, stochastic=True)
    nn.init.normal_(layer.guide)
    layer.coin = True
    guided = layer(x)
    layer.coin = False
    assert torch.equal(layer(x), structured)  # not (1 - alpha) U V x
    assert flops(layer, x) == 2 * 2 * (layer.U.numel() + layer.V.numel())
    assert rel_err(guided, structured) > 0.1
    assert torch.equal(layer.eval()(x), guided)


def test_frozen_layers_have_no_guide():
    model = nn.Sequential(low_rank(16, 16), low_rank(16, 16))
    model[0].requires_grad_(False)
    guide = Guide(model, 3)
    assert model[0].guide is None and guide.layers == [model[1]]
    with pytest.raises(ValueError, match="earlier guide is not finished"):
        Guide(model.requires_grad_(False), 3)


def train_step(model, guide, optimizer, t):
    x = wave(6, 16, phase=t)
    loss = (model(x) - x.roll(1, -1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), guide.step(optimizer)


def test_the_guide_leaves_the_model_and_the_optimizer():
    """Also where the loop keeps a list of parameters and does not clear gradients."""
    model = ffns(low_rank)
    names = set(model.state_dict())
    early = torch.optim.AdamW(model.parameters())
    guide = Guide(model, 3)
    with pytest.raises(ValueError, match="make it after Guide"):
        guide.step(early)
    with pytest.raises(ValueError, match="earlier guide is not finished"):
        Guide(model, 3)
    kept = [*model.parameters()]
    guides = [layer.guide for layer in guide.layers]
    assert len(guides) == 6 and len(model.state_dict()) == len(names) + 6
    optimizer = torch.optim.AdamW(model.named_parameters())
    for t in range(5):
        model(wave(6, 16)).square().sum().backward()
        by_list = nn.utils.clip_grad_norm_(kept, 1e9)
        assert by_list == nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        assert all((W in optimizer.state) == (t < 3) for W in guides)
        assert guide.step(optimizer) == (t == 2)
    assert set(model.state_dict()) == names
    group = optimizer.param_groups[0]
    assert [*zip(group["param_names"], group["params"], strict=True)] == [*model.named_parameters()]
    assert not any(W.grad is not None for W in guides)
    Guide(model, 3)


@pytest.mark.parametrize("stop", [7, 14])
def test_resume_in_the_middle_is_exact(stop):
    """A run stopped while guided (7) or after (14) ends as the one that was not stopped."""

    def start(t=0):
        model = ffns(block_shuffle)
        guide = Guide(model, 12, stochastic=True, seed=2, t=t)
        return model, guide, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train(run, first, last):
        return [train_step(*run, t) for t in range(first, last)]

    run = model, guide, optimizer = start()
    train(run, 0, stop)
    t = torch.tensor(guide.t)  # as a file may hold it
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    want = train(run, stop, 20)
    run = model, guide, optimizer = start(t)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(run, stop, 20) == want


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
        model = ffns(low_rank)
        guide = Guide(model, 3, stochastic)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = wrap(model) if parallel else model
        for t in range(6):
            loss, ended = train_step(run, guide, optimizer, t)
            if ended and parallel and not stochastic:
                run = wrap(model)
        losses.append(loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


# ---------------------------------------------------------------- pre-merge


@kinds
def test_merged_serves_few_tokens_by_the_dense_product_and_is_exact(make):
    layer = build(make)
    x = randn(9, 16)
    want = layer(x)
    frozen = sf.merged(layer, max_tokens=8)
    factors = 2 * (layer.U.numel() + layer.V.numel())
    assert flops(frozen, x[:8]) == 8 * 2 * 16 * 24
    assert flops(frozen, x) == flops(frozen, x.view(3, 3, 16)) == 9 * factors
    assert rel_err(frozen(x), want) < 1e-12
    assert rel_err(frozen(x[:8]), want[:8]) < 1e-12
    assert frozen(x[0]).shape == (24,)


def test_merged_is_a_frozen_copy_of_the_whole_model():
    """Of a guided one too, whatever the state of its coins."""
    model = ffns(block_shuffle)
    guide = Guide(model, 10, t=4, stochastic=True)
    for layer in guide.layers:
        nn.init.normal_(layer.guide)
    before = copy.deepcopy(model.state_dict())
    x = randn(3, 16)
    frozen = [sf.merged(model, 100), sf.merged(model, 1), sf.merged(sf.merged(model, 1), 100)]
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    want = model.eval()(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for copied in frozen:
        assert rel_err(copied(x), want) < 1e-12  # nothing is shared with the model
        assert not copied.training and not any(p.requires_grad for p in copied.parameters())


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
    assert layer.guide is None and layer.V.grad.is_meta


@kinds
def test_compiles_into_one_graph(make):
    """Guided too, without a new graph for every alpha; exports for any number of tokens."""
    layer = build(make)
    x = randn(7, 16)
    shapes = ({0: torch.export.Dim("tokens", min=2)},)
    exported = torch.export.export(layer, (x[:3],), dynamic_shapes=shapes)
    assert rel_err(exported.module()(x), layer(x)) < 1e-12
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    Guide(layer, 100)
    nn.init.normal_(layer.guide)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for layer.alpha in (0.9, 0.8, 0.7, 0.6, 0.5):
        assert rel_err(compiled(x), layer(x)) < 1e-12
    assert len(graphs) <= 2


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_self_check(dtype, limit):
    rows = sf.self_check(dtype)
    assert len(rows) == 15
    assert all(row[1] <= row[2] == limit for row in rows)


def test_zeros_and_other_shapes_are_not_compared():
    for b in (torch.zeros(3), torch.ones(1)):
        with pytest.raises(AssertionError):
            rel_err(torch.zeros(3), b)
