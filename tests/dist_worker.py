"""What one rank does in tests/test_dist_attention.py: dist_worker.py FOLDER PORT...

Rank and number of ranks come from the environment, as schedulers set them.  All cases run in worlds
of 4 and 3 ranks, one port each; then three ranks lose one another in several ways.  What a rank saw
goes to FOLDER as JSON.
"""

import inspect
import itertools
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist_attention as da
import lra_data
import pretrain
from attention import Transformer, TransformerConfig
from s4 import S4Config, S4Model
from settings import Config
from sgconv import SGConvConfig, SGConvModel, ramp_decay

CASES = [
    {"heads": (4, 4), "lengths": (32, 32)},
    {"heads": (3, 1)},
    {"lengths": (3, 3)},
    {"padded": True},
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
]
CROSS = [{"lengths": (45, 18)}, {"lengths": (9, 2)}]  # fewer keys than queries, not causal


def grid():
    """Errors of all cases, by name."""
    errors = {}
    for where in itertools.product(da.SCHEDULES, ("contiguous", "zigzag"), (False, True)):
        schedule, layout, causal = where
        for case in CASES if causal else CASES + CROSS:
            options = dict(case)
            dtype = options.pop("dtype", "float64")
            case = da.SCHEDULES[schedule], layout, causal, getattr(torch, dtype), "cpu"
            errors[f"{where} {options} {dtype}"] = da.check_case(*case, **options)
    return errors


def activation_checkpointing_changes_no_bit(rank, world):
    again = inspect.unwrap(checkpoint.checkpoint)  # the wrapper imports all of torch._dynamo
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    for attend in da.SCHEDULES.values():

        def squared(z, attend=attend):
            return attend(z, z, z, True).square().sum()

        (expected,) = torch.autograd.grad(squared(x), x)
        for reentrant in (False, True):
            x.grad = None
            again(squared, x, use_reentrant=reentrant).backward()
            assert torch.equal(x.grad, expected)


class Wrapped(torch.nn.Module):
    """A module that passes attributes on, like that of activation checkpointing."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args):
        return self.module(*args)


def wrapped(**sizes):
    model = MODELS["transformer"](**sizes)
    for block in model.blocks:
        block.mixer = Wrapped(block.mixer)
    return model


MODELS = {
    "wrapped": wrapped,
    "transformer": lambda **c: Transformer(TransformerConfig(n_heads=2, rope=True, **c)),
    "s4": lambda **c: S4Model(S4Config(d_state=4, **c)),
    "sgconv": lambda **c: SGConvModel(
        SGConvConfig(max_len=32, kernel_dim=4, decay=ramp_decay, **c)
    ),
}


def models_over_ranks_are_models(rank, world):
    """Loss and all gradients of padded models are those of one process."""
    for name, causal, how, layout in [
        ("transformer", True, "ring", "zigzag"),
        ("transformer", False, "ulysses", "zigzag"),
        ("transformer", True, "allgather", "contiguous"),
        ("wrapped", True, "ring", "zigzag"),
        ("s4", False, "ulysses", "contiguous"),
        ("s4", True, "ring", "zigzag"),
        ("sgconv", False, "ulysses", "zigzag"),
    ]:
        torch.manual_seed(0)
        model = MODELS[name](d_model=8, n_layers=2, vocab_size=9, causal=causal).double()
        tokens = torch.randint(9, (2, 26))
        expected = loss_and_gradients(model, tokens)
        da.spread(model, how, layout)
        got = loss_and_gradients(model, tokens, layout, rank, world)
        scale = max(x.abs().max() for x in expected)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() < 1e-12 * scale, (name, how)
        assert torch.equal(da.unshard(da.own_tokens(tokens, dim=-1), -1), tokens)


def loss_and_gradients(model, tokens, layout=None, rank=0, world=1):
    """Of the mean over real tokens.  layout: over ranks, which all have the loss; one counts."""
    L = tokens.shape[1]
    keep = torch.arange(L) < torch.tensor([[L], [17]])
    count = keep.sum(1, keepdim=True)
    where = {}
    if layout:
        tokens = da.own_tokens(tokens, layout)
        keep = da.own_tokens(keep, layout)
        if isinstance(model, Transformer):
            where["positions"] = da.positions(L, rank, world, layout)
    total = (model(tokens, keep, **where) * keep[..., None]).sum(1)
    if layout:
        total = da.SumOverRanks.apply(total)
    loss = (total / count).sin().sum()
    model.zero_grad()
    (loss * (rank == 0)).backward()
    if layout:
        da.sum_gradients(model.parameters())
    return [loss.detach(), *(p.grad for p in model.parameters())]


def bytes_are_those_of_the_formula(rank, world):
    B, n, H, G, E, e, W = 2, 12, 24, 12, 2, 4, world
    kv = (W - 1) * 2 * B * n * G * E
    heads = (W - 1) * B * n * E * (2 * H + 2 * G) * e // W
    expected = {"ring": [kv * e, kv * (e + 4)], "allgather": [kv * e] * 2, "ulysses": [heads] * 2}
    for schedule, attend in da.SCHEDULES.items():
        q, k, v = (torch.randn(B, h, n, E, requires_grad=True) for h in (H, G, G))
        da.traffic.clear()
        out = attend(q, k, v)
        forward = da.traffic["bytes"]
        out.sum().backward()
        assert [forward, da.traffic["bytes"] - forward] == expected[schedule], schedule
    q = torch.randn(B, H, n, E, dtype=torch.bfloat16)
    da.traffic.clear()
    assert da.ring_attention(q, q, q).dtype == q.dtype
    assert da.traffic["bytes"] == (W - 1) * 2 * B * n * H * E * 2  # two bytes each
    assert da.traffic["messages"] == W - 1


def nan_reaches_those_who_see_it(rank, world):
    """The last key is NaN: all rows without a mask, the last row with a causal one; no hang."""
    q = torch.randn(1, 2, 4, 8)
    k = q.clone()
    if rank == world - 1:
        k[:, :, -1] = torch.nan
    assert da.ring_attention(q, k, q).isnan().all()
    seen = da.ring_attention(q, k, q, True).isnan()
    assert not seen[:, :, :-1].any() and seen[:, :, -1].all() == (rank == world - 1)


def a_group_of_some_ranks_works(rank, world):
    if world < 3:
        return
    group = dist.new_group([1, 2])
    if rank not in (1, 2):
        return
    q = torch.randn(1, 2, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = da.own_tokens(q, dim=2, group=group)
    out = da.ring_attention(own, own, own, True, group=group)
    whole = da.unshard(out, 2, group=group)
    assert da.rel_err(whole, da.attention_slow(q, q, q, True)) < 1e-13


def wrong_rings_are_caught(rank, world):
    """The check sees a block that is left out, and gradients that are lost on their way home."""
    if world < 3:
        return
    blocks = da.visible_blocks
    shift = da.Ranks.shift

    def drop_last_block(*args):
        return list(blocks(*args))[:-1]

    def lose_gradients(ranks, x, tokens, what):
        return shift(ranks, x, tokens, what) if what.startswith("step") else lambda: 0

    case = da.ring_attention, "zigzag", True, torch.float64, "cpu", (48, 48)
    assert da.check_case(*case) < 1e-13
    with mock.patch.object(da, "visible_blocks", drop_last_block):
        assert da.check_case(*case) > 1e-3
    with mock.patch.object(da.Ranks, "shift", lose_gradients):
        assert da.check_case(*case) > 1e-3


def caught(attend, *args, **options):
    """The text of the error that a call raises."""
    try:
        attend(*args, **options)
    except (ValueError, da.RankLost) as error:
        return str(error)
    return "no error"


def a_mismatch_is_named_on_every_rank(rank, world):
    """Rank 1 is odd; then all goes well."""
    if world != 3:
        return

    def one(right, wrong):
        return wrong if rank == 1 else right

    def hears(said, *args, attend=da.ring_attention, **options):
        heard = caught(attend, *args, **options)
        assert said in heard, (said, heard)

    q = torch.zeros(1, 4, 6, 8)
    narrow = one(q, q[:, :2])
    short = one(q, q[:, :, :5])
    double = one(q, q.double())
    learned = q.clone().requires_grad_()
    keep = torch.ones(1, one(6, 5), dtype=torch.bool)
    plain = "torch.float32 (1, 4, n, 8), gradient False"
    held = "ranks hold [6, 5, 6] tokens; layout contiguous gives them [5, 6, 6]"
    hears(f"q: ranks differ, they have ['{plain}', 'torch.float32 (1, 2", narrow, narrow, narrow)
    hears("k: ranks differ, they have [", q, narrow, narrow)
    hears(f"'{plain}', 'torch.float64 (1, ", double, double, double)
    hears(f"gradient True', '{plain}', 'torch", one(learned, q), learned, learned)
    hears(f"q: {held}", short, short, short)
    hears("causal: ranks differ, they have [False, True, False]", q, q, q, one(False, True))
    hears("keep: ranks differ, they have ['torch.bool (1, n)", q, q, q, False, one(keep, None))
    hears(f"keep: {held}", q, q, q, False, keep)
    hears("['contiguous', 'zigzag', ", q, q, q, layout=one("contiguous", "zigzag"))
    attend = one(da.ring_attention, da.ulysses_attention)
    hears("call: ranks differ, they have ['ring', 'ulysses', 'ring']", q, q, q, attend=attend)
    hears("no error", q, q, q)


PROPERTIES = [
    activation_checkpointing_changes_no_bit,
    models_over_ranks_are_models,
    bytes_are_those_of_the_formula,
    nan_reaches_those_who_see_it,
    a_group_of_some_ranks_works,
    wrong_rings_are_caught,
    a_mismatch_is_named_on_every_rank,
]


def everything(rank, world):
    torch.manual_seed(rank)
    seen = {"grid": grid()}
    for check in PROPERTIES:
        try:
            check(rank, world)
            seen[check.__name__] = "ok"
        except Exception:
            seen[check.__name__] = traceback.format_exc()
    return seen


def faults(rank):
    """What ranks hear, by fault; all waits in between are longer than the group's timeout."""
    q = torch.randn(1, 2, 64, 8)
    groups = [dist.new_group(timeout=timedelta(seconds=2)) for _ in range(3)]
    real = da.Ranks.op
    heard = {}
    for fault, group in zip(("shorter", "longer", "sleeps"), groups, strict=True):

        def op(ranks, call, x, peer, fault=fault):
            if rank == 1 and call is dist.isend and x.is_floating_point():
                if fault == "sleeps":
                    time.sleep(6)
                x = x.new_zeros(x.numel() + (1 if fault == "longer" else -1))
            return real(ranks, call, x, peer)

        with mock.patch.object(da.Ranks, "op", op):
            heard[fault] = caught(da.ring_attention, q, q, q, group=group)
        da.wait_for_all_ranks()
    pretrain.rank0_first(lambda config: time.sleep(4 if rank < 2 else 0), None)
    score = evaluate(seconds=4 if rank == 1 else 0)
    heard["late"] = f"{score['loss']:.2f}, then {caught(da.ring_attention, q, q, q)}"
    return heard


def evaluate(seconds=0):
    """The validation score of an untrained model; the part of this rank takes so long."""
    data = lra_data.load("lattice", n_train=6, n_val=6, n_test=6)
    about = pretrain.describe(data)
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8}
    config = pretrain.fitted(Config(device="cpu", batch_size=2, **sizes), about)
    model = pretrain.initial_model(config, about)
    head = pretrain.initial_head("finetune", model, config, about)
    model.register_forward_hook(lambda *args: time.sleep(seconds))
    split = pretrain.resident(data.val, about, "cpu")
    return pretrain.evaluate(model, head, split, "finetune", config)


def main(folder, *ports):
    rank = int(os.environ["RANK"])

    def join(world, port, timeout):
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": port}
        return da.process_group(timeout=timeout)

    def save(name, seen):
        Path(folder, f"{name}.{rank}").write_text(json.dumps(seen))

    for world, port in (4, ports[0]), (3, ports[1]):
        if rank < world:
            with join(world, port, 120):
                save(world, everything(rank, world))
    if rank < 3:
        with join(3, ports[2], 3):
            save("faults", faults(rank))
            da.wait_for_all_ranks()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 2:
                dist.all_reduce(torch.ones(1))  # torch's own error becomes one line, too
            evaluate()


if __name__ == "__main__":
    da.guarded(main, *sys.argv[1:])
