"""What one rank does in tests/test_dist_attention.py: dist_worker.py FOLDER PORT...

Rank and number of ranks come from the environment, as schedulers set them.  All cases run in worlds
of 4 and 3 ranks, one port each; then three ranks lose one another in several ways.  What a rank saw
goes to FOLDER as JSON.
"""

import itertools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist_attention as da
from attention import Transformer, TransformerConfig
from s4 import S4Config, S4Model
from sgconv import SGConvConfig, SGConvModel

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------- right results


def grid():
    """Errors of all cases, by name."""
    errors = {}

    def case(schedule, layout, causal, dtype="float64", **options):
        name = f"{schedule} {layout} causal={causal} {options} {dtype}"
        attend = da.SCHEDULES[schedule]
        errors[name] = da.check_case(attend, layout, causal, DTYPES[dtype], "cpu", **options)

    layouts = ("contiguous", "zigzag")
    for where in itertools.product(da.SCHEDULES, layouts, (False, True)):
        for heads, L in (((4, 4), 32), ((3, 1), 45), ((4, 2), 3)):
            case(*where, heads=heads, lengths=(L, L))
        for dtype in ("float32", "bfloat16"):
            case(*where, dtype=dtype)
        case(*where, padded=True)
        if not where[2]:
            case(*where, lengths=(45, 18))
            case(*where, lengths=(9, 2))
    return errors


def checkpointed():
    """Error of gradients with activation checkpointing, by schedule and kind."""
    errors = {}
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    for schedule, attend in da.SCHEDULES.items():

        def squared(z, attend=attend):
            return attend(z, z, z, True).square().sum()

        (expected,) = torch.autograd.grad(squared(x), x)
        for reentrant in (False, True):
            x.grad = None
            checkpoint(squared, x, use_reentrant=reentrant).backward()
            errors[f"{schedule} {reentrant}"] = da.rel_err(x.grad, expected)
    return errors


def models():
    """Error of loss and all gradients of padded models over ranks against one process."""
    cases = [
        ("transformer", True, "ring", "zigzag"),
        ("transformer", False, "ulysses", "zigzag"),
        ("transformer", True, "allgather", "contiguous"),
        ("s4", False, "ulysses", "contiguous"),
        ("s4", True, "ring", "zigzag"),
        ("sgconv", False, "ulysses", "zigzag"),
    ]
    errors = {}
    for case in cases:
        expected = loss_and_gradients(*case[:2])
        got = loss_and_gradients(*case)
        scale = max(x.abs().max() for x in expected)
        worst = [float((a - b).abs().max() / scale) for a, b in zip(got, expected, strict=True)]
        errors[" ".join(map(str, case))] = da.largest(worst)
    return errors


def loss_and_gradients(name, causal, how=None, layout="contiguous"):
    """Of the mean over real tokens.  how: over ranks, which all have the loss; the first counts."""
    torch.manual_seed(0)
    shared = {"d_model": 8, "n_layers": 2, "vocab_size": 9, "causal": causal}
    model = {
        "transformer": lambda: Transformer(TransformerConfig(n_heads=2, rope=True, **shared)),
        "s4": lambda: S4Model(S4Config(d_state=4, **shared)),
        "sgconv": lambda: SGConvModel(SGConvConfig(max_len=32, kernel_dim=4, **shared)),
    }[name]().double()
    tokens = torch.randint(9, (2, 26))
    keep = torch.arange(26) < torch.tensor([[26], [17]])
    count = keep.sum(1, keepdim=True)
    extra = {}
    if how:
        da.spread(model, how, layout)
        ranks = da.ranks_of(None, "cpu")
        if name == "transformer":
            extra["positions"] = da.positions(26, ranks.rank, ranks.world, layout)
        tokens = da.own_tokens(tokens, layout)
        keep = da.own_tokens(keep, layout)
    mean = (model(tokens, keep, **extra) * keep[..., None]).sum(1) / count
    if how:
        mean = da.SumOverRanks.apply(mean)
    loss = mean.sin().sum()
    (loss * (not how or ranks.rank == 0)).backward()
    if how:
        da.sum_gradients(model.parameters())
    return [loss.detach(), *(p.grad for p in model.parameters())]


def bytes_sent(world):
    """Counted messages and bytes of a forward and a backward pass, by schedule."""
    B, H, G, E, n = 2, 24, 12, 2, 12
    seen = {}
    for schedule, attend in da.SCHEDULES.items():
        q, k, v = (torch.randn(B, h, n, E, requires_grad=True) for h in (H, G, G))
        da.traffic.clear()
        out = attend(q, k, v)
        forward = dict(da.traffic)
        da.traffic.clear()
        out.sum().backward()
        seen[schedule] = [forward, dict(da.traffic)]
    q = torch.randn(B, H, n, E, dtype=torch.bfloat16)
    da.traffic.clear()
    assert da.ring_attention(q, q, q).dtype == q.dtype
    return seen | {"bfloat16": [dict(da.traffic)]}


def nan_rows(rank, world):
    """Shares of rows that are NaN, without and with a causal mask, where the last key is."""
    q = torch.randn(1, 2, 4, 8)
    k = q.clone()
    if rank == world - 1:
        k[:, :, -1] = torch.nan
    outs = [da.ring_attention(q, k, q, causal) for causal in (False, True)]
    return [out.isnan().any(-1).float().mean().item() for out in outs]


def same_bits():
    """True when the same call gives the same bits again."""
    q = torch.randn(1, 2, 40, 8)
    bits = []
    for _ in range(2):
        x = q.clone().requires_grad_()
        out = da.ring_attention(x, x, x, True, layout="zigzag")
        out.backward(q)
        bits.append(torch.stack([out.detach(), x.grad]))
    return torch.equal(*bits)


def subgroup(rank):
    """Error of the ring over ranks 1 and 2 of three."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return 0.0
    q = torch.randn(1, 2, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = da.own_tokens(q, dim=2, group=group)
    out = da.ring_attention(own, own, own, True, group=group)
    whole = da.unshard(out, 2, group=group)
    return da.rel_err(whole, da.attention_slow(q, q, q, True))


# ---------------------------------------------------------------- planted faults in the arithmetic


def drop_last_block(*args):
    """Wrong: the last block is left out."""
    return list(REAL["visible_blocks"](*args))[:-1]


def no_block(*args):
    """Wrong: nothing is computed."""
    return []


def swap_two_chunks(plan, kv, what):
    """Wrong: the keys of two other ranks are taken for each other."""
    a, b = [r for r in range(plan.ranks.world) if r != plan.ranks.rank][:2]
    for owner, part in REAL["around_the_ring"](plan, kv, what):
        yield {a: b, b: a}.get(owner, owner), part


def forget_rescaling(out, lse, out_block, lse_block):
    """Wrong: what was there keeps its old normalizer."""
    total = torch.logaddexp(lse, lse_block)
    return out + out_block * (lse_block - total).exp()[..., None], total


def one_per_cent(*args):
    """Wrong: a block's out and lse are 1.01 times what they are."""
    return [1.01 * x for x in REAL["attention_block"](*args)]


def lose_sums(ranks, x, tokens, what):
    """Wrong: gradients that other ranks found for keys never come home."""
    return REAL["shift"](ranks, x, tokens, what) if what.startswith("step") else lambda: 0


REAL = {name: getattr(da, name) for name in ("visible_blocks", "around_the_ring")}
REAL |= {"attention_block": da.attention_block, "shift": da.Ranks.shift}
MUTATIONS = [
    (da, "visible_blocks", drop_last_block),
    (da, "visible_blocks", no_block),
    (da, "around_the_ring", swap_two_chunks),
    (da, "merge", forget_rescaling),
    (da, "attention_block", one_per_cent),
    (da.Ranks, "shift", lose_sums),
]


def mutations():
    """Error of the ring when one thing in it is wrong, by name of the wrong thing."""
    case = da.ring_attention, "zigzag", True, torch.float64, "cpu", (48, 48)
    errors = {}
    for owner, name, wrong in MUTATIONS:
        right = getattr(owner, name)
        setattr(owner, name, wrong)
        errors[wrong.__name__] = da.check_case(*case)
        setattr(owner, name, right)
    return errors | {"right": da.check_case(*case)}


# ---------------------------------------------------------------- ranks that disagree, or are lost


def caught(attend, *args, **options):
    """The text of the error that a call raises."""
    try:
        attend(*args, **options)
    except (ValueError, da.RankLost) as error:
        return str(error)
    return "no error"


def mismatches(odd):
    """What this rank hears when one rank alone is odd."""
    q = torch.zeros(1, 4, 6, 8)
    other = q.clone().requires_grad_()
    ring = da.ring_attention
    six, three = torch.zeros(1, 6, 6, 8), torch.zeros(1, 3, 6, 8)
    keep = torch.ones(1, 5 if odd else 6, dtype=torch.bool)
    heard = {}
    heard["heads"] = caught(ring, *[six if odd else q] * 3)
    heard["groups"] = caught(ring, q, *[three if odd else q] * 2)
    heard["dtype"] = caught(ring, *[q.double() if odd else q] * 3)
    heard["tokens"] = caught(ring, *[q[:, :, :5] if odd else q] * 3)
    heard["causal"] = caught(ring, q, q, q, odd)
    heard["layout"] = caught(ring, q, q, q, layout="zigzag" if odd else "contiguous")
    heard["schedule"] = caught(da.ulysses_attention if odd else ring, q, q, q)
    heard["gradients"] = caught(ring, q if odd else other, other, other)
    heard["mask"] = caught(ring, q, q, q, keep=None if odd else keep)
    heard["length of the mask"] = caught(ring, q, q, q, keep=keep)
    heard["after all that"] = caught(ring, q, q, q)
    return heard


def everything(rank, world):
    torch.manual_seed(rank)
    seen = {"grid": grid(), "models": models(), "bytes": bytes_sent(world)}
    seen["nan"] = nan_rows(rank, world)
    seen["same bits"] = same_bits()
    if world < 4:
        seen["checkpointed"] = checkpointed()
    if world == 3:
        seen["mutations"] = mutations()
        seen["mismatches"] = mismatches(rank == 1)
        seen["subgroup"] = subgroup(rank)
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

        da.Ranks.op = op
        heard[fault] = caught(da.ring_attention, q, q, q, group=group)
        da.Ranks.op = real
        da.wait_for_rank0()
    if rank == 0:
        time.sleep(4)
    da.wait_for_rank0()
    heard["late rank 0"] = caught(da.ring_attention, q, q, q)
    return heard


def main(folder, *ports):
    rank = int(os.environ["RANK"])
    Path(folder, f"ready.{rank}").touch()
    while len(list(Path(folder).glob("ready.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)  # from here on nobody is late

    def save(name, seen):
        Path(folder, f"{name}.{rank}").write_text(json.dumps(seen))

    for world, port in zip((4, 3, 3), ports, strict=True):
        if rank >= world:
            continue
        last = port == ports[-1]
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_PORT": port}
        with da.process_group(timeout=3 if last else 120):
            if not last:
                save(world, everything(rank, world))
                continue
            save("faults", faults(rank))
            da.wait_for_rank0()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            q = torch.randn(1, 2, 64, 8)
            da.ring_attention(q, q, q)


if __name__ == "__main__":
    da.guarded(main, *sys.argv[1:])
