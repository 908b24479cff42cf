"""attention.py: golden values, exact properties, traps of the fused kernels, the command line."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_golden
import numpy as np
import pytest
import torch
from torch import nn

import attention
from attention import (
    Attention,
    Transformer,
    TransformerConfig,
    attention_block,
    attention_block_grad,
    attention_online,
    attention_ref,
    attention_slow,
    from_multihead,
    hide,
    merge,
    rel_err,
    self_check,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/attention.json").read_text())


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).to(dtype)


def model(**options):
    """A small float64 Transformer, the same one every time."""
    torch.manual_seed(0)
    options = {"d_model": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 11} | options
    return Transformer(TransformerConfig(**options)).double()


# ---------------------------------------------------------------- references and goldens


def test_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4; and a uniform mean when all scores are equal."""
    q, k = np.array([[1.0]]), np.array([[0.0], [math.log(3)]])
    v = np.array([[0.0, 4.0], [8.0, 0.0]])
    out, lse = attention_ref(q, k, v)
    assert np.allclose(out, [[6.0, 1.0]], rtol=1e-15)
    assert np.allclose(lse, [math.log(4)], rtol=1e-15)
    ones = torch.ones(1, 1, 4, 2, dtype=torch.float64)
    v = torch.arange(4.0, dtype=torch.float64).view(1, 1, 4, 1).expand(1, 1, 4, 2)
    causal = attention.attention(ones, ones, v, causal=True)[0, 0, :, 0]
    assert rel_err(causal, torch.tensor([0, 0.5, 1, 1.5])) < 1e-15


def test_golden_is_what_the_references_say():
    """To rounding, not to the bit: the last digit of exp depends on the processor."""
    made = make_golden.attention()
    assert made.keys() == GOLDEN.keys() and made["input"] == GOLDEN["input"]
    for name in GOLDEN.keys() - {"input", "losses"}:
        assert rel_err(np.array(made[name]), np.array(GOLDEN[name])) < 1e-13, name


@pytest.mark.parametrize("causal", [False, True])
def test_golden_attention(causal):
    n = np.arange(60.0)
    q, k, v = (torch.from_numpy(np.sin(a * n**1.1 + a)).view(1, 1, 12, 5) for a in (0.9, 1.3, 1.7))
    golden = torch.tensor(GOLDEN["causal" if causal else "full"], dtype=torch.float64)
    for fast in (attention.attention, attention_slow):
        assert rel_err(fast(q, k, v, causal)[0, 0], golden) < 1e-12
    for fast in (attention_block, attention_online):
        assert rel_err(fast(q, k, v, causal)[0][0, 0], golden) < 1e-12


def test_golden_losses():
    """Ten steps of a tiny Transformer in float64, every weight of it a closed form."""
    losses = make_golden.attention_losses()
    assert rel_err(np.array(losses), np.array(GOLDEN["losses"])) < 1e-9
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_self_check(dtype):
    bad = [row for row in self_check(dtype) if not row[1] <= row[2]]
    assert not bad


def zero(*args, **kwargs):
    return 0 * attention_slow(*args, **kwargs)


def without_scale(q, k, v, *args, **kwargs):
    return attention.attention_slow(q * math.sqrt(q.shape[-1]), k, v, *args, **kwargs)


def unscaled_merge(out, lse, out_block, lse_block):
    total = torch.logaddexp(lse, lse_block)
    return out + out_block * (lse_block - total).exp()[..., None], total


FAULTS = {
    "zeros": ("attention", zero, "fused == definition"),
    "no 1/sqrt(E)": ("attention", without_scale, "fused == definition"),
    "one per cent": (
        "attention",
        lambda *a, **k: 1.01 * attention_slow(*a, **k),
        "fused == definition",
    ),
    "shifted by one": (
        "attention",
        lambda *a, **k: attention_slow(*a, **k).roll(1, 2),
        "fused == definition",
    ),
    "merge without rescaling": ("merge", unscaled_merge, "merged blocks"),
    "padding not hidden": (
        "hide",
        lambda keep, dtype: hide(torch.ones_like(keep), dtype),
        "tiles ==",
    ),
    "gradient one per cent": (
        "attention_block_grad",
        lambda *a: [1.01 * x for x in attention_block_grad(*a)],
        "of blocks",
    ),
    "RoPE the other way": ("rope", lambda x, at: attention_rope(x, -at), "RoPE == definition"),
    "positions from 1": (
        "sinusoidal_positions",
        lambda at, d: attention_sinusoids(at + 1, d),
        "sinusoids ==",
    ),
}
attention_rope, attention_sinusoids = attention.rope, attention.sinusoidal_positions


@pytest.mark.parametrize("fault", FAULTS)
def test_self_check_sees(fault, monkeypatch):
    name, wrong, row = FAULTS[fault]
    monkeypatch.setattr(attention, name, wrong)
    caught = [label for label, error, limit in self_check() if not error <= 1000 * limit]
    assert any(row in label for label in caught)


# ---------------------------------------------------------------- traps of the fused kernels


@pytest.mark.parametrize(("Lq", "Lk"), [(0, 5), (5, 0), (0, 0)])
def test_empty_blocks(Lq, Lk):
    q, k = draw(2, 4, Lq, 8), draw(2, 2, Lk, 8)
    out, lse = attention_block(q, k, k)
    assert out.shape == q.shape and lse.shape == (2, 4, Lq)
    assert not out.any() and (lse == -torch.inf).all()
    grads = attention_block_grad(out, q, k, k, out, lse)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert not any(x.any() for x in grads)


def test_strided_head_dimension():
    q, k, v = (draw(1, 2, 8, 9, seed=i).transpose(2, 3) for i in range(3))  # stride(-1) = 8
    assert q.stride(-1) != 1
    straight = [x.contiguous() for x in (q, k, v)]
    out, lse = attention_block(q, k, v)
    same, same_lse = attention_block(*straight)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)
    grad = draw(1, 2, 8, 9, seed=4).transpose(2, 3)
    got = attention_block_grad(grad, q, k, v, out, lse)
    expected = attention_block_grad(grad.contiguous(), *straight, same, same_lse)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("block", [attention_block, attention_online])
def test_rows_that_see_nothing(block):
    """out 0, lse -inf, and no trace in another block or in a gradient."""
    q, k, v = draw(2, 2, 6, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1] = False
    out, lse = block(q, k, v, False, hide(keep, q.dtype))
    assert not out[1].any() and (lse[1] == -torch.inf).all() and lse[0].isfinite().all()
    for grads in (
        attention_block_grad(q, q, k, v, out, lse, False, hide(keep, q.dtype)),
        attention.attention_online_grad(q, q, k, v, out, lse, False, hide(keep, q.dtype)),
    ):
        assert all(x[0].isfinite().all() and x[0].any() and not x[1].any() for x in grads)


def test_row_bias_hides_one_row():
    bias = torch.zeros(1, 1, 6, 7, dtype=torch.float64)
    bias[:, :, 2] = -torch.inf
    out, lse = attention_block(draw(1, 2, 6, 8), draw(1, 2, 7, 8), draw(1, 2, 7, 8), False, bias)
    assert (lse[:, :, 2] == -torch.inf).all() and not out[:, :, 2].any()
    assert lse[:, :, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_additive_bias(causal):
    """The reference, the product, the fused kernel and the blocks take the same bias."""
    q, k, v = (draw(1, 2, 9, 8, seed=i) for i in range(3))
    bias = draw(1, 2, 9, 9, seed=3)
    expected = attention_slow(q, k, v, causal, bias=bias)
    ref = attention_ref(*(x[0, 1].numpy() for x in (q, k, v)), causal, bias=bias[0, 1].numpy())
    assert rel_err(expected[0, 1], ref[0]) < 1e-13
    assert rel_err(attention.attention(q, k, v, causal, bias=bias), expected) < 1e-13
    out, lse = attention_block(q, k, v, causal, bias)
    assert rel_err(out, expected) < 1e-13 and rel_err(lse[0, 1], ref[1]) < 1e-13
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attention_slow(*leaves, causal, bias=bias), leaves, q)
    got = attention_block_grad(q, q, k, v, out, lse, causal, bias)
    assert all(rel_err(a, b) < 1e-12 for a, b in zip(got, grads, strict=True))


def test_other_value_width_takes_the_tiles():
    q, k, v = draw(1, 2, 9, 8), draw(1, 2, 5, 8, seed=1), draw(1, 2, 5, 3, seed=2)
    assert rel_err(attention_block(q, k, v)[0], attention_slow(q, k, v)) < 1e-13


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-6), (torch.float16, 2e-6)])
def test_half_precision_is_computed_in_float32(dtype, limit):
    q, k, v = (draw(1, 2, 33, 16, seed=i, dtype=dtype) for i in range(3))
    out, lse = attention_block(q, k, v)
    assert out.dtype == lse.dtype == torch.float32
    assert rel_err(out, attention_slow(q.double(), k.double(), v.double())) < limit


def test_sampled_rows_are_rows():
    q, k, v = (draw(50, 8, seed=i).numpy() for i in range(3))
    whole, lse = attention_ref(q, k, v, causal=True)
    some, some_lse = attention_ref(q, k, v, causal=True, rows=[0, 17, 49])
    assert np.array_equal(some, whole[[0, 17, 49]]) and np.array_equal(some_lse, lse[[0, 17, 49]])


# ---------------------------------------------------------------- exact properties


@pytest.mark.parametrize("options", [{}, {"rope": True}, {"causal": True}, {"n_kv_heads": 2}])
def test_batch_mates_change_nothing(options):
    """The features of an example do not depend on how far it is padded."""
    net, tokens = model(**options), torch.randint(11, (2, 20), generator=torch.Generator())
    keep = torch.arange(20) < torch.tensor([[20], [13]])
    padded, alone = net(tokens, keep)[1, :13], net(tokens[1:, :13])[0]
    assert rel_err(padded, alone) < 1e-13
    assert rel_err(net(tokens)[1, :13], alone) > 1e-3 or options.get("causal")


def test_padding_with_holes():
    net = model(causal=True, rope=True)
    tokens = torch.randint(11, (1, 9), generator=torch.Generator())
    keep = torch.tensor([[True, False, True, True, False, True, True, True, True]])
    other = torch.where(keep, tokens, (tokens + 1) % 11)
    assert torch.equal(net(tokens, keep)[keep], net(other, keep)[keep])


@pytest.mark.parametrize("rope", [False, True])
def test_causal(rope):
    net, tokens = model(causal=True, rope=rope), torch.randint(11, (1, 16))
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 11
    before, after = net(tokens), net(other)
    assert rel_err(after[:, :9], before[:, :9]) < 1e-15
    assert all(rel_err(after[:, t], before[:, t]) > 1e-6 for t in range(9, 16))


def test_without_positions_the_layer_permutes_with_its_input():
    layer, x, order = Attention(16, 4).double(), draw(2, 10, 16), torch.randperm(10)
    assert rel_err(layer(x[:, order]), layer(x)[:, order]) < 1e-13


def test_rope_model_sees_distances_alone():
    net, tokens = model(rope=True), torch.randint(11, (1, 12))
    assert rel_err(net(tokens, positions=torch.arange(12) + 1000), net(tokens)) < 1e-11


def test_positions_place_the_tokens():
    """Tokens in another order, with their positions, give the same features in that order."""
    tokens, order = torch.randint(11, (1, 12)), torch.randperm(12)
    for net in (model(), model(rope=True)):
        assert rel_err(net(tokens[:, order], positions=order), net(tokens)[:, order]) < 1e-13


@pytest.mark.parametrize("options", [{}, {"rope": True, "n_kv_heads": 2}])
def test_steps_of_a_model(options):
    """prefill, a second prefill and steps == forward, with a cache that must grow."""
    net, tokens = model(causal=True, **options), torch.randint(11, (2, 300))
    y, state = net.prefill(tokens[:, :100], net.initial_state(2))
    z, state = net.prefill(tokens[:, 100:290], state)
    parts = [y, z]
    for t in range(290, 300):
        y, state = net.step(tokens[:, t], state)
        parts.append(y[:, None])
    assert rel_err(torch.cat(parts, 1), net(tokens)) < 1e-13


def test_values_instead_of_tokens():
    net = model(vocab_size=None, n_channels=3)
    assert net(draw(2, 7, 3)).shape == (2, 7, 16)


def test_factories_build_the_sublayers():
    class Still(nn.Module):
        def forward(self, x, keep=None):
            return torch.zeros_like(x)

    config = TransformerConfig(d_model=8, n_heads=2, vocab_size=5, rope=True)
    asked = []
    net = Transformer(
        config, mixer=lambda c, i: Still(), ffn=lambda c, i: asked.append(i) or Still()
    )
    assert asked == [0, 1]
    tokens = torch.tensor([[1, 2]])
    assert torch.equal(net(tokens), net.norm(net.embed(tokens)))


def test_param_groups_hold_each_parameter_once():
    class Convolution(nn.Linear):
        kernel = None

    config = TransformerConfig(d_model=8, n_heads=2, vocab_size=5)
    for net in (model(), Transformer(config, mixer=lambda c, i: Convolution(8, 8))):
        groups = net.param_groups(1e-2, 0.1)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in net.parameters())
        assert {p.ndim for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
        assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0
    slow = groups[2]["params"]
    assert len(slow) == 4 and slow[0] is net.blocks[0].mixer.weight and groups[2]["lr"] == 1e-3


# ---------------------------------------------------------------- nn.MultiheadAttention, errors


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_multihead(bias):
    mha = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double()
    for p in mha.parameters():
        nn.init.normal_(p)
    x, keep = draw(2, 9, 12), torch.arange(9) < torch.tensor([[9], [5]])
    theirs = mha(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    assert rel_err(from_multihead(mha)(x, keep), theirs) < 1e-13


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kdim": 6}, "kdim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_refused_multihead(options, named):
    with pytest.raises(ValueError, match=named):
        from_multihead(nn.MultiheadAttention(12, 3, **options))


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: Attention(130, 4), "130.*4"),
        (lambda: Attention(16, 4, n_kv_heads=3), "4.*3"),
        (lambda: Attention(12, 4, rope=True), "12 / 4 = 3"),
        (lambda: TransformerConfig(), "None"),
        (lambda: TransformerConfig(vocab_size=3, n_channels=2), "3.*2"),
        (lambda: Attention(16, 4).initial_state(1), "causal"),
    ],
)
def test_bad_input(make, numbers):
    with pytest.raises(ValueError, match=numbers):
        make()


# ---------------------------------------------------------------- command line, GPU


def test_command_line():
    command = [sys.executable, "attention.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("attention.py  torch") and lines[1].split() == [
        "check",
        "error",
        "limit",
    ]
    assert len(lines) >= 30 and all(line.endswith("ok") for line in lines[2:])


@pytest.mark.slow
def test_demo_reaches_its_target(capsys):
    assert attention.demo("cpu", L=32, steps=150)
    assert "after 150 steps" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_operators_take_these_arguments(dtype, monkeypatch):
    """The branch for CUDA on meta tensors: operators, arguments and shapes, without numbers."""
    monkeypatch.setattr(attention, "fused", lambda *args: True)
    q, k = (torch.empty(2, h, n, 16, dtype=dtype, device="meta") for h, n in ((4, 33), (2, 17)))
    out, lse = attention_block(q, k, k)
    assert out.shape == q.shape and lse.shape == (2, 4, 33)
    assert out.dtype == lse.dtype == torch.float32
    grads = attention_block_grad(out, q, k, k, out, lse)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


# ---------------------------------------------------------------------- what users do to it


@pytest.mark.parametrize("lengths", [(9, 5), (5, 9), (6, 6)])
def test_padding_on_the_right_counts_with_any_lengths(lengths):
    Lq, Lk = lengths
    q, k, v = draw(2, 2, Lq, 8), draw(2, 2, Lk, 8, seed=1), draw(2, 2, Lk, 8, seed=2)
    keep = torch.arange(Lk) < torch.tensor([[2], [Lk]])
    got, want = (f(q, k, v, True, keep) for f in (attention.attention, attention_slow))
    for b, n in enumerate((2, Lk)):  # what a padded query gets is of no use
        rows = slice(0, n if Lq == Lk else Lq)
        assert rel_err(got[b, :, rows], want[b, :, rows]) < 1e-12


@pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 7), (2, 6, 7), (3, 1, 6, 7)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_bias_of_any_shape_that_broadcasts(shape, padded):
    q, k, v = draw(3, 2, 6, 8), draw(3, 2, 7, 8, seed=1), draw(3, 2, 7, 8, seed=2)
    bias = draw(*shape, 1, seed=3)[..., 0]
    keep = torch.arange(7).expand(3, 7) > 1 if padded else None
    got, want = (f(q, k, v, False, keep, bias) for f in (attention.attention, attention_slow))
    assert rel_err(got, want) < 1e-12


def test_masks_of_another_kind_are_refused():
    q = draw(2, 2, 6, 8)
    for keep in (torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected keep \(2, 6\) bool"):
            attention.attention(q, q, q, True, keep)
    with pytest.raises(ValueError, match=r"bias torch\.bool: expected floating"):
        attention.attention(q, q, q, bias=torch.ones(6, 6, dtype=torch.bool))


def test_blocks_carry_no_gradient_that_would_be_wrong():
    q = draw(1, 2, 5, 8).requires_grad_()
    out, lse = attention_block(q, q, q)
    assert not out.requires_grad and not lse.requires_grad


def test_a_state_is_continued_once():
    net = model(causal=True).eval()
    _, state = net.prefill(torch.zeros(2, 3, dtype=torch.long), net.initial_state(2))
    branch, token = copy.deepcopy(state), torch.zeros(2, dtype=torch.long)
    first, _ = net.step(token, state)
    with pytest.raises(ValueError, match="token 3 was continued before"):
        net.step(token, state)
    assert torch.equal(net.step(token, branch)[0], first)
    with pytest.raises(ValueError, match="batch 2, got 1"):
        net.step(token[:1], net.initial_state(2))


@pytest.mark.parametrize("sizes", [(16, 0), (16, -4), (0, 4), (16, 4, False, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=">= 1"):
        Attention(*sizes)


def test_the_default_width_of_the_ffn_follows_d_model():
    config = replace(TransformerConfig(d_model=64, vocab_size=5), d_model=128)
    assert Transformer(config).blocks[0].ffn.up.out_features == 512


def test_merge_takes_other_types_infinities_and_what_is_not_a_number():
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
    """The shares of the blocks carry no error of a log-sum-exp near ten, one part in a million."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 32, generator=generator) for n in (64, 2**16, 2**16))
    out, lse = attention_block(q, k[:, :, :1024], v[:, :, :1024])
    for i in range(1024, 2**16, 1024):
        out, lse = merge(
            out, lse, *attention_block(q, k[:, :, i : i + 1024], v[:, :, i : i + 1024])
        )
    want = (q.double() @ k.double().mT / math.sqrt(32)).softmax(-1) @ v.double()
    assert (out - want).norm() / want.norm() < 1.2e-6  # by e^(lse - total): 1.35e-6
