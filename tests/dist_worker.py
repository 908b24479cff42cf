"""What one rank does in tests/test_dist_attention.py: torchrun ... dist_worker.py TASK FILE.

TASK grid runs every case and writes what it saw to FILE.<rank> as JSON; the other tasks plant a
fault in a live rank.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention
import dist_attention as da

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def grid(world):
    """Errors of all cases, by name."""
    errors = {}
    product = itertools.product(
        da.SCHEDULES, (da.contiguous, da.zigzag), (False, True), ((4, 4), (4, 2), (3, 1)), DTYPES
    )
    for attend, layout, causal, heads, dtype in product:
        if dtype != "float64" and heads != (4, 2):
            continue
        for L in (45,) if dtype != "float64" else (45, 32, 7, 3):
            name = f"{attend.__name__} {layout.__name__} causal={causal} {heads} L={L} {dtype}"
            errors[name] = da.check_case(
                attend, layout, causal, DTYPES[dtype], "cpu", (L, L), heads
            )
    for attend, causal in itertools.product(da.SCHEDULES, (False, True)):
        for n, lengths in (("padded", (45, 45)), ("cross", (45, 18)), ("short keys", (9, 2))):
            if n == "padded" or not causal:
                name, padded = f"{attend.__name__} {n} causal={causal} float64", n == "padded"
                errors[name] = da.check_case(
                    attend, da.zigzag, causal, torch.float64, "cpu", lengths, padded=padded
                )
    errors["a mixer float64"] = check_mixer(da.zigzag, torch.float64, "cpu")
    return errors


class Decay(torch.nn.Module):
    """The smallest channel-wise mixer: y[t] = a y[t-1] + x[t]."""

    def __init__(self, d_model):
        super().__init__()
        self.d_model, self.a = d_model, torch.nn.Parameter(torch.linspace(0.5, 0.9, d_model))

    def forward(self, x, keep=None):
        y = [torch.zeros_like(x[:, 0])]
        for x_t in x.unbind(1):
            y.append(self.a * y[-1] + x_t)
        return torch.stack(y[1:], 1)


def check_mixer(layout, dtype, device):
    """`ulysses(mixer)` against the mixer in one process: output, input and parameter gradients."""
    link, generator = da.Link(), torch.Generator().manual_seed(1)
    x, grad = (torch.randn(2, 23, 6, generator=generator, dtype=dtype).to(device) for _ in range(2))
    alone, over = Decay(6).to(device, dtype), da.ulysses(Decay(6).to(device, dtype), layout=layout)
    whole = alone(x.requires_grad_())
    whole.backward(grad)
    mine = [
        da.shard(y, link.rank, link.world, 1, layout) for y in (x.detach(), grad, whole, x.grad)
    ]
    part = over(mine[0].requires_grad_())
    part.backward(mine[1])
    da.sum_gradients(over.parameters())
    pairs = (part, mine[2]), (mine[0].grad, mine[3]), (over.mixer.a.grad, alone.a.grad)
    return da.worst([da.rel_err(a.detach(), b.detach()) for a, b in pairs], device)


def first_block_only(out, lse, q, chunk, blocks):
    """Wrong: no other rank's keys are merged."""
    if (lse == -torch.inf).all():
        REAL["accumulate"](out, lse, q, chunk, blocks)


def drop_last_dk(dq, q, chunk, blocks, grad, out, lse):
    """Wrong: the last chunk that comes by gets no dk from here."""
    dk, dv = REAL["accumulate_grad"](dq, q, chunk, blocks, grad, out, lse)
    return (0 * dk, dv) if next(CALLS) % da.Link().world == da.Link().world - 1 else (dk, dv)


def swap_two_chunks(plan, owner):
    """Wrong: the chunks of two other ranks are taken for each other."""
    a, b = [r for r in range(plan.link.world) if r != plan.link.rank][:2]
    return REAL["blocks"](plan, {a: b, b: a}.get(owner, owner))


def forget_rescaling(out, lse, out_block, lse_block):
    """Wrong: what was there keeps its old normaliser."""
    total = torch.logaddexp(lse, lse_block)
    out.add_(out_block * (lse_block - total).exp()[..., None])
    lse.copy_(total)


def one_per_cent(*args):
    """Wrong: a block's out and lse are 1.01 times what they are."""
    return tuple(1.01 * x for x in REAL["attention_block"](*args))


def zeros(*args):
    """Wrong: nothing is computed."""


CALLS = itertools.count()
REAL = {name: getattr(da, name) for name in ("accumulate", "accumulate_grad", "attention_block")}
REAL["blocks"] = da.Plan.blocks
MUTATIONS = [
    (da, "accumulate", first_block_only),
    (da, "accumulate_grad", drop_last_dk),
    (da.Plan, "blocks", swap_two_chunks),
    (da, "merge_", forget_rescaling),
    (da, "attention_block", one_per_cent),
    (da, "accumulate", zeros),
]


def mutations():
    """Error of the ring when one thing in it is wrong, by name of the wrong thing."""
    arguments = da.ring_attention, da.zigzag, True, torch.float64, "cpu", (48, 48)
    errors = {}
    for owner, name, wrong in MUTATIONS:
        right = getattr(owner, name)
        setattr(owner, name, wrong)
        errors[wrong.__name__] = da.check_case(*arguments)
        setattr(owner, name, right)
    return errors | {"right": da.check_case(*arguments)}


def caught(call):
    """The text of the ValueError that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def mismatches(rank, world):
    """What this rank hears when rank 1 alone is different."""
    odd = rank == 1

    def ring(shape=(1, 4, 6, 8), dtype=torch.float32, **options):
        q = torch.zeros(*shape, dtype=dtype)
        return lambda: da.ring_attention(q, q, q, **options)

    bad = torch.zeros(1, 4, 6, 8), torch.zeros(1, 3, 6, 8)
    grad = torch.zeros(1, 4, 6, 8, requires_grad=True)
    return {
        "heads": caught(ring((1, 6 if odd else 4, 6, 8))),
        "dtype": caught(ring(dtype=torch.float64 if odd else torch.float32)),
        "tokens": caught(ring((1, 4, 5 if odd else 6, 8))),
        "causal": caught(ring(causal=odd)),
        "layout": caught(ring(layout=da.zigzag if odd else da.contiguous)),
        "schedule": caught(
            lambda: (da.ulysses_attention if odd else da.ring_attention)(bad[0], bad[0], bad[0])
        ),
        "groups": caught(lambda: da.ring_attention(bad[0], *bad[1 if odd else 0 :][:1] * 2)),
        "gradients": caught(lambda: da.ring_attention(grad if not odd else bad[0], grad, grad)),
        "dropout": caught(ring(dropout=0.1 if odd else 0.0)),
        "window": caught(ring(window=128)),
        "bias": caught(ring(bias=torch.zeros(1))),
        "after all that": caught(ring()),
    }


def bytes_sent(world, rank):
    """Counted messages and bytes of a forward and a backward pass, next to the formula."""
    B, H, G, E, L = 2, 24, 12, 2, 12 * world
    seen = {}
    for attend in da.SCHEDULES:
        q, k, v = (torch.randn(B, h, L // world, E, requires_grad=True) for h in (H, G, G))
        da.traffic.clear()
        out = attend(q, k, v)
        forward = dict(da.traffic)
        da.traffic.clear()
        out.sum().backward()
        seen[attend.__name__] = [forward, dict(da.traffic)]
    q = torch.randn(B, H, L // world, E, dtype=torch.bfloat16)
    da.traffic.clear()
    da.ring_attention(q, q, q)
    return seen | {"bfloat16": [dict(da.traffic)]}


def nan_stays_where_it_belongs(rank, world):
    """A NaN in the last key of the sequence: [share of NaN rows full, causal]."""
    q = torch.randn(1, 2, 4, 8)
    k = q.clone()
    if rank == world - 1:
        k[:, :, -1] = torch.nan
    outs = [da.ring_attention(q, k, q, causal=causal) for causal in (False, True)]
    return [out.isnan().any(-1).float().mean().item() for out in outs]


def whole_models(rank, world):
    """Error of features and all gradients of a model over ranks against one process."""
    from s4 import S4, S4Config, S4Model
    from sgconv import SGConv, SGConvConfig, SGConvModel

    tokens = torch.randint(9, (2, 26), generator=torch.Generator().manual_seed(0))
    shared = {"d_model": 8, "n_layers": 2, "vocab_size": 9}
    errors = {}

    def attend_over(schedule, layout):
        return lambda q, k, v, causal, keep: schedule(q, k, v, causal, layout=layout, keep=keep)

    def transformer(schedule=None, layout=None):
        config = attention.TransformerConfig(n_heads=2, causal=True, rope=True, **shared)
        if schedule is None:
            return attention.Transformer(config)
        attend = attend_over(schedule, layout)
        return attention.Transformer(
            config, mixer=lambda c, i: attention.Attention(8, 2, True, rope=True, attend=attend)
        )

    def s4(schedule=None, layout=None):
        mixer = lambda c, i: S4(8, 4, bidirectional=True)  # noqa: E731
        over = lambda c, i: da.ulysses(mixer(c, i), {"C": 1}, layout=layout)  # noqa: E731
        return S4Model(S4Config(**shared), mixer=over if schedule else mixer)

    def sgconv(schedule=None, layout=None):
        axes = {"w": 2, "norm": 1}
        mixer = lambda c, i: SGConv(8, 32, 4, bidirectional=True)  # noqa: E731
        over = lambda c, i: da.ulysses(mixer(c, i), axes, layout=layout)  # noqa: E731
        return SGConvModel(SGConvConfig(max_len=32, **shared), mixer=over if schedule else mixer)

    cases = [
        (transformer, da.ring_attention, da.zigzag),
        (transformer, da.ulysses_attention, da.zigzag),
        (transformer, da.allgather_attention, da.contiguous),
        (s4, True, da.contiguous),
        (s4, True, da.zigzag),
        (sgconv, True, da.zigzag),
    ]
    for make, schedule, layout in cases:
        nets = []
        for options in ((), (schedule, layout)):
            torch.manual_seed(0)
            nets.append(make(*options).double())
        one, many = nets
        local = da.shard(tokens, rank, world, 1, layout)
        at = da.positions(26, rank, world, layout)
        extra = {"positions": at} if make is transformer else {}
        expected, got = one(tokens), many(local, **extra)
        weight = torch.sin(torch.arange(expected.numel(), dtype=torch.float64)).view_as(expected)
        (expected * weight).sum().backward()
        (got * da.shard(weight, rank, world, 1, layout)).sum().backward()
        da.sum_gradients(many.parameters())
        pairs = [(da.unshard(got, 1, layout=layout), expected.detach())]
        for a, b in zip(many.parameters(), one.parameters(), strict=True):
            pairs.append((a.grad, b.grad))
        worst = max(((a - b).abs().max() / (b.abs().max() + 1e-12)).item() for a, b in pairs)
        errors[f"{make.__name__} {len(errors)} {layout.__name__}"] = worst
    return errors


def twice(rank, world):
    """True when the same call gives the same bits again."""
    q = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(rank))
    bits = []
    for _ in range(2):
        x = q.clone().requires_grad_()
        out = da.ring_attention(x, x, x, causal=True, layout=da.zigzag)
        out.backward(q)
        bits.append((out.detach(), x.grad))
    return all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def subgroup(rank, world):
    """The ring over ranks 1 and 2 of three, against one process."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return 0.0
    q = torch.randn(1, 2, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = da.shard(q, rank - 1, 2, 2)
    out = da.ring_attention(own, own, own, causal=True, group=group)
    return da.rel_err(out, da.shard(da.product(q, q, q, True), rank - 1, 2, 2))


def everything(rank, world):
    seen = {"grid": grid(world), "bytes": bytes_sent(world, rank)}
    seen["nan"] = nan_stays_where_it_belongs(rank, world)
    seen["models"] = whole_models(rank, world)
    seen["twice"] = twice(rank, world)
    if world == 3:
        seen["mutations"], seen["mismatches"] = mutations(), mismatches(rank, world)
        seen["subgroup"] = subgroup(rank, world)
    return seen


def fault(task, rank):
    """Rank 1 dies, or sleeps, in step 0 of the ring: rank 2 waits for it in step 1."""
    steps, real = itertools.count(), da.accumulate

    def accumulate(*args):
        if rank == 1 and next(steps) == 0:
            if task == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        real(*args)

    da.accumulate = accumulate
    q = torch.randn(1, 2, 64, 8)
    for _ in range(3):
        da.ring_attention(q, q, q)


def other_size(task, rank):
    """Rank 1 sends a byte less, or more, than the others expect."""
    real = da.pack

    def pack(tensors, device):
        message = real(tensors, device)
        if rank == 0 or not message.numel():
            return message
        return message[:-1] if task == "shorter" else torch.cat([message, message[:1]])

    da.pack = pack
    q = torch.randn(1, 2, 64, 8)
    da.ring_attention(q, q, q)


def main(task, path):
    torch.manual_seed(0)
    with da.process_group(timeout=120 if task == "grid" else 4) as (rank, world, _):
        Path(f"{path}.{rank}").write_text(json.dumps({"pid": os.getpid()}))
        if task == "grid":
            start = time.perf_counter()
            seen = everything(rank, world) | {"seconds": time.perf_counter() - start}
            Path(f"{path}.{rank}").write_text(json.dumps(seen))
        else:
            (fault if task in ("dies", "sleeps") else other_size)(task, rank)


if __name__ == "__main__":
    da.guarded(main, *sys.argv[1:])
