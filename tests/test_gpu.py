"""What differs on a GPU: other kernels, other rounding, asynchronous work. `pytest -m gpu`."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

import attention
import dist_attention
import gpu_generate
import gpu_step
import s4
import sgconv
import structured_ffn
from s4 import rel_err

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).parent.parent
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "file, dtype",
    [(f, d) for f in (s4, sgconv, attention, structured_ffn, dist_attention)
     for d in (DOUBLE, SINGLE)] + [(f, HALF) for f in (structured_ffn, dist_attention)],
    ids=lambda x: getattr(x, "__name__", str(x).removeprefix("torch.")),
)  # fmt: skip
def test_self_check(file, dtype):
    bad = [row for row in file.self_check(dtype, "cuda") if not row[1] <= row[2]]
    assert not bad


@pytest.mark.parametrize("dtype, limit", [(SINGLE, 2e-6), (HALF, 1e-2)])
@pytest.mark.parametrize(
    "shape, causal",
    [((64, 64), False), ((33, 70), False), ((70, 33), False), ((3, 40), False),
     ((64, 64), True), ((129, 129), True)],
)  # fmt: skip
def test_blocks_of_attention_are_those_of_float64(dtype, limit, shape, causal):
    """Fused kernels where there are any; as many keys as queries, or not."""
    generator = torch.Generator("cuda").manual_seed(0)
    n, m = shape

    def draw(length):
        x = torch.randn(2, 4, length, 32, device="cuda", generator=generator)
        return x.to(dtype)

    q, k, v, grad = draw(n), draw(m), draw(m), draw(n)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention.attention_online(*exact, causal)
    wanted = torch.autograd.grad(attention.attention_slow(*exact, causal), exact, grad.double())
    out, lse = dist_attention.attention_block(q, k, v, causal)
    assert rel_err(out, want) < limit and rel_err(lse, want_lse) < limit
    grads = dist_attention.attention_block_grad(grad, q, k, v, out, lse, causal)
    assert max(map(rel_err, grads, wanted)) < 2 * limit


@pytest.mark.parametrize("kind", [s4.S4, s4.S4D, s4.DLR, sgconv.SGConv])
def test_layers_are_those_of_the_cpu(kind):
    torch.manual_seed(0)
    layer = kind(16, 4096) if kind is sgconv.SGConv else kind(16)
    u, found = torch.randn(2, 4096, 16), []
    for device in ("cuda", "cpu"):
        there = copy.deepcopy(layer).to(device)
        y = there(u.to(device))
        grads = torch.autograd.grad((y * y.cos()).mean(), [*there.parameters()])
        found.append([y, *grads])
    errors = [rel_err(a, b) for a, b in zip(*found, strict=True)]
    assert errors[0] < 1e-5 and max(errors) < 1e-4


LAYERS = {
    "S4": lambda causal: s4.S4(16, bidirectional=not causal),
    "S4D": lambda causal: s4.S4D(16, bidirectional=not causal),
    "DLR": lambda causal: s4.DLR(16, bidirectional=not causal),
    "SGConv": lambda causal: sgconv.SGConv(16, 1000, 8, bidirectional=not causal),
    "attention": lambda causal: attention.Attention(16, 2, causal, rope=True),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_in_a_cuda_graph_is_the_eager_one(kind, causal):
    """Forward and backward, recorded once, replayed on another input and another mask."""
    torch.manual_seed(0)
    layer = LAYERS[kind](causal).cuda()
    x = torch.randn(2, 1000, 16, device="cuda", requires_grad=True)
    keep = torch.ones(2, 1000, dtype=torch.bool, device="cuda")

    def run():
        y = layer(x, keep)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        return [y.detach(), *grads]

    graphs = gpu_step.Graphs()  # FFT plans and workspaces must be there before
    graphs.warm_up(run)
    replay = graphs.capture(run)
    with torch.no_grad():
        x.normal_()
        keep[1, 600:] = False
    assert max(map(rel_err, replay(), run())) < 1e-5


@pytest.mark.parametrize("L", [64, 100, 128, 704])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_finite_where_all_scores_are_far_below_zero(causal, L):
    """cuDNN's gradient of q is nan with a mask of 64, 192, 320, ... keys (torch 2.11)."""
    q, k, v = (torch.randn(2, 4, L, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0] = 1
    k[..., 0] = -120 * 32**0.5
    leaves = [t.requires_grad_() for t in (q, k, v)]
    keep = (torch.arange(L, device="cuda") < L - 5).expand(2, L)
    attention.attention(q, k, v, causal, keep).float().square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_rounding_does_not_grow_with_the_keys(causal):
    """Unevenly many; the last rows, which see most."""
    generator, n = torch.Generator("cuda").manual_seed(0), 150_000
    q, k, v = (torch.randn(1, 1, n, 64, device="cuda", generator=generator) for _ in range(3))
    with torch.no_grad():
        out = dist_attention.ring_attention(q, k, v, causal=causal)
    rows = slice(n - 64, n)
    scores = q[:, :, rows].double() @ k.double().mT / 8
    if causal:
        future = torch.ones(64, n, dtype=torch.bool, device="cuda").triu(n - 63)
        scores = scores.masked_fill(future, -torch.inf)
    want = scores.softmax(-1) @ v.double()
    assert rel_err(out[:, :, rows], want) < 2e-6


# ---------------------------------------------------------------------------- pretrain.py

run = partial(runs.run, d_model=32, d_ff=64, batch_size=16, device="cuda")
STAGES = ("pretrain", "finetune", "test")


@pytest.fixture
def small(monkeypatch):
    """train() on a lattice of 96 examples."""
    runs.load_small(monkeypatch)


@pytest.fixture
def padded(monkeypatch):
    """train() on 64 texts of symbols with padding."""
    lengths = np.random.RandomState(0).randint(20, 61, 64)
    runs.load_small(monkeypatch, runs.symbols(lengths))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
def test_every_model_trains(padded, tmp_path, model, objective, precision):
    options = {"model": model, "objective": objective, "precision": precision}
    result = run(tmp_path, "a", task="listops", **options)
    assert np.isfinite([result[stage]["loss"] for stage in STAGES]).all()
    assert result["speed"]["peak_memory"] == torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("model", ["transformer", "s4", "sgconv"])
def test_losses_are_those_of_the_cpu(small, tmp_path, model):
    """Nothing random in a causal run: float64 differs by rounding alone."""
    options = {"model": model, "objective": "causal", "precision": "float64"}
    found = [run(tmp_path, d, device=d, **options) for d in ("cpu", "cuda")]
    for stage in STAGES:
        assert found[1][stage]["loss"] == pytest.approx(found[0][stage]["loss"], rel=1e-6)


@pytest.mark.parametrize("model", ["transformer", "s4"])
def test_an_interrupted_run_ends_in_the_same_bits(small, tmp_path, monkeypatch, model):
    options = {"model": model, "dropout": 0.1}
    run(tmp_path, "whole", **options)
    with monkeypatch.context() as patch:
        runs.after_step(patch, "finetune", 9, runs.die)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, "cut", **options)
    run(tmp_path, "cut", resume=True, **options)
    runs.same(runs.bits(tmp_path / "whole"), runs.bits(tmp_path / "cut"))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("pad_to", [64, 8])  # one length; several
@pytest.mark.parametrize("model", ["transformer", "s4", "s4d", "diagonal", "sgconv"])
def test_ten_captured_steps_are_ten_eager_ones(padded, tmp_path, model, pad_to, dropout):
    options = {"model": model, "pad_to": pad_to, "dropout": dropout, "precision": "float64"}
    options |= {"pretrain_steps": 10, "finetune_steps": 10, "eval_every": 10}
    weights = []
    for eager in (True, False):
        run(tmp_path, str(eager), task="listops", eager=eager, **options)
        weights.append(runs.bits(tmp_path / str(eager))[2])
        for name in weights[-1]:
            if name.endswith("qkv.bias"):
                weights[-1][name][32:64] = 0  # of keys: no softmax sees it, so it learns rounding
    for name in weights[0]:
        assert rel_err(weights[1][name], weights[0][name]) < 1e-12, name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["S4", "Transformer"])
def test_generation_by_graphs_gives_the_tokens_of_the_model(kind, temperature):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 50, "causal": True}
    if kind == "S4":
        model = s4.S4Model(s4.S4Config(**sizes))
    else:
        model = attention.Transformer(attention.TransformerConfig(**sizes))
    model = model.cuda().double()
    head = torch.nn.Linear(32, 50).cuda().double()
    prompt = torch.randint(0, 50, (3, 40), device="cuda")
    torch.manual_seed(1)
    want = model.generate(prompt, 60, head, temperature)
    torch.manual_seed(1)
    assert torch.equal(gpu_generate.generate(model, prompt, 60, head, temperature), want)


@pytest.mark.parametrize(("model", "parts"), [("s4", 1), ("diagonal", 2)])
def test_a_compiled_model_trains_the_same(small, tmp_path, model, parts):
    options = {"model": model, "accumulate": parts, "objective": "causal", "eval_every": 12}
    plain, compiled = (run(tmp_path, str(on), compile=on, **options) for on in (False, True))
    for stage in ("pretrain", "finetune"):
        assert compiled[stage]["loss"] == pytest.approx(plain[stage]["loss"], rel=1e-3)


def test_two_ranks_on_one_gpu_are_one_process(tmp_path):
    """gloo through host memory where there are fewer GPUs than ranks; shares of the sequence."""
    flags = ["--device", "cuda", "--precision", "float64", "--objective", "causal"]
    flags += ["--d-model", "32", "--pretrain-steps", "4", "--finetune-steps", "4"]
    flags += ["--eval-every", "2", "--data-dir", str(tmp_path / "data")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "pretrain.py", "--sequence-parallel", "ring"]
    for start, name in (([sys.executable, "pretrain.py"], "one"), (command, "two")):
        done = subprocess.run(
            [*start, *flags, "--out", str(tmp_path / name)],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    for stage in STAGES:
        assert two[stage]["loss"] == pytest.approx(one[stage]["loss"], rel=1e-9)


def test_guided_training_frees_its_guide():
    """W, its gradient and its optimizer state leave the memory of the device."""
    layer = structured_ffn.LowRank(512, 2048, 16).cuda()
    guide = structured_ffn.Guide(layer, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    used = []
    for _ in range(3):
        layer(torch.randn(8, 512, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        guide.step(optimizer)
        used.append(torch.cuda.memory_allocated())
    assert layer.guide is None and used[0] - used[2] > 0.9 * 3 * 4 * 512 * 2048


def test_merged_layers_agree_with_their_factors():
    for dtype, limit in ((SINGLE, 1e-5), (HALF, 3e-2)):
        layer = structured_ffn.BlockShuffle(64, 128, 4).cuda().to(dtype)
        merged = structured_ffn.merged(layer, max_tokens=4)
        x = torch.randn(8, 64, device="cuda", dtype=dtype)
        assert rel_err(merged(x[:4]), layer(x[:4])) < limit
        assert rel_err(merged(x), layer(x)) < limit
