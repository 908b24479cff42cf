"""s4.py: golden values, kernels, layers, streaming, optimiser groups, planted faults."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import s4
import sgconv
from s4 import DLR, S4, S4D, S4Config, S4Model, s4_mixer, s4d_inv, s4d_legs, s4d_lin, s4d_mixer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/s4.json").read_text())
SLOW = pytest.mark.slow
KINDS = pytest.mark.parametrize("kind", [S4, S4D, DLR])
TIMED = pytest.mark.parametrize("kind", [S4, S4D])
INITS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}


def rel_err(a, b):
    a, b = (v.detach().double().numpy() if torch.is_tensor(v) else np.array(v) for v in (a, b))
    assert a.shape == b.shape and abs(b).max() > 0
    return float(abs(a - b).max() / abs(b).max())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_channel(N, C, dt, dtype=torch.complex128):
    """The arguments of the fast kernels for HiPPO-LegS with C real, in the basis of the states."""
    Lam, P, B, V = s4.nplr_legs(N)
    Lam, P, B = (torch.from_numpy(v)[None] for v in (Lam, P, B))
    C = torch.from_numpy((C @ V)[None, None]).to(dtype)
    dt = torch.tensor([[dt]], dtype=torch.float64)
    return s4.discretize(Lam, P, B, C, dt), Lam, P, B, dt


def random_systems(D, N, n=1):
    """Lam, P, B, C, dt of D random stable systems, with gradients."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.complex128)  # noqa: E731
    Lam = torch.complex(-torch.rand(D, N // 2).double() - 0.1, 3 * torch.randn(D, N // 2).double())
    dt = 0.05 + 0.2 * torch.rand(D, 1, dtype=torch.float64)
    parts = (Lam, draw(D, N // 2), draw(D, N // 2), draw(n, D, N // 2), dt)
    return tuple(part.requires_grad_() for part in parts)


def two_level(Lam, P, B, C, dt, L):
    return s4.two_level_kernel(s4.discretize(Lam, P, B, C, dt), L)


def cauchy(Lam, P, B, C, dt, L):
    return s4.cauchy_kernel(s4.discretize(Lam, P, B, C, dt), Lam, P, B, dt, L)


def diagonal(Lam, P, B, C, dt, L):
    return s4.diagonal_kernel(Lam, s4.hold(Lam, B, C, dt).B_bar, C, dt, L)


# ---------------------------------------------------------------- HiPPO


def test_hippo_matrix_by_hand():
    A, B = s4.hippo_legs(4)
    r3, r5, r7 = 3**0.5, 5**0.5, 7**0.5
    want = [[-1, 0, 0, 0], [-r3, -2, 0, 0], [-r5, -r3 * r5, -3, 0], [-r7, -r3 * r7, -r5 * r7, -4]]
    assert rel_err(A, np.array(want)) < 1e-14
    assert rel_err(B, np.array([1, r3, r5, r7])) < 1e-14


FREQUENCIES = {
    4: [0.556501115084, 4.603293007067],
    8: [0.427488712286, 1.957794150903, 5.354208515031, 19.857410370971],
    16: [0.352017915889, 80.9660809245133],
    64: [0.263856931111, 0.905859410025, 1.702968166581, 2.625654767152, 1303.2738429811975],
}


@pytest.mark.parametrize("N", FREQUENCIES)
def test_normal_form(N):
    A, B = s4.hippo_legs(N)
    Lam, P, B_half, V = s4.nplr_legs(N)
    assert (B_half.real > 0).all() and abs(B_half.imag).max() < 1e-12  # no solver's own phases
    want = np.array(FREQUENCIES[N])
    got = np.sort(Lam.imag)
    got = got if N <= 8 else np.concatenate([got[: len(want) - 1], got[-1:]])
    assert np.allclose(got, want, rtol=1e-9, atol=0)
    full = np.concatenate([V, V.conj()], 1)  # (N, N)
    assert rel_err((full.conj().T @ full).real, np.eye(N)) < 1e-12
    Lam, P = s4.both(Lam), s4.both(P)
    back = full @ (np.diag(Lam) - np.outer(P, P.conj())) @ full.conj().T
    assert np.abs(back.imag).max() < 1e-10
    assert rel_err(back.real, A) < 1e-11
    assert rel_err((full @ s4.both(B_half)).real, B) < 1e-12


@pytest.mark.parametrize("t", [0.01, 0.3, 2.0])
def test_memory_is_made_of_legendre_polynomials(t):
    """(e^{tA} B)_n = e^{-t} sqrt(2n+1) P_n(2 e^{-t} - 1): knows nothing of normal forms."""
    A, B = s4.hippo_legs(16)
    basis = np.polynomial.legendre.legvander(2 * np.exp(-t) - 1, 15)  # (16,)
    got = torch.matrix_exp(t * torch.from_numpy(A)) @ torch.from_numpy(B)
    assert rel_err(got, np.exp(-t) * np.sqrt(2 * np.arange(16) + 1) * basis.ravel()) < 1e-11


@pytest.mark.parametrize("dt", [1e-4, 1e-2, 1.0, 10.0])
def test_no_system_grows(dt):
    """||A_bar|| <= 1 for LegS and for any tied P with Re Lam < 0."""
    hippo = one_channel(64, np.ones(64), dt)[0]
    Lam, P, B, C, _ = random_systems(5, 8)
    step = torch.full((5, 1), dt, dtype=torch.float64)
    for system in (hippo, s4.discretize(Lam, P, B, C, step)):
        E = s4.real_form(*system)[0]
        norms = torch.linalg.matrix_norm(torch.eye(E.shape[-1], dtype=E.dtype) + E, 2)
        assert 0.1 < norms.min() and norms.max() <= 1 + 1e-12


# ---------------------------------------------------------------- kernels


def test_golden_kernels_of_others():
    """First values of two kernels, computed elsewhere."""
    bilinear = [0.547052197739, 0.223439367527, 0.063993929101]
    bilinear += [-0.004599418612, -0.025621550246, -0.023929160707]
    assert (
        rel_err(s4.two_level_kernel(one_channel(4, np.ones(4), 0.1)[0], 6)[0, 0], bilinear) < 1e-11
    )
    hold = [0.387011208635, 0.350341187798, 0.300984952682]
    hold += [0.244020162256, 0.184808923753, 0.128456683586]
    Lam, B = (torch.from_numpy(v)[None] for v in s4d_lin(4))
    dt = torch.tensor([[0.1]], dtype=torch.float64)
    assert rel_err(diagonal(Lam, None, B, torch.ones_like(B)[None], dt, 6)[0, 0], hold) < 1e-11


def test_golden_kernels():
    C = np.cos(np.arange(8))
    system, Lam, P, B, dt = one_channel(8, C, 0.05)
    for K in (s4.two_level_kernel(system, 24), s4.cauchy_kernel(system, Lam, P, B, dt, 24)):
        assert rel_err(K[0, 0], GOLDEN["kernel"]) < 1e-11
    for name, init in INITS.items():
        Lam, B = (torch.from_numpy(v)[None] for v in init(8))
        C_half = torch.from_numpy(C[None, None, :4]).to(torch.complex128)
        K = diagonal(Lam, None, B, C_half, dt, 24)
        assert rel_err(K[0, 0], GOLDEN[f"s4d_{name}"]) < 1e-11


@pytest.mark.parametrize("L", [1, 2, 3, 5, 255, 256, 1000, 1024])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.complex128, 1e-11), (torch.complex64, 5e-6)])
def test_kernels_equal_powers(L, dtype, limit):
    C, dt = np.cos(np.arange(16)), 0.02
    want = s4.kernel_ref(*s4.discretize_ref(*s4.hippo_legs(16), dt), C, L)
    system, Lam, P, B, dt = one_channel(16, C, dt, dtype)
    assert rel_err(s4.two_level_kernel(system, L)[0, 0], want) < limit
    assert rel_err(s4.cauchy_kernel(system, Lam, P, B, dt, L)[0, 0], want) < limit


def recurrence(layer, L):
    """The kernel of a float64 layer one step at a time: (D, L)."""
    E, x, C = s4.real_form(*layer.system())
    out = []
    for _ in range(L):
        out.append((C @ x)[:, 0, 0])
        x = torch.baddbmm(x, E, x)
        x = torch.where(x.abs() < 1e-200, 0.0, x)  # numbers below 1e-308 are slow
    return torch.stack(out, -1)


@torch.no_grad()
@pytest.mark.parametrize(
    "dt", [1e-4, 1e-1, pytest.param(1e-3, marks=SLOW), pytest.param(1e-2, marks=SLOW)]
)
def test_float32_at_length_16384(dt, L=16384):
    """Relative L2 error; the form of the paper loses three digits here, A_bar without - I two."""
    for kind, limit in ((S4, 6e-6), (S4D, 6e-6)):
        layer = kind(2, 64, dt_min=dt, dt_max=dt)
        exact = recurrence(copy.deepcopy(layer).double(), L)
        error = lambda K: ((K - exact).norm(dim=-1) / exact.norm(dim=-1)).max()  # noqa: B023, E731
        assert error(layer.kernel(L)) < limit
        assert error(copy.deepcopy(layer).double().kernel(L)) < 1e-11
        if kind is S4:
            Lam, B, C, step = layer.continuous()
            P = torch.view_as_complex(layer.P.double())
            assert error(cauchy(Lam, P, B, C, step, L)[0]) < 2e-5


@pytest.mark.parametrize("L", [9, 10])
@pytest.mark.parametrize("kernel", [two_level, cauchy, diagonal])
def test_gradcheck_kernels(kernel, L):
    parts = random_systems(2, 6, n=2)
    if kernel is diagonal:
        parts = (parts[0], None, *parts[2:])
    assert gradcheck(lambda *p: kernel(*p, L), parts)


@pytest.mark.parametrize("L", [9, 10])
def test_gradcheck_convolution(L):
    u = torch.randn(2, L, 3, dtype=torch.float64, requires_grad=True)
    for shape in ((3, L), (2, 3, L)):
        assert gradcheck(s4.fft_conv, (u, torch.randn(*shape).double().requires_grad_()))


def test_kernel_does_not_depend_on_the_basis():
    """Phases of the eigenvectors, the choice within a pair, the order, a rotation of the states."""
    Lam, P, B, C, dt = (part.detach() for part in random_systems(3, 8))
    phase = torch.polar(torch.ones(4).double(), torch.arange(4).double())
    swap = torch.tensor([True, False, True, False])
    swapped = [torch.where(swap, v.conj(), v) for v in (Lam, P, B, C)]
    for kernel in (two_level, cauchy):
        K = kernel(Lam, P, B, C, dt, 50)
        assert rel_err(kernel(Lam, phase * P, phase * B, C / phase, dt, 50), K) < 1e-12
        assert rel_err(kernel(*swapped, dt, 50), K) < 1e-12
        assert rel_err(kernel(*(v.flip(-1) for v in (Lam, P, B, C)), dt, 50), K) < 1e-12
    Q = np.linalg.qr(np.random.RandomState(0).randn(64, 64))[0]
    (A, B), C = s4.hippo_legs(64), np.cos(np.arange(64))
    rotated = s4.kernel_ref(*s4.discretize_ref(Q @ A @ Q.T, Q @ B, 0.01), Q @ C, 50)
    assert rel_err(s4.two_level_kernel(one_channel(64, C, 0.01)[0], 50)[0, 0], rotated) < 1e-11


def test_gradient_of_a_layer_reaches_every_parameter():
    for kind in (S4, S4D, DLR):
        layer = kind(3, 8, bidirectional=True).double()
        layer(torch.randn(2, 20, 3, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())


# ---------------------------------------------------------------- layers


@KINDS
def test_prefix_and_untouched_parameters(kind):
    layer = kind(3, 8).double()
    before = copy.deepcopy(layer.state_dict())
    long, short = layer.kernel(100), layer.kernel(37)
    assert rel_err(long[:, :37], short) < 1e-13
    layer(torch.randn(1, 500, 3).double()), layer(torch.randn(1, 5, 3).double())
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    twin = kind(3, 8).double()
    twin.load_state_dict(after)
    assert torch.equal(twin.kernel(61), layer.kernel(61))
    assert torch.equal(copy.deepcopy(layer).kernel(61), layer.kernel(61))


@KINDS
def test_lags_of_a_bidirectional_layer(kind):
    """An impulse at position 4: row 0 answers from 4 on, row 1 at 3, 2, 1, 0."""
    layer = kind(2, 8, bidirectional=True).double()
    x = torch.zeros(1, 9, 2, dtype=torch.float64)
    x[0, 4] = 1
    K = layer.kernel(9)
    want = torch.cat([K[1, :, :4].flip(-1), K[0, :, :5]], -1)  # (D, 9)
    want[:, 4] += layer.D_skip
    assert rel_err(layer(x)[0].T, want) < 1e-12


@KINDS
def test_causality(kind):
    x = torch.randn(1, 30, 3, dtype=torch.float64, requires_grad=True)
    for bidirectional in (False, True):
        (grad,) = torch.autograd.grad(kind(3, 8, bidirectional).double()(x)[0, 17].sum(), x)
        future = grad[0, 18:].abs().max() / grad.abs().max()
        assert (future > 1e-6) == bidirectional and (bidirectional or future < 1e-12)


@KINDS
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [[1] * 300, [300], [1, 299], [64, 64, 64, 64, 44], [7, 130, 163]])
def test_any_chunking_is_the_convolution(kind, dtype, limit, sizes):
    layer = kind(4, 64).to(dtype)
    x = torch.randn(2, 300, 4, dtype=dtype)
    y, state = s4.stream(layer, x, sizes)
    assert rel_err(y, layer(x)) < limit
    assert state.x.shape == (2, 4, 64)  # N numbers a channel


@KINDS
def test_step_of_a_large_batch(kind):
    """From a batch of 8 on another way of the same sum."""
    layer = kind(4, 16).double()
    x = torch.randn(9, 30, 4, dtype=torch.float64)
    assert rel_err(s4.stream(layer, x, 1)[0], layer(x)) < 1e-12


@KINDS
def test_gradients_pass_through_the_recurrent_mode(kind):
    layer = kind(3, 8).double()
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    y, _ = s4.stream(layer, x, [13] + [1] * 7)
    got = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    assert max(map(rel_err, got, want)) < 1e-10


@TIMED
@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_rate_keeps_the_integral(kind, rate):
    layer = kind(4, 16, dt_min=0.05, dt_max=0.1).double()
    assert rel_err(layer.kernel(2000, rate).sum(-1), layer.kernel(2000).sum(-1)) < 1e-6
    shifted = copy.deepcopy(layer)
    shifted.log_dt.data += np.log(rate)
    assert rel_err(layer.kernel(50, rate), shifted.kernel(50)) < 1e-12
    x = torch.randn(1, 50, 4, dtype=torch.float64)
    y, _ = layer.prefill(x, layer.initial_state(1, rate))
    assert rel_err(layer(x, rate=rate), shifted(x)) < 1e-12
    assert rel_err(y, shifted(x)) < 1e-10


def test_a_plain_recurrence_is_what_its_name_says():
    """x_l = a x_{l-1} + u_l with a = exp(Lam), y_l = 2 Re(C x_l), as a loop."""
    layer = DLR(3, 8).double()
    a = np.exp(-np.exp(layer.log_decay.detach().numpy()) + 1j * layer.frequency.detach().numpy())
    C, u = layer.C[0].detach().numpy() @ np.array([1, 1j]), np.random.RandomState(0).randn(50, 3)
    x, y = np.zeros((3, 4), complex), []
    for u_l in u:
        x = a * x + u_l[:, None]
        y.append(2 * (C * x).sum(-1).real + layer.D_skip.detach().numpy() * u_l)
    assert rel_err(layer(torch.from_numpy(u)[None])[0], np.array(y)) < 1e-12
    assert (abs(a) < 1).all() and (0.9 < abs(a)).all()
    with pytest.raises(ValueError, match=r"rate 2.0: expected 1"):
        layer.kernel(5, 2.0)


def test_half_rate_gives_half_the_samples():
    """A slow input at twice the step: the output is that at every second sample."""
    layer = S4D(2, 2, dt_min=1e-3, dt_max=1e-3, init=lambda N: (np.array([-2 + 1j]), np.ones(1)))
    layer = layer.double()
    layer.D_skip.data.zero_()
    x = torch.sin(torch.arange(4000).double() * 2e-3)[None, :, None].expand(1, -1, 2)
    assert rel_err(layer(x[:, 1::2], rate=2.0), layer(x)[:, 1::2]) < 2e-3


@KINDS
def test_bfloat16(kind):
    layer = kind(8, 16)
    x = torch.randn(2, 40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.kernel(40), layer.kernel(40).float())
        K = layer.kernel(40)
        y = layer(x.bfloat16())
        y_prefill, _ = layer.prefill(x.bfloat16(), layer.initial_state(2))
    assert K.dtype == torch.float32 and torch.equal(K, layer.kernel(40))
    assert y.dtype == torch.bfloat16
    assert rel_err(y, layer(x)) < 2e-2
    assert rel_err(y_prefill, layer(x)) < 2e-2
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16 and half.kernel(9).dtype == torch.float32


@SLOW
@pytest.mark.parametrize(
    ("mixer", "backend"),
    [(s4_mixer, "aot_eager"), (s4d_mixer, "aot_eager"), (s4_mixer, "inductor")],
)
@pytest.mark.filterwarnings("ignore")
def test_compile(mixer, backend):
    model = S4Model(S4Config(d_model=4, n_layers=1, d_state=8, vocab_size=5), mixer)
    tokens = torch.randint(0, 5, (2, 30))
    torch.compiler.reset()
    compiled, weight = torch.compile(model, backend=backend), torch.randn(2, 30, 4)
    assert rel_err(compiled(tokens), model(tokens)) < 1e-5
    (compiled(tokens) * weight).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(tokens) * weight).sum().backward()
    assert max(rel_err(a, p.grad) for a, p in zip(got, model.parameters(), strict=True)) < 1e-4


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("mixer", [s4_mixer, s4d_mixer])
@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_mate_changes_nothing(mixer, causal):
    config = S4Config(d_model=6, d_state=8, n_channels=3, causal=causal)
    model = S4Model(config, mixer).double()
    x = torch.randn(3, 40, 3, dtype=torch.float64)
    lengths = torch.tensor([40, 23, 1])
    keep = torch.arange(40) < lengths[:, None]
    y = model(x, keep)
    noisy = model(torch.where(keep[..., None], x, torch.nan), keep)
    for b, n in enumerate(lengths):
        assert rel_err(y[b, :n], model(x[b : b + 1, :n])[0]) < 1e-11
        assert rel_err(noisy[b, :n], y[b, :n]) < 1e-11


@pytest.mark.parametrize("mixer", [s4_mixer, s4d_mixer])
def test_generation_is_the_argmax_of_the_whole(mixer):
    model = S4Model(S4Config(d_model=8, d_state=8, vocab_size=7, causal=True), mixer).double()
    head = nn.Linear(8, 7).double()
    tokens = torch.randint(0, 7, (3, 10))
    got = model.generate(tokens, 12, head)
    for _ in range(12):
        best = head(model(tokens))[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], 1)
    assert torch.equal(got, tokens[:, 10:]) and len(got.unique()) > 1
    assert model.generate(tokens, 0, head).shape == (3, 0)
    warm = model.generate(tokens, 40, head, temperature=5.0)
    assert warm.shape == (3, 40) and len(warm.unique()) > 4


def test_values_stream_too():
    model = S4Model(S4Config(d_model=8, d_state=8, n_channels=2, causal=True)).double()
    x = torch.randn(2, 30, 2, dtype=torch.float64)
    assert rel_err(s4.stream(model, x, [20, 9, 1])[0], model(x)) < 1e-10


@pytest.mark.parametrize("mixer", [s4_mixer, s4d_mixer])
def test_param_groups(mixer):
    model = S4Model(S4Config(d_model=8, d_state=8, vocab_size=7), mixer)
    slow, plain, decayed = model.param_groups(0.01, 0.1)
    groups = [{id(p) for p in g["params"]} for g in (slow, plain, decayed)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(list(model.parameters()))
    assert (slow["lr"], slow["weight_decay"]) == (1e-3, 0.0)
    assert (plain["lr"], plain["weight_decay"]) == (0.01, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (0.01, 0.1)
    assert model.param_groups(1e-4, 0.1)[0]["lr"] == 1e-4
    names = {id(p): name.split(".")[-1] for name, p in model.named_parameters()}
    names = [{names[i] for i in g} for g in groups]
    P = {"P"} if mixer is s4_mixer else set()
    assert names[0] == {"log_dt", "log_decay", "frequency", "B"} | P
    assert names[1:] == [{"C", "D_skip", "bias", "weight"}, {"weight"}]
    assert all(p.ndim == 2 for p in decayed["params"])
    torch.optim.AdamW(model.param_groups(0.01, 0.1))


def test_loss_trajectory():
    """Ten steps of gradient descent in float64 on a tiny model, as recorded."""
    sys.path.insert(0, str(ROOT / "tests"))
    from make_golden import s4_losses

    assert rel_err(s4_losses(), GOLDEN["losses"]) < 1e-9


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S4(4, 7), "got 7"),
        (lambda: S4D(4, 0), "got 0"),
        (lambda: S4(4, dt_min=0.1, dt_max=0.01), "got 0.1 and 0.01"),
        (lambda: S4(4, dt_max=float("nan")), "nan"),
        (lambda: S4(4, 8)(torch.zeros(2, 5, 3)), r"\(2, 5, 3\)"),
        (lambda: S4(4, 8)(torch.zeros(2, 4)), r"\(2, 4\)"),
        (lambda: S4(4, 8)(torch.zeros(2, 0, 4)), r"\(2, 0, 4\)"),
        (lambda: S4(4, 8)(torch.zeros(2, 5, 4), torch.ones(2, 4).bool()), r"\(2, 4\)"),
        (lambda: S4(4, 8)(torch.zeros(2, 5, 4), torch.ones(2, 5)), "float32"),
        (lambda: S4(4, 8, True).initial_state(1), "bidirectional=False"),
        (lambda: S4(4, 8).kernel(9, rate=0.0), "positive and finite"),
        (lambda: S4(4, 8).step(torch.zeros(3, 4), S4(4, 8).initial_state(2)), r"\(3, 4\)"),
        (lambda: S4Model(S4Config()), "None and None"),
        (lambda: S4Model(S4Config(vocab_size=3, n_channels=2)), "3 and 2"),
        (lambda: S4Model(S4Config(vocab_size=3)).initial_state(1), "bidirectional=False"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_dt_that_is_not_finite():
    layer = S4(4, 8)
    layer.log_dt.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"\[nan\] in 1 channels"):
        layer.kernel(5)


# ---------------------------------------------------------------- checks and planted faults


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_self_check(dtype):
    for name, error, limit in s4.self_check(dtype):
        assert error <= limit, f"{name}: {error} > {limit}"


def first(value, change):
    """The change to what a function returns: to a tensor, or to the first of several."""
    return change(value) if torch.is_tensor(value) else (change(value[0]), *value[1:])


FAULTS = {
    "nearly zero": lambda f: lambda *a: first(f(*a), lambda y: 1e-9 * y),
    "1 %": lambda f: lambda *a: first(f(*a), lambda y: 1.01 * y),
    "one step late": lambda f: lambda *a: first(f(*a), lambda y: y.roll(1, -1)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "name", ["two_level_kernel", "cauchy_kernel", "diagonal_kernel", "S4.step", "S4.prefill"]
)
def test_a_fault_is_found(monkeypatch, name, fault):
    owner = s4.S4 if name.startswith("S4.") else s4
    name = name.split(".")[-1]
    monkeypatch.setattr(owner, name, FAULTS[fault](getattr(owner, name)))
    torch.manual_seed(0)
    rows = list(s4.check_kernels(torch.float64, "cpu", 1e-10))
    rows += list(s4.check_layers(torch.float64, "cpu", 1e-10))
    assert any(not error <= limit for _, error, limit in rows)


@pytest.mark.parametrize("fault", ["nearly zero", "1 %"])
def test_a_fault_of_the_convolution_is_found(monkeypatch, fault):
    monkeypatch.setattr(s4, "fft_conv", FAULTS[fault](s4.fft_conv))
    rows = list(s4.check_layers(torch.float64, "cpu", 1e-10))
    assert any(not error <= limit for _, error, limit in rows)


def test_a_dropped_skip_and_a_dropped_mask_are_found(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(S4, "skip_at_zero", lambda self: 0.0)
        assert any(e > limit for _, e, limit in s4.check_layers(torch.float64, "cpu", 1e-10))
    forward = S4.forward
    monkeypatch.setattr(S4, "forward", lambda self, x, keep=None: forward(self, x))
    assert any(e > limit for _, e, limit in s4.check_model(torch.float64, "cpu", 1e-10))


@SLOW
def test_command_line():
    run = subprocess.run(
        [sys.executable, "s4.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAILED" not in run.stdout and "MISSED" not in run.stdout and "two-level" in run.stdout


# ------------------------------------------------------------------------- what users do to layers

ALL = pytest.mark.parametrize("kind", [S4, S4D, DLR, lambda D: sgconv.SGConv(D, 16, 4)],
                              ids=["S4", "S4D", "DLR", "SGConv"])  # fmt: skip


@ALL
def test_a_second_derivative_is_refused_not_wrong(kind):
    layer, x = kind(2), torch.randn(1, 6, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@ALL
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(kind):
    layer = kind(3)
    y = layer(torch.randn(0, 7, 3))
    assert y.shape == (0, 7, 3)
    y.sum().backward()
    assert not layer.D_skip.grad.any()


@ALL
def test_padding_may_hold_anything(kind):
    layer, x, keep = kind(3), torch.randn(2, 9, 3), torch.arange(9).expand(2, 9) < 5
    y = layer(x, keep)[:, :5]
    x[:, 5:] = torch.nan
    assert torch.equal(layer(x, keep)[:, :5], y)


@ALL
def test_integers_are_refused_and_half_precision_is_not(kind):
    layer = kind(3)
    with pytest.raises(ValueError, match="int64"):
        layer(torch.randint(-5, 5, (1, 6, 3)))
    x = torch.randn(2, 9, 3)
    y, half = layer(x), layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and rel_err(half.float(), y) < 0.05


@KINDS
def test_a_state_of_another_batch_is_refused(kind):
    layer = kind(3, 4)
    with pytest.raises(ValueError, match="batch 1"):
        layer.prefill(torch.randn(4, 5, 3), layer.initial_state(1))


@KINDS
def test_half_precision_streams_as_it_convolves(kind):
    layer, x = kind(3, 8).bfloat16(), torch.randn(2, 70, 3).bfloat16()
    y = layer(x)
    assert rel_err(layer.prefill(x, layer.initial_state(2))[0].float(), y.float()) < 2e-3


def test_a_layer_is_made_on_one_device():
    with torch.device("meta"):
        assert all(p.is_meta for p in S4(3, 4).parameters())


@pytest.mark.parametrize("call, message", [
    (lambda: S4(0, 4), "d_model >= 1, got 0"),
    (lambda: S4(3, 4).kernel(0), "length 0"),
    (lambda: S4D(1, 4, init=lambda N: (np.array([0.5 + 1j, -1]), np.ones(2, complex))), "Re Lam"),
    (lambda: S4D(1, 4, init=lambda N: (np.array([-1 + 0j]), np.ones(2, complex))), "N/2"),
    (lambda: sgconv.SGConv(3, 16, 4, init=torch.zeros), "norm 0"),
])  # fmt: skip
def test_layers_that_could_not_work_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_longer_than_the_input_is_cut():
    u, K = torch.randn(1, 4, 2), torch.randn(2, 7)
    assert rel_err(s4.fft_conv(u, K), s4.fft_conv(u, K[:, :4])) < 1e-6


@pytest.mark.parametrize("file", [s4, sgconv])
def test_any_mixer_with_a_kernel_has_the_rates_of_one(file):
    """Shared kernels once, mixers of another file too: no decay, at most 1e-3."""
    config, model = {s4: (S4Config, S4Model), sgconv: (sgconv.SGConvConfig, sgconv.SGConvModel)}[
        file
    ]
    config = config(d_model=4, vocab_size=5)
    for make in (lambda c, i: S4(4, 4), lambda c, i: sgconv.SGConv(4, 16, 4)):
        net = model(config, make)
        first, second = (block.mixer for block in net.blocks)
        name = "w" if hasattr(first, "w") else "P"
        setattr(second, name, getattr(first, name))
        groups = net.param_groups(1e-2, 0.1)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in net.parameters())
        slow = {id(p) for group in groups if group["lr"] == 1e-3 for p in group["params"]}
        assert id(getattr(first, name)) in slow
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert not decayed & {id(p) for p in first.parameters()}
