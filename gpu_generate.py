"""Generation as CUDA graphs: one call starts all kernels of a token.

    tokens = generate(model, prompt, 100, head)  # as model.generate(prompt, 100, head)

For S4Model (mixers S4, S4D, DLR) and Transformer (mixer Attention).  Their decoders here keep the
state at fixed addresses and never change a shape, as graphs demand (see gpu_step.py), and touch it
as little as they can:

    S4             reads and writes the state once per token: O(N) operations, compiled into one
    Transformer    reads keys and values up to the next multiple of 1,024 positions, once

Not included: prompts of unequal length.
"""

import math

import torch
import torch.nn.functional as F

from gpu_step import Graphs
from s4 import S4, S4Model, require

WINDOW = 1024  # positions; there is a graph for each multiple


def planes(v):
    """Real coordinates (..., N) -> real parts and imaginary parts, each (..., N/2)."""
    return v.unflatten(-1, (-1, 2)).unbind(-1)


def recurrence(mixer):
    """The layer as x' = x + T x + left (right x) + B_bar u, y = C x' + D u, with 2 x 2 blocks T.

    Returns T, left, right, B_bar, C as pairs of (D, N/2), and D (D,).  T has blocks a -b; b a.
    """
    E, B_bar, C = mixer.system()
    left = torch.zeros_like(B_bar)  # (D, N, 1)
    right = left.mT
    if isinstance(mixer, S4):
        _, _, left, right = mixer.low_rank()
    T = E - left @ right  # (D, N, N)
    T = T.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (D, N/2, 2, N/2, 2)
    T = T.diagonal(dim1=1, dim2=3)  # (D, 2, 2, N/2)
    pairs = [T[:, :, 0].unbind(1)]  # a, b
    for vector in (left, right, B_bar, C):
        pairs.append(planes(vector.flatten(1)))
    pairs = [[part.to(C.dtype).contiguous() for part in pair] for pair in pairs]
    return *pairs, mixer.D_skip


def advance(re, im, u, T, left, right, B_bar, C, D_skip):
    """Take one token, u (B, D) -> y (B, D).  The state, re and im (B, D, N/2), changes in place."""
    a, b = T
    left_re, left_im = left
    right_re, right_im = right
    B_re, B_im = B_bar
    C_re, C_im = C
    right_x = (right_re * re + right_im * im).sum(-1, keepdim=True)  # (B, D, 1)
    u = u[..., None]
    change_re = a * re - b * im + left_re * right_x + B_re * u
    change_im = b * re + a * im + left_im * right_x + B_im * u
    re += change_re
    im += change_im
    y = (C_re * re + C_im * im).sum(-1)
    return y + D_skip * u[..., 0]


class S4Decoder:
    """Tokens (B,) -> features (B, D), one after the other."""

    def __init__(self, model, state, n):
        self.model = model
        on_gpu = state[0].x.is_cuda
        self.advance = torch.compile(advance, dynamic=False) if on_gpu else advance  # CPU: tests
        self.layers = []
        for block, s in zip(model.blocks, state, strict=True):
            re, im = [part.contiguous() for part in planes(s.x)]
            self.layers.append((block, re, im, recurrence(block.mixer)))

    def reach(self, i):
        """How much of the state token i may have to read: always all."""
        return 0

    def __call__(self, token, reach):
        h = self.model.embed(token)
        for block, re, im, system in self.layers:
            u = block.norm(h).to(re.dtype)
            y = self.advance(re, im, u, *system)
            h = h + block.gate(y.to(h.dtype))  # as S4Block.forward
        return self.model.norm(h)


class TransformerDecoder:
    """Tokens (B,) -> features (B, D), one after the other; room for n tokens more than the state's.

    Keys and values are written at `position`, a tensor; a mask hides what is not there yet.  Their
    positions are the last axis, along which a product with one query reads memory in order.
    """

    def __init__(self, model, state, n):
        caches, self.past = state
        self.model = model
        self.capacity = self.past + n
        self.position = torch.tensor([self.past], device=model.norm.weight.device)
        self.layers = []
        for block, cache in zip(model.blocks, caches, strict=True):
            room = (0, self.capacity - cache.k.shape[2])  # perhaps negative
            keys = F.pad(cache.k.mT, room).contiguous()  # (B, G, E, capacity)
            values = F.pad(cache.v.mT, room).contiguous()
            self.layers.append((block, keys, values))

    def reach(self, i):
        """How many positions token i may have to read."""
        windows = math.ceil((self.past + i + 1) / WINDOW)
        return min(windows * WINDOW, self.capacity)

    def __call__(self, token, reach):
        h = self.model.embed_at(token[:, None], self.position)  # (B, 1, D)
        future = torch.arange(reach, device=h.device) > self.position  # (reach,)
        for block, keys, values in self.layers:
            q, k, v = block.mixer.project(block.norm_mixer(h), self.position)
            keys.index_copy_(3, self.position, k.mT)
            values.index_copy_(3, self.position, v.mT)
            q = q[:, :, 0].unflatten(1, (keys.shape[1], -1))  # (B, G, H/G, E): heads per group
            scores = q @ keys[..., :reach] / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(future, -math.inf).softmax(-1)  # (B, G, H/G, reach)
            out = weights @ values[..., :reach].mT  # (B, G, H/G, E)
            h = h + block.mixer.out(out.flatten(1)[:, None])  # as Block.forward
            h = h + block.ffn(block.norm_ffn(h))
        self.position += 1
        return self.model.norm(h)[:, 0]


def decoder_of(model, state, n):
    """The decoder of a model that continues a state by n tokens."""
    kind = S4Decoder if isinstance(model, S4Model) else TransformerDecoder
    needed = "system" if kind is S4Decoder else "project"  # a method of S4 or Attention
    plain = all(hasattr(block.mixer, needed) for block in model.blocks)
    require(plain, "S4Model with Attention, or Transformer with S4 mixers: use model.generate")
    return kind(model, state, n)


def pick(logits, temperature):
    """The next token (B,): the likeliest at temperature 0, else a random one."""
    if temperature > 0:
        p = (logits / temperature).softmax(-1)
        return torch.multinomial(p, 1)[:, 0]
    return logits.argmax(-1)


@torch.no_grad()
def generate(model, prompt, n, head, temperature=0.0, graphs=None):
    """Continue prompt (B, L) by n >= 1 tokens, (B, n) int64, as model.generate does.

    ValueError if the prompt is not on a CUDA device.
    """
    fits = temperature >= 0 and n >= 1 and prompt.ndim == 2 and prompt.numel() > 0
    found = f"temperature {temperature}, n {n}, prompt {tuple(prompt.shape)}"
    require(fits, f"expected temperature >= 0, n >= 1 and a prompt (B, L), got {found}")
    graphs = graphs or Graphs(prompt.device)
    features, state = model.prefill(prompt, model.initial_state(len(prompt)))
    decoder = decoder_of(model, state, n)
    token = pick(head(features[:, -1]), temperature)
    tokens = [token.clone()]
    replays = {}
    for i in range(n - 1):
        reach = decoder.reach(i)  # there is a graph for each

        def next_token(reach=reach):
            logits = head(decoder(token, reach))
            token.copy_(pick(logits, temperature))

        if reach in replays:
            replays[reach]()
        else:
            # this token runs uncaptured and loads what cannot be captured; capture() runs nothing
            graphs.warm_up(next_token)
            replays[reach] = graphs.capture(next_token)
        tokens.append(token.clone())
    return torch.stack(tokens, 1)
