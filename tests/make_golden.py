"""Write tests/golden/<name>.json from the numpy references: python tests/make_golden.py [name ...]

One function per file, named as the file.  Inputs are closed forms, so that no random stream of a
library can change a golden value; each JSON says in "input" how its inputs are made.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
sys.path.insert(0, str(FOLDER.parent / "benchmarks"))


def closed_form(model, scale=0.5):
    """The model in float64, every number of it a closed form."""
    model.double()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            n = torch.arange(p.numel(), dtype=torch.float64).view_as(p)
            p.copy_((1.0 if "norm" in name else 0.0) + scale * torch.sin(0.7 * n + i))
    return model


def train(model, logits_of, tokens=None, after_step=None):
    """Ten losses of predicting the next token, by plain gradient descent."""
    if tokens is None:
        tokens = (torch.arange(40) ** 2 % 7 % 5).view(2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        logits = logits_of(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after_step:
            after_step(optimizer)
        losses.append(loss.item())
    return losses


def train_tied(model):
    """`train` with the embedding as the head: (B, L, D) x (D, 5) -> (B, L, 5)."""
    return train(model, lambda x: model(x) @ model.embed.weight.T)


def sgconv_losses():
    from sgconv import SGConvConfig, SGConvModel

    sizes = {"d_model": 4, "n_layers": 2, "max_len": 20, "kernel_dim": 2, "vocab_size": 5}
    model = closed_form(SGConvModel(SGConvConfig(**sizes, causal=True)))
    for block in model.blocks:
        block.mixer.norm.fill_(2.0)
    return train_tied(model)


def sgconv():
    """Kernels of each decay, and the direct two-sided convolution, all by sgconv's references."""
    from sgconv import conv_ref, kernel_ref

    w = np.cos(1.7 * np.arange(12) + 0.3).reshape(4, 3)  # (S, d)
    u = np.sin(0.9 * np.arange(24) ** 1.1)  # (L,)
    constant, power = kernel_ref(w), kernel_ref(w, alpha=1.0, power=1.0)
    return {
        "input": "w = cos(1.7 n + 0.3), n < 12, as (4, 3); u = sin(0.9 n^1.1), n < 24; "
        "back = the power-law kernel",
        "constant": constant.tolist(),
        "ramp_third": kernel_ref(w, alpha=1 / 3, first_factor=2).tolist(),
        "power_law": power.tolist(),
        "causal": conv_ref(u, constant).tolist(),
        "two_sided": conv_ref(u, constant, power).tolist(),
        "losses": sgconv_losses(),
    }


def attention_losses():
    from attention import Transformer, TransformerConfig

    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 5}
    return train_tied(closed_form(Transformer(TransformerConfig(**sizes, causal=True)), 0.3))


def attention():
    """One head, full and causal, by attention's reference; losses of a tiny Transformer."""
    from attention import attention_ref

    n = np.arange(60.0)
    q, k, v = (np.sin(a * n**1.1 + a).reshape(12, 5) for a in (0.9, 1.3, 1.7))
    return {
        "input": "q, k, v = sin(a n^1.1 + a), n < 60, as (12, 5), a = 0.9, 1.3, 1.7",
        "full": attention_ref(q, k, v)[0].tolist(),
        "causal": attention_ref(q, k, v, causal=True)[0].tolist(),
        "losses": attention_losses(),
    }


def pretrain_losses(model, folder):
    """Ten losses of pretrain.fit in float64: closed-form weights, all 24 examples in each batch."""
    import batches
    import lra_data
    import pretrain

    config = pretrain.Config(
        model=model, objective="causal", d_model=8, n_heads=2, d_ff=12, d_state=4, device="cpu",
        batch_size=24, pretrain_steps=10, eval_every=10, precision="float64", out=str(folder),
    )  # fmt: skip
    n, t = np.arange(24)[:, None], np.arange(16)[None]
    tokens = (np.sin(0.7 * n + 0.9 * t**1.1) > 0).astype(np.uint8)
    split = lra_data.Split(tokens, np.zeros(24, np.int64), np.full(24, 16, np.int32))
    data = lra_data.Data("closed form", split, split, split, 2, 2)
    about = batches.describe(data)
    resident = batches.resident(split, about, "cpu")
    body = pretrain.build_model(config, about).double()
    head = pretrain.build_head("pretrain", config, about).double()
    with torch.no_grad():
        for i, p in enumerate([*body.parameters(), *head.parameters()]):
            wave = torch.sin(1.3 * torch.arange(p.numel(), dtype=torch.float64) + i).view_as(p)
            p.copy_(0.3 * wave + (1.0 if p.ndim == 1 and i % 2 else 0.0))
    losses = []

    class Recorder(pretrain.Run):
        def log(self, step, sums, tokens):
            losses.append(float(sums[0] / sums[1]))

    with Recorder(folder, {}) as run:
        pretrain.fit("pretrain", body, head, resident, resident, config, run)
    return losses


def pretrain():
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: pretrain_losses(name, f"{folder}/{name}") for name in ("transformer", "s4")}
    return {"input": "see pretrain_losses", **losses}


def structured_ffn_losses():
    """BlockShuffle, guided for five steps."""
    from byte_lm import LM, LMConfig

    from structured_ffn import BlockShuffle, Guide

    linear = partial(BlockShuffle, n_blocks=2)
    model = LM(LMConfig(8, 2, n_heads=4, n_kv_heads=2, vocab_size=7, linear=linear))
    model = closed_form(model)
    tokens = (torch.arange(42) ** 2 % 11 % 7).view(2, 21)
    return train(model, model, tokens, Guide(model, 5).step)


def structured_ffn():
    """Matrices of the three kinds by the references of structured_ffn, and losses of a tiny LM."""
    from structured_ffn import block_dense_ref, block_shuffle_ref, shuffle_ref

    def wave(*shape, phase=0.0):
        return np.cos(1.3 * np.arange(np.prod(shape)) + phase).reshape(shape)

    shuffled = block_shuffle_ref(wave(2, 2, 2), wave(2, 3, 2, phase=1))
    return {
        "input": "V = cos(1.3 n), U = cos(1.3 n + 1) in their shapes: low_rank (3, 4), (6, 3); "
        "block_dense (2, 2, 2), (6, 4); grid and block_shuffle (2, 2, 2), (2, 3, 2)",
        "low_rank": block_dense_ref(wave(1, 3, 4), wave(6, 3, phase=1)).tolist(),
        "block_dense": block_dense_ref(wave(2, 2, 2), wave(6, 4, phase=1)).tolist(),
        "grid": shuffle_ref(shuffled, 2).tolist(),  # without the second shuffle
        "block_shuffle": shuffled.tolist(),
        "losses": structured_ffn_losses(),
    }


def s4_losses():
    from s4 import S4Config, S4Model

    sizes = {"d_model": 4, "n_layers": 2, "d_state": 4, "vocab_size": 5}
    model = closed_form(S4Model(S4Config(**sizes, causal=True)))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.log_dt.sub_(2.0)
    return train_tied(model)


def s4():
    """Kernels of S4 and S4D, by s4.py's references."""
    import s4

    C = np.cos(np.arange(8))
    inits = {"lin": s4.s4d_lin, "inv": s4.s4d_inv, "legs": s4.s4d_legs}
    systems = {f"s4d_{k}": s4.hold_ref(*f(8), 0.05) for k, f in inits.items()}
    diagonal = {name: s4.kernel_ref(*system, 2 * C[:4], 24) for name, system in systems.items()}
    return {
        "input": "N = 8, dt = 0.05; S4: HiPPO-LegS, C = cos(n) there; S4D: C = cos(n), n < 4",
        "kernel": s4.kernel_ref(*s4.bilinear_ref(*s4.hippo_legs(8), 0.05), C, 24).tolist(),
        **{name: K.tolist() for name, K in diagonal.items()},
        "losses": s4_losses(),
    }


GENERATORS = [pretrain, attention, sgconv, structured_ffn, s4]


def main(names):
    for make in GENERATORS:
        if not names or make.__name__ in names:
            path = FOLDER / "golden" / f"{make.__name__}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(make(), indent=1) + "\n")
            print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
