"""Structured feed-forward layers: two small batched products in place of one large matrix.

Structured feedforward layers for language models and self-guided training: Wei, Moalla, Pascanu,
Gulcehre, NeurIPS 2024, arXiv:2406.16450.

Each layer of the paper cuts W (M, N) into a grid of n_out x n_in blocks (S, P), S = M / n_out,
P = N / n_in, and makes every block a product of its own, of rank c:

    W[a, b] = U[a][:, b c : (b+1) c]  V[b][a c : (a+1) c]        (S, P) = (S, c) x (c, P)

    name          grid     rank c            weights
    LowRank       1 x 1    R                 R (N + M)
    BlockDense    1 x B    R / B             R (M + N / B)
    BlockShuffle  B x B    min(N, M) / B^2   min(N, M) (N + M) / B        (Monarch)

    paper         code                     shape
    N, M, B       d_in, d_out, n_blocks
    blkdiag(V)    V                        (n_in, n_out c, P), n_in blocks of n_out c rows
    blkdiag(U)    U                        (n_out, S, n_in c), n_out blocks of S rows
    W of eq. 1    W                        (d_out, d_in), the guide; None unless guided
    rows of U     S                        d_out / n_out, of the blocks of U[a]
    alpha         alpha                    weight of the guide, falls from 1 to 0 in training

Departures, marked on their lines: BlockShuffle leaves out the second shuffle unless asked (the
paper finds that it changes nothing, appendix A.1) and wants B^2 to divide min(N, M); one coin an
optimiser step for stochastic guiding. Not included: GPU kernels of its own, a trainer.

    python structured_ffn.py            checks, demo and timing, about 30 s on one core
    python structured_ffn.py --check    checks alone, about 5 s

Expected: every check ok; in the demo self-guided training ends with less than half the error of
plain training; in the timing the structured layers take 0.3-0.5 of the dense time.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# ---------------------------------------------------------------- reference: numpy, the matrices


def grid_matrix_ref(V, U):
    """W[a, b] = U[a][:, b c : (b+1) c]  V[b][a c : (a+1) c, :] for each block of the grid.

    V: (n_in, n_out c, P), U: (n_out, S, n_in c).  Returns (n_out S, n_in P).
    """
    (n_in, _, P), (n_out, S, bc) = V.shape, U.shape
    c = bc // n_in
    W = np.zeros((n_out, S, n_in, P))
    for a in range(n_out):
        for b in range(n_in):
            W[a, :, b] = U[a][:, b * c : (b + 1) * c] @ V[b][a * c : (a + 1) * c]
    return W.reshape(n_out * S, n_in * P)


def low_rank_ref(V, U):
    """W = U V (section 2.1).  V: (R, N), U: (M, R).  Returns (M, N)."""
    return U @ V


def block_dense_ref(V, U):
    """W = U blkdiag(V) (section 2.1).  V: (B, R / B, N / B), U: (M, R).  Returns (M, N)."""
    parts = np.hsplit(U, len(V))  # (M, R / B) each
    return np.hstack([part @ block for part, block in zip(parts, V, strict=True)])


def block_shuffle_ref(V, U):
    """W = shuffle blkdiag(U) shuffle blkdiag(V) (section 2.1), as printed, with both shuffles.

    V: (B, Q, N / B), U: (B, S, Q), Q = min(N, M) / B.  A shuffle takes what stood at (r, l), l < B,
    to (l, r).  Returns (B S, N).
    """
    (B, Q, P), S = V.shape, U.shape[1]
    W = np.zeros((S, B, B, P))  # output s B + l, input k P + p
    for k in range(B):
        for q in range(Q):
            r, l = divmod(k * Q + q, B)  # hidden number k Q + q becomes input r of block l
            W[:, l, k] += np.outer(U[l, :, r], V[k, q])
    return W.reshape(S * B, B * P)


def guided_ref(x, W, W_structured, bias, alpha):
    """o = alpha W x + (1 - alpha) U V x + bias (eq. 1).  x: (T, N), W: (M, N).  Returns (T, M)."""
    return alpha * (x @ W.T) + (1 - alpha) * (x @ W_structured.T) + bias


# ---------------------------------------------------------------- fast: torch, two products


def grid_linear(x, V, U, bias=None):
    """y = W x + bias without W: every V[b] on its part of x, a regrouping, every U[a].

    x: (..., n_in P), V: (n_in, n_out c, P), U: (n_out, S, n_in c).  Returns (..., n_out S).
    T tokens cost 2 T (|V| + |U|) FLOPs; the regrouping copies T n_out n_in c numbers, c at a time.
    Not for torch.vmap over U or the bias alone when n_out > 1.
    """
    (n_in, _, P), (n_out, S, _), lead = V.shape, U.shape, x.shape[:-1]
    if n_in == n_out == 1:  # squeeze: the backward of V[0] would fill a tensor with zeros first
        return F.linear(F.linear(x, V.squeeze(0)), U.squeeze(0), bias)
    x = x.reshape(-1, n_in, P)  # (T, n_in, P)
    z = torch.bmm(x.transpose(0, 1), V.mT).unflatten(2, (n_out, -1))  # (n_in, T, n_out, c)
    z = z.permute(2, 1, 0, 3).flatten(2)  # (n_out, T, n_in c)
    if n_out == 1:
        return F.linear(z.squeeze(0), U.squeeze(0), bias).reshape(*lead, S)
    # (n_out, T, S) in the memory of (T, n_out, S), so that the last line copies nothing
    y = z.new_empty_strided((n_out, x.shape[0], S), (S, n_out * S, 1))
    U = U if z.dtype == V.dtype else U.to(z.dtype)  # autocast does not cast for products in place
    if bias is None:
        y = y.baddbmm_(z, U.mT, beta=0)
    else:
        y = y.copy_(bias.view(n_out, 1, S)).baddbmm_(z, U.mT)
    return y.transpose(0, 1).reshape(*lead, n_out * S)


# torch's counter of FLOPs knows this product, but not its form in place
flop_registry.setdefault(torch.ops.aten.baddbmm_, flop_registry[torch.ops.aten.baddbmm])


def shuffle(x, n, dim=0):
    """The paper's shuffle along dim, read as n rows of k: what stood at (i, j) goes to (j, i)."""
    return x.unflatten(dim, (n, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def paper_to_grid(V, U):
    """Factors of the paper's BlockShuffle -> the same matrix on the grid with shuffle_out=True.

    V: (B, Q, P), U: (B, S, Q), Q divisible by B.  Hidden number k Q + q is input k (Q / B) + q // B
    of block q mod B: sorting V's rows by q mod B leaves U as it is.
    """
    B, Q, _ = V.shape
    _check_divides(B, "n_blocks", Q=Q)
    return shuffle(V, Q // B, dim=1), U


def grid_to_paper(V, U):
    """The inverse of paper_to_grid."""
    return shuffle(V, len(V), dim=1), U


# ---------------------------------------------------------------- layers


def _check_divides(k, what, **sizes):
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{what} {k!r}: expected a whole number, 1 or more")
    for name, n in sizes.items():
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} {n!r}: expected a whole number, 1 or more")
        if n % k:
            low = n // k * k
            near = f"{low} and {low + k} are" if low > 0 else f"multiples of {k} are"
            raise ValueError(f"{name} {n} is not divisible by {what} {k}: {near}")


class Grid(nn.Module):
    """Takes the place of nn.Linear(d_in, d_out): n_out x n_in blocks, each a product of rank c.

    (..., d_in) -> (..., d_out) by |V| + |U| weights and as many multiply-adds a token.
    Raises ValueError when the grid does not divide the sizes or c exceeds a block's smaller side.
    """

    def __init__(self, d_in, d_out, n_in, n_out, c, bias=True, shuffle_out=False):
        super().__init__()
        _check_divides(n_in, "the number of blocks", d_in=d_in)
        _check_divides(n_out, "the number of blocks", d_out=d_out)
        P, S = d_in // n_in, d_out // n_out
        if not isinstance(c, int) or not 1 <= c <= min(P, S):
            raise ValueError(f"rank {c} of a {S} x {P} block must be between 1 and {min(P, S)}")
        self.d_in, self.d_out, self.n_in, self.n_out, self.c = d_in, d_out, n_in, n_out, c
        self.shuffle_out = shuffle_out
        self.V = nn.Parameter(torch.empty(n_in, n_out * c, P))
        self.U = nn.Parameter(torch.empty(n_out, S, n_in * c))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        # Set by Guide: W and alpha of eq. 1; coin False leaves the guide out of a training step.
        self.register_parameter("W", None)
        self.alpha, self.coin = 0.0, True
        self._merged, self.threshold = None, 0  # see merge
        if not self.V.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Every V[b] and U[a] gets singular values 1 (table 4, orthonormal), the bias 0."""
        for block in (*self.V, *self.U):
            block.copy_(nn.init.orthogonal_(torch.empty_like(block, dtype=_exact(block.dtype))))
        self._reset_bias()

    def _reset_bias(self):
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self):
        return f"{self.d_in}, {self.d_out}, grid {self.n_out} x {self.n_in}, c {self.c}"

    def dense_weight(self):
        """The (d_out, d_in) matrix that the factors stand for, with gradient."""
        U = self.U.unflatten(2, (self.n_in, self.c))  # (n_out, S, n_in, c)
        V = self.V.unflatten(1, (self.n_out, self.c))  # (n_in, n_out, c, P)
        with torch.autocast(U.device.type, enabled=False):  # what is kept has the type of U
            W = torch.einsum("asbc,bacp->asbp", U, V).reshape(self.d_out, self.d_in)
        return shuffle(W, self.n_out) if self.shuffle_out else W

    @torch.no_grad()
    def project_(self, weight):
        """Set U, V to the best approximation of `weight` (d_out, d_in) in Frobenius norm.

        By an SVD of each block, its singular values shared evenly between the factors.
        """
        n_out, n_in, c = self.n_out, self.n_in, self.c
        if weight.shape != (self.d_out, self.d_in):
            raise ValueError(f"weight {tuple(weight.shape)}, expected {(self.d_out, self.d_in)}")
        weight = weight.to(_exact(weight.dtype))
        if self.shuffle_out:
            weight = shuffle(weight, self.d_out // n_out)  # undo the second shuffle
        blocks = weight.reshape(n_out, -1, n_in, self.d_in // n_in).transpose(1, 2)
        left, sigma, right = torch.linalg.svd(blocks, full_matrices=False)  # of (n_out, n_in, S, P)
        root = sigma[..., :c].sqrt()  # (n_out, n_in, c)
        U = left[..., :c] * root[..., None, :]
        V = right[..., :c, :] * root.where(root > 0, 1)[..., None]  # U = V = 0 could never learn
        self.U.copy_(U.transpose(1, 2).reshape(self.U.shape))  # (n_out, n_in, S, c) -> U
        self.V.copy_(V.transpose(0, 1).reshape(self.V.shape))  # (n_out, n_in, c, P) -> V
        return self

    def structured(self, x):
        """U V x + bias, always by the factors."""
        if not self.shuffle_out:
            return grid_linear(x, self.V, self.U, self.bias)
        bias = None if self.bias is None else shuffle(self.bias, self.U.shape[1])
        y = grid_linear(x, self.V, self.U, bias)  # (..., a S + s)
        return shuffle(y, self.n_out, dim=y.dim() - 1)  # (..., s n_out + a)

    def forward(self, x):
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x {tuple(x.shape)}: the last size must be d_in {self.d_in}")
        if self._merged is not None and self._merged_serves(x):
            return F.linear(x, self._merged[0], self.bias)
        y = self.structured(x)
        if self.W is None or (self.training and not self.coin):
            return y  # eq. 2: unscaled when the coin leaves the guide out
        # eq. 1; the bias stands in both terms, whose weights add up to 1
        return torch.lerp(y, F.linear(x, self.W, self.bias), self.alpha)

    def merge(self, threshold=None):
        """Keep the product U V beside the factors, for calls of at most `threshold` tokens (2.2).

        threshold None: measured here, once a shape and process; 0 frees it (d_out d_in numbers).
        Serves evaluation without gradients.  Dropped by train(), by a call with gradients enabled,
        and by any change of U or V: optimiser step, load_state_dict, other device or type; copies
        go without.  (Writes through .data, numpy or to what was made under inference_mode escape
        torch's counter: call merge() again.)
        Returns the threshold.  Raises ValueError while the layer is guided.
        """
        if self.W is not None:
            raise ValueError("a guided layer cannot be merged: finish the guide first")
        with torch.no_grad():
            product = self.dense_weight()
        self.threshold = self._measure(product) if threshold is None else threshold
        # what it was made of; p.detach() keeps that memory, so that nothing else comes to lie there
        factors = [(p, p.detach(), _writes(p)) for p in (self.U, self.V)]
        self._merged = (product, factors) if self.threshold > 0 else None
        _count_fused_writes()
        return self.threshold

    def _merged_serves(self, x):
        """Whether x goes through the merged form; frees it when it may be out of date."""
        if torch.compiler.is_compiling():
            return False
        same = all(
            p is q and q.data_ptr() == kept.data_ptr() and _writes(q) == n
            for p, (q, kept, n) in zip((self.U, self.V), self._merged[1], strict=True)
        )
        if self.training or torch.is_grad_enabled() or not same:
            self._merged = None
            return False
        return x.numel() <= self.threshold * self.d_in

    def train(self, mode=True):
        if mode:
            self._merged = None
        return super().train(mode)

    def __getstate__(self):  # copies and files go without: a loaded tensor counts from new
        return self.__dict__ | {"_merged": None}

    @torch.no_grad()
    def _measure(self, W):
        """Tokens, a power of two up to 4096, up to which the merged form W is the faster one."""
        best = 0
        key = (*self.V.shape, *self.U.shape, self.shuffle_out)
        key = (*key, W.dtype, W.device, torch.get_num_threads())
        if key not in _THRESHOLDS:
            for T in (2**k for k in range(13)):
                x = W.new_zeros(T, self.d_in)
                dense = partial(F.linear, x, W, self.bias)
                merged, factors = seconds([dense, partial(self.structured, x)])
                if merged > factors:
                    break
                best = T
            _THRESHOLDS[key] = best
        return _THRESHOLDS[key]


_THRESHOLDS: dict[tuple, int] = {}  # measured by Grid.merge: shape, type, device, threads -> tokens


def _writes(p):
    """torch's counter of writes to a tensor, which inference tensors lack."""
    return 0 if p.is_inference() else p._version


@cache  # once a process
def _count_fused_writes():
    """Fused optimisers write past torch's counter of writes: count what every step writes."""
    register_optimizer_step_post_hook(
        lambda optimizer, *_: [increment_version(g["params"]) for g in optimizer.param_groups]
    )


def _exact(dtype):
    """The type to factorise a matrix in: there are no SVD and QR in half precision."""
    return torch.promote_types(dtype, torch.float32)


class LowRank(Grid):
    """W = U V; starts as the best rank R approximation of a matrix drawn from N(0, std^2)."""

    def __init__(self, d_in, d_out, R, bias=True, std=0.02):
        self.std = std
        super().__init__(d_in, d_out, 1, 1, R, bias)

    def reset_parameters(self):
        self.project_(self.std * torch.randn(self.d_out, self.d_in, device=self.V.device))
        self._reset_bias()


class BlockDense(Grid):
    """W = U blkdiag(V): each of n_blocks parts of x gives R / n_blocks of the R hidden numbers."""

    def __init__(self, d_in, d_out, R, n_blocks, bias=True):
        _check_divides(n_blocks, "n_blocks", R=R)
        super().__init__(d_in, d_out, n_blocks, 1, R // n_blocks, bias)


class BlockShuffle(Grid):
    """Monarch: n_blocks x n_blocks blocks of rank min(d_in, d_out) / n_blocks^2, of full rank."""

    def __init__(self, d_in, d_out, n_blocks, bias=True, shuffle_out=False):
        # differs from the paper: no second shuffle unless shuffle_out; n_blocks^2 has to divide
        narrow = min(d_in, d_out)
        _check_divides(n_blocks**2, "n_blocks squared", **{"min(d_in, d_out)": narrow})
        super().__init__(d_in, d_out, n_blocks, n_blocks, narrow // n_blocks**2, bias, shuffle_out)


KINDS = {"lowrank": LowRank, "blockdense": BlockDense, "blockshuffle": BlockShuffle}

# ---------------------------------------------------------------- self-guided training


def alpha_at(t, n_steps):
    """Weight of the guide in step t: (1 + cos(pi t / n_steps)) / 2, then 0 (section 2.3)."""
    return 0.5 * (1 + math.cos(math.pi * t / n_steps)) if t < n_steps else 0.0


class Guide:
    """Self-guided training of every Grid layer of a model (section 2.3, eq. 1 and 2).

        guide = Guide(model, n_steps=steps // 2)        # before the optimiser, which must see W
        ...; loss.backward(); optimizer.step(); guide.step(optimizer)

    W starts at U V, so the first output does not depend on alpha. After n_steps W, its gradient and
    its optimiser state are freed.  stochastic: compute the guide with probability alpha only, which
    halves its cost (DistributedDataParallel then needs find_unused_parameters).  Evaluation is by
    eq. 1; a copy of the model keeps the alpha of its moment.  Resume: Guide, guide.load_state_dict,
    optimiser, then the states of model, optimiser.
    ValueError: no Grid layer, one that is guided already, an optimiser that does not know W.
    """

    def __init__(self, model, n_steps, stochastic=False, seed=0):
        self.layers = [layer for layer in model.modules() if isinstance(layer, Grid)]
        if not n_steps >= 1 or not self.layers:
            raise ValueError(f"n_steps {n_steps}, {len(self.layers)} Grid layers: at least 1")
        if any(layer.W is not None for layer in self.layers):
            raise ValueError("the model is guided already: finish that guide first")
        self.n_steps, self.stochastic, self.seed, self.t = n_steps, stochastic, seed, 0
        for layer in self.layers:
            layer.W, layer._merged = nn.Parameter(layer.dense_weight().detach().clone()), None
        self._set_alpha()

    def _set_alpha(self, optimizer=None):
        """Give the layers alpha and their coins of step t, or finish."""
        if self.t >= self.n_steps:
            return self.finish(optimizer)
        # differs from the paper: one coin a layer and optimiser step, drawn from (seed, t) alone,
        # not one a forward pass: ranks, micro-batches, recomputation and resumed runs then agree
        coins, alpha = random.Random(f"{self.seed} {self.t}"), alpha_at(self.t, self.n_steps)
        for layer in self.layers:
            layer.alpha = alpha
            layer.coin = (not self.stochastic) or coins.random() < alpha

    def step(self, optimizer=None):
        """Call after each optimiser step."""
        W = self.layers[0].W
        if optimizer and W is not None:
            if not any(W is p for group in optimizer.param_groups for p in group["params"]):
                raise ValueError("the optimiser does not train W: make it after the guide")
        self.t += 1
        self._set_alpha(optimizer)

    def finish(self, optimizer=None):
        """From here on the layers are U V alone; W leaves the model and the optimiser."""
        guides = {id(layer.W) for layer in self.layers}
        for group in optimizer.param_groups if optimizer else ():
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in guides]
            for name in {"params", "param_names"} & group.keys():
                group[name] = [group[name][i] for i in kept]
        for layer in self.layers:
            if optimizer:
                optimizer.state.pop(layer.W, None)
            layer.W, layer.alpha, layer.coin = None, 0.0, True

    def state_dict(self):
        return {k: getattr(self, k) for k in ("t", "n_steps", "stochastic", "seed")}

    def load_state_dict(self, state):
        if state["t"] < state["n_steps"] and any(layer.W is None for layer in self.layers):
            raise ValueError(
                f"this guide is finished, the state is of step {state['t']}: make anew"
            )
        for k in self.state_dict():
            setattr(self, k, state[k])
        self._set_alpha()


# ---------------------------------------------------------------- FFN, planner, conversion


class StructuredFFN(nn.Module):
    """fc2(gelu(fc1 x)); gated: fc2(silu(g) u) with [g, u] = fc1 x (SwiGLU).  (..., D) -> (..., D).

    linear(d_in, d_out) builds both matrices: nn.Linear, partial(LowRank, R=16), match(...).
    """

    def __init__(self, d_model, d_ff, linear=nn.Linear, gated=False):
        super().__init__()
        self.gated = gated
        self.fc1 = linear(d_model, 2 * d_ff if gated else d_ff)
        self.fc2 = linear(d_ff, d_model)

    def forward(self, x):
        h = self.fc1(x)  # (..., D) -> (..., F), gated (..., 2 F)
        if self.gated:
            g, u = h.chunk(2, dim=-1)
            return self.fc2(F.silu(g) * u)
        return self.fc2(F.gelu(h, approximate="tanh"))


def _round_rank(rank):
    """The multiple of 8 nearest to rank, or of 4, 2, 1: the first that is within 2 %."""
    near = [k * round(rank / k) for k in (8, 4, 2, 1)]
    return next((n for n in near if abs(n - rank) <= 0.02 * rank), near[-1])


def match(d_model, d_ff, kind, ratio, n_blocks=4):
    """linear(d_in, d_out) of a kind ("dense", a key of KINDS) whose FFN has `ratio` of the weights.

    n_blocks: of BlockDense.  The ranks c are multiples of 8, 4 or 2 where that moves them by 2 %
    at most: GPUs want it.  Raises ValueError when the nearest size is more than 15 % off.
    """
    if kind == "dense":
        return nn.Linear
    if kind not in KINDS or not 0 < ratio <= 1:
        raise ValueError(f"kind {kind!r}, ratio {ratio}: expected {[*KINDS]} and 0 < ratio <= 1")
    rank = ratio * (d_model * d_ff) / (d_model + d_ff)  # LowRank has 2 R (D + F) of 2 D F weights
    if kind == "lowrank":
        plan = {"R": min(max(1, _round_rank(rank)), d_model, d_ff)}
    elif kind == "blockdense":
        _check_divides(n_blocks, "n_blocks", d_model=d_model, d_ff=d_ff)
        c = 2 * rank / (n_blocks + 1)  # BlockDense has R (D + F) (1 + 1/B) weights, c = R / B
        c = min(max(1, _round_rank(c)), d_model // n_blocks, d_ff // n_blocks)
        plan = {"R": c * n_blocks, "n_blocks": n_blocks}
    else:
        narrow, wide = sorted((d_model, d_ff))
        fits = [b for b in range(1, narrow + 1) if narrow % b**2 == 0 and wide % b == 0]
        # BlockShuffle has 2 min(D, F) (D + F) / B weights
        plan = {"n_blocks": min(fits, key=lambda b: abs(1 / b - rank / narrow))}
    linear = partial(KINDS[kind], **plan)
    got = ffn_weights(linear, d_model, d_ff) / (2 * d_model * d_ff)
    if abs(got - ratio) > 0.15 * ratio:
        wanted = f"{kind} FFN {d_model} x {d_ff}, ratio {ratio}"
        raise ValueError(f"{wanted}: the nearest, {plan}, has {got:.3f}")
    return linear


def ffn_factory(kind, ratio=0.3125, n_blocks=4):
    """ffn(config, i) for a Transformer that takes factories: block 0 dense, the others `kind`."""

    def build(config, i):
        d_ff = config.d_ff or 4 * config.d_model
        linear = match(config.d_model, d_ff, kind if i else "dense", ratio, n_blocks)
        return StructuredFFN(config.d_model, d_ff, linear)

    return build


def from_linear(linear, make):
    """The layer make(d_in, d_out, bias=...) nearest to an nn.Linear, on its device, in its type."""
    with torch.device("meta"):
        layer = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
    if not isinstance(layer, Grid):
        raise ValueError(f"make gives a {type(layer).__name__}, expected a structured layer")
    layer = layer.to(linear.weight.dtype).to_empty(device=linear.weight.device)
    layer.project_(linear.weight)
    if linear.bias is not None:
        layer.bias.data.copy_(linear.bias.data)
    return layer.train(linear.training).requires_grad_(linear.weight.requires_grad)


def convert(model, make, pick):
    """Replace in place each nn.Linear whose dotted name pick(name) accepts.

    Returns {name: relative error of its matrix in Frobenius norm}.  ValueError, and the model as it
    was: nothing accepted, the model is an nn.Linear itself, or a weight has a second owner (tied).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {n: m for n, m in modules.items() if n and isinstance(m, nn.Linear) and pick(n)}
    if not chosen:
        raise ValueError("pick accepted none of the nn.Linear layers inside the model")
    weights = [id(p) for m in set(modules.values()) for p in m.parameters(recurse=False)]
    if tied := [n for n, m in chosen.items() if weights.count(id(m.weight)) > 1]:
        raise ValueError(f"the weight of {', '.join(tied)} belongs to another module as well")
    new = {m: from_linear(m, make) for m in set(chosen.values())}  # all, before one is replaced
    errors = {}
    for name, old in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new[old])
        size = old.weight.norm().clamp_min(torch.finfo(old.weight.dtype).tiny)
        errors[name] = ((new[old].dense_weight() - old.weight).norm() / size).item()
    return errors


# ---------------------------------------------------------------- language model, counters


@dataclass(frozen=True)
class LMConfig:
    """linear(d_in, d_out) builds the FFN matrices of all blocks but the first (section 4.1)."""

    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    d_ff: int | None = None  # 4 d_model
    d_head: int | None = None  # d_model / n_heads; smaller for "wide and structured"
    n_kv_heads: int | None = None  # n_heads
    vocab_size: int = 256
    linear: Callable = nn.Linear

    def sizes(self):
        """Returns (d_ff, d_head, n_kv_heads) with the defaults filled in."""
        if self.d_head is None:
            _check_divides(self.n_heads, "n_heads", d_model=self.d_model)
        d_head = self.d_head or self.d_model // self.n_heads
        n_kv_heads = self.n_kv_heads or self.n_heads
        _check_divides(n_kv_heads, "n_kv_heads", n_heads=self.n_heads)
        _check_divides(2, "2 (RoPE turns pairs)", d_head=d_head)
        return self.d_ff or 4 * self.d_model, d_head, n_kv_heads


def rope(x, base=10000.0):
    """Turn the pair (x[i], x[i + E/2]) at position l by l base^(-2i/E).  x: (B, H, L, E)."""
    L, half = x.shape[-2], x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(L, dtype=torch.float64)[:, None] * rate  # (L, E/2)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """norm, causal attention, residual, norm, FFN, residual.  (B, L, D) -> (B, L, D)."""

    def __init__(self, config, i):
        super().__init__()
        D, H, (d_ff, E, G) = config.d_model, config.n_heads, config.sizes()
        self.d_head, self.heads = E, [H, G, G]
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, (H + 2 * G) * E), nn.Linear(H * E, D)
        self.ffn = StructuredFFN(D, d_ff, config.linear if i else nn.Linear)

    def forward(self, x):
        x_heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.d_head))  # (B, L, H + 2 G, E)
        q, k, v = x_heads.transpose(1, 2).split(self.heads, dim=1)  # (B, H, L, E), (B, G, L, E)
        k, v = (t.repeat_interleave(self.heads[0] // self.heads[1], dim=1) for t in (rope(k), v))
        y = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)  # (B, H, L, E)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class LM(nn.Module):
    """Tokens (B, L) int64 -> logits (B, L, vocab_size); the head is the embedding (section 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, tokens):
        x = self.embed(tokens)  # (B, L) -> (B, L, D)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)  # (B, L, D) x (D, vocab)


def ffn_weights(linear, d_model, d_ff):
    """Weights of the two matrices of one FFN, without biases, as the paper counts."""
    with torch.device("meta"):
        ffn = StructuredFFN(d_model, d_ff, linear)
    return sum(p.numel() for p in ffn.parameters() if p.dim() > 1)


def count(config, L=1024):
    """What the paper counts: matrices alone, attention in full, backward = 2 forward.

    L: tokens a sequence.  Returns exact integers: weights of all FFNs ("ffn") and of the model
    ("params"), training FLOPs a token ("flops").
    """
    (d_ff, E, G), D, n, H = config.sizes(), config.d_model, config.n_layers, config.n_heads
    ffn = ffn_weights(nn.Linear, D, d_ff) + (n - 1) * ffn_weights(config.linear, D, d_ff)
    params = ffn + n * 2 * D * (H + G) * E + config.vocab_size * D  # q, out (D, H E), k, v (D, G E)
    macs = params + n * 2 * L * H * E  # a token: the matrices, then scores and mixing over L tokens
    return {"ffn": ffn, "params": params, "flops": 3 * 2 * macs}


def guided_fraction(structured, dense, L=1024):
    """The share f of steps to guide and to repeat at the cost of training `dense` (section 4.4).

    (1 + f) F_s + f G / 2 = F_d;  G: FLOPs of the guides, halved by the mean of alpha (stochastic).
    """
    F_s, F_d = count(structured, L)["flops"], count(dense, L)["flops"]
    guide = ffn_weights(nn.Linear, structured.d_model, structured.sizes()[0])  # of one block
    G = 6 * (structured.n_layers - 1) * guide
    return (F_d - F_s) / (F_s + 0.5 * G)


# Sizes of the paper and their optimiser steps of 512 sequences of 1024 tokens (section 4.1)
PUBLISHED = {
    "s": (LMConfig(768, 12, 12, vocab_size=32000), 4196),
    "m": (LMConfig(1024, 24, 16, vocab_size=32000), 12779),
    "l": (LMConfig(1536, 24, 12, vocab_size=32000), 27809),
    "xl": (LMConfig(2048, 24, 16, vocab_size=32000), 48637),
}

# ---------------------------------------------------------------- self-check


def rel_err(a, b):
    """max |a - b| / max |b|, with max |b| > 0."""
    a, b = (np.asarray(t.detach().double().cpu() if torch.is_tensor(t) else t) for t in (a, b))
    if a.shape != b.shape or not np.abs(b).max() > 0:
        raise ValueError(f"shapes {a.shape}, {b.shape}; largest expected {np.abs(b).max()}")
    return float(np.abs(a - b).max() / np.abs(b).max())


def _numpy(*tensors):
    return [t.detach().double().cpu().numpy() for t in tensors]


def _check_layer(layer, reference, x):
    """Returns [(what, error)] of one layer against reference(V, U), its matrix by numpy."""
    W = torch.from_numpy(reference(*_numpy(layer.V, layer.U))).to(x)
    want = x @ W.T + layer.bias
    with torch.no_grad():
        unrecorded = layer(x)
        layer.eval().merge(threshold=len(x))
        merged = layer(x)
    y = layer.train()(x)
    leaves, g = [x, layer.V, layer.U], torch.cos(torch.arange(y.numel(), device=x.device)).to(x)
    outputs = (y, x @ layer.dense_weight().T)
    grads = [torch.autograd.grad(out, leaves, g.view_as(y)) for out in outputs]
    with FlopCounterMode(display=False) as flops:
        layer(x)
    Guide(layer, 10)
    mixes = []
    for layer.alpha in (0.0, 1.0, 0.3):  # stays 0.3 below
        mixes.append(layer(x))
    with torch.no_grad():
        layer.W.mul_(-0.5)  # away from the start, so that the guide shows
    formula = 2 * len(x) * (layer.V.numel() + layer.U.numel())
    guided = guided_ref(*_numpy(x, layer.W, W, layer.bias), layer.alpha)
    return [
        ("forward, nothing recorded == numpy", rel_err(unrecorded, want)),
        ("merged == numpy", rel_err(merged, want)),
        ("forward == numpy", rel_err(y, want)),
        # np.max, as max() may pass over a nan
        ("gradients of x, V, U == dense", float(np.max([*map(rel_err, *grads)]))),
        ("FLOPs == formula", rel_err(flops.get_total_flops(), formula)),
        ("guided start, any alpha == unguided", float(np.max([rel_err(y, want) for y in mixes]))),
        ("guided == numpy", rel_err(layer(x), guided)),
    ]


LIMITS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}  # of every check, by type


def self_check(dtype=torch.float64, device="cpu"):
    """Returns [(name, error, limit)]: each fast step against the slower one, in `dtype`."""
    limit = LIMITS[str(dtype).removeprefix("torch.")]
    torch.manual_seed(0)

    def both_shuffles(V, U):  # the reference takes the paper's factors
        return block_shuffle_ref(*_numpy(*grid_to_paper(torch.tensor(V), torch.tensor(U))))

    rows = []
    for name, layer, reference in (
        ("LowRank", LowRank(24, 36, 10, std=1.0), lambda V, U: low_rank_ref(V[0], U[0])),
        ("BlockDense", BlockDense(24, 36, 12, 4), lambda V, U: block_dense_ref(V, U[0])),
        ("BlockShuffle", BlockShuffle(36, 48, 3), grid_matrix_ref),
        ("both shuffles", BlockShuffle(32, 16, 2, shuffle_out=True), both_shuffles),
    ):
        layer = layer.to(device, dtype)
        nn.init.normal_(layer.bias)
        x = torch.randn(7, layer.d_in, device=device, dtype=dtype, requires_grad=True)
        errors = _check_layer(layer, reference, x)
        W = layer.dense_weight().detach()
        errors.append(("SVD of its own matrix", rel_err(layer.project_(W).dense_weight(), W)))
        rows += [(f"{name}: {what}", error, limit) for what, error in errors]
    xl, steps = PUBLISHED["xl"]
    flops = count(xl)["flops"] * steps * 512 * 1024
    return [*rows, ("training FLOPs of xl == 2.10e20", rel_err(flops, 2.10e20), 2e-3)]


# ---------------------------------------------------------------- demo, timing, command line


class Residual(nn.Module):
    """x + FFN(norm(x)): the demo's network is three of them.  (T, D) -> (T, D)."""

    def __init__(self, d_model, linear):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.ffn = StructuredFFN(d_model, 4 * d_model, linear)

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def teacher_student(linear, teacher=None, guide=None, lr=4e-3, steps=2000, seed=0):
    """Fit a frozen random network of three FFNs; the test error over the variance of what they add.

    linear, teacher: builders of the student's and the teacher's matrices (None: the same).  guide:
    None, "deterministic" (eq. 1), "stochastic" (eq. 2), over the first half.  AdamW, cosine to 0.
    """
    torch.manual_seed(seed)
    target, student = (
        nn.Sequential(*(Residual(64, make) for _ in range(3)))
        for make in (teacher or linear, linear)
    )
    for p in target.requires_grad_(False).parameters():
        if p.dim() > 1:  # a unit input leaves as a unit output
            p.normal_(std=p.shape[-1] ** -0.5)
    if guide not in (None, "deterministic", "stochastic"):
        raise ValueError(f"guide {guide!r}: expected None, 'deterministic' or 'stochastic'")
    guide = Guide(student, steps // 2, guide == "stochastic", seed) if guide else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(128, 64)
        loss = F.mse_loss(student(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if guide:
            guide.step(optimizer)
    with torch.no_grad():
        x = torch.randn(8192, 64)
        y = target(x)
        return float(F.mse_loss(student.eval()(x), y) / (y - x).var())


def demo(steps=1500, target=0.5):
    """Plain against self-guided training of LowRank FFNs that can equal their teacher."""
    linear = partial(LowRank, R=16)
    plain = teacher_student(linear, steps=steps)
    guided = teacher_student(linear, guide="deterministic", steps=steps)
    ok = guided < target * plain
    print(f"\ndemo: LowRank student of a LowRank teacher, d_model 64, R 16, {steps} steps")
    print(f"  test error plain {plain:.4f}, self-guided {guided:.4f}, ratio {guided / plain:.2f}")
    print(f"  target: ratio below {target}   {'ok' if ok else 'FAIL'}")
    return ok


def seconds(calls, rounds=5, least=2e-4, clock=time.perf_counter):
    """Seconds a call: calls take turns, a turn lasts at least `least`, the fastest turn counts."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best, repeats = [math.inf] * len(calls), [1] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            wait()
            start = clock()
            for _ in range(repeats[i]):
                call()
            wait()
            best[i] = min(best[i], (clock() - start) / repeats[i])
            repeats[i] = max(repeats[i], min(1000, math.ceil(least / best[i])))
    return best


def timing(device, T=512, d_in=1024, d_out=4096):
    """Prints the time of one layer of each kind beside nn.Linear, at 31 % of the FFN's weights."""
    layers = [match(d_in, d_out, kind, 0.3125)(d_in, d_out) for kind in ("dense", *KINDS)]
    layers = [layer.to(device) for layer in layers]
    x = torch.randn(T, d_in, device=device, requires_grad=True)
    g = torch.randn(T, d_out, device=device)
    with torch.no_grad():
        forward = seconds([partial(layer, x) for layer in layers])
    both = seconds([lambda layer=layer: layer(x).backward(g) for layer in layers])
    print(f"\ntiming: {d_in} -> {d_out}, {T} tokens, {device}, {torch.get_num_threads()} thread(s)")
    print(f"  in brackets, and FLOPs: share of nn.Linear{'forward':>9}{'forward + backward':>23}")
    for layer, a, b in zip(layers, forward, both, strict=True):
        share = sum(p.numel() for p in layer.parameters() if p.dim() > 1) / (d_in * d_out)
        print(f"  {type(layer).__name__:<22}{share:6.2f} of the FLOPs", end="")
        print(f"{1e3 * a:8.2f} ms ({a / forward[0]:.2f}){1e3 * b:9.2f} ms ({b / both[0]:.2f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the check table and stop")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", choices=[*LIMITS], default="float64", help="default float64")
    args = parser.parse_args()
    print(f"structured_ffn.py  torch {torch.__version__}  device {args.device}  seed 0")
    print(f"{'check':<56}{'error':>9}{'limit':>9}")
    good = True
    for name, error, limit in self_check(getattr(torch, args.dtype), args.device):
        ok = error <= limit  # False for nan
        good &= ok
        print(f"  {name:<54}{error:9.1e}{limit:9.0e}   {'ok' if ok else 'FAIL'}")
    if not args.check:
        good &= demo()
        timing(args.device)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
