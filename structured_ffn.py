"""Structured feed-forward layers: two small batched products in place of one large matrix.

Wei, Moalla, Pascanu, Gulcehre, NeurIPS 2024, arXiv:2406.16450.

Each layer of the paper cuts W (M, N) into a grid of n_out x n_in blocks of shape (S, P), with
S = M / n_out and P = N / n_in, and makes every block a product of its own, of rank c:

    W[a, b] = U[a, :, b] V[b, a]                  (S, P) = (S, c) x (c, P)

    name          grid     rank c            weights
    LowRank       1 x 1    R                 R (N + M)
    BlockDense    1 x B    R / B             R (M + N / B)
    BlockShuffle  B x B    min(N, M) / B^2   min(N, M) (N + M) / B        (Monarch)

    paper         code                     shape
    N, M, B       d_in, d_out, n_blocks
    blkdiag(V)    V                        (n_in, n_out, c, P): n_in blocks of n_out c rows
    blkdiag(U)    U                        (n_out, S, n_in, c): n_out blocks of n_in c columns
    W of eq. 1    W                        (d_out, d_in), the guide; None unless guided
    alpha         alpha                    weight of the guide, falls from 1 to 0 during training

Differences from the paper are marked where they occur: BlockShuffle has no second shuffle and needs
B^2 to divide min(N, M); stochastic guiding draws one coin per layer and optimizer step.  Left out:
GPU kernels, gated FFNs, a trainer.

    python structured_ffn.py            checks and a short demo of self-guided training
    python structured_ffn.py --check    checks only
"""

import argparse
import copy
import math
import random
import sys
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- reference: numpy


def grid_matrix_ref(V, U):
    """W[a, b] = U[a, :, b] V[b, a].  V: (n_in, n_out, c, P), U: (n_out, S, n_in, c).

    Returns (n_out S, n_in P).  The paper's three layers, defined below, are special cases.
    """
    n_in, n_out, _, P = V.shape
    S = U.shape[1]
    W = np.zeros((n_out, S, n_in, P))
    for a in range(n_out):
        for b in range(n_in):
            W[a, :, b] = U[a, :, b] @ V[b, a]
    return W.reshape(n_out * S, n_in * P)


def low_rank_ref(V, U):
    """W = U V (section 2.1).  V: (R, N), U: (M, R).  Returns (M, N)."""
    return U @ V


def block_dense_ref(V, U):
    """W = U blkdiag(V) (section 2.1).  V: (B, R / B, N / B), U: (M, R).  Returns (M, N)."""
    parts = np.hsplit(U, len(V))  # B parts (M, R / B)
    return np.hstack([part @ block for part, block in zip(parts, V, strict=True)])


def block_shuffle_ref(V, U):
    """W = shuffle blkdiag(U) shuffle blkdiag(V) (section 2.1), with both shuffles.

    V: (B, Q, N / B), U: (B, S, Q) with Q = min(N, M) / B.  Returns (B S, N).
    The first shuffle transposes the hidden units, read as a matrix with B columns, the second one
    the outputs, read as a matrix with B rows.
    """
    B, Q, P = V.shape
    S = U.shape[1]
    W = np.zeros((S, B, B, P))  # output s B + l, input k P + p
    for k in range(B):
        for q in range(Q):
            r, l = divmod(k * Q + q, B)  # unit k Q + q is entry (r, l): input r of block l
            W[:, l, k] += np.outer(U[l, :, r], V[k, q])
    return W.reshape(S * B, B * P)


# ---------------------------------------------------------------- torch: the product with a grid


def grid_linear_slow(x, V, U):
    """y = W x without forming W, as two einsums.  x: (..., n_in P).  Returns (..., n_out S)."""
    n_in, _, _, P = V.shape
    x = x.unflatten(-1, (n_in, P))
    z = torch.einsum("...bp, bacp -> ...abc", x, V)
    y = torch.einsum("...abc, asbc -> ...as", z, U)
    return y.flatten(-2)


def grid_linear(x, V, U, bias=None):
    """y = W x + bias as two batched products: every V[b] on its part of x, then every U[a].

    x: (..., n_in P), V: (n_in, n_out, c, P), U: (n_out, S, n_in, c).  Returns (..., n_out S).
    T tokens cost 2 T (|V| + |U|) FLOPs.
    """
    n_in, n_out, c, P = V.shape
    S = U.shape[1]
    if U.shape != (n_out, S, n_in, c) or (bias is not None and bias.shape != (n_out * S,)):
        shapes = f"V {tuple(V.shape)}, U {tuple(U.shape)}"
        raise ValueError(f"expected U (n_out, S, n_in, c), bias (n_out S,); got {shapes}")
    V = V.flatten(1, 2)  # (n_in, n_out c, P)
    U = U.flatten(2)  # (n_out, S, n_in c)
    if n_in == n_out == 1:  # fewer calls, which take most of the time when tokens are few
        return F.linear(F.linear(x, V.squeeze(0)), U.squeeze(0), bias)
    lead = x.shape[:-1]
    x = x.reshape(-1, n_in, P)
    z = torch.bmm(x.transpose(0, 1), V.mT)  # (n_in, T, n_out c)
    z = z.unflatten(2, (n_out, c))
    z = z.permute(2, 1, 0, 3).flatten(2)  # (n_out, T, n_in c)
    # The second product is written in place, into the memory of (T, n_out, S): copying the result,
    # the largest tensor here, would cost more than 15 % of the forward pass.
    y = z.new_empty_strided((n_out, len(x), S), (S, n_out * S, 1))
    if bias is None:
        y.zero_()
    else:
        y.copy_(bias.view(n_out, 1, S))
    y.baddbmm_(z, U.mT.to(z.dtype))  # autocast does not cast for operations in place
    return y.transpose(0, 1).reshape(*lead, n_out * S)


def paper_to_grid(V, U):
    """Convert the paper's BlockShuffle factors V (B, Q, P), U (B, S, Q) to a grid's; B divides Q.

    Row q of V[k] belongs to block q mod B.  The paper's output s B + a is the grid's a S + s.
    """
    B = len(V)
    return V.unflatten(1, (-1, B)).transpose(1, 2), U.unflatten(2, (B, -1))


# ---------------------------------------------------------------- layers


def divide(name, n, k):
    """Return n / k; raises ValueError if k does not divide n."""
    if k < 1 or n % k:
        raise ValueError(f"{name} {n} is not divisible by {k}: choose a multiple of it")
    return n // k


class Grid(nn.Module):
    """Drop-in replacement for nn.Linear(d_in, d_out): n_out x n_in blocks, each of rank c.

    (..., d_in) -> (..., d_out) with |V| + |U| weights and as many multiply-adds per token.
    Raises ValueError if the grid does not divide the sizes or c exceeds a block's shorter side.
    """

    def __init__(self, d_in, d_out, n_in, n_out, c, bias=True):
        super().__init__()
        P = divide("d_in", d_in, n_in)
        S = divide("d_out", d_out, n_out)
        if not 1 <= c <= min(P, S):
            raise ValueError(f"rank {c} of a {S} x {P} block: choose one from 1 to {min(P, S)}")
        self.d_in = d_in
        self.d_out = d_out
        self.V = nn.Parameter(torch.empty(n_in, n_out, c, P))
        self.U = nn.Parameter(torch.empty(n_out, S, n_in, c))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.W = None  # Guide sets W, alpha and coin
        self.alpha = 0.0
        self.coin = True  # False leaves the guide out of a training step
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Give every block V[b] and U[a] singular values of 1 (orthonormal, table 4), bias 0."""
        for block in [*self.V.flatten(1, 2), *self.U.flatten(2)]:
            nn.init.orthogonal_(block)
        if self.bias is not None:
            self.bias.zero_()

    def dense_weight(self):
        """Return the equivalent weight (d_out, d_in) of nn.Linear; gradients reach U and V."""
        W = torch.einsum("asbc, bacp -> asbp", self.U, self.V)
        return W.reshape(self.d_out, self.d_in)

    @torch.no_grad()
    def project_(self, weight):
        """Set U and V to the best approximation of weight (d_out, d_in) in Frobenius norm.

        Takes the SVD of each block and shares its singular values evenly between the factors.
        """
        n_in, n_out, c, P = self.V.shape
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no SVD in half
        blocks = weight.unflatten(1, (n_in, P)).unflatten(0, (n_out, -1))  # (n_out, S, n_in, P)
        left, sigma, right = torch.linalg.svd(blocks.transpose(1, 2), full_matrices=False)
        root = sigma[..., :c].sqrt()  # (n_out, n_in, c)
        U = left[..., :c] * root[..., None, :]
        V = right[..., :c, :] * root.where(root > 0, 1)[..., None]  # U = V = 0 could never learn
        self.U.copy_(U.transpose(1, 2))
        self.V.copy_(V.transpose(0, 1))
        return self

    def forward(self, x):
        """x: (..., d_in).  Returns (..., d_out)."""
        y = grid_linear(x, self.V, self.U, self.bias)
        if self.W is None or (self.training and not self.coin):
            return y  # eq. 2: unscaled if the coin leaves the guide out
        guide = F.linear(x, self.W, self.bias)
        return self.alpha * guide + (1 - self.alpha) * y  # eq. 1; the two biases add up to one


class LowRank(Grid):
    """W = U V of rank R."""

    def __init__(self, d_in, d_out, R, bias=True):
        super().__init__(d_in, d_out, 1, 1, R, bias)

    @torch.no_grad()
    def reset_parameters(self):
        """Start at the best rank-R approximation of N(0, 0.02^2), as in the paper's code."""
        self.project_(0.02 * torch.randn(self.d_out, self.d_in, device=self.V.device))
        if self.bias is not None:
            self.bias.zero_()


class BlockDense(Grid):
    """W = U blkdiag(V): each of n_blocks parts of x yields R / n_blocks of the R hidden units."""

    def __init__(self, d_in, d_out, R, n_blocks, bias=True):
        super().__init__(d_in, d_out, n_blocks, 1, divide("R", R, n_blocks), bias)


class BlockShuffle(Grid):
    """Monarch: n_blocks x n_blocks blocks of rank min(d_in, d_out) / n_blocks^2, of full rank."""

    def __init__(self, d_in, d_out, n_blocks, bias=True):
        # differs from the paper: n_blocks^2 must divide, and there is no second shuffle, which the
        # paper finds to change nothing (appendix A.1)
        c = divide("min(d_in, d_out)", min(d_in, d_out), n_blocks**2)
        super().__init__(d_in, d_out, n_blocks, n_blocks, c, bias)


KINDS = {"lowrank": LowRank, "blockdense": BlockDense, "blockshuffle": BlockShuffle}


class StructuredFFN(nn.Module):
    """fc2(gelu(fc1 x)).  linear(d_in, d_out) builds both: nn.Linear, partial(LowRank, R=16)."""

    def __init__(self, d_model, d_ff, linear=nn.Linear):
        super().__init__()
        self.fc1 = linear(d_model, d_ff)
        self.fc2 = linear(d_ff, d_model)

    def forward(self, x):
        """x: (..., d_model).  Returns (..., d_model)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # tanh, as in the paper's code


# ---------------------------------------------------------------- self-guided training


def alpha_at(t, n_steps):
    """Weight of the guide at step t: (1 + cos(pi t / n_steps)) / 2, then 0 (section 2.3)."""
    return 0.5 * (1 + math.cos(math.pi * min(t / n_steps, 1)))


class Guide:
    """Self-guided training of every structured layer of a model (section 2.3, eq. 1 and 2).

        guide = Guide(model, n_steps=steps // 2)        # before the optimizer, which must see W
        ...; loss.backward(); optimizer.step(); guide.step(optimizer)

    W starts at U V, so the first output does not depend on alpha, and after n_steps it leaves the
    model and the optimizer.  stochastic=True computes the guide with probability alpha only, which
    halves its cost; evaluation uses eq. 1.  To resume, pass t of the saved guide, make the
    optimizer, then load both states.  DistributedDataParallel: wrap the model again when step
    returns True, as its parameters have changed; with stochastic=True wrap it once, with
    find_unused_parameters=True.

    Raises ValueError if the model has no structured layer, or one that is guided already, and in
    step if the optimizer does not train W.
    """

    def __init__(self, model, n_steps, stochastic=False, seed=0, t=0):
        self.layers = [m for m in model.modules() if isinstance(m, Grid)]
        if not self.layers or any(layer.W is not None for layer in self.layers):
            raise ValueError("the model has no structured layers, or a guide that is not finished")
        self.n_steps = n_steps
        self.stochastic = stochastic
        self.seed = seed
        self.t = t
        if t < n_steps:
            for layer in self.layers:
                layer.W = nn.Parameter(layer.dense_weight().detach())
            self._set_alpha()

    def _set_alpha(self):
        # differs from the paper: one coin per layer and optimizer step, drawn from (seed, t) alone,
        # not one per forward pass: ranks, micro-batches, recomputation and resumed runs agree
        coins = random.Random(f"{self.seed} {self.t}")
        alpha = alpha_at(self.t, self.n_steps)
        for layer in self.layers:
            layer.alpha = alpha
            layer.coin = not self.stochastic or coins.random() < alpha

    def step(self, optimizer):
        """Call after each optimizer step.  Returns True if the guide ends with this step."""
        if self.t >= self.n_steps:
            return False
        guides = {layer.W for layer in self.layers}
        trained = set()
        for group in optimizer.param_groups:
            trained.update(group["params"])
        if not guides <= trained:
            raise ValueError("the optimizer does not train W: make the optimizer after the guide")
        self.t += 1
        if self.t < self.n_steps:
            self._set_alpha()
            return False
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in guides]
        for layer in self.layers:
            optimizer.state.pop(layer.W, None)
            layer.W.grad = None  # lists of parameters made earlier must not clip or step by it
            layer.W.requires_grad_(False)
            layer.W = None
        return True


# ---------------------------------------------------------------- pre-merge for inference


class Merged(nn.Module):
    """One dense product for up to max_tokens tokens, the factors for more (section 2.2)."""

    def __init__(self, layer, max_tokens):
        super().__init__()
        self.factors = layer
        self.max_tokens = max_tokens
        self.register_buffer("weight", layer.dense_weight().detach())

    def forward(self, x):
        """x: (..., d_in).  Returns (..., d_out)."""
        tokens = x.numel() // self.factors.d_in
        if tokens > self.max_tokens:
            return self.factors(x)
        return F.linear(x, self.weight, self.factors.bias)


def merged(model, max_tokens):
    """Return a frozen copy of model for inference whose structured layers are Merged.

    benchmarks/ffn_latency.py measures max_tokens.  The copy does not follow model: merge again
    after further training.  Raises ValueError while model is guided.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    new = {}
    for layer in model.modules():
        if isinstance(layer, Grid):
            if layer.W is not None:
                raise ValueError("a guided model cannot be merged: train it until the guide ends")
            new[layer] = Merged(layer, max_tokens)
    return replace(model, new)


def replace(model, new):
    """Put new[module] in the place of each module of model, wherever it occurs.  Returns model."""
    if model in new:
        return new[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[module])
    return model


# ---------------------------------------------------------------- planner, conversion


def ffn_weights(linear, d_model, d_ff):
    """Count the weights of an FFN without biases: one multiply-add per token each."""
    with torch.device("meta"):
        ffn = StructuredFFN(d_model, d_ff, linear)
    return sum(p.numel() for p in ffn.parameters() if p.dim() > 1)


def round_rank(rank):
    """Round to a multiple of 8, which GPUs prefer; below 64, where 8 is coarse, to an integer."""
    step = 8 if rank >= 64 else 1
    return step * round(rank / step)


def match(d_model, d_ff, kind, ratio, n_blocks=4):
    """Plan the two layers of an FFN with `ratio` of the dense weights, and so of the FLOPs.

    kind: "dense" or a key of KINDS; n_blocks is for BlockDense.  Returns linear(d_in, d_out).
    Raises ValueError if the nearest size is more than 15 % off.
    """
    if kind == "dense":
        return nn.Linear
    narrow = min(d_model, d_ff)
    wide = max(d_model, d_ff)
    rank = ratio * d_model * d_ff / (d_model + d_ff)
    if kind == "lowrank":  # 2 R (D + F) of the 2 D F weights
        plan = {"R": round_rank(rank)}
    elif kind == "blockdense":  # R = B c: B c (D + F) (1 + 1 / B) weights
        c = round_rank(2 * rank / (n_blocks + 1))
        plan = {"R": c * n_blocks, "n_blocks": n_blocks}
    else:  # 2 min(D, F) (D + F) / B weights
        fits = [B for B in range(1, narrow + 1) if narrow % B**2 == 0 and wide % B == 0]
        plan = {"n_blocks": min(fits, key=lambda B: abs(1 / B - rank / narrow))}
    linear = partial(KINDS[kind], **plan)
    got = ffn_weights(linear, d_model, d_ff) / (2 * d_model * d_ff)
    if abs(got - ratio) > 0.15 * ratio:
        raise ValueError(f"{kind} {d_model} x {d_ff}, ratio {ratio}: nearest is {plan}, {got:.3f}")
    return linear


def ffn_factory(kind, ratio=0.3125, n_blocks=4):
    """Return ffn(d_model, d_ff) for one Transformer, which calls it once per block, in order.

    The first block is dense (section 4.1), the others have `ratio` of the weights.
    """
    first = True

    def ffn(d_model, d_ff):
        nonlocal first
        linear = nn.Linear if first else match(d_model, d_ff, kind, ratio, n_blocks)
        first = False
        return StructuredFFN(d_model, d_ff, linear)

    return ffn


def from_linear(linear, make):
    """Return the layer make(d_in, d_out, bias=...) nearest to an nn.Linear, on its device."""
    with torch.device("meta"):  # without initial values
        layer = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer = layer.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    layer.project_(linear.weight)
    if linear.bias is not None:
        layer.bias.data.copy_(linear.bias.data)
    return layer.train(linear.training).requires_grad_(linear.weight.requires_grad)


def convert(model, make, pick):
    """Replace in place each nn.Linear whose dotted name pick(name) accepts.

    make(d_in, d_out, bias=...) builds the new layer, set to the nearest weight of its kind.
    Returns {name: relative error of its weight in Frobenius norm}.  Raises ValueError, before
    anything is changed, if pick accepts nothing, or a layer whose weight other code reads: tied
    weights, nn.MultiheadAttention.out_proj, linear1 and linear2 of nn.TransformerEncoderLayer.
    """
    owners = Counter()  # modules that hold each parameter; more than one if it is tied
    for module in model.modules():
        owners.update(module.parameters(recurse=False))
    new = {}
    errors = {}
    for name, module in model.named_modules():
        if not (name and isinstance(module, nn.Linear) and pick(name)):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        fused = isinstance(parent, nn.TransformerEncoderLayer)  # its fast path reads the weights
        if fused or type(module) is not nn.Linear or owners[module.weight] > 1:
            kind = f"{type(module).__name__} of a {type(parent).__name__}"
            raise ValueError(f"{name} ({kind}): other code reads its weight, let pick refuse it")
        layer = from_linear(module, make)
        error = (layer.dense_weight() - module.weight).norm()
        errors[name] = (error / module.weight.norm().clamp_min(1e-30)).item()
        new[module] = layer
    if not new:
        raise ValueError("pick accepts no nn.Linear inside the model")
    replace(model, new)
    return errors


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|, the only error measure in this file."""
    a = torch.as_tensor(a, dtype=torch.float64).detach().cpu()
    b = torch.as_tensor(b, dtype=torch.float64).detach().cpu()
    assert a.shape == b.shape and b.abs().max() > 0, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def print_table(rows):
    """Print (name, error, limit) rows; return True if every error is within its limit."""
    ok = True
    for name, error, limit in rows:
        passed = error <= limit  # False for nan
        print(f"  {name:<50}{error:9.1e}{limit:9.0e}   {'ok' if passed else 'FAILED'}")
        ok = ok and passed
    return ok


def numpy64(tensor):
    """Return a float64 numpy copy."""
    return tensor.detach().double().cpu().numpy()


def paper_matrix(layer):
    """Return the matrix (d_out, d_in) of a layer by the paper's definition, in numpy."""
    V = numpy64(layer.V)
    U = numpy64(layer.U)
    if isinstance(layer, LowRank):
        return low_rank_ref(V[0, 0], U[0, :, 0])
    if isinstance(layer, BlockDense):
        return block_dense_ref(V[:, 0], U[0].reshape(layer.d_out, -1))
    n_in, n_out, c, P = V.shape
    V = V.swapaxes(1, 2).reshape(n_in, c * n_out, P)  # the inverse of paper_to_grid
    U = U.reshape(n_out, -1, n_in * c)
    W = block_shuffle_ref(V, U).reshape(-1, n_out, layer.d_in)
    return W.swapaxes(0, 1).reshape(layer.d_out, -1)  # without the second shuffle


def check_layer(layer, x):
    """Yield (name, error): every form of a layer against the paper's matrix."""
    W = paper_matrix(layer)
    bias = numpy64(layer.bias)
    y = numpy64(x) @ W.T + bias
    yield "einsum", rel_err(grid_linear_slow(x, layer.V, layer.U) + layer.bias, y)
    yield "forward", rel_err(layer(x), y)
    yield "dense weight", rel_err(layer.dense_weight(), W)
    yield "merged", rel_err(merged(layer, max_tokens=len(x))(x), y)

    leaves = [x, layer.V, layer.U]
    dense = F.linear(x, layer.dense_weight(), layer.bias)
    want = torch.autograd.grad(dense.square().sum(), leaves)
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    for i, name in enumerate("xVU"):
        yield f"gradient of {name}", rel_err(got[i], want[i])

    Guide(layer, n_steps=10)
    nn.init.normal_(layer.W)
    layer.alpha = 0.3
    guide = numpy64(x) @ numpy64(layer.W).T + bias
    yield "guided (eq. 1)", rel_err(layer(x), 0.3 * guide + 0.7 * y)


LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def self_check(dtype=torch.float64, device="cpu"):
    """Return a list of (name, error, limit).  Seeds torch with 0."""
    torch.manual_seed(0)
    rows = []
    for layer in (LowRank(24, 36, 10), BlockDense(24, 36, 12, 4), BlockShuffle(36, 48, 3)):
        layer = layer.to(device, dtype)
        for p in layer.parameters():
            nn.init.normal_(p)
        x = torch.randn(7, layer.d_in, device=device, dtype=dtype, requires_grad=True)
        for name, error in check_layer(layer, x):
            rows.append((f"{type(layer).__name__}: {name}", error, LIMITS[dtype]))
    return rows


# ---------------------------------------------------------------- demo, command line


def demo(steps=600, lr=8e-3):
    """Fit a random LowRank FFN by another one, plain, then guided for the first half.

    Returns the two errors, relative to the variance of the target.
    """
    errors = []
    for guided_steps in (0, steps // 2):
        torch.manual_seed(0)
        teacher = StructuredFFN(64, 256, partial(LowRank, R=16)).requires_grad_(False)
        student = StructuredFFN(64, 256, partial(LowRank, R=16))
        for p in teacher.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=2 * p.shape[-1] ** -0.5)
        guide = Guide(student, guided_steps)
        optimizer = torch.optim.AdamW(student.parameters())
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
            x = torch.randn(128, 64)
            y = teacher(x)
            loss = F.mse_loss(student(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guide.step(optimizer)
        errors.append(loss.item() / y.var().item())
    return errors


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="run the checks only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    ok = True
    for dtype in (torch.float64, torch.float32):
        print(f"checks in {dtype} on {args.device}: error, limit")
        ok = print_table(self_check(dtype, args.device)) and ok
    if not args.check:
        plain, guided = demo()
        print(f"demo: error of a LowRank FFN that learns another: {plain:.3f}, guided {guided:.3f}")
        ok = print_table([("guided / plain", guided / plain, 0.5)]) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
