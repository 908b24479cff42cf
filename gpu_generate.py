"""Generation as CUDA graphs: one call starts all kernels of a token.

    tokens = generate(model, prompt, 100, head)  # as model.generate(prompt, 100, head)

For S4Model (mixers S4, S4D, DLR) and Transformer (mixer Attention).  Both keep their state in the
same memory and never change a shape, as graphs demand (see gpu_step.py), and both touch it as
little as they can:

    S4             reads the state twice and writes it once per token: one product per layer
    Transformer    reads keys and values up to the next multiple of 1,024 positions

Not included: prompts of unequal length.
"""

import math

import torch
import torch.nn.functional as F

from gpu_step import Graphs
from s4 import S4Model

WINDOW = 1024  # positions; there is a graph for each multiple


class S4Decoder:
    """Tokens (B,) -> features (B, D), one after the other.

    A layer is one product per channel, (x, u) -> (x', y) = (x, u) + (x, u) W, where W (N+1, N+1)
    has the rows and columns of E, B_bar, C and D.  The results go to a second buffer, and back.
    """

    def __init__(self, model, state, n):
        self.model = model
        self.layers = []
        for block, (x, E, B_bar, C) in zip(model.blocks, state, strict=True):
            D_skip = block.mixer.D_skip[:, None, None]  # (D, 1, 1)
            to_x = torch.cat([E, B_bar], -1)  # x' - x = E x + B_bar u
            of_x = C + C @ E
            of_u = C @ B_bar + D_skip - 1
            to_y = torch.cat([of_x, of_u], -1)  # y - u = C x' + D u - u
            W = torch.cat([to_x, to_y], 1).mT.contiguous()  # (D, N+1, N+1)
            now = F.pad(x.transpose(0, 1), (0, 1)).contiguous()  # (D, B, N+1)
            later = torch.empty_like(now)
            self.layers.append((block, W, [now, later]))

    def graph(self, i):
        """Which graph token i needs: the buffers change places."""
        return i % 2

    def __call__(self, token, graph):
        h = self.model.embed(token)
        for block, W, buffers in self.layers:
            now = buffers[graph]
            later = buffers[1 - graph]
            now[..., -1] = block.norm(h).T  # u
            torch.baddbmm(now, now, W, out=later)
            h = h + block.gate(later[..., -1].T.to(h.dtype))  # y; as S4Block.forward
        return self.model.norm(h)


class TransformerDecoder:
    """Tokens (B,) -> features (B, D), one after the other; room for n tokens more than the state's.

    Keys and values are written at `position`, a tensor; a mask hides what is not there yet.
    """

    def __init__(self, model, state, n):
        caches, self.past = state
        self.model = model
        self.capacity = self.past + n
        self.position = torch.tensor([self.past], device=model.norm.weight.device)
        self.layers = []
        for block, cache in zip(model.blocks, caches, strict=True):
            room = (0, 0, 0, self.capacity - cache.k.shape[2])  # perhaps negative
            keys = F.pad(cache.k, room)
            values = F.pad(cache.v, room)
            self.layers.append((block, keys, values))

    def graph(self, i):
        """How many positions token i may have to read."""
        windows = math.ceil((self.past + i + 1) / WINDOW)
        return min(windows * WINDOW, self.capacity)

    def __call__(self, token, graph):
        h = self.model.embed_at(token[:, None], self.position)  # (B, 1, D)
        there = torch.arange(graph, device=h.device)[None] <= self.position  # (1, graph)
        for block, keys, values in self.layers:
            q, k, v = block.mixer.project(block.norm_mixer(h), self.position)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            k = keys[:, :, :graph]
            v = values[:, :, :graph]
            out = F.scaled_dot_product_attention(q, k, v, there, enable_gqa=True)  # (B, H, 1, E)
            out = out.transpose(1, 2).flatten(2)  # (B, 1, D)
            h = h + block.mixer.out(out)  # as Block.forward
            h = h + block.ffn(block.norm_ffn(h))
        self.position += 1
        return self.model.norm(h)[:, 0]


def decoder_of(model, state, n):
    """The decoder of a model that continues a state by n tokens."""
    kind = S4Decoder if isinstance(model, S4Model) else TransformerDecoder
    return kind(model, state, n)


def pick(logits, temperature):
    """The next token (B,): the likeliest at temperature 0, else a random one."""
    if temperature > 0:
        p = (logits / temperature).softmax(-1)
        return torch.multinomial(p, 1)[:, 0]
    return logits.argmax(-1)


@torch.no_grad()
def generate(model, prompt, n, head, temperature=0.0, graphs=None):
    """Continue prompt (B, L) by n tokens, (B, n) int64, as model.generate does.

    ValueError if the model is not on a CUDA device.
    """
    if not temperature >= 0 or n < 1 or prompt.numel() == 0:
        found = f"temperature {temperature}, n {n}, prompt {tuple(prompt.shape)}"
        raise ValueError(f"expected temperature >= 0, n >= 1 and a prompt, got {found}")
    graphs = graphs or Graphs(prompt.device)
    features, state = model.prefill(prompt, model.initial_state(len(prompt)))
    decoder = decoder_of(model, state, n)
    token = pick(head(features[:, -1]), temperature)
    tokens = [token.clone()]
    replays = {}
    for i in range(n - 1):
        graph = decoder.graph(i)

        def next_token(graph=graph):
            logits = head(decoder(token, graph))
            token.copy_(pick(logits, temperature))

        if graph in replays:
            replays[graph]()
        else:  # a token of its own, which loads what cannot be recorded
            graphs.rehearse(next_token)
            replays[graph] = graphs.record(next_token)
        tokens.append(token.clone())
    return torch.stack(tokens, 1)
