"""sgconv.py: golden values, exact properties, errors and plug-ins."""

import copy
import json
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import s4
import sgconv
from sgconv import SGConv, SGConvConfig, SGConvModel, conv_ref, multi_scale_kernel, rel_err

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/sgconv.json").read_text())
GOLDEN = {k: torch.tensor(v, dtype=torch.float64) for k, v in GOLDEN.items() if k != "input"}
W = torch.cos(1.7 * torch.arange(12, dtype=torch.float64) + 0.3).view(4, 1, 3)  # (S, D, d)
U = torch.from_numpy(np.sin(0.9 * np.arange(24) ** 1.1)).view(1, 24, 1)  # (B, L, D)
PLACE = torch.zeros(1, 1, dtype=torch.float64)  # of the only channel
CAUSAL_OR_NOT = pytest.mark.parametrize("bidirectional", [False, True])
DECAYS = [sgconv.constant_decay, sgconv.ramp_decay, sgconv.power_law_decay]
EVERY_DECAY = pytest.mark.parametrize("decay", DECAYS)


def model_of(**fields):
    torch.manual_seed(0)
    return SGConvModel(SGConvConfig(d_model=6, max_len=40, kernel_dim=4, **fields)).double()


# ---------------------------------------------------------------- kernel


def test_kernel_by_hand():
    """w = [1, 2], [3, 4], [5, 6], alpha = 1/2, times 4; its norm."""
    by_hand = np.array([4, 8, 6, 8, 5, 5.25, 5.75, 6])
    w = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 1, 2)
    assert rel_err(4 * sgconv.kernel_ref(w[:, 0].numpy()), by_hand) < 1e-12
    assert rel_err(4 * multi_scale_kernel(w, 8, PLACE)[0], by_hand) < 1e-12
    layer = SGConv(1, 8, 2, init=lambda shape: w.view(shape))
    assert rel_err(layer.kernel(8)[0], by_hand / 301.625**0.5) < 1e-12


def test_kernel_golden():
    constant, ramp, power_law = DECAYS
    third = lambda i, lags, place: ramp(i, lags, place, 3.0, 3.0)  # noqa: E731
    assert rel_err(multi_scale_kernel(W, 24, PLACE, constant)[0], GOLDEN["constant"]) < 1e-12
    assert rel_err(multi_scale_kernel(W, 48, PLACE, third, 2)[0], GOLDEN["ramp_third"]) < 1e-12
    assert rel_err(multi_scale_kernel(W, 24, PLACE, power_law)[0], GOLDEN["power_law"]) < 1e-12


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_upsample_against_numpy_and_torch(factor, d):
    w = torch.sin(torch.arange(3.0 * d, dtype=torch.float64) + 1).view(3, d)
    ours = sgconv.upsample(w, factor)
    assert rel_err(ours, np.stack([sgconv.upsample_ref(row, factor) for row in w.numpy()])) < 1e-12
    assert rel_err(ours, interpolate(w[None], scale_factor=factor, mode="linear")[0]) < 1e-12


def test_cosine_init_is_a_shuffled_set_of_cosines():
    torch.manual_seed(0)
    w = sgconv.cosine_init((2, 3, 6, 8)).view(6, 6, 8)
    by_hand = torch.from_numpy(np.cos(np.outer(np.arange(6), np.linspace(0, 2 * np.pi, 8))))
    orders = [torch.cdist(x.double(), by_hand).argmin(1) for x in w]
    for x, order in zip(w, orders, strict=True):
        assert sorted(order.tolist()) == list(range(6))
        assert rel_err(x, by_hand[order]) < 1e-5
    assert len({tuple(order.tolist()) for order in orders}) > 1


@CAUSAL_OR_NOT
@EVERY_DECAY
def test_norm_is_one_at_construction_only(decay, bidirectional):
    torch.manual_seed(0)
    layer = SGConv(16, 1024, 32, bidirectional, decay, sgconv.cosine_init, first_factor=2)
    K = layer.kernel(1024)
    assert K.shape == ((2, 16, 1024) if bidirectional else (16, 1024))
    assert (K.double().norm(dim=-1) - 1).abs().max() < 1e-6
    with torch.no_grad():
        layer.w *= 10
    assert rel_err(layer.kernel(1024), 10 * K) < 1e-6  # the normalizer is constant


def test_norm_is_that_of_the_whole_kernel():
    """Scales of 4, 4, 8, 16 and 32 lags, of which max_len takes 40."""
    layer = SGConv(1, 40, 4).double()
    whole = multi_scale_kernel(layer.w, 64, PLACE)
    assert rel_err(layer.norm, whole.norm(dim=-1, keepdim=True)) < 1e-6


@CAUSAL_OR_NOT
@pytest.mark.parametrize("L", [1, 4, 17])
def test_short_kernel_is_the_beginning_of_the_long_one(L, bidirectional):
    layer = SGConv(3, 64, 4, bidirectional)
    assert torch.equal(layer.kernel(L), layer.kernel(64)[..., :L])


# d_model, max_len, kernel_dim, first_factor and parameters of one published kernel
PUBLISHED = {
    "listops": (128, 2048, 1, 1, 3072),
    "text": (256, 4096, 2, 1, 12288),
    "retrieval": (256, 4000, 1, 1, 6656),
    "image": (512, 1024, 32, 1, 196608),
    "pathfinder": (256, 1024, 32, 1, 98304),
    "pathx": (256, 16384, 64, 2, 262144),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_parameter_counts_as_published(task):
    d_model, max_len, kernel_dim, first_factor, count = PUBLISHED[task]
    layer = SGConv(d_model, max_len, kernel_dim, bidirectional=True, first_factor=first_factor)
    assert layer.w.numel() == count


@pytest.mark.parametrize(
    ("max_len", "first_factor", "d"), [(1, 1, 1), (1, 4, 1), (49, 1, 49), (49, 2, 25)]
)
def test_a_sub_kernel_is_never_longer_than_the_input(max_len, first_factor, d):
    """7 x 7 pixels is the last stage of every ConvNeXt: fewer than kernel_dim."""
    layer = SGConv(2, max_len, first_factor=first_factor)  # kernel_dim 64
    assert layer.w.shape == (1, 2, d)
    assert layer.kernel(max_len).shape == (2, max_len)


# ---------------------------------------------------------------- convolution and layer


def test_convolution_golden():
    causal = GOLDEN["constant"][None]  # (D, L)
    back = GOLDEN["power_law"][None]
    assert rel_err(sgconv.fft_conv(U, causal)[0, :, 0], GOLDEN["causal"]) < 1e-12
    two_sided = sgconv.fft_conv(U, torch.stack([causal, back]))
    assert rel_err(two_sided[0, :, 0], GOLDEN["two_sided"]) < 1e-12


def layer_ref(layer, u):
    """The output of a layer by conv_ref. u: (L, D) tensor."""
    u = u.detach().numpy()
    K = layer.kernel(len(u)).detach().numpy()
    kernels = K if layer.bidirectional else [K]
    return conv_ref(u, *kernels) + layer.D_skip.detach().numpy() * u


@CAUSAL_OR_NOT
@pytest.mark.parametrize("L", [1, 2, 31, 257])
def test_layer_is_a_direct_convolution(L, bidirectional):
    torch.manual_seed(L)
    layer = SGConv(2, 257, 4, bidirectional).double()
    u = torch.randn(2, L, 2, dtype=torch.float64)
    y = layer(u)
    assert rel_err(y[0], layer_ref(layer, u[0])) < 1e-10
    assert rel_err(y[1], layer_ref(layer, u[1])) < 1e-10


@CAUSAL_OR_NOT
@EVERY_DECAY
def test_gradcheck(bidirectional, decay):
    torch.manual_seed(0)
    layer = SGConv(2, 12, 2, bidirectional, decay=decay).double()
    u = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)

    def run(u, w, D_skip):
        return torch.func.functional_call(layer, {"w": w, "D_skip": D_skip}, (u,))

    assert torch.autograd.gradcheck(run, (u, layer.w, layer.D_skip), atol=1e-8, rtol=1e-6)
    if decay is sgconv.constant_decay:
        few = u.detach()[:1, :5].requires_grad_()
        assert torch.autograd.gradgradcheck(run, (few, layer.w, layer.D_skip))


def test_checkpoint_carries_the_normalizer():
    a = model_of(vocab_size=7)
    b = SGConvModel(a.config).double()  # another draw
    x = torch.randint(7, (2, 40), dtype=torch.uint8)
    assert rel_err(b(x), a(x)) > 0.1
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert set(a.blocks[0].mixer.state_dict()) == {"w", "D_skip", "norm"}


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


@EVERY_DECAY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_parameters_only(dtype, decay):
    torch.manual_seed(0)
    layer = SGConv(8, 4096, 16, decay=decay)
    half = copy.deepcopy(layer).to(dtype)
    rounded = copy.deepcopy(half).double()
    assert rel_err(half.kernel(4096), rounded.kernel(4096)) < 1e-6
    x = torch.randn(1, 4096, 8, dtype=dtype)
    y = half(x)
    assert y.dtype == dtype
    assert rel_err(y, rounded(x.double())) < torch.finfo(dtype).eps
    assert rel_err(y, layer.double()(x.double())) < 0.01


@CAUSAL_OR_NOT
@EVERY_DECAY
def test_channels_can_be_split(decay, bidirectional):
    """channel_axes says where the channels are; a part of a layer computes those channels."""
    torch.manual_seed(0)
    layer = SGConv(5, 64, 4, bidirectional, decay=decay).double()
    part = copy.deepcopy(layer)
    part.d_model = 2
    part.first_channel = 3
    for tensors in (part._parameters, part._buffers):
        for name in tensors:
            tensors[name] = tensors[name].narrow(layer.channel_axes.get(name, 0), 3, 2)
    x = torch.randn(1, 50, 5, dtype=torch.float64)
    assert rel_err(part(x[..., 3:]), layer(x)[..., 3:]) < 1e-12


# ---------------------------------------------------------------- model


def test_config_hands_the_variant_to_every_mixer():
    torch.manual_seed(0)
    variant = dict(kernel_dim=64, first_factor=2, decay=sgconv.ramp_decay, init=sgconv.cosine_init)
    config = SGConvConfig(d_model=6, max_len=256, vocab_size=7, causal=True, **variant)
    place = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    for block in SGConvModel(config).blocks:
        layer = block.mixer
        assert layer.w.shape == (2, 6, 64)  # 256 = 2 * 64 * 2: two scales
        w = (layer.w / layer.norm).detach().double()
        K = multi_scale_kernel(w, 256, place, sgconv.ramp_decay, 2)
        assert rel_err(layer.kernel(256), K) < 1e-5
        assert rel_err(layer.w[0].sort(0)[0], sgconv.cosine_init((1, 6, 64))[0].sort(0)[0]) < 1e-6


def test_losses_golden():
    losses = torch.tensor(make_golden.sgconv_losses(), dtype=torch.float64)
    assert rel_err(losses, GOLDEN["losses"]) < 1e-10
    assert losses[-1] < 0.9 * losses[0]


LAYER = SGConv(3, 32, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LAYER(torch.zeros(1, 33, 3)), "32, got 33"),
        (lambda: LAYER.kernel(0), "32, got 0"),
        (lambda: LAYER(torch.zeros(1, 8, 1)), "3.*1"),
        (lambda: LAYER(torch.zeros(8, 3)), r"\(8, 3\)"),
        (lambda: LAYER(torch.zeros(2, 8, 3, dtype=torch.int64)), "int64"),
        (lambda: LAYER(torch.zeros(2, 8, 3), torch.ones(8) > 0), r"\(2, 8\).*\(8,\)"),
        (lambda: LAYER.initial_state(2), "SGConv has no recurrent mode"),
        (lambda: model_of(vocab_size=3).initial_state(2), "SGConv has no recurrent mode"),
        (lambda: sgconv.SGConv2d(3, 4, 5, 2)(torch.zeros(1, 3, 5, 4)), "4, 5.*5, 4"),
        (lambda: SGConvModel(SGConvConfig()), "vocab_size=None, n_channels=None"),
        (lambda: model_of(vocab_size=3, n_channels=2), "vocab_size=3, n_channels=2"),
        (
            lambda: model_of(vocab_size=3)(torch.zeros(8).long()),
            r"integer tokens \(B, L\), got \(8,\)",
        ),
        (lambda: model_of(n_channels=1)(torch.zeros(2, 8)), r"\(B, L, 1\), got \(2, 8\)"),
        (lambda: model_of(vocab_size=3, n_layers=0), "sizes of at least 1.*n_layers=0"),
        (lambda: SGConv(3, None), "d_model=3, max_len=None"),
        (lambda: SGConv(3, 8, 0), "kernel_dim=0"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- plug-ins


def test_sgconv2d_reads_row_by_row_both_ways():
    torch.manual_seed(0)
    layer = sgconv.SGConv2d(2, 3, 5, 4).double()
    assert layer.conv.kernel(15).shape == (2, 2, 15)  # (2, D, H W): both ways
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    for image, y in zip(x, layer(x), strict=True):
        rows = image.reshape(2, 15).T  # (H W, D)
        assert rel_err(y, layer_ref(layer.conv, rows).T.reshape(2, 3, 5)) < 1e-10


def test_the_block_is_that_of_s4():
    mixer = SGConv(6, 20, 4)
    ours = sgconv.SGConvBlock(6, mixer)
    theirs = s4.S4Block(6, mixer)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 6)
    keep = torch.arange(20).expand(2, 20) < 9
    assert torch.equal(ours(x, keep), theirs(x, keep))


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_built_on_the_meta_device_and_loaded_equals_the_saved_one(assign):
    def build():
        return SGConv(4, 32, 8, decay=sgconv.ramp_decay, init=sgconv.cosine_init)

    saved = build()
    with torch.device("meta"):
        layer = build()
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(saved.state_dict(), assign=assign)
    x = torch.randn(2, 20, 4)
    assert torch.equal(layer(x), saved(x))
