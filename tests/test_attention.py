"""attention.py: golden values, exact properties, masks, merging, the KV cache, errors."""

import copy
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attention as at
from attention import Attention, Transformer, TransformerConfig, attention_slow, merge, rel_err
from sgconv import SGConv

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/attention.json").read_text())
CAUSAL_OR_NOT = pytest.mark.parametrize("causal", [False, True])


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


def q_k_v(H=2, G=2, Lq=6, Lk=7, width=8):
    return draw(2, H, Lq, 8), draw(2, G, Lk, 8, seed=1), draw(2, G, Lk, width, seed=2)


def model(mixer=None, ffn=None, **options):
    """A small float64 Transformer, the same one every time."""
    torch.manual_seed(0)
    options = {"d_model": 16, "n_heads": 4, "vocab_size": 11} | options
    return Transformer(TransformerConfig(**options), ffn, mixer).double()


def draw_tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- references and golden values


def test_two_keys_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4."""
    q = np.array([[1.0]])
    k = np.array([[0.0], [math.log(3)]])
    out, lse = at.attention_ref(q, k, np.array([[0.0, 4.0], [8.0, 0.0]]))
    assert np.allclose(out, [[6.0, 1.0]], rtol=1e-15)
    assert np.allclose(lse, [math.log(4)], rtol=1e-15)


def test_golden_is_what_the_code_says():
    """To rounding, not to the bit: the last digit of exp depends on the processor.

    losses: ten steps of a tiny Transformer in float64, every weight of it a closed form.
    """
    made = make_golden.attention()
    assert made.keys() == GOLDEN.keys() and made["input"] == GOLDEN["input"]
    for name, limit in (("full", 1e-13), ("causal", 1e-13), ("losses", 1e-9)):
        assert rel_err(np.array(made[name]), np.array(GOLDEN[name])) < limit
    assert made["losses"][-1] < made["losses"][0]


@pytest.mark.parametrize("D", [7, 8])
def test_sinusoids_are_those_of_the_paper(D):
    table = np.zeros((4, D))
    positions = [0, 1, 7, 1_000_000]
    for row, pos in enumerate(positions):
        for column in range(D):
            angle = pos / 10000 ** ((column - column % 2) / D)
            table[row, column] = math.cos(angle) if column % 2 else math.sin(angle)
    made = at.sinusoids(draw(4, D), torch.tensor(positions))
    assert rel_err(made[:3], table[:3]) < 1e-13
    assert rel_err(made, table) < 1e-9


def test_float32_at_length_4096():
    q, k, v = q_k_v(1, 1, 4096, 4096, 64)
    out = at.attention(q.float(), k.float(), v.float(), causal=True)
    for i in (0, 1, 2047, 4095):
        ref = attention_slow(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        assert rel_err(out[:, :, i : i + 1], ref) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(9, 5), (5, 9), (6, 6), (12, 8), (8, 12)])
@CAUSAL_OR_NOT
def test_all_forms_are_the_definition(lengths, causal, padded):
    """Also lengths that equal d_head, values 3 wide, shared heads, a hole in the padding mask."""
    Lq, Lk = lengths
    q, k, v = q_k_v(H=6, Lq=Lq, Lk=Lk, width=3)
    keep = keep_ref = None
    if padded:
        keep = torch.arange(Lk) < torch.tensor([[2], [Lk]])
        keep[1, 3] = False
        keep_ref = keep[:, None].numpy()
    repeated = [x.numpy().repeat(3, axis=1) for x in (k, v)]  # heads 0, 0, 0, 1, 1, 1
    ref = at.attention_ref(q.numpy(), *repeated, causal, keep_ref)[0]
    assert rel_err(at.attention(q, k, v, causal, keep), ref) < 1e-13
    assert rel_err(attention_slow(q, k, v, causal, keep), ref) < 1e-13
    assert rel_err(at.attention_online(q, k, v, causal, keep, tile=4)[0], ref) < 1e-13


# ---------------------------------------------------------------- the checks


def test_self_check_in_float32():
    bad = [row for row in at.self_check(torch.float32) if not row[1] <= row[2]]
    assert not bad


def test_self_check_sees_padding_that_is_not_hidden(monkeypatch):
    monkeypatch.setattr(at, "attention", lambda *a, **k: attention_slow(*a[:4], **k))
    assert any(not error <= limit for _, error, limit in at.self_check())


# ---------------------------------------------------------------- masks


def test_online_queries_that_see_nothing_get_zero():
    """out 0 and log-sum-exp -inf, and no trace in the other sequence."""
    keep = torch.tensor([[True] * 7, [False] * 7])
    q, k, v = q_k_v()
    out, lse = at.attention_online(q, k, v, keep=keep, tile=3)
    assert not out[1].any() and (lse[1] == -torch.inf).all()
    assert rel_err(out[:1], attention_slow(q[:1], k[:1], v[:1])) < 1e-13
    out, lse = at.attention_online(*q_k_v(Lk=0))
    assert not out.any() and (lse == -torch.inf).all()


@CAUSAL_OR_NOT
def test_gradients_are_those_of_the_formula_and_finite(causal):
    leaves = [x.requires_grad_() for x in q_k_v(Lk=6)]

    def out_and_gradients(form, keep):
        out = form(*leaves, causal, keep)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    keep = torch.arange(6) < torch.tensor([[4], [6]])
    found = [out_and_gradients(form, keep) for form in (at.attention, attention_slow)]
    for ours, expected in zip(*found, strict=True):
        assert rel_err(ours, expected) < 1e-12
    left = torch.arange(6).expand(2, 6) >= 3  # causal: the first queries see nothing
    assert all(x.isfinite().all() for x in out_and_gradients(at.attention, left))


# ---------------------------------------------------------------- merge


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("L, padded, avoided", [(64, 1, 1), (192, 1, 1), (128, 1, 0), (64, 0, 0)])
def test_a_kernel_whose_gradients_can_be_nan_is_avoided(L, padded, avoided, monkeypatch):
    chosen = []
    monkeypatch.setattr(at, "sdpa_kernel", lambda kernels: chosen.extend(kernels) or nullcontext())
    q = torch.randn(1, 2, L, 8).as_subclass(OnGPU)
    at.attention(q, q, q, keep=torch.ones(1, L, dtype=torch.bool) if padded else None)
    assert bool(chosen) == avoided and at.SDPBackend.CUDNN_ATTENTION not in chosen


def test_merge_takes_other_types_infinities_and_nan():
    out, out_block = torch.randn(2, 1, 1, 3, 4).bfloat16()
    lse, lse_block = torch.tensor([[[[-torch.inf, 0.0, 0.0]]], [[[-torch.inf, 0.0, -torch.inf]]]])
    out[0, 0, 0] = 0
    merged, total = merge(out, lse, out_block, lse_block)
    mean = (out.float() + out_block.float())[0, 0, 1] / 2
    assert rel_err(merged[0, 0], torch.stack([torch.zeros(4), mean, out[0, 0, 2].float()])) < 1e-6
    assert total[0, 0].tolist() == pytest.approx([-math.inf, math.log(2), 0])
    out_block[0, 0, 1, 0] = torch.inf
    assert merge(out, lse, out_block, lse_block)[0][0, 0, 1, 0] == torch.inf
    for which in (lse, lse_block):
        which[0, 0, 1] = torch.nan
        assert merge(out, lse, out_block, lse_block)[0][0, 0, 1].isnan().all()
        which[0, 0, 1] = 0.0


def test_rounding_of_many_blocks_stays_small():
    """The weights of the blocks carry no error of a log-sum-exp near ten."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 64, 32, generator=generator)
    k, v = torch.randn(2, 1, 1, 2**16, 32, generator=generator)
    out, lse = at.attention_online(q, k[:, :, :1024], v[:, :, :1024], tile=1024)
    for block in torch.arange(1024, 2**16).split(1024):
        other = at.attention_online(q, k[:, :, block], v[:, :, block], tile=1024)
        out, lse = merge(out, lse, *other)
    want = (q.double() @ k.double().mT / math.sqrt(32)).softmax(-1) @ v.double()
    assert (out - want).norm() / want.norm() < 1.2e-6


# ---------------------------------------------------------------- exact properties of the model


@torch.no_grad()
def test_the_layer_is_torchs_own_with_the_same_weights():
    mha = nn.MultiheadAttention(12, 3, batch_first=True).double()
    layer = Attention(12, 3).double()
    for p in mha.parameters():
        nn.init.normal_(p)
    theirs = [mha.in_proj_weight, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias]
    for ours, p in zip(layer.parameters(), theirs, strict=True):  # both stack q, k, v
        ours.copy_(p)
    x = draw(2, 9, 12)
    keep = torch.arange(9) < torch.tensor([[9], [5]])
    y = mha(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    assert rel_err(layer(x, keep), y) < 1e-13


@pytest.mark.parametrize("rope", [False, True])
def test_positions_place_the_tokens(rope):
    """Tokens in another order, with their positions, give the same features in that order."""
    net, tokens, order = model(rope=rope), draw_tokens(1, 12), torch.randperm(12)
    y = net(tokens)[:, order]
    assert rel_err(net(tokens[:, order], positions=order), y) < 1e-13
    if rope:  # only distances count
        assert rel_err(net(tokens[:, order], positions=order + 1000), y) < 1e-11


def test_factories_build_the_sublayers():
    class Still(nn.Module):
        def forward(self, x, keep=None):
            return torch.zeros_like(x)

    mixers = []
    ffns = []
    net = model(
        lambda config, i: mixers.append(i) or Still(),
        lambda d_model, d_ff: ffns.append((d_model, d_ff)) or Still(),
        rope=True,
    )
    assert mixers == [0, 1] and ffns == [(16, 64), (16, 64)]
    assert torch.equal(net(draw_tokens(1, 2)), net.norm(net.embed(draw_tokens(1, 2))))


def test_attend_is_called_in_every_block():
    calls = []

    def attend(q, k, v, causal, keep):
        calls.append((causal, keep))
        return attention_slow(q, k, v, causal, keep)

    config = TransformerConfig(d_model=16, n_layers=3, vocab_size=11, causal=True)
    keep = torch.ones(1, 5, dtype=torch.bool)
    Transformer(config, attend=attend)(draw_tokens(1, 5), keep)
    assert calls == [(True, keep)] * 3


# ---------------------------------------------------------------- recurrent mode


@pytest.mark.parametrize("options", [{}, {"rope": True, "n_kv_heads": 2}])
def test_steps_of_a_model(options):
    """prefill, a second prefill and steps == forward, with a cache that must grow."""
    net, tokens = model(causal=True, **options), draw_tokens(2, 800)
    y, state = net.prefill(tokens[:, :100], net.initial_state(2))
    z, state = net.prefill(tokens[:, 100:790], state)  # three chunks
    parts = [y, z]
    for t in range(790, 800):
        y, state = net.step(tokens[:, t], state)
        parts.append(y[:, None])
    assert rel_err(torch.cat(parts, 1), net(tokens)) < 1e-13
    caches, past = state
    assert past == caches[0].length == 800
    assert caches[0].k.shape[2] == caches[0].v.shape[2] == 2 * 790  # doubled at the first step
    assert net(tokens[:, :0]).shape == (2, 0, 16)


def test_a_cache_is_continued_once_and_refuses_another_batch():
    """Gradients are enabled, as they are by default: deepcopy works all the same."""
    net, tokens = model(causal=True), draw_tokens(2, 5)
    start = net.initial_state(2)
    with pytest.raises(ValueError, match=r"batch size; got \(2, .*\(1, "):
        net.prefill(tokens[:1], start)
    y, state = net.prefill(tokens[:, :3], start)  # the state is still valid
    assert rel_err(y, net(tokens[:, :3])) < 1e-13
    branch = copy.deepcopy(state)
    first, _ = net.step(tokens[:, 3], state)
    with pytest.raises(ValueError, match=r"cache of 3 tokens was already continued: .*deepcopy"):
        net.step(tokens[:, 4], state)
    assert torch.equal(net.step(tokens[:, 3], branch)[0], first)


def test_memory_of_prefill_is_linear_in_the_prompt(monkeypatch):
    """65,536 tokens after 8 in the cache; the kernel runs for one chunk in 16, the rest is 0."""
    torch.manual_seed(0)
    layer = Attention(2, 1, causal=True).double()
    x = draw(1, 65544, 2)
    _, state = layer.prefill(x[:, :8], layer.initial_state(1))
    kernel = F.scaled_dot_product_attention
    masks, computed = [], []

    def some_chunks(q, k, v, mask, **options):
        masks.append(mask.numel())
        if len(masks) % 16:
            return torch.zeros_like(q)
        computed.append(k.shape[2] - 1)  # the last query of this chunk
        return kernel(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", some_chunks)
    y, _ = layer.prefill(x[:, 8:], state)
    assert max(masks) <= 256 * 65544 and computed[-1] == 65543
    q, k, v = layer.project(x, torch.arange(65544))
    for t in computed:
        out = attention_slow(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        assert rel_err(y[:, t - 8], layer.out(out.flatten(1))) < 1e-11


# ---------------------------------------------------------------- errors


def masked(keep):
    return at.attention(*q_k_v(), True, keep)


def placed(*shape, rope=False):
    return model(rope=rope)(draw_tokens(1, 4), positions=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(130, 4), "130.*4"),
        (lambda: Attention(16, 4, n_kv_heads=3), "4.*3"),
        (lambda: Attention(16, 4)(draw(2, 4, 5, 16)), r"x \(B, L, 16\); got \(2, 4, 5, 16\)"),
        (lambda: Attention(16, 4)(draw(2, 5, 8)), r"x \(B, L, 16\); got \(2, 5, 8\)"),
        (lambda: Attention(16, 4)(draw_tokens(2, 5, 16)), r"x \(B, L, 16\); got .* torch.int64"),
        (lambda: Attention(16, 4).initial_state(1), "causal"),
        (lambda: Attention(12, 4, rope=True), "even.*12, 4"),
        (lambda: model(vocab_size=None), "vocab_size=None, n_channels=None"),
        (lambda: model(n_channels=2), "vocab_size=11, n_channels=2"),
        (lambda: model(n_layers=0), "sizes of at least 1.*n_layers=0"),
        (lambda: model(d_ff=0), "sizes of at least 1.*d_ff=0"),
        (lambda: model()(draw(2, 7)), r"integer tokens x \(B, L\); got \(2, 7\) torch.float64"),
        (lambda: model(vocab_size=None, n_channels=1)(draw(2, 7)), r"values x .* got \(2, 7\)"),
        (lambda: model(vocab_size=None, n_channels=1)(draw_tokens(2, 7, 1)), "float values x"),
        (lambda: at.attention(*[x[0] for x in q_k_v()]), r"q \(B, H, Lq, E\)"),
        (lambda: masked(torch.ones(1, 7) > 0), r"bool keep \(B, Lk\); .* \(1, 7\)"),
        (lambda: masked(torch.ones(2, 7)), r"bool keep \(B, Lk\); .* torch.float32"),
        (lambda: placed(1), r"positions \(L,\); .* \(1,\)"),
        (lambda: placed(1, rope=True), r"positions \(L,\); .* \(1,\)"),
        (lambda: at.rotate(torch.ones(4, 8, dtype=torch.long)), "float x .* torch.int64"),
        (lambda: model(lambda c, i: SGConv(16, 32, 4)).initial_state(2), "SGConv has no recurrent"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


@pytest.mark.parametrize("quantized", [False, True])
def test_generation_with_an_adapter_around_each_projection(quantized):
    layer = Attention(8, 2, causal=True)
    for name in ("qkv", "out"):
        linear = layer._modules.pop(name)
        adapter = nn.Sequential(linear)  # without attributes of a Linear
        if quantized:  # also without parameters
            adapter = partial(F.linear, weight=linear.weight.data, bias=linear.bias.data)
        setattr(layer, name, adapter)
    x = torch.randn(2, 5, 8)
    _, state = layer.prefill(x[:, :4], layer.initial_state(2))
    y, _ = layer.step(x[:, 4], state)
    assert rel_err(y, layer(x)[:, -1]) < 1e-5
