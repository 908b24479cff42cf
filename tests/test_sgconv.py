"""sgconv.py: golden values, exact properties, errors, and the command line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import attention
from sgconv import (
    PUBLISHED,
    SGConv,
    SGConv2d,
    SGConvConfig,
    SGConvModel,
    constant_decay,
    conv_ref,
    cosine_init,
    fft_conv,
    kernel_ref,
    multi_scale_kernel,
    power_law_decay,
    ramp_decay,
    rel_err,
    self_check,
    upsample,
    upsample_ref,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/sgconv.json").read_text())
GOLDEN = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN.items() if k != "input"}
W = torch.cos(1.7 * torch.arange(12, dtype=torch.float64) + 0.3).view(4, 1, 3)  # (S, D, d)
U = torch.from_numpy(np.sin(0.9 * np.arange(24) ** 1.1)).view(1, 24, 1)  # (B, L, D)


# ---------------------------------------------------------------- kernel


def test_kernel_by_hand():
    """w = [1, 2], [3, 4], [5, 6], alpha = 1/2, times 4; its norm."""
    by_hand = np.array([4, 8, 6, 8, 5, 5.25, 5.75, 6])
    w = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 1, 2)
    assert rel_err(4 * kernel_ref(w[:, 0].numpy()), by_hand) < 1e-12
    assert rel_err(4 * multi_scale_kernel(w, 8)[0], by_hand) < 1e-12
    layer = SGConv(1, 8, 2, init=lambda shape: w.view(shape)).double()
    assert rel_err(layer.kernel(8)[0], by_hand / 301.625**0.5) < 1e-12


@pytest.mark.parametrize(
    ("name", "decay", "first_factor"),
    [
        ("constant", constant_decay, 1),
        ("ramp_third", lambda i, lags, D: ramp_decay(i, lags, D, 3.0, 3.0), 2),
        ("power_law", power_law_decay, 1),
    ],
)
def test_kernel_golden(name, decay, first_factor):
    K = multi_scale_kernel(W, 24 * first_factor, decay, first_factor)
    assert rel_err(K[0], GOLDEN[name]) < 1e-12


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_upsample_against_numpy_and_torch(factor, d):
    w = torch.sin(torch.arange(3.0 * d, dtype=torch.float64) + 1).view(3, d)
    ours = upsample(w, factor)
    assert rel_err(ours, np.stack([upsample_ref(row, factor) for row in w.numpy()])) < 1e-12
    assert rel_err(ours, interpolate(w[None], scale_factor=factor, mode="linear")[0]) < 1e-12


def test_ramp_decay_differs_by_channel():
    gain = ramp_decay(2, torch.arange(3.0), 5)  # (D, 1): 1, 1.5, 2, 2.5, 3 to the power -2
    assert rel_err(gain[:, 0], [1, 1 / 2.25, 1 / 4, 1 / 6.25, 1 / 9]) < 1e-6


def test_cosine_init_is_a_shuffled_set_of_cosines():
    w = cosine_init((2, 3, 6, 8))
    by_hand = torch.from_numpy(np.cos(np.outer(np.arange(6), np.linspace(0, 2 * np.pi, 8))))
    assert len({tuple(x.flatten().tolist()) for x in w.view(6, 6, 8)}) > 1  # not all in one order
    for x in w.view(6, 6, 8):
        nearest = torch.cdist(x.double(), by_hand).argmin(1)
        assert sorted(nearest.tolist()) == list(range(6))
        assert rel_err(x, by_hand[nearest]) < 1e-5


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("task", list(PUBLISHED))
def test_norm_is_one_at_construction(task, bidirectional):
    torch.manual_seed(0)
    K = SGConv(16, 1024, bidirectional=bidirectional, **PUBLISHED[task]).kernel(1024)
    assert K.shape == ((2,) if bidirectional else ()) + (16, 1024)
    assert (K.double().norm(dim=-1) - 1).abs().max() < 1e-6


def test_norm_is_constant_after_construction():
    layer = SGConv(3, 32, 4)
    before = layer.kernel(32).clone()
    with torch.no_grad():
        layer.w *= 10
    assert rel_err(layer.kernel(32), 10 * before) < 1e-6


@pytest.mark.parametrize("L", [1, 4, 5, 17, 63])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_short_kernel_is_the_beginning_of_the_long_one(L, bidirectional):
    torch.manual_seed(0)
    layer = SGConv(3, 64, 4, bidirectional)
    assert torch.equal(layer.kernel(L), layer.kernel(64)[..., :L])


# Published parameter counts of one two-sided kernel.
COUNTS = {
    "listops": (128, 2048, 3072),
    "text": (256, 4096, 12288),
    "retrieval": (256, 4000, 6656),
    "image": (512, 1024, 196608),
    "pathfinder": (256, 1024, 98304),
    "pathx": (256, 16384, 262144),
}


@pytest.mark.parametrize("task", list(COUNTS))
def test_parameter_counts_as_published(task):
    d_model, max_len, count = COUNTS[task]
    assert SGConv(d_model, max_len, bidirectional=True, **PUBLISHED[task]).w.numel() == count


def test_parameters_grow_with_log_length():
    counts = [sum(p.numel() for p in SGConv(2, 8 * 2**s, 8).parameters()) for s in range(8)]
    assert counts == [2 * 8 * (1 + s) + 2 for s in range(8)]
    assert SGConv(2, 65, 8).w.numel() == 2 * 8 * 5  # one lag above 64: one more scale


# ---------------------------------------------------------------- convolution and layer


def test_convolution_golden():
    causal = GOLDEN["constant"][None]  # (D, L)
    back = GOLDEN["power_law"][None]
    assert rel_err(fft_conv(U, causal)[0, :, 0], GOLDEN["causal"]) < 1e-12
    two_sided = fft_conv(U, torch.stack([causal, back]))
    assert rel_err(two_sided[0, :, 0], GOLDEN["two_sided"]) < 1e-12


@pytest.mark.parametrize("L", [1, 2, 7, 31, 100, 257])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layer_is_a_direct_convolution(L, bidirectional):
    torch.manual_seed(L)
    layer = SGConv(2, 257, 4, bidirectional).double()
    u = torch.randn(2, L, 2, dtype=torch.float64)
    K = layer.kernel(L).detach().numpy()
    fwd, back = K if bidirectional else (K, [None, None])
    y = np.zeros(u.shape)
    for b, d in np.ndindex(2, 2):
        y[b, :, d] = conv_ref(u[b, :, d].numpy(), fwd[d], back[d])
    assert rel_err(layer(u), y + (u * layer.D_skip).detach().numpy()) < 1e-10


@pytest.mark.parametrize("decay", [constant_decay, ramp_decay, power_law_decay])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("L", [6, 11])
def test_gradcheck(L, bidirectional, decay):
    torch.manual_seed(0)
    layer = SGConv(2, 12, 2, bidirectional, decay=decay).double()
    u = torch.randn(2, L, 2, dtype=torch.float64, requires_grad=True)

    def run(u, w, D_skip):
        return torch.func.functional_call(layer, {"w": w, "D_skip": D_skip}, (u,))

    assert torch.autograd.gradcheck(run, (u, layer.w, layer.D_skip), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_absent(bidirectional):
    torch.manual_seed(0)
    model = model_of(vocab_size=7, causal=not bidirectional)
    x, lengths = torch.randint(7, (3, 30)), [30, 17, 1]
    keep = torch.arange(30) < torch.tensor(lengths)[:, None]
    y = model(x, keep)
    for b, L in enumerate(lengths):
        assert rel_err(y[b, :L], model(x[b : b + 1, :L])[0]) < 1e-12


def model_of(**fields):
    return SGConvModel(SGConvConfig(d_model=6, max_len=40, kernel_dim=4, **fields)).double()


def test_causal_model_reads_no_future_and_two_sided_does():
    torch.manual_seed(0)
    for causal in (True, False):
        model = model_of(n_channels=2, causal=causal)
        x = torch.randn(1, 30, 2, dtype=torch.float64)
        y = model(x)
        x[:, 20] += 1
        change = (model(x) - y).abs().amax((0, 2))
        assert change[20:].min() > 1e-6
        assert (change[:20].max() < 1e-12) == causal


def test_forward_changes_no_state():
    model = model_of(vocab_size=7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for L in (40, 3, 25):
        model(torch.randint(7, (2, L))).sum().backward()
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and len(before) == len(after)


def test_checkpoint_carries_the_normaliser():
    torch.manual_seed(0)
    a, b = model_of(vocab_size=7), model_of(vocab_size=7)
    x = torch.randint(7, (2, 40))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_resample_keeps_the_response_to_a_slow_signal():
    """A smooth kernel and a slow signal: the last fine output of a cell is the coarse one."""
    smooth = torch.cos(torch.linspace(0, 1, 8)).expand(4, 2, 3, 8)
    layer = SGConv(3, 64, 8, bidirectional=True, init=lambda shape: smooth.clone()).double()
    with torch.no_grad():
        layer.D_skip.zero_()

    def signal(L):
        t = (torch.arange(L, dtype=torch.float64) + 0.5) / L
        return torch.sin(3 * t + 1)[None, :, None].expand(1, L, 3)

    coarse = layer(signal(64))
    total = layer.kernel(64).sum(-1)
    for factor in (2, 4):
        fine = layer.resample(64 * factor)(signal(64 * factor))
        assert rel_err(layer.kernel(64 * factor).sum(-1), total) < 1e-12
        assert rel_err(fine[:, factor - 1 :: factor], coarse) < 0.01
    assert rel_err(layer.resample(64)(signal(64)), coarse) < 1e-12  # and back


def test_resample_to_half_the_rate_averages_pairs():
    torch.manual_seed(0)
    layer = SGConv(3, 64, 8).double()
    pairs = layer.kernel(64).unflatten(1, (32, 2)).sum(2)
    assert rel_err(layer.resample(32).kernel(20), pairs[:, :20]) < 1e-12


def test_float32_and_bfloat16_autocast():
    torch.manual_seed(0)
    model = SGConvModel(SGConvConfig(d_model=8, max_len=4096, vocab_size=7))
    x = torch.randint(7, (1, 4096))
    exact = model.double()(x)
    assert rel_err(model.float()(x), exact) < 1e-5
    mixer = model.blocks[0].mixer
    K = mixer.kernel(4096)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(mixer.kernel(4096), K)
    assert rel_err(y, exact) < 5e-2


# ---------------------------------------------------------------- model


def test_every_parameter_is_in_one_group():
    model = model_of(vocab_size=7)
    kernel, plain, decayed = model.param_groups(1e-2, 0.1)
    assert [g["lr"] for g in (kernel, plain, decayed)] == [1e-3, 1e-2, 1e-2]
    assert [g["weight_decay"] for g in (kernel, plain, decayed)] == [0, 0, 0.1]
    grouped = [id(p) for g in (kernel, plain, decayed) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in kernel["params"]} == {id(b.mixer.w) for b in model.blocks}
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {"embed.weight", "blocks.0.out.weight", "blocks.1.out.weight"}
    assert {names[id(p)] for p in decayed["params"]} == expected


def test_config_hands_the_variant_to_every_mixer():
    torch.manual_seed(0)
    config = SGConvConfig(d_model=6, max_len=256, vocab_size=7, causal=True, **PUBLISHED["pathx"])
    for block in SGConvModel(config).blocks:
        layer = block.mixer
        assert layer.w.shape == (2, 6, 64)  # 256 = 2 * 64 * 2: two scales
        w = (layer.w / layer.norm).detach().double()
        assert rel_err(layer.kernel(256), multi_scale_kernel(w, 256, ramp_decay, 2)) < 1e-5
        assert rel_err(layer.w[0].sort(0)[0], cosine_init((1, 6, 64))[0].sort(0)[0]) < 1e-6


def test_losses_golden():
    losses = torch.tensor(make_golden.sgconv_losses(), dtype=torch.float64)
    assert rel_err(losses, GOLDEN["losses"]) < 1e-10
    assert losses[-1] < 0.9 * losses[0]


def test_bad_input_says_the_numbers():
    layer = SGConv(3, 32, 4)
    for bad, numbers in (
        (lambda: SGConv(3, 8, 16), "16.*8"),
        (lambda: SGConv(3, 16, 16, first_factor=2), "16, 2.*16"),
        (lambda: SGConv(0, 8, 4), "0, 4"),
        (lambda: SGConv(3, 8, 0), "3, 0"),
        (lambda: layer(torch.zeros(1, 33, 3)), "33.*32"),
        (lambda: layer(torch.zeros(1, 8, 4)), "3.*4"),
        (lambda: layer(torch.zeros(8, 3)), r"\(8, 3\)"),
        (lambda: layer(torch.zeros(2, 8, 3), torch.ones(8) > 0), r"\(2, 8\).*\(8,\)"),
        (lambda: layer(torch.zeros(2, 0, 3)), r"\(2, 0, 3\)"),
        (lambda: layer.kernel(0), "0.*32"),
        (lambda: layer.resample(0), "0"),
        (lambda: SGConv2d(3, 4, 5, 2)(torch.zeros(1, 3, 5, 4)), "4, 5.*5, 4"),
        (lambda: SGConvModel(SGConvConfig()), "None"),
        (lambda: SGConvModel(SGConvConfig(vocab_size=3, n_channels=2)), "3 and 2"),
    ):
        with pytest.raises(ValueError, match=numbers):
            bad()


# ---------------------------------------------------------------- plug-ins


def test_token_mixer_of_a_transformer_block():
    """The block's first sublayer becomes norm, direct convolution, residual."""
    torch.manual_seed(0)
    config = attention.TransformerConfig(d_model=4, n_layers=2, vocab_size=7, causal=True)
    model = attention.Transformer(config, mixer=lambda config, i: SGConv(config.d_model, 32, 4))
    model = model.double()
    assert not any(isinstance(m, attention.Attention) for m in model.modules())
    block, seen = model.blocks[0], {}
    block.mixer.register_forward_hook(lambda m, args, y: seen.update(u=args[0], y=y))
    x = torch.randint(7, (1, 20))
    y = model(x)
    u, K = seen["u"][0].detach().numpy(), block.mixer.kernel(20).detach().numpy()
    mixed = np.stack([conv_ref(u[:, d], K[d]) for d in range(4)], 1)
    assert rel_err(seen["y"][0], mixed + u * block.mixer.D_skip.detach().numpy()) < 1e-10
    x[:, 12] = (x[:, 12] + 1) % 7
    change = (model(x) - y).abs().amax((0, 2))
    assert change[:12].max() < 1e-12 < 1e-6 < change[12:].min()


def test_sgconv2d_is_a_sum_over_pixels():
    torch.manual_seed(0)
    layer = SGConv2d(2, 3, 5, 4).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    K, skip = (a.detach().numpy() for a in (layer.conv.kernel(15), layer.conv.D_skip))
    y = x.numpy() * skip[:, None, None]
    for i, j, s, t in np.ndindex(3, 5, 3, 5):
        lag = (i - s) * 5 + j - t
        y[:, :, i, j] += (K[0, :, lag] if lag >= 0 else K[1, :, -lag - 1]) * x[:, :, s, t].numpy()
    assert rel_err(layer(x), y) < 1e-10


# ---------------------------------------------------------------- twins, checks, command line


def tree(file, name):
    """Syntax tree of a function or class (`Class.method` too), its own name left out."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        node = next(n for n in body if getattr(n, "name", None) == part)
        body = node.body
    node.name = "twin"
    return ast.dump(node)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("fft_length", "fft_length"),
        ("CircularConv", "CircularConv"),
        ("fft_conv", "fft_conv"),
        ("SGConv.check", "S4.check"),
        ("SGConv.skip_at_zero", "S4.skip_at_zero"),
        ("SGConvBlock", "S4Block"),
        ("SGConvModel.forward", "S4Model.forward"),
    ],
)
def test_twins_of_s4(ours, theirs):
    assert tree("sgconv.py", ours) == tree("s4.py", theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_self_check(dtype):
    for name, error, limit in self_check(dtype):
        assert error <= limit, f"{name}: {error} > {limit}"


def test_command_line_check():
    command = [sys.executable, str(ROOT / "sgconv.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SGConv2d == sum over pixels" in result.stdout and "FAIL" not in result.stdout


@pytest.mark.slow
def test_command_line_demo_as_the_file_says():
    command = [sys.executable, str(ROOT / "sgconv.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "accuracy 1.00" in (ROOT / "sgconv.py").read_text().split('"""')[1]
    assert "  accuracy 1.00: ok" in result.stdout
