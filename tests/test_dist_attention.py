"""dist_attention.py: layouts and references here; everything with ranks in real processes.

tests/dist_worker.py is started once per number of ranks and writes down what it saw.
"""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import dist_worker
import numpy as np
import pytest
import torch

import dist_attention as da
from attention import attention_ref, attention_slow

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3}
WORLDS = [1, 2, 3, 4]


def torchrun(world, *args, timeout=300, **options):
    """Start `world` ranks on this machine, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What every rank of every world saw: seen(world) -> one dict a rank."""
    folder, known = tmp_path_factory.mktemp("dist"), {}

    def look(world):
        if world == 1 and world not in known:  # no process group at all
            known[world] = [dist_worker.everything(0, 1)]
        if world not in known:
            path = folder / f"world{world}"
            done = torchrun(world, "tests/dist_worker.py", "grid", path)
            assert done.returncode == 0, done.stderr[-3000:]
            known[world] = [json.loads(Path(f"{path}.{r}").read_text()) for r in range(world)]
        return known[world]

    return look


# ---------------------------------------------------------------- one process: layouts, reference


@pytest.mark.parametrize("layout", [da.contiguous, da.zigzag])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("L", [0, 1, 3, 16, 45])
def test_layouts_deal_out_every_token_once(layout, world, L):
    at = [da.positions(L, rank, world, layout) for rank in range(world)]
    assert sorted(torch.cat(at).tolist()) == list(range(L))
    assert all((x[1:] > x[:-1]).all() for x in at)
    x = torch.randn(2, L, 3)
    for rank in range(world):
        assert torch.equal(da.shard(x, rank, world, 1, layout), x[:, at[rank]])


def work(layout, L, world):
    """Pairs of query and key that each rank computes under a causal mask."""
    segments = layout(L, world)
    pairs = []
    for mine in segments:
        blocks = [b for theirs in segments for b in da.visible_blocks(mine, theirs, True)]
        sizes = [(q.stop - q.start, k.stop - k.start, diagonal) for q, k, diagonal in blocks]
        pairs.append(sum(n * (n + 1) // 2 if diagonal else n * m for n, m, diagonal in sizes))
    return pairs


@pytest.mark.parametrize("L", [1024, 1021])
def test_zigzag_is_balanced_and_contiguous_is_not(L):
    balanced, skewed = work(da.zigzag, L, 4), work(da.contiguous, L, 4)
    assert sum(balanced) == sum(skewed) == L * (L + 1) // 2
    assert max(balanced) <= 1.02 * min(balanced)
    assert max(skewed) >= 5 * min(skewed)


def test_blocks_of_any_two_layouts_cover_the_causal_mask():
    for mine in da.zigzag(37, 3):
        for theirs in (*da.contiguous(37, 4), [(3, 11), (20, 37)]):
            at = [torch.cat([torch.arange(a, b) for a, b in s]) for s in (mine, theirs)]
            count = torch.zeros(len(at[0]), len(at[1]), dtype=torch.int64)
            for rows, cols, diagonal in da.visible_blocks(mine, theirs, True):
                block = torch.ones_like(count[rows, cols])
                count[rows, cols] += block.tril() if diagonal else block
            assert torch.equal(count, (at[1][None] <= at[0][:, None]).long())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_simulated_ring_is_attention(world, causal):
    q, k, v = (np.random.RandomState(i).randn(23, 6) for i in range(3))
    expected = torch.from_numpy(attention_ref(q, k, v, causal)[0])
    for layout in (da.contiguous, da.zigzag):
        ring = da.ring_ref(q, k, v, world, causal, layout)
        assert da.rel_err(torch.from_numpy(ring), expected) < 1e-13


def test_what_everything_is_compared_with_is_attention():
    q, k, v = (np.random.RandomState(i).randn(23, 6) for i in range(3))
    whole = da.product(*(torch.from_numpy(x)[None, None] for x in (q, k, v)), causal=True)
    expected = torch.from_numpy(attention_ref(q, k, v, causal=True)[0])
    assert da.rel_err(whole[0, 0], expected) < 1e-13


def test_what_is_not_a_number_is_no_small_error():
    assert da.worst([0.0, float("nan"), 1e-16], "cpu") == float("inf")


def test_without_a_process_group():
    q = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    for attend in da.SCHEDULES:
        out = attend(q, q, q, causal=True, layout=da.zigzag)
        assert da.rel_err(out, da.product(q, q, q, True)) < 1e-13


def test_numbers_from_blocks_do_not_depend_on_where_they_start():
    whole = da.random_tokens(3, 0, 9000, 2, 4)
    assert torch.equal(da.random_tokens(3, 4000, 8300, 2, 4), whole[:, :, 4000:8300])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda q: da.ring_attention(q[0], q, q), r"\(2, 9, 8\)"),
        (lambda q: da.ring_attention(q, q, q.half()), "float16"),
        (lambda q: da.ring_attention(q, q, q, keep=torch.ones(1, 4)), r"\(1, 9\)"),
        (lambda q: da.ring_attention(q, q[:, :, :3], q[:, :, :3], causal=True), "9 and 3"),
        (lambda q: da.ulysses_attention(q, q, q, dropout=0.1), "dropout"),
        (lambda q: da.allgather_attention(q, q, q, window=5), "window"),
        (lambda q: da.ring_attention(q, q, q, bias=q), "bias"),
        (lambda q: da.ulysses(dist_worker.Decay(6), axes={"a": 1}), "axis 1 is not d_model 6"),
        (lambda q: da.ulysses(torch.nn.Sequential(dist_worker.Decay(6))), "modules inside"),
    ],
)
def test_bad_input(call, named):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(1, 2, 9, 8))


@pytest.mark.parametrize("attend", da.SCHEDULES)
def test_an_unknown_option_is_an_error(attend):
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(TypeError, match="casual"):
        attend(q, q, q, casual=False)
    with pytest.raises(TypeError, match="positional"):  # options are no place for a slip either
        attend(q, q, q, False, None, da.contiguous, None, 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_blocks_that_must_be_written_out(causal, kernel, monkeypatch):
    """Padding under a causal mask, no kernel at all: squares of scores, whatever their number."""
    if not kernel:
        monkeypatch.setattr(da, "fused", lambda *args: False)
    monkeypatch.setattr(da.squares, "__defaults__", (7,))
    q, k, v, grad = (torch.randn(2, h, 45, 8, dtype=torch.float64) for h in (4, 2, 2, 4))
    keep = torch.arange(45) < torch.tensor([[45], [20]])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = da.ring_attention(*leaves, causal=causal, keep=keep)
    expected = attention_slow(*leaves, causal, keep)
    assert da.rel_err(out, expected) < 1e-13
    grads = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    assert all(da.rel_err(*pair) < 1e-13 for pair in zip(*grads, strict=True))


def functions(path):
    return {x.name: x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)}


def test_twins_are_twins():
    """What is marked as the same as in attention.py is the same."""
    marked = [
        x
        for x in (ROOT / "dist_attention.py").read_text().splitlines()
        if "same as attention.py:" in x
    ]
    ours, theirs = functions(ROOT / "dist_attention.py"), functions(ROOT / "attention.py")
    names = [line.split("same as attention.py:")[1].strip() for line in marked]
    assert len(names) >= 4
    for name in names:
        assert ast.dump(ours[name]) == ast.dump(theirs[name]), name


# ---------------------------------------------------------------- several processes


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_forward_and_all_gradients(seen, world):
    """Every schedule, layout, mask, head grouping, length and dtype, on every rank."""
    errors = seen(world)[0]["grid"]
    assert len(errors) > 150
    bad = {name: e for name, e in errors.items() if not e <= LIMITS[name.split()[-1]]}
    assert not bad


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS[1:])
def test_float32_is_as_good_as_one_fused_call(seen, world):
    one, many = seen(1)[0]["grid"], seen(world)[0]["grid"]
    singles = [name for name in one if name.endswith("float32")]
    assert singles
    assert not [name for name in singles if not many[name] <= 2 * one[name] + 1e-7]


@pytest.mark.dist
def test_wrong_rings_are_caught(seen):
    """The check sees a dropped block, swapped chunks, a forgotten rescaling, 1 %, zeros."""
    errors = seen(3)[0]["mutations"]
    assert errors.pop("right") < 1e-13
    assert len(errors) == 6 and all(error > 1e-3 for error in errors.values()), errors


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_the_formula(seen, world):
    B, n, H, G, E, e, W = 2, 12, 24, 12, 2, 4, world
    ring = [(W - 1) * 2 * B * n * G * E * e, (W - 1) * 2 * B * n * G * E * (e + 4)]
    heads = (W - 1) * B * n * E * (2 * H + 2 * G) * e // W
    expected = {
        "ring_attention": ring,
        "allgather_attention": ring,
        "ulysses_attention": [heads] * 2,
        "bfloat16": [(W - 1) * 2 * B * n * H * E * 2],  # travels as it is, two bytes each
    }
    for rank in seen(world):
        for name, sent in rank["bytes"].items():
            assert [x.get("bytes", 0) for x in sent] == expected[name], name
    messages = [x.get("messages", 0) for x in seen(world)[0]["bytes"]["ring_attention"]]
    assert messages == [W - 1, {1: 0, 2: 2}.get(W, W + 1)]


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_models_over_ranks_are_models(seen, world):
    """Transformer, S4 and SGConv: features and summed gradients equal those of one process."""
    errors = seen(world)[0]["models"]
    assert len(errors) == 6 and not [e for e in errors.values() if not e <= 1e-10]


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_same_bits_again(seen, world):
    assert all(rank["twice"] for rank in seen(world))


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_nan_reaches_those_who_see_it(seen, world):
    """The last key is NaN: all rows without a mask, the last row with a causal one; no hang."""
    full, causal = zip(*(rank["nan"] for rank in seen(world)), strict=True)
    assert set(full) == {1.0}
    assert causal == (0.0,) * (world - 1) + (0.25,)


@pytest.mark.dist
def test_a_group_of_some_ranks(seen):
    assert [rank["subgroup"] < 1e-13 for rank in seen(3)] == [True] * 3


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("heads", "query heads H: rank 1 has 6, the others have 4"),
        ("dtype", "dtype: rank 1 has float64, the others have float32"),
        ("tokens", "the ranks hold 6, 5, 6 tokens; layout contiguous gives them 5, 6, 6"),
        ("causal", "causal: rank 1 has 1, the others have 0"),
        ("layout", "layout: rank 1 has zigzag, the others have contiguo"),
        ("schedule", "schedule: rank 1 has ulysses, the others have ring"),
        ("groups", "rank 1: expected q (B, H, n, E), k and v (B, G, n, E)"),
        (
            "gradients",
            "gradients of q, k, v: rank 1 has [False, True, True], the others have",
        ),
        ("dropout", "rank 1: not implemented: dropout"),
        ("window", "rank 0: not implemented: window; rank 1: not"),
        ("bias", "rank 0: not implemented: bias"),
        ("after all that", "no error"),
    ],
)
def test_a_mismatch_is_the_same_error_everywhere(seen, case, said):
    heard = {rank["mismatches"][case] for rank in seen(3)}
    assert len(heard) == 1 and heard.pop().startswith(said)


def alive(pid):
    """True when a process of that number runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.dist
@pytest.mark.parametrize("task", ["dies", "sleeps"])
def test_a_lost_rank_ends_all_others(task, tmp_path):
    """A message with rank, peer and step; exit status not 0; in time; nobody is left."""
    start = time.perf_counter()
    done = torchrun(3, "tests/dist_worker.py", task, tmp_path / "lost")
    assert done.returncode != 0 and time.perf_counter() - start < 60
    said = [x for x in done.stderr.splitlines() if "no answer from rank" in x]
    # who hears of it first says so; torchrun may end the other before it speaks
    assert any(
        re.search(r"rank [02] of 3: no answer from rank 1 in step \d of", x) for x in said
    ), said
    pids = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("lost.*")]
    deadline = time.perf_counter() + 5
    while any(map(alive, pids)) and time.perf_counter() < deadline:
        time.sleep(0.1)
    assert len(pids) == 3 and not any(map(alive, pids))


@pytest.mark.dist
def test_a_message_of_another_size_is_never_taken(tmp_path):
    """Neither a stale tail (a shorter one) nor an abort (a longer one): the receiver says so."""
    for task in ("shorter", "longer"):
        done = torchrun(2, "tests/dist_worker.py", task, tmp_path / "sizes")
        assert "no answer from rank 1 in step 0 of the ring" in done.stderr, done.stderr[-3000:]
        assert done.returncode != 0 and "SIGABRT" not in done.stderr


@pytest.mark.dist
def test_command_line():
    done = torchrun(2, "dist_attention.py", "--tokens", "5000")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    table = [x for x in lines if x.endswith(("ok", "FAIL"))]
    assert len(table) >= 28 and all(x.endswith("ok") for x in table)
    assert "5,000 tokens, 1 head of 64, causal, zigzag ring, 2 ranks of 1 threads" in lines[-3]
    assert "1.3 MB sent in 1 messages" in lines[-2]  # 2 x 2500 x 64 x 4 bytes


def test_command_line_alone():
    command = [sys.executable, "dist_attention.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("   ok") >= 28


def test_command_line_wants_tokens():
    command = [sys.executable, "dist_attention.py", "--tokens", "-3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--tokens -3: expected at least 1" in done.stderr
