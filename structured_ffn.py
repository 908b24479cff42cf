"""Structured feed-forward layers: two small batched products in place of one large matrix.

Wei, Moalla, Pascanu, Gulcehre, NeurIPS 2024, arXiv:2406.16450.

Up to the order of its rows, every layer of the paper is a matrix W (M, N) in a grid of n_out x n_in
blocks (S, P), S = M / n_out and P = N / n_in.  Each block is a product of its own, of rank
c = R / (n_out n_in):

    W[a, b] = U[a, :, b] V[b, a]        (S, P) = (S, c) x (c, P)

    name          W here                         grid    R          weights
    LowRank       U V                            1 x 1   R          R (N + M)
    BlockDense    U blkdiag(V)                   1 x B   R          R (M + N / B)
    BlockShuffle  blkdiag(U) shuffle blkdiag(V)  B x B   min(N, M)  min(N, M) (N + M) / B

    paper         code                shape
    N, M, B       d_in, d_out, n_blocks
    blkdiag(V)    V                   (n_in, n_out, c, P): n_in blocks of n_out c rows
    blkdiag(U)    U                   (n_out, S, n_in, c): n_out blocks of n_in c columns
    V, U          V, U of LowRank     (1, 1, R, N), (1, M, 1, R)
    W of eq. 1    guide               (d_out, d_in), dense; None unless guided
    alpha         alpha               weight of the guide, falls from 1 to 0 over its n_steps

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


def blkdiag_ref(blocks):
    """Put B blocks (B, S, P) along the diagonal of a matrix (B S, B P)."""
    B, S, P = blocks.shape
    W = np.zeros((B, S, B, P))
    for b in range(B):
        W[b, :, b] = blocks[b]
    return W.reshape(B * S, B * P)


def shuffle_ref(W, k):
    """Permute rows: write their numbers row by row into k columns, read them column by column."""
    return W.reshape(-1, k, W.shape[1]).swapaxes(0, 1).reshape(W.shape)


def block_dense_ref(V, U):
    """W = U blkdiag(V) (section 2.1); LowRank's U V if B = 1.  V: (B, R / B, N / B), U: (M, R)."""
    return U @ blkdiag_ref(V)


def block_shuffle_ref(V, U):
    """W = shuffle blkdiag(U) shuffle blkdiag(V) (section 2.1).

    V: (B, Q, N / B), U: (B, S, Q) with Q = min(N, M) / B, S = M / B.
    """
    B, S, _ = U.shape
    hidden = shuffle_ref(blkdiag_ref(V), B)  # (B Q, N)
    return shuffle_ref(blkdiag_ref(U) @ hidden, S)


# ---------------------------------------------------------------- torch: the product with a grid


def grid_linear_slow(x, V, U):
    """y = W x without forming W, as two einsums.  x: (..., n_in P).  Returns (..., n_out S)."""
    check_grid(x, V, U)
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
    check_grid(x, V, U, bias)
    n_in, n_out, c, P = V.shape
    S = U.shape[1]
    V = V.flatten(1, 2)  # (n_in, n_out c, P)
    U = U.flatten(2)  # (n_out, S, n_in c)
    if n_in == n_out == 1:  # fewer calls, which take most of the time when tokens are few
        return F.linear(F.linear(x, V.squeeze(0)), U.squeeze(0), bias)
    lead = x.shape[:-1]
    x = x.reshape(-1, n_in, P)
    z = torch.bmm(x.transpose(0, 1), V.mT)  # (n_in, T, n_out c)
    z = z.unflatten(2, (n_out, c)).permute(2, 1, 0, 3).flatten(2)  # (n_out, T, n_in c)
    # The second product is written in place, into the memory of (T, n_out, S): a copy of the result
    # would cost more than 15 % of the forward pass.
    y = z.new_empty_strided((n_out, x.shape[0], S), (S, n_out * S, 1))
    if bias is None:
        y.zero_()
    else:
        y.copy_(bias.view(n_out, 1, S))
    y.baddbmm_(z, U.mT.to(z.dtype))  # autocast does not cast for operations in place
    return y.transpose(0, 1).reshape(*lead, n_out * S)


def check_grid(x, V, U, bias=None):
    """Refuse shapes that would broadcast by accident, and dtypes that would be converted."""
    n_in, n_out, c, P = V.shape
    S = U.shape[1]
    fits = x.shape[-1] == n_in * P and U.shape == (n_out, S, n_in, c) and U.dtype == V.dtype
    if bias is not None:
        fits = fits and bias.shape == (n_out * S,) and bias.dtype == V.dtype
    if not fits:
        got = [(*t.shape, t.dtype) for t in (x, V, U, bias) if t is not None]
        wanted = "x (..., n_in P), V (n_in, n_out, c, P), U (n_out, S, n_in, c), bias (n_out S,)"
        raise ValueError(f"expected {wanted}; V, U and bias of one dtype; got {got}")


# ---------------------------------------------------------------- layers


def require(ok, message):  # same as s4.py:require
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(message)


class Grid(nn.Module):
    """In place of nn.Linear(d_in, d_out): R hidden units in n_out x n_in blocks.

    (..., d_in) -> (..., d_out) with |V| + |U| weights and as many multiply-adds per token.
    Raises ValueError if the grid does not divide the sizes or a block has more than full rank.
    """

    def __init__(self, d_in, d_out, n_in, n_out, R, bias=True):
        super().__init__()
        blocks = n_in * n_out
        most = min(d_in * n_out, d_out * n_in)  # R if every block has full rank
        in_range = n_in >= 1 and n_out >= 1 and blocks <= R <= most
        fits = in_range and d_in % n_in == 0 and d_out % n_out == 0 and R % blocks == 0
        expected = f"multiples of {n_in}, {n_out} and {blocks}, R from {blocks} to {most}"
        require(fits, f"d_in {d_in}, d_out {d_out}, R {R}: expected {expected}")
        self.d_in = d_in
        self.d_out = d_out
        c = R // blocks
        self.V = nn.Parameter(torch.empty(n_in, n_out, c, d_in // n_in))
        self.U = nn.Parameter(torch.empty(n_out, d_out // n_out, n_in, c))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.guide = None  # class Guide sets guide, alpha and coin
        self.alpha = 0.0
        self.coin = True  # False leaves the guide out of a training step
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Give every diagonal block V[b], U[a] singular values of 1 (orthonormal, table 4)."""
        for block in [*self.V.flatten(1, 2), *self.U.flatten(2)]:
            at_least_single = torch.promote_types(block.dtype, torch.float32)  # no QR in half
            block.copy_(nn.init.orthogonal_(block.to(at_least_single)))
        if self.bias is not None:
            self.bias.zero_()

    def dense_weight(self):
        """Return the equivalent weight (d_out, d_in) of nn.Linear, with the guide if there is one.

        Gradients reach the factors and the guide.
        """
        product = torch.einsum("asbc, bacp -> asbp", self.U, self.V)  # [a, b]: U[a, :, b] V[b, a]
        product = product.reshape(self.d_out, self.d_in)
        if self.guide is None:
            return product
        return self.alpha * self.guide + (1 - self.alpha) * product

    @torch.no_grad()
    def project_(self, weight):
        """Set U and V to the best approximation of weight (d_out, d_in) in Frobenius norm.

        Takes the SVD of each block and shares its singular values evenly between the factors.
        """
        n_in, n_out, c, P = self.V.shape
        S = self.U.shape[1]
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no SVD in half
        blocks = weight.unflatten(1, (n_in, P)).unflatten(0, (n_out, S))  # (n_out, S, n_in, P)
        left, sigma, right = torch.linalg.svd(blocks.transpose(1, 2), full_matrices=False)
        root = sigma[..., :c].sqrt()  # (n_out, n_in, c)
        U = left[..., :c] * root[..., None, :]
        # where sigma is 0 only U becomes 0: if both were, neither could learn
        V = right[..., :c, :] * root.where(root > 0, 1)[..., None]
        self.U.copy_(U.transpose(1, 2))
        self.V.copy_(V.transpose(0, 1))

    def forward(self, x):
        """x: (..., d_in).  Returns (..., d_out)."""
        y = grid_linear(x, self.V, self.U, self.bias)
        if self.guide is None or (self.training and not self.coin):
            return y  # eq. 2: unscaled if the coin leaves the guide out
        y_guide = F.linear(x, self.guide, self.bias)
        return self.alpha * y_guide + (1 - self.alpha) * y  # eq. 1; the two biases add up to one


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
        super().__init__(d_in, d_out, n_blocks, 1, R, bias)


class BlockShuffle(Grid):
    """Monarch (arXiv:2204.00595): n_blocks^2 blocks of rank min(d_in, d_out) / n_blocks^2.

    W can have full rank.
    """

    def __init__(self, d_in, d_out, n_blocks, bias=True):
        # differs from the paper: n_blocks^2 must divide min(d_in, d_out), and there is no second
        # shuffle, which the paper finds to change nothing (appendix A.1)
        super().__init__(d_in, d_out, n_blocks, n_blocks, min(d_in, d_out), bias)


class StructuredFFN(nn.Module):
    """fc2(gelu(fc1 x)).  linear(d_in, d_out) builds each: nn.Linear or partial(LowRank, R=16)."""

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
    fits = t >= 0 and 0 <= n_steps < math.inf
    require(fits, f"expected t and n_steps of at least 0, got {t} and {n_steps}")
    if t >= n_steps:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * t / n_steps))


class Guide:
    """Self-guided training of a model's trainable structured layers (section 2.3, eq. 1 and 2).

        guide = Guide(model, n_steps=steps // 2)  # before the optimizer, which trains the guides
        ...
        optimizer.step()
        guide.step(optimizer)

    The guide of a layer (W in eq. 1) starts as the product of the factors, which leaves the model's
    output as it is; after n_steps it is removed from the model and the optimizer.
    stochastic=True halves its expected compute: a training step uses it with probability alpha.
    To resume: Guide(model, n_steps, t=guide.t as saved), make the optimizer, load the states of
    model and optimizer.
    DistributedDataParallel: wrap the model again when step returns True; with stochastic=True use
    find_unused_parameters=True instead.
    CUDA graphs and copies of the model (AveragedModel) keep the alpha of their step: make them
    after the guide has ended.
    """

    def __init__(self, model, n_steps, stochastic=False, seed=0, t=0):
        layers = [m for m in model.modules() if isinstance(m, Grid)]
        self.layers = [m for m in layers if m.V.requires_grad or m.U.requires_grad]
        require(all(layer.guide is None for layer in layers), "an earlier guide is not finished")
        require(self.layers, "the model has no trainable structured layers")
        self.n_steps = n_steps
        self.stochastic = stochastic
        self.seed = seed
        self.t = int(t)
        self._set_alpha()
        if self.t < n_steps:
            for layer in self.layers:
                layer.guide = nn.Parameter(layer.dense_weight().detach())

    def _set_alpha(self):
        # differs from the paper: one coin per layer and optimizer step, drawn from (seed, t) alone,
        # not one per forward pass: ranks, micro-batches, recomputation and resumed runs agree
        coins = random.Random(f"{self.seed} {self.t}")
        alpha = alpha_at(self.t, self.n_steps)
        for layer in self.layers:
            layer.alpha = alpha
            layer.coin = not self.stochastic or coins.random() < alpha

    def step(self, optimizer):
        """Call after each optimizer step.  Returns True if the guide ends with this step.

        Raises ValueError if the optimizer does not train the guides.
        """
        if self.t >= self.n_steps:
            return False
        guides = {layer.guide for layer in self.layers}
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        how = "the optimizer does not train the guides: make it after Guide(model, ...)"
        require(guides <= trained, how)
        self.t += 1
        self._set_alpha()
        if self.t < self.n_steps:
            return False
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if p not in guides]
            for key in {"params", "param_names"} & set(group):
                group[key] = [group[key][i] for i in kept]
        for layer in self.layers:
            optimizer.state.pop(layer.guide, None)
            # a list of parameters made earlier, as for clipping, still holds the guide
            layer.guide.grad = None
            layer.guide = None
        return True


# ---------------------------------------------------------------- pre-merge, conversion


def replace(model, new):
    """Put new, {module: its replacement}, into model wherever a module occurs.  Returns model."""
    if model in new:
        return new[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[module])
    return model


class Merged(nn.Module):
    """One dense product for up to max_tokens tokens, the factors for more (section 2.2)."""

    def __init__(self, layer, max_tokens):
        super().__init__()
        self.factors = layer
        self.max_tokens = max_tokens
        self.register_buffer("weight", layer.dense_weight().detach())

    def forward(self, x):
        """x: (..., d_in).  Returns (..., d_out)."""
        tokens = x.numel() // x.shape[-1]
        if tokens > self.max_tokens:
            return self.factors(x)
        return F.linear(x, self.weight, self.factors.bias)


def merged(model, max_tokens):
    """Return a frozen copy of model for inference whose structured layers are Merged.

    benchmarks/ffn_latency.py measures up to how many tokens this pays.  The copy does not follow
    model: merge again after further training.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, Grid)]
    return replace(model, {layer: Merged(layer, max_tokens) for layer in layers})


def from_linear(linear, make):
    """Return the layer make(d_in, d_out, bias=...) nearest to an nn.Linear, on its device."""
    with torch.device("meta"):  # without initial values
        layer = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
    fits = isinstance(layer, Grid) and not linear.weight.is_meta
    require(fits, "make must build a structured layer, and the weights of model must have values")
    layer = layer.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    layer.project_(linear.weight)
    layer.train(linear.training).requires_grad_(linear.weight.requires_grad)
    if linear.bias is not None:
        layer.bias.data.copy_(linear.bias.data)
        layer.bias.requires_grad_(linear.bias.requires_grad)
    return layer


def convert(model, make, pick):
    """Replace in place each nn.Linear whose dotted name pick(name) accepts.

    make(d_in, d_out, bias=...) builds the new layer, set to the nearest weight of its kind.
    Returns {name: relative error of its weight in Frobenius norm}.  Raises ValueError, before
    anything is changed, if pick accepts nothing, or a layer whose weight other code reads or sets:
    tied and pruned weights, weight_norm, nn.MultiheadAttention.out_proj, linear1 and linear2 of
    nn.TransformerEncoderLayer.  It cannot see code that reads layer.weight itself (Swin, T5): pick
    must refuse those.  Convert before making the optimizer and hooks.
    """
    readers = Counter()  # modules per parameter: 2 if tied, 0 for the weight of a pruned layer
    for module in model.modules():
        readers.update(module.parameters(recurse=False))
        if isinstance(module, nn.TransformerEncoderLayer):  # its fast path
            readers.update(module.linear1.parameters())
            readers.update(module.linear2.parameters())
    picked = {}
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Linear) and pick(name):
            picked[name] = module
    shared = [n for n, m in picked.items() if type(m) is not nn.Linear or readers[m.weight] != 1]
    require(picked, "pick accepts no nn.Linear inside the model")
    require(not shared, f"pick must refuse them: other code reads or sets the weights of {shared}")
    new = {module: from_linear(module, make) for module in picked.values()}
    errors = {}
    for name, module in picked.items():
        error = (new[module].dense_weight() - module.weight).norm().item()
        errors[name] = error / max(module.weight.norm().item(), 1e-30)
    replace(model, new)
    return errors


# ---------------------------------------------------------------- planner

KINDS = {"lowrank": LowRank, "blockdense": BlockDense, "blockshuffle": BlockShuffle}


def ffn_weights(linear, d_model, d_ff):
    """Count the weights of an FFN without biases: one multiply-add per token each."""
    with torch.device("meta"):
        ffn = StructuredFFN(d_model, d_ff, linear)
    return sum(p.numel() for p in ffn.parameters() if p.dim() > 1)


def round_rank(rank):
    """Round to a multiple of 8, which GPUs prefer; below 64, where 8 is coarse, to an integer."""
    step = 8 if rank >= 64 else 1
    return step * round(rank / step)


def plan_linear(d_model, d_ff, kind, ratio, n_blocks=4):
    """Plan the two layers of an FFN with `ratio` of the dense weights, and so of the FLOPs.

    kind: "dense" (whatever the ratio) or a key of KINDS; n_blocks is for BlockDense.  Returns
    linear(d_in, d_out).  Raises ValueError if the nearest size is more than 15 % off.
    """
    if kind == "dense":
        return nn.Linear
    require(kind in KINDS, f"kind {kind!r}: expected 'dense' or one of {list(KINDS)}")
    narrow, wide = sorted([d_model, d_ff])  # D = d_model, F = d_ff
    # of a LowRank FFN with as many weights; the other kinds follow from it
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
    close = 0.85 * ratio <= got <= 1.15 * ratio  # False for nan
    require(close, f"{kind} {d_model} x {d_ff}, ratio {ratio}: nearest is {plan}, {got:.3f}")
    return linear


def ffn_factory(kind, ratio=0.3125, n_blocks=4):
    """Return ffn(d_model, d_ff) for one Transformer, which calls it once per block, in order.

    The first block is dense (section 4.1), the others have `ratio` of the weights; the default is
    rank 192 of a LowRank FFN of 768 x 3072.
    """
    first = True

    def ffn(d_model, d_ff):
        nonlocal first
        linear = nn.Linear if first else plan_linear(d_model, d_ff, kind, ratio, n_blocks)
        first = False
        return StructuredFFN(d_model, d_ff, linear)

    return ffn


# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max|a - b| / max|b|."""
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


def paper_matrix(layer):
    """Return the matrix (d_out, d_in) of a layer by the paper's definition, in numpy."""
    V = layer.V.detach().double().cpu().numpy()
    U = layer.U.detach().double().cpu().numpy()
    n_in, n_out, c, P = V.shape
    if n_out == 1:
        return block_dense_ref(V[:, 0], U.reshape(layer.d_out, n_in * c))
    # row q of the paper's V[b] is V[b, q % B, q // B]
    V = V.swapaxes(1, 2).reshape(n_in, c * n_out, P)
    W = block_shuffle_ref(V, U.reshape(n_out, -1, n_in * c))
    return shuffle_ref(W, n_out)  # undoes the second shuffle


def check_layer(layer, x):
    """Yield (name, error): every form of a layer against the paper's matrix."""
    W = torch.from_numpy(paper_matrix(layer))
    x64 = x.double().cpu()
    bias = layer.bias.detach().double().cpu()
    y = F.linear(x64, W, bias)
    yield "einsum", rel_err(grid_linear_slow(x, layer.V, layer.U), x64 @ W.T)
    yield "forward", rel_err(layer(x), y)
    yield "dense weight", rel_err(layer.dense_weight(), W)
    yield "merged", rel_err(merged(layer, max_tokens=len(x))(x), y)
    Guide(layer, n_steps=10)  # adds layer.guide
    nn.init.normal_(layer.guide)
    layer.alpha = 0.3
    guide = F.linear(x64, layer.guide.double().cpu(), bias)
    yield "guided (eq. 1)", rel_err(layer(x), 0.3 * guide + 0.7 * y)


def self_check(dtype=torch.float64, device="cpu"):
    """Return a list of (name, error, limit).  Seeds torch with 0."""
    torch.manual_seed(0)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    rows = []
    for layer in (LowRank(24, 36, 10), BlockDense(24, 36, 12, 4), BlockShuffle(36, 48, 3)):
        layer = layer.to(device, dtype)
        for p in layer.parameters():
            nn.init.normal_(p)
        x = torch.randn(7, layer.d_in, device=device, dtype=dtype)
        for name, error in check_layer(layer, x):
            rows.append((f"{type(layer).__name__}: {name}", error, limit))
    return rows


# ---------------------------------------------------------------- demo, command line


def demo(steps=600, lr=8e-3):
    """Fit a random LowRank FFN by another: without a guide, then with one in the first half.

    Returns both errors.
    """

    errors = []
    for guided_steps in (0, steps // 2):
        torch.manual_seed(0)
        teacher = StructuredFFN(64, 256, partial(LowRank, R=16)).requires_grad_(False)
        student = StructuredFFN(64, 256, partial(LowRank, R=16))
        for layer in (teacher.fc1, teacher.fc2):
            nn.init.normal_(layer.V, std=2 * layer.d_in**-0.5)
            nn.init.normal_(layer.U, std=0.5)
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
