"""dist_attention.py: layouts and references here; everything with ranks in real processes."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import MappingProxyType

import dist_worker
import numpy as np
import pytest
import torch
from torch import nn

import dist_attention as da
from attention import attention_online, attention_ref
from s4 import S4, S4Block
from sgconv import SGConv

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3}
WORLDS = [1, 3, 4]  # the command line runs with 2
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "RANK")}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_ranks(world, *command, **environment):
    """Run a Python command as all ranks, as a scheduler does: no torchrun, no LOCAL_RANK.

    Returns exit codes and standard errors.
    """
    shared = ENVIRONMENT | environment | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world)}
    command = [sys.executable, *command]
    started = []
    for rank in range(world):
        env = shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=pipe, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Folder of what four ranks saw, and their (exit codes, standard errors)."""
    folder = tmp_path_factory.mktemp("dist")
    ports = [free_port() for _ in range(3)]
    return folder, *run_ranks(4, "tests/dist_worker.py", str(folder), *ports)


def read(folder, name, world):
    files = [folder / f"{name}.{rank}" for rank in range(world)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def seen(ranks):
    """What every rank of every world saw: seen[world][rank]."""
    folder, codes, errors = ranks
    assert codes[3] == 0, errors
    known = {world: read(folder, world, world) for world in (3, 4)}
    return known | {1: [dist_worker.everything(0, 1)]}  # no process group at all


# ---------------------------------------------------------------- one process: layouts, reference


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_layouts_deal_out_every_token_once(layout, world):
    for L in (0, 1, 3, 16, 45):
        at = [da.positions(L, rank, world, layout) for rank in range(world)]
        assert sorted(torch.cat(at).tolist()) == list(range(L))
        assert all((x[1:] > x[:-1]).all() for x in at)


@pytest.mark.parametrize("L", [1024, 1021])
def test_zigzag_is_balanced_under_a_causal_mask_and_contiguous_is_not(L):
    work = {}  # the query at position p meets p + 1 keys
    for layout in ("contiguous", "zigzag"):
        at = [da.positions(L, rank, 4, layout) for rank in range(4)]
        work[layout] = [int((x + 1).sum()) for x in at]
    assert max(work["zigzag"]) <= 1.02 * min(work["zigzag"])
    assert max(work["contiguous"]) >= 5 * min(work["contiguous"])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("longest", [2, 5, 100])
def test_visible_blocks_cover_the_causal_mask_once(layout, longest):
    for L in (2, 37):
        for mine in (da.chunks_of(L, rank, 3, layout) for rank in range(3)):
            for theirs in (da.chunks_of(L, rank, 3, layout) for rank in range(3)):
                q_at, k_at = da.tokens_of(mine), da.tokens_of(theirs)
                count = torch.zeros(len(q_at), len(k_at))
                for rows, cols, diagonal in da.visible_blocks(mine, theirs, True, longest):
                    block = torch.ones_like(count[rows, cols])
                    assert max(block.shape) <= longest
                    count[rows, cols] += block.tril() if diagonal else block
                assert torch.equal(count, (k_at[None] <= q_at[:, None]).float())


@pytest.mark.parametrize("causal", [False, True])
def test_references_are_attention(causal):
    q, k, v = np.random.RandomState(0).randn(3, 23, 6)
    expected = attention_ref(q, k, v, causal)[0]
    for world in (1, 2, 5):
        for layout in ("contiguous", "zigzag"):
            at = [da.positions(23, rank, world, layout).numpy() for rank in range(world)]
            assert da.rel_err(da.ring_ref(q, k, v, at, causal), expected) < 1e-13
    q, k, v = torch.from_numpy(np.stack([q, k, v]))[:, None, None]
    assert da.rel_err(da.attention_slow(q, k, v, causal)[0, 0], expected) < 1e-13


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_blocks_with_and_without_a_fused_kernel(kernel, padded, causal, monkeypatch):
    """Tensors are transposed: kernels assume that the last axis has stride 1.

    Every block of 7 keys begins with padding, so there are queries that see no key of it.
    """
    if not kernel:
        monkeypatch.setattr(da, "has_kernel", lambda *args: False)
    real = da.visible_blocks
    monkeypatch.setattr(da, "visible_blocks", lambda *args: real(*args[:3], 7))
    q, k, v, grad = (torch.randn(2, h, 8, 45, dtype=torch.float64).mT for h in (4, 2, 2, 4))
    at = torch.arange(45)
    keep = (at > torch.tensor([[0], [9]])) & (at % 7 > 0) if padded else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = da.ring_attention(*leaves, causal, keep)
    expected, _ = attention_online(*leaves, causal, keep)
    assert da.rel_err(out, expected) < 1e-13
    got = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert da.rel_err(a, b) < 1e-13


def test_blocks_of_bfloat16_are_computed_in_float32():
    half = torch.randn(4, 1, 2, 9, 8).bfloat16()
    grad, q, k, v = half
    single = da.attention_block(*half[1:].float())
    for a, b in zip(da.attention_block(q, k, v), single, strict=True):
        assert torch.equal(a, b)
    grads = da.attention_block_grad(grad, q, k, v, *single)
    expected = da.attention_block_grad(*half.float(), *single)
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kernel", "expected"), [(True, []), (False, [1024, 1024])])
def test_padding_needs_no_square_of_the_length(kernel, expected, monkeypatch):
    """Scores are written out without a kernel only, 1024 x 1024 at most, where there is padding."""
    sizes = []
    real = da.scores_of

    def scores_of(q, k, causal, keep):
        if keep is not None:
            sizes.append(k.shape[2])
        return real(q, k, causal, keep)

    monkeypatch.setattr(da, "scores_of", scores_of)
    monkeypatch.setattr(da, "has_kernel", lambda q, keep: kernel or keep is None)
    q = torch.randn(1, 1, 3000, 8)
    da.ring_attention(q, q, q, True, torch.arange(3000)[None] != 1500)
    assert sizes == expected  # the second keys, for the second and the third queries


def test_rounding_does_not_grow_with_the_keys():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 16, 16, generator=generator)
    k, v = torch.randn(2, 1, 1, 2**20, 16, generator=generator)
    out = da.ring_attention(q, k, v)
    expected = da.attention_slow(q.double(), k.double(), v.double())
    for row in range(16):
        assert da.rel_err(out[0, 0, row], expected[0, 0, row]) < 1.5e-6


class Sideways(SGConv):
    channel_axes = MappingProxyType({})  # without those of SGConv


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda q: da.ring_attention(q[0], q, q), r"\(2, 9, 8\)"),
        (lambda q: da.ring_attention(q, q[:, [0, 1, 0]], q[:, [0, 1, 0]]), r"\(1, 3, 9, 8\)"),
        (lambda q: da.ring_attention(q, q, q, keep=torch.ones(1, 4) > 0), r"got .*\(1, 4\)"),
        (lambda q: da.ring_attention(q, q, q, keep=torch.ones(1, 9)), r"\(1, 9\) torch.float"),
        (lambda q: da.ring_attention(q, q[:, :, :3], q[:, :, :3], True), "n == m if causal"),
        (lambda q: da.ring_attention(q, q, q, layout=partial(max)), "'contiguous' or 'zigzag'"),
        (lambda q: da.positions(9, 0, 1, "stripes"), "'stripes': expected 'contiguous' or"),
        (lambda q: da.spread(None, "rnig"), "'rnig': expected one of .*'ring'.*'ulysses'"),
        (lambda q: da.ring_attention(q, q.double(), q.double()), "k and v .* alike"),
        (lambda q: da.ulysses(S4(4, 2))(q[0]), r"x \(B, n, 4\), got \(2, 9, 8\)"),
        (
            lambda q: da.ulysses(S4Block(8, S4(8, 2))),
            r"S4Block contains \['S4'\]: apply ulysses to",
        ),
        (lambda q: da.ulysses(Sideways(8, 16, 4))(q[0]), "axis 0 of w .* Sideways.channel_axes"),
        (
            lambda q: da.ulysses(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
            "remove the parametrizations of this ParametrizedLinear",
        ),
        (
            lambda q: torch.autograd.grad(da.ring_attention(q, q, q).sum(), q, create_graph=True),
            "no second derivatives",
        ),
    ],
)
def test_bad_input(call, named):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(1, 2, 9, 8, requires_grad=True))


# ---------------------------------------------------------------- several processes


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_forward_and_all_gradients(seen, world):
    """Every schedule, layout, mask, head grouping, length and dtype, on every rank."""
    errors = seen[world][0]["grid"]
    assert len(errors) == 84
    assert not {name: e for name, e in errors.items() if not e <= LIMITS[name.split()[-1]]}


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS[1:])
def test_float32_is_as_good_as_one_fused_call(seen, world):
    one, many = seen[1][0]["grid"], seen[world][0]["grid"]
    singles = [name for name in one if name.endswith("float32")]
    assert len(singles) == 12
    assert not [name for name in singles if not many[name] <= 2 * one[name] + 1e-7]


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", [check.__name__ for check in dist_worker.PROPERTIES])
def test_over_ranks(seen, world, what):
    assert [rank[what] for rank in seen[world]] == ["ok"] * world


@pytest.mark.dist
@pytest.mark.parametrize("fault", ["shorter", "longer", "sleeps"])
def test_a_silent_rank_or_a_wrong_message_is_named_alone(ranks, fault):
    """A message of another size is never taken: neither a stale tail nor an abort."""
    heard = read(ranks[0], "faults", 3)[2][fault]
    assert heard.startswith("rank 2 of 3: no answer from rank 1 in step 0 of the ring: ")
    assert "\n" not in heard


@pytest.mark.dist
def test_a_rank_may_load_and_evaluate_longer_than_the_timeout(ranks):
    heard = [rank["late"] for rank in read(ranks[0], "faults", 3)]
    assert heard == [heard[0]] * 3
    assert heard[0].endswith(", then no error")


@pytest.mark.dist
def test_a_dead_rank_ends_all_others_with_one_line(ranks):
    _, codes, errors = ranks
    assert codes == [1, -9, 1, 0]
    said = [re.findall("^dist_worker.py: (.*)", error, re.MULTILINE) for error in errors]
    assert [len(lines) for lines in said] == [1, 0, 1, 0]
    assert said[0][0].startswith("rank 0 of 3: no answer from rank 1 in a wait for all ranks: ")
    assert said[2][0].startswith("rank 2 of 3: another rank was lost: ")


@pytest.mark.dist
def test_a_rank_that_dies_while_joining_does_not_hold_up_the_others():
    code = """if True:
        import os, sys, dist_attention as da
        if os.environ["RANK"] == "1":
            da.dist.new_group = lambda **options: os.kill(os.getpid(), 9)
        with da.process_group(timeout=2):
            pass
    """
    _, errors = run_ranks(2, "-c", code, MASTER_PORT=free_port())
    assert "RankLost: rank 0 of 2: could not join the others: " in errors[0]


def test_only_errors_of_the_transport_say_that_a_rank_is_lost():
    with pytest.raises(RuntimeError, match="shapes differ") as seen:
        with da.lost("rank 1"):
            raise RuntimeError("shapes differ")
    assert seen.type is RuntimeError


def test_second_derivatives_pass_through_messages():
    def swapped(x):
        return da.Swap.apply(da.Ranks(), "a test", [x.shape], x)[0]

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: swapped(x).pow(3), x)
    assert torch.autograd.gradgradcheck(lambda x: da.SumOverRanks.apply(x).pow(3), x)


# ---------------------------------------------------------------- the command line, the long run


def test_the_long_run_counts_its_operations_and_sees_wrong_values(monkeypatch, capsys):
    row = da.run(1000, 2, 8, "cpu", 0, 1)
    assert row["error"] < 1e-6 and row["messages"] == 0
    assert row["flop"] == 2 * 2 * 2 * 8 * sum(range(1001))  # two products, multiply and add
    da.print_run(row | {"wall": 2.0, "flop": 68e9})
    assert "2.00 s, 34.0 Gflop/s in all" in capsys.readouterr().out
    real = da.ring_attention
    monkeypatch.setattr(da, "ring_attention", lambda q, k, v, **options: real(q, v, k, **options))
    assert da.run(1000, 2, 8, "cpu", 0, 1)["error"] > 0.1


@pytest.mark.parametrize("row", [0, 150, 299])
def test_the_long_run_checks_its_first_middle_and_last_row(row):
    q, k, v = torch.randn(3, 1, 1, 300, 8)
    out = da.attention_slow(q, k, v, True)
    assert da.sampled_error(q, k, v, out, torch.arange(300)) < 1e-6
    out[:, :, row] *= 1.1
    assert da.sampled_error(q, k, v, out, torch.arange(300)) > 0.09
    out[:, :, row] = torch.nan
    assert da.sampled_error(q, k, v, out, torch.arange(300)) == torch.inf


@pytest.mark.dist
def test_command_line():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "dist_attention.py", "--tokens", "5000"]
    env = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("   ok\n") == 11
    assert "5,000 tokens, 1 head of 64, causal, zigzag ring, 2 ranks of 1 threads" in done.stdout
    assert "1.3 MB sent per rank, in 1 messages" in done.stdout  # 2 x 2500 x 64 x 4 bytes


def test_command_line_under_a_scheduler_with_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    asked = []
    real = da.process_group
    monkeypatch.setattr(da, "process_group", lambda *args: asked.append(args) or real(*args))
    assert da.main(["--check", "--timeout", "7"]) == 0
    assert asked == [("cpu", 7.0)]


def test_command_line_refuses_too_few_tokens(capsys):
    with pytest.raises(SystemExit) as stop:
        da.main(["--tokens", "-3"])
    assert stop.value.code == 2
    assert "--tokens -3: expected at least 2 per rank" in capsys.readouterr().err
