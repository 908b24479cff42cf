"""s4.py: golden values, kernels, layers, precision, recurrent mode, the model, errors."""

import copy
import io
import json
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

import s4
from attention import Attention
from s4 import DLR, S4, S4D, S4Config, S4Model, rel_err, s4_mixer, s4d_mixer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/s4.json").read_text())
KINDS = pytest.mark.parametrize("kind", [S4, S4D, DLR])
HIPPO_MIXERS = pytest.mark.parametrize("mixer", [s4_mixer, s4d_mixer])
MIXERS = pytest.mark.parametrize("mixer", [s4_mixer, s4d_mixer, s4.dlr_mixer])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def column(v):
    """Complex (D, N/2) -> (D, N, 1) in real coordinates."""
    return s4.coordinates(v.resolve_conj())[..., None]


def kernel(Lam, P, B, C, dt, L):
    """K of A = diag(Lam) - P P^*.  Complex Lam, P, B (D, N/2), C (n, D, N/2), dt (D, 1)."""
    E, B_bar, _, _ = s4.bilinear(Lam, column(P), column(B), dt)
    return s4.two_level_kernel(E, B_bar, s4.output_rows(C).transpose(0, 1), L)


def random_system(D, N, n=1):
    """Lam, P, B, C, dt of D random stable systems."""
    shape = (D, N // 2)
    Lam = torch.complex(-0.1 - torch.rand(shape).double(), 3 * randn(*shape))
    P = torch.complex(randn(*shape), randn(*shape))
    B = torch.complex(randn(*shape), randn(*shape))
    C = torch.complex(randn(n, *shape), randn(n, *shape))
    return Lam, P, B, C, 0.05 + 0.2 * torch.rand(D, 1).double()


def legs_system(N, C, dt):
    """HiPPO-LegS with C (N,), as random_system."""
    Lam, P, B, V = s4.dplr_legs(N)
    Lam, P, B, C = [torch.from_numpy(v)[None] for v in (Lam, P, B, C @ V)]
    return Lam, P, B, C[None], torch.tensor([[dt]], dtype=torch.float64)


def stream(module, x, sizes):
    """Run x in pieces through the recurrent mode.  Returns y (B, L, D) and the state."""
    state = module.initial_state(len(x))
    out = []
    for piece in x.split(sizes, 1):
        if piece.shape[1] == 1:
            y, state = module.step(piece[:, 0], state)
            y = y[:, None]
        else:
            y, state = module.prefill(piece, state)
        out.append(y)
    return torch.cat(out, 1), state


def causal_model(mixer=s4_mixer, **sizes):
    return S4Model(S4Config(d_model=8, d_state=8, causal=True, **sizes), mixer).double()


# ---------------------------------------------------------------- HiPPO


def test_hippo_matrix_by_hand():
    A, B = s4.hippo_legs(4)
    r3, r5, r7 = 3**0.5, 5**0.5, 7**0.5
    want = [[-1, 0, 0, 0], [-r3, -2, 0, 0], [-r5, -r3 * r5, -3, 0], [-r7, -r3 * r7, -r5 * r7, -4]]
    assert rel_err(A, np.array(want)) < 1e-14
    assert rel_err(B, np.array([1, r3, r5, r7])) < 1e-14


@pytest.mark.parametrize("N", [4, 64])
def test_the_normal_form_rebuilds_hippo(N):
    A, B = s4.hippo_legs(N)
    Lam, P, B_half, V = s4.dplr_legs(N)
    assert (B_half.real > 0).all() and abs(B_half.imag).max() < 1e-12  # no solver's own phases
    U = np.concatenate([V, V.conj()], 1)  # (N, N)
    q = s4.both(P)
    back = U @ (np.diag(s4.both(Lam)) - np.outer(q, q.conj())) @ U.conj().T
    assert rel_err((U.conj().T @ U).real, np.eye(N)) < 1e-12
    assert np.abs(back.imag).max() < 1e-10
    assert rel_err(back.real, A) < 1e-11
    assert rel_err((U @ s4.both(B_half)).real, B) < 1e-12


@pytest.mark.parametrize("dt", [1e-4, 1e-2, 1.0, 10.0])
def test_no_system_grows(dt):
    """||A_bar|| <= 1 for LegS and for any P = Q with Re Lam < 0."""
    for Lam, P, B, _, _ in (random_system(5, 8), legs_system(64, np.ones(64), dt)):
        dts = torch.full((len(Lam), 1), dt, dtype=torch.float64)
        E, *_ = s4.bilinear(Lam, column(P), column(B), dts)
        norms = torch.linalg.matrix_norm(torch.eye(E.shape[-1]).double() + E, 2)
        assert 0.1 < norms.min() and norms.max() <= 1 + 1e-12


# ---------------------------------------------------------------- kernels


def test_golden_kernels():
    """Of make_golden.py, after the first values of two kernels that others computed."""

    def bilinear(C, dt, L):
        return kernel(*legs_system(len(C), C, dt), L)[0, 0]

    def hold(init, C, dt, L):
        Lam, B = [torch.from_numpy(v)[None] for v in init(2 * len(C))]
        log_A = dt * Lam
        B_bar = torch.expm1(log_A) / Lam * B
        return s4.diagonal_kernel(log_A, B_bar, torch.from_numpy(C + 0j)[None, None], L)[0, 0]

    theirs = [0.547052197739, 0.223439367527, 0.063993929101]
    theirs += [-0.004599418612, -0.025621550246, -0.023929160707]
    assert rel_err(bilinear(np.ones(4), 0.1, 6), np.array(theirs)) < 1e-11
    theirs = [0.387011208635, 0.350341187798, 0.300984952682]
    theirs += [0.244020162256, 0.184808923753, 0.128456683586]
    assert rel_err(hold(s4.s4d_lin, np.ones(2), 0.1, 6), np.array(theirs)) < 1e-11
    C = np.cos(np.arange(8))
    assert rel_err(bilinear(C, 0.05, 24), np.array(GOLDEN["kernel"])) < 1e-11
    for name, init in (("lin", s4.s4d_lin), ("inv", s4.s4d_inv), ("legs", s4.s4d_legs)):
        K = hold(init, C[:4], 0.05, 24)
        assert rel_err(K, np.array(GOLDEN[f"s4d_{name}"])) < 1e-11


@pytest.mark.parametrize("L", [1, 2, 3, 5, 255, 256, 1000, 1024])
def test_two_level_kernel_equals_powers(L):
    """Two complex random systems, two directions; float64 and float32."""
    Lam, P, B, C, dt = random_system(2, 8, n=2)
    want = np.zeros((2, 2, L))
    for d in range(2):
        lam, p, b = [s4.both(v[d].numpy()) for v in (Lam, P, B)]
        A_bar, B_bar = s4.bilinear_ref(np.diag(lam) - np.outer(p, p.conj()), b, dt[d].numpy())
        for n in range(2):
            want[n, d] = s4.kernel_ref(A_bar, B_bar, s4.both(C[n, d].numpy()), L)
    for dtype, limit in ((torch.complex128, 1e-11), (torch.complex64, 5e-6)):
        K = kernel(Lam, P, B, C.to(dtype), dt, L)
        assert K.dtype == dtype.to_real() and rel_err(K, want) < limit


@torch.no_grad()
@pytest.mark.parametrize(("kind", "single"), [(S4, 6e-6), (S4D, 1e-6)])
def test_float32_at_length_16384(kind, single, L=16384):
    """Relative L2 error; the form of the paper loses three digits here, A_bar without - I two."""
    layer = kind(4, 64)
    layer.log_dt.copy_(torch.tensor([1e-4, 1e-3, 1e-2, 1e-1]).log())
    double = copy.deepcopy(layer).double()
    E, x, C = double.system()
    exact = []
    for _ in range(L):
        exact.append((C @ x)[:, 0, 0])
        x = torch.baddbmm(x, E, x)
        x = torch.where(x.abs() < 1e-200, 0.0, x)  # numbers below 1e-308 are slow
    exact = torch.stack(exact, -1)
    for K, limit in ((layer.kernel(L), single), (double.kernel(L), 1e-11)):
        error = (K - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max() < limit


@torch.no_grad()
def test_the_first_power_is_taken_in_float64(L=16384):
    """Its rounding to float32 would double the error at a large dt."""
    layer = S4(16, 64, dt_min=0.1, dt_max=0.1)
    exact = copy.deepcopy(layer).double().kernel(L)
    error = (layer.kernel(L) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 3.5e-6


@KINDS
@pytest.mark.parametrize(("bidirectional", "L"), [(False, 5), (True, 6)])
def test_gradcheck(kind, bidirectional, L):
    """First and second derivatives by the input and every parameter."""
    layer = kind(2, 4, bidirectional).double()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = randn(2, L, 2).requires_grad_()
    assert gradcheck(run, [x, *values])
    assert gradgradcheck(run, [x, *values])
    grads = torch.autograd.grad(run(x, *values).square().sum(), values)
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize("extreme", [-800.0, 800.0])
def test_extreme_decays_leave_kernel_and_gradient_finite(kind, extreme):
    layer = kind(2, 8).double()
    layer.log_decay.data[0] = extreme
    K = layer.kernel(20)
    K.sum().backward()
    assert K.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert (s4.eigenvalues(layer.log_decay, layer.frequency).real < 0).all()


def test_a_vanishing_eigenvalue_has_the_limit_dt_b():
    layer = S4D(1, 2).double()  # S4D-Lin with one pair: frequency 0
    layer.log_decay.data.fill_(-800)
    want = 2 * layer.C[0, :, 0, :1] * layer.log_dt.exp()  # (1, 1)
    assert rel_err(layer.kernel(5), want.expand(1, 5)) < 1e-12


@pytest.mark.parametrize("L", [64, 101])
def test_cauchy_kernels_of_the_benchmark(monkeypatch, L):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from s4_kernel import naive_cauchy, stable_cauchy

    layer = S4(3, 16, bidirectional=True).double()
    assert rel_err(stable_cauchy(layer, L), layer.kernel(L)) < 1e-10
    assert rel_err(naive_cauchy(layer, 101), layer.kernel(101)) < 1e-8


# ---------------------------------------------------------------- layers


@KINDS
def test_a_bidirectional_layer(kind):
    """An impulse at position 4: row 0 answers from 4 on, row 1 at 3, 2, 1, 0."""
    layer = kind(2, 8, bidirectional=True).double()
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(1, 9, 2, dtype=torch.float64)
    x[0, 4] = 1
    K = layer.kernel(9)
    for other in (K[..., :-1], K[None], K[0]):
        with pytest.raises(ValueError, match=r"K must be that of kernel\(L\)"):
            layer(x, K=other)
    y = layer(x, K=K)  # which leaves K as it is
    want = torch.cat([K[1, :, :4].flip(-1), K[0, :, :5]], -1)  # (D, 9)
    want[:, 4] += layer.D_skip
    assert rel_err(y[0].T, want) < 1e-12 and torch.equal(layer(x), y)
    assert rel_err(layer.kernel(100)[..., :9], K) < 1e-13
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name])  # forward changes none
        assert p.shape[layer.channel_axes.get(name, 0)] == 2


def test_a_plain_recurrence_is_what_its_name_says():
    """x_l = a x_{l-1} + u_l with a = exp(Lam), y_l = 2 Re(C x_l), as a loop."""
    layer = DLR(3, 8).double()
    parts = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    a = np.exp(-np.exp(parts["log_decay"]) + 1j * parts["frequency"])
    C = parts["C"][0] @ np.array([1, 1j])
    u = np.random.RandomState(0).randn(50, 3)
    x = np.zeros((3, 4), complex)
    y = []
    for u_l in u:
        x = a * x + u_l[:, None]
        y.append(2 * (C * x).sum(-1).real + parts["D_skip"] * u_l)
    assert rel_err(layer(torch.from_numpy(u)[None])[0], np.array(y)) < 1e-12


def test_a_plain_recurrence_starts_as_its_docstring_says():
    layer = DLR(200, 8, dt_min=0.01, dt_max=0.5)
    decay = layer.log_decay.exp()
    want = 2 * torch.pi * torch.arange(4) / 8
    assert rel_err(layer.frequency, want.expand(200, 4)) < 1e-6
    assert 0.01 * 0.9999 <= decay.min() < 0.02 and 0.4 < decay.max() <= 0.5 * 1.0001
    assert abs(layer.log_decay.mean() - np.log(0.01 * 0.5) / 2) < 0.15  # log-uniform
    assert len(decay.unique()) > 700


FREE = """_conj _reshape_alias _to_empty _unsafe_view alias as_strided detach empty empty_like
empty_strided expand imag new_empty permute real resolve_conj select slice split split_with_sizes
squeeze t transpose unbind unflatten unsqueeze view view_as_complex view_as_real"""


class Operations(TorchDispatchMode):
    """Names of the operations that compute: not views, not allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in FREE.split():
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "limit"), [(S4, 260), (S4D, 90), (DLR, 60)])
def test_a_kernel_and_its_gradient_take_few_operations(kind, limit):
    """Each is a launch on a GPU; the limits are at L = 1024 and do not depend on the width."""
    layer = kind(16)
    with Operations() as operations:
        layer.kernel(1024).sum().backward()
    assert limit / 2 < len(operations.names) <= limit


# ---------------------------------------------------------------- precision


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_dynamics(kind, dtype):
    """L = 1024, where a rounded dt or frequency turns the phases."""
    layer = kind(16)
    half = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(2, 1024, 16).to(dtype)
    y = half(x)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert y.dtype == dtype and rel_err(y, layer(x.float())) < 1e-2
    streamed, _ = half[0].prefill(x, half[0].initial_state(2))
    assert streamed.dtype == dtype and rel_err(streamed, y) < 1e-2


@KINDS
def test_parameters_cast_from_outside_are_rounded_and_nothing_else(kind):
    """As by FSDP with param_dtype=bfloat16."""
    layer = kind(4, 8)
    cast = {name: p.detach().bfloat16() for name, p in layer.named_parameters()}
    x = torch.randn(2, 30, 4)
    y = functional_call(layer, cast, x)
    layer.load_state_dict(cast)
    assert torch.equal(y, layer(x))


@KINDS
def test_parameters_follow_the_default_dtype(kind):
    first = parameters_to_vector(kind(4, 8).parameters())
    assert first.dtype == torch.float32
    try:
        for default, dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            torch.set_default_dtype(default)
            assert {p.dtype for p in kind(4, 8).parameters()} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)


@KINDS
def test_autocast_rounds_no_kernel_and_no_state(kind):
    layer = kind(8, 16)
    x = torch.randn(2, 70, 8)
    K = layer.kernel(70)
    y, state = layer.prefill(x, layer.initial_state(2))
    stepped, _ = layer.step(x[:, 0], state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.kernel(70), K)
        y_auto, state_auto = layer.prefill(x, layer.initial_state(2))
        assert torch.equal(y_auto, y) and torch.equal(state_auto.x, state.x)
        assert torch.equal(layer.step(x[:, 0], state)[0], stepped)
        assert rel_err(layer(x.bfloat16()), layer(x)) < 2e-2


# ---------------------------------------------------------------- recurrent mode


@KINDS
@pytest.mark.parametrize("sizes", [1, 300, [1, 299], [64, 64, 64, 64, 44], [7, 0, 130, 163]])
def test_any_chunking_is_the_convolution(kind, sizes):
    """Also its gradient."""
    layer = kind(4, 64)
    x = torch.randn(2, 300, 4)
    y, state = stream(layer, x, sizes)
    assert rel_err(y, layer(x)) < 1e-5
    assert state.x.shape == (2, 4, 64)  # N numbers per channel
    layer = layer.double()
    x = x.double()
    y, state = stream(layer, x, sizes)
    assert rel_err(y, layer(x)) < 1e-10
    assert rel_err(state.x, stream(layer, x, 1)[1].x) < 1e-12
    got = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert max(map(rel_err, got, want)) < 1e-10


@MIXERS
@pytest.mark.parametrize("mode", ["step", "prefill"])
def test_a_state_can_be_continued_twice_copied_and_loaded(mixer, mode):
    model = causal_model(mixer, vocab_size=11)
    tokens = torch.randint(0, 11, (2, 7))
    _, state = model.prefill(tokens, model.initial_state(2))
    twin = copy.deepcopy(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([s4.State]):
        loaded = torch.load(file, weights_only=True)
    x = tokens if mode == "prefill" else tokens[:, 0]
    run = getattr(model, mode)
    y, after = run(x, state)
    assert all(torch.equal(run(x, same)[0], y) for same in (state, twin, loaded))
    for old, copied, new in zip(state, twin, after, strict=True):
        assert torch.equal(old.x, copied.x) and not torch.equal(old.x, new.x)
        assert copied.x.requires_grad and copied.x.data_ptr() != old.x.data_ptr()


# ---------------------------------------------------------------- model


@HIPPO_MIXERS
@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_the_rate_scales_the_step(mixer, rate):
    model = causal_model(mixer, n_channels=2)
    shifted = copy.deepcopy(model)
    for block in shifted.blocks:
        block.mixer.log_dt.data += np.log(rate)
    x = randn(2, 30, 2)
    want = shifted(x)
    assert rel_err(model(x, rate=rate), want) < 1e-12
    y, state = model.prefill(x[:, :29], model.initial_state(2, rate=rate))
    last, _ = model.step(x[:, 29], state)
    assert rel_err(torch.cat([y, last[:, None]], 1), want) < 1e-11


def test_dropout_is_before_the_glu_and_in_training_only():
    """With all of it dropped, a block adds what the bias alone gives."""
    block = s4.S4Block(4, S4(4, 8), dropout=1.0)
    x = torch.randn(2, 5, 4)
    bias = nn.functional.glu(block.out.bias, -1)
    assert rel_err(block(x) - x, bias.expand(2, 5, 4)) < 1e-5
    assert rel_err(block.eval()(x) - x, bias.expand(2, 5, 4)) > 0.1
    assert s4.S4Block(4, S4(4)).dropout.p == S4Config().dropout == 0


@HIPPO_MIXERS
def test_param_groups(mixer):
    model = causal_model(mixer, vocab_size=7)
    first, second = [block.mixer for block in model.blocks]
    second.B = first.B  # shared: learns once
    groups = model.param_groups(0.01, 0.1)
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    assert rates == [(1e-3, 0.0), (0.01, 0.0), (0.01, 0.1)]
    assert model.param_groups(1e-4, 0.1)[0]["lr"] == 1e-4
    leaf = {p: name.split(".")[-1] for name, p in model.named_parameters()}
    names = [{leaf.pop(p) for p in group["params"]} for group in groups]
    P = {"P"} if mixer is s4_mixer else set()
    assert names[0] == {"log_dt", "log_decay", "frequency", "B"} | P
    assert names[1:] == [{"C", "D_skip", "bias", "weight"}, {"weight"}]
    assert all(p.ndim == 2 for p in groups[2]["params"])
    assert not leaf  # every parameter is in one group


def test_loss_trajectory():
    """Ten steps of gradient descent in float64 on a tiny model, as recorded."""
    losses = np.array(make_golden.s4_losses())
    assert rel_err(losses, np.array(GOLDEN["losses"])) < 1e-9


# ---------------------------------------------------------------- bad input


def hybrid_model():
    """S4, then Attention."""

    def mixer(config, i):
        return Attention(8, 2, causal=True) if i else s4_mixer(config, i)

    return causal_model(mixer, vocab_size=3)


def test_a_layer_leaves_as_it_is_what_its_kernel_returns():
    layer = S4(2, 4)
    K = layer.kernel(9).detach()
    layer.kernel = lambda L, rate: K  # of a subclass that keeps kernels
    x = torch.randn(1, 9, 2)
    assert torch.equal(layer(x), layer(x))


def read(x, **inputs):
    return S4Model(S4Config(**inputs))(x)


def prefilled(keep):
    model = S4Model(S4Config(vocab_size=3, causal=True))
    return model.prefill(torch.zeros(2, 4).long(), model.initial_state(2), keep)


def continued(run, *shape):
    layer = S4(4, 8)
    return getattr(layer, run)(torch.zeros(shape), layer.initial_state(5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S4(4, 7), "got 7"),
        (lambda: S4D(4, 0), "got 0"),
        (lambda: S4(4, dt_min=0.1, dt_max=0.01), "got 0.1 and 0.01"),
        (lambda: S4(4, 8)(torch.zeros(2, 5, 3)), r"\(2, 5, 3\)"),
        (lambda: S4(4, 8)(torch.zeros(2, 4)), r"\(2, 4\)"),
        (lambda: S4D(4, 8)(torch.zeros(2, 5, 4).long()), "int64"),
        (lambda: S4(4, 8)(torch.zeros(2, 5, 4), torch.ones(2, 4).bool()), r"\(2, 4\)"),
        (lambda: S4(4, 8, True).initial_state(1), "bidirectional=False"),
        (lambda: continued("step", 1, 4), "expected batch size 5 as in the state, got 1"),
        (lambda: continued("prefill", 1, 7, 4), "expected batch size 5 as in the state, got 1"),
        (lambda: continued("prefill", 3, 7, 4), "expected batch size 5 as in the state, got 3"),
        (lambda: S4(4, 8)(torch.zeros(2, 0, 4)), "at least 1, got 0"),
        (lambda: DLR(4, 8).kernel(5, 2.0), "rate 2.0"),
        (lambda: S4Model(S4Config()), "exactly one"),
        (lambda: S4Model(S4Config(vocab_size=3, n_channels=1)), "exactly one"),
        (lambda: S4Model(S4Config(n_channels=1))(torch.zeros(2, 5)), r"\(B, L, 1\), got \(2, 5\)"),
        (lambda: read(torch.ones(2, 5, 1).long(), n_channels=1), "float values .*int64"),
        (lambda: read(torch.zeros(2, 5), vocab_size=3), "integer tokens .* torch.float32"),
        (lambda: read(torch.zeros(5).long(), vocab_size=3), r"tokens \(B, L\) .*\(5,\)"),
        (lambda: prefilled(torch.ones(2, 4)), r"bool keep \(2, 4\), got \(2, 4\) torch.float32"),
        (lambda: prefilled(torch.ones(1, 4) > 0), r"bool keep \(2, 4\), got \(1, 4\)"),
        (lambda: causal_model(vocab_size=3).prefill(torch.zeros(1, 1).long(), []), "shorter"),
        (lambda: hybrid_model().generate(torch.zeros(2, 3).long(), 1, None, lengths=[3, 2]),
         "such as Attention, would remember padding"),
    ],
)  # fmt: skip
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- the convolution


def test_a_layer_in_channels_last_is_the_same():
    """As a model with convolutions makes of its 4-D parameters."""
    layer = S4(4, 8)
    x = randn(2, 9, 4).float()
    y = layer(x)
    assert torch.equal(layer.to(memory_format=torch.channels_last)(x), y)


@KINDS
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(kind):
    layer = kind(3)
    y = layer(torch.randn(0, 7, 3))
    assert y.shape == (0, 7, 3)
    y.sum().backward()
    assert not layer.D_skip.grad.any()


def test_a_kernel_longer_than_the_input_is_cut():
    u = torch.randn(1, 4, 2)
    K = torch.randn(2, 7)
    assert rel_err(s4.fft_conv(u, K), s4.fft_conv(u, K[:, :4])) < 1e-6


def test_fft_lengths_have_small_factors_and_little_padding():
    for n in range(1, 5000):
        length = s4.fft_length(n)
        assert length % 2 == 0 and n <= length <= 1.13 * n + 2
        assert 30**12 % length == 0
