"""What one rank does in tests/test_dist_attention.py: dist_worker.py FOLDER PORT...

Rank and number of ranks come from the environment, as schedulers set them.  All cases run in worlds
of 4 and 3 ranks, one port each; then three ranks lose one another in several ways.  What a rank saw
goes to FOLDER as JSON.
"""

import copy
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
from sgconv import SGConvConfig, SGConvModel

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


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


def activation_checkpointing_changes_nothing(rank, world):
    again = inspect.unwrap(checkpoint.checkpoint)  # the wrapper imports all of torch._dynamo
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    for attend in da.SCHEDULES.values():

        def squared(z, attend=attend):
            return attend(z, z, z, True).square().sum()

        (expected,) = torch.autograd.grad(squared(x), x)
        for reentrant in (False, True):
            x.grad = None
            again(squared, x, use_reentrant=reentrant).backward()
            assert da.rel_err(x.grad, expected) < 1e-14


MODELS = {
    "transformer": lambda **c: Transformer(TransformerConfig(n_heads=2, rope=True, **c)),
    "s4": lambda **c: S4Model(S4Config(d_state=4, **c)),
    "sgconv": lambda **c: SGConvModel(SGConvConfig(max_len=32, kernel_dim=4, **c)),
}


def models_over_ranks_are_models(rank, world):
    """Loss and all gradients of padded models are those of one process."""
    for name, causal, how, layout in [
        ("transformer", True, "ring", "zigzag"),
        ("transformer", False, "ulysses", "zigzag"),
        ("transformer", True, "allgather", "contiguous"),
        ("s4", False, "ulysses", "contiguous"),
        ("s4", True, "ring", "zigzag"),
        ("sgconv", False, "ulysses", "zigzag"),
    ]:
        torch.manual_seed(0)
        model = MODELS[name](d_model=8, n_layers=2, vocab_size=9, causal=causal).double()
        tokens = torch.randint(9, (2, 26))
        expected = loss_and_gradients(copy.deepcopy(model), tokens)
        da.spread(model, how, layout)
        got = loss_and_gradients(model, tokens, layout)
        scale = max(x.abs().max() for x in expected)
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() < 1e-12 * scale, (name, how)


def loss_and_gradients(model, tokens, layout=None):
    """Of the mean over real tokens.  layout: over ranks, which all have the loss; one counts."""
    L = tokens.shape[1]
    keep = torch.arange(L) < torch.tensor([[L], [17]])
    count = keep.sum(1, keepdim=True)
    if not layout:
        loss = ((model(tokens, keep) * keep[..., None]).sum(1) / count).sin().sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]
    ranks = da.ranks_of(None, "cpu")
    tokens, keep = da.own_tokens(tokens, layout), da.own_tokens(keep, layout)
    extra = {}
    if isinstance(model, Transformer):
        extra["positions"] = da.positions(L, ranks.rank, ranks.world, layout)
    total = (model(tokens, keep, **extra) * keep[..., None]).sum(1)
    loss = (da.SumOverRanks.apply(total) / count).sin().sum()
    (loss * (ranks.rank == 0)).backward()
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


def the_same_call_gives_the_same_bits(rank, world):
    q = torch.randn(1, 2, 40, 8)
    bits = []
    for _ in range(2):
        x = q.clone().requires_grad_()
        out = da.ring_attention(x, x, x, True, layout="zigzag")
        out.backward(q)
        bits.append(torch.stack([out.detach(), x.grad]))
    assert torch.equal(*bits)


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


# ---------------------------------------------------------------- planted faults in the arithmetic

blocks = da.visible_blocks
shift = da.Ranks.shift


def drop_last_block(*args):
    return list(blocks(*args))[:-1]


def forget_rescaling(out, lse, out_block, lse_block):
    total = torch.logaddexp(lse, lse_block)
    return out + out_block * (lse_block - total).exp()[..., None], total


def lose_sums(ranks, x, tokens, what):
    """Gradients that other ranks found for keys never come home."""
    return shift(ranks, x, tokens, what) if what.startswith("step") else lambda: 0


def wrong_rings_are_caught(rank, world):
    if world < 3:
        return
    case = da.ring_attention, "zigzag", True, torch.float64, "cpu", (48, 48)
    assert da.check_case(*case) < 1e-13
    for owner, name, wrong in [
        (da, "visible_blocks", drop_last_block),
        (da, "merge", forget_rescaling),
        (da.Ranks, "shift", lose_sums),
    ]:
        right = getattr(owner, name)
        setattr(owner, name, wrong)
        error = da.check_case(*case)
        setattr(owner, name, right)
        assert error > 1e-3, wrong.__name__


# ---------------------------------------------------------------- ranks that disagree, or are lost


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

    q = torch.zeros(1, 4, 6, 8)
    kv = [one(q, q[:, :2])] * 2
    keep = torch.ones(1, one(6, 5), dtype=torch.bool)
    learned = q.clone().requires_grad_()
    plain = "torch.float32 (1, 4, n, 8), gradient False"
    held = "ranks hold [6, 5, 6] tokens; layout contiguous gives them [5, 6, 6]"
    contiguous = {"layout": one("contiguous", "zigzag")}
    cases = [
        (f"q: ranks differ, they have ['{plain}', 'torch.f", [one(q, q[:, :2])] * 3, {}),
        ("k: ranks differ, they have [", [q, *kv], {}),
        (f"'{plain}', 'torch.float64 (1, ", [one(q, q.double())] * 3, {}),
        (f"q: {held}", [one(q, q[:, :, :5])] * 3, {}),
        ("causal: ranks differ, they have [False, True, False]", [q, q, q, one(False, True)], {}),
        ("layout: ranks differ, they have ['contiguous', 'zigzag', ", [q, q, q], contiguous),
        (f"gradient True', '{plain}', 'torch", [one(learned, q), learned, learned], {}),
        (
            "keep: ranks differ, they have ['torch.bool (1, n), ",
            [q, q, q, False, one(keep, None)],
            {},
        ),
        ("keep: ranks hold [6, 5, 6] tokens", [q, q, q, False, keep], {}),
        ("no error", [q, q, q], {}),
    ]
    for said, inputs, options in cases:
        heard = caught(da.ring_attention, *inputs, **options)
        assert said in heard, (said, heard)
    heard = caught(one(da.ring_attention, da.ulysses_attention), q, q, q)
    assert "call: ranks differ, they have ['ring', 'ulysses', 'ring']" in heard


PROPERTIES = [
    activation_checkpointing_changes_nothing,
    models_over_ranks_are_models,
    bytes_are_those_of_the_formula,
    nan_reaches_those_who_see_it,
    the_same_call_gives_the_same_bits,
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

        da.Ranks.op = op
        heard[fault] = caught(da.ring_attention, q, q, q, group=group)
        da.Ranks.op = real
        da.wait_for_rank0()
    pretrain.rank0_first(lambda config: time.sleep(4 if rank < 2 else 0), None)
    score = evaluate(seconds=4 if rank == 1 else 0)
    heard["late"] = f"{score['loss']:.2f}, then {caught(da.ring_attention, q, q, q)}"
    return heard


def evaluate(seconds=0):
    """The validation score of an untrained model; the part of this rank takes so long."""
    data = lra_data.load("lattice", n_train=6, n_val=6, n_test=6)
    about = pretrain.identity(data)
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 8}
    config = pretrain.fitted(Config(device="cpu", batch_size=2, **sizes), about)
    model = pretrain.initial_model(config, about)
    head = pretrain.initial_head("finetune", model, config, about)
    model.register_forward_hook(lambda *args: time.sleep(seconds))
    split = pretrain.resident(data.val, about, "cpu")
    return pretrain.evaluate(model, head, split, "finetune", config)


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
            if rank == 2:
                dist.all_reduce(torch.ones(1))  # torch's own error becomes one line, too
            evaluate()


if __name__ == "__main__":
    da.guarded(main, *sys.argv[1:])
