"""Every model file, and its public modules and functions, used as people use PyTorch.

A new module is covered by adding it to MODULES and ARGUMENTS, a new function by adding it to CALLS.
"""

import ast
import copy
import inspect
import io
import math
import pickle
import pkgutil
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

import attention
import dist_attention
import s4
import sgconv
import structured_ffn
from attention import Attention, Transformer, TransformerConfig
from gpu_kernels import JointS4Model
from s4 import DLR, S4, S4D, S4Config, S4Model, rel_err
from sgconv import SGConv, SGConv2d, SGConvConfig, SGConvModel
from structured_ffn import BlockDense, BlockShuffle, LowRank, Merged, StructuredFFN

SLOW = pytest.mark.slow

# ---------------------------------------------------------------- files

ROOT = Path(__file__).resolve().parent.parent
FILES = [s4, sgconv, attention, structured_ffn, dist_attention]
EACH_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)


def run_as_script(file, *arguments):
    """As python FILE.py ARGUMENTS, which must end well."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [file.__file__, *arguments])
        runpy.run_path(file.__file__, run_name="__main__")
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("file", "rows"),
    [(s4, 12), (sgconv, 10), (attention, 12), (structured_ffn, 30), (dist_attention, 11)],
)
def test_all_checks_are_ok(file, rows, capsys):
    run_as_script(file, "--check")
    printed = capsys.readouterr().out
    assert printed.count(" ok\n") == rows
    assert not re.search("FAILED|demo", printed)


@SLOW
@pytest.mark.parametrize(
    ("file", "result"),
    [
        (s4, "accuracy 1.00, as a recurrence 1.00, target 0.95"),
        (sgconv, "accuracy 1.00, target 0.95"),
        (attention, "100.0% of 32 symbols seen once are repeated"),
        (structured_ffn, r"another: 0.0[3-9]\d, guided 0.0[1-3]\d"),
    ],
)
def test_demo(file, result, capsys):
    run_as_script(file)
    assert re.search(result, capsys.readouterr().out)


@EACH_FILE
def test_one_failed_row_fails_the_check(file, capsys, monkeypatch):
    errors = iter([math.nan])
    monkeypatch.setattr(file, "rel_err", lambda a, b: next(errors, 0.0))
    assert file.main(["--check"]) == 1
    assert capsys.readouterr().out.count(" FAILED\n") == 1


PLACES = {  # what may be wrong, and the rows of the table that must show it
    "s4.krylov": "S4 kernel",
    "s4.bilinear": "S4 kernel",
    "s4.diagonal_kernel": "S4D kernel",
    "s4.fft_conv": "layer",
    "s4.StateSpace.step": "layer",
    "s4.StateSpace.prefill": "layer",
    "sgconv.upsample": "kernel",
    "sgconv.fft_conv": "layer",
    "attention.attention": "fused kernel",
    "attention.attention_slow": "written out",
    "attention.attention_online": "online softmax",
    "attention.attention_newest": "== forward",
    "attention.merge": "merged blocks",
    "attention.rotate": "RoPE",
    "structured_ffn.grid_linear": "forward",
    "structured_ffn.grid_linear_slow": "einsum",
    "dist_attention.fused_block": "ring:",
}
FAULTS = {
    "1 %": lambda y: 1.01 * y,
    "one late": lambda y: y.roll(1, -1),
    "nearly zero": lambda y: 1e-9 * y,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_the_checks_see_a_fault(place, fault, monkeypatch):
    right = pkgutil.resolve_name(place)

    def faulty(*args, **options):
        """Change the result, or the first of several."""
        value = right(*args, **options)
        if torch.is_tensor(value):
            return FAULTS[fault](value)
        return FAULTS[fault](value[0]), *value[1:]

    monkeypatch.setattr(place, faulty)
    rows = sys.modules[place.split(".")[0]].self_check()
    errors = [(error, limit) for name, error, limit in rows if PLACES[place] in name]
    assert errors and not any(error <= limit for error, limit in errors)


def tree(path, name):
    """Syntax tree of the function, class or Class.method of this name, without its docstring."""
    nodes = ast.walk(ast.parse(path.read_text()))
    node = next(n for n in nodes if getattr(n, "name", None) == name.split(".")[-1])
    node.body = node.body[1:] if ast.get_docstring(node) else node.body
    return ast.dump(node)


def test_copies_are_those_of_their_originals():
    """Of what is marked as the same, and of how every model file measures and prints errors."""
    compared = 0
    for file in FILES:
        path = Path(file.__file__)
        marked = re.findall("# same as (.*):(.*)", path.read_text())
        for original, name in [*marked, ("s4.py", "rel_err"), ("s4.py", "print_table")]:
            assert tree(path, name) == tree(ROOT / original, name), (path.name, name)
            compared += 1
    assert compared == 11 + 10


# ---------------------------------------------------------------- modules

MODULES = {  # how to make it, shape of an input
    "S4": (lambda: S4(6, 4), (2, 9, 6)),
    "S4D": (lambda: S4D(6, 4, bidirectional=True), (2, 9, 6)),
    "DLR": (lambda: DLR(6, 4), (2, 9, 6)),
    "SGConv": (lambda: SGConv(6, 16, 4, decay=sgconv.power_law_decay), (2, 9, 6)),
    "SGConv2d": (lambda: SGConv2d(6, 3, 4, 2, decay=sgconv.ramp_decay), (2, 6, 3, 4)),
    "Attention": (lambda: Attention(8, 2), (2, 9, 8)),
    "Attention, RoPE": (lambda: Attention(8, 2, causal=True, rope=True), (2, 9, 8)),
    "Attention, grouped": (lambda: Attention(8, 4, n_kv_heads=2), (2, 9, 8)),
    "LowRank": (lambda: LowRank(16, 24, 4), (5, 16)),
    "BlockDense": (lambda: BlockDense(16, 24, 8, 4), (5, 16)),
    "BlockShuffle": (lambda: BlockShuffle(16, 24, 2), (5, 16)),
    "StructuredFFN": (lambda: StructuredFFN(8, 16, partial(LowRank, R=4)), (2, 9, 8)),
    "S4Model": (lambda: S4Model(S4Config(6, 2, 4, n_channels=3)), (2, 9, 3)),
    "JointS4Model": (lambda: JointS4Model(S4Config(6, 2, 4, n_channels=3)), (2, 9, 3)),
    "SGConvModel": (lambda: SGConvModel(SGConvConfig(6, 2, 16, 4, n_channels=3)), (2, 9, 3)),
    "Transformer": (lambda: Transformer(TransformerConfig(8, 2, 2, n_channels=3)), (2, 9, 3)),
}
EACH = pytest.mark.parametrize("name", MODULES)


def build(name, seed=0):
    make, shape = MODULES[name]
    torch.manual_seed(seed)
    return make(), torch.randn(shape)


def gradients(run, module, x):
    """Gradients of the input and of all parameters, as one vector."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    run(x).sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in [x, *module.parameters()]])


def test_every_module_is_in_the_list():
    tested = {Merged}  # for inference only
    for name in MODULES:
        for module in build(name)[0].modules():
            tested.update(type(module).__mro__)
    for file in (s4, sgconv, attention, structured_ffn):
        for _, kind in inspect.getmembers(file, inspect.isclass):
            if issubclass(kind, nn.Module) and kind.__module__ == file.__name__:
                assert kind in tested


@EACH
def test_a_training_step_reads_no_value_back(name):
    """Made on the meta device, which has no values: a GPU would have to wait for them."""
    make, shape = MODULES[name]
    with torch.device("meta"):
        module = make()
        x = torch.randn(shape)
        keep = torch.ones(shape[:2], dtype=torch.bool)
    padded = {"keep": keep} if "keep" in inspect.signature(module.forward).parameters else {}
    module(x, **padded).sum().backward()
    assert all(p.is_meta and p.grad.is_meta for p in module.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@EACH
def test_activation_checkpointing_changes_no_gradient(name, use_reentrant):
    module, x = build(name)
    again = partial(checkpoint.checkpoint, module, use_reentrant=use_reentrant)
    assert torch.equal(gradients(again, module, x), gradients(module, module, x))


@SLOW
@EACH
def test_compiles(name):
    torch.compiler.reset()
    module, x = build(name)
    module = module.double()
    x = x.double()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert rel_err(gradients(compiled, module, x), gradients(module, module, x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_mixed_precision_with_a_gradient_scaler_is_close_to_float32(name, dtype):
    module, x = build(name)
    want = module(x)
    want_gradients = gradients(module, module, x)
    module.zero_grad()
    leaves = [x.requires_grad_(), *module.parameters()]
    old = nn.utils.parameters_to_vector(leaves).detach()
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype):
        y = module(x)
        loss = y.sin().sum()
    assert rel_err(y, want) < 0.03
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # skipped if a gradient is not finite
    new = nn.utils.parameters_to_vector(leaves)
    assert rel_err((old - new) / 0.1, want_gradients) < 0.1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
@EACH
def test_converted_modules_are_close(name, dtype, limit):
    module, x = build(name)
    want = module(x)
    got = module.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert rel_err(got, want) < limit  # False for nan


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
@EACH
def test_a_copy_gives_the_same_bits_and_shares_nothing(name, way):
    module, x = build(name)
    gradients(module, module, x)  # what a training step leaves behind is copied as well
    want = module(x)
    if way == "deepcopy":
        twin = copy.deepcopy(module)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        twin, _ = build(name, seed=1)
        assert not torch.equal(twin(x), want)
        twin.load_state_dict(saved(module))
    assert torch.equal(twin(x), want)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(module(x), want)


@EACH
def test_exports(name):
    module, x = build(name)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,), strict=False)
        assert rel_err(program.module()(x), module(x)) < 1e-6


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("S4", "state._replace(x=state.x[idx])"),
        ("Attention, RoPE", "Cache(c.k[idx], c.v[idx], c.length)"),
    ],
)
def test_a_state_reordered_as_documented_continues_other_beams(name, how):
    layer, x = build(name)
    x = torch.cat([x, x.sin()])  # (4, 9, D)
    idx = torch.tensor([3, 0, 0])
    y = layer(torch.cat([x[idx, :7], x[:3, 7:]], 1))
    _, state = layer.prefill(x[:, :7], layer.initial_state(4))
    assert how in type(state).__doc__
    state = eval(how, {"Cache": attention.Cache}, {"state": state, "c": state, "idx": idx})
    for t in (7, 8):
        y_t, state = layer.step(x[:3, t], state)
        assert rel_err(y_t, y[:, t]) < 1e-5


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("ranks") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@SLOW
@pytest.mark.parametrize("option", [None, "static_graph", "gradient_as_bucket_view"])
@EACH
def test_data_parallel_changes_no_gradient(name, option, one_rank):
    module, x = build(name)
    want = gradients(module, module, x)
    options = {option: True} if option else {}
    parallel = DistributedDataParallel(module, **options)
    for _ in range(2):  # a static graph is recorded in the first step
        assert torch.equal(gradients(parallel, module, x), want)


# ---------------------------------------------------------------- models

MODELS = {  # by their kind of mixer; options of the config
    "S4": lambda **c: S4Model(S4Config(8, d_state=8, **c)),
    "S4D": lambda **c: S4Model(S4Config(8, d_state=8, **c), s4.s4d_mixer),
    "DLR": lambda **c: S4Model(S4Config(8, d_state=8, **c), s4.dlr_mixer),
    "sinusoids": lambda **c: Transformer(TransformerConfig(8, **c)),
    "RoPE": lambda **c: Transformer(TransformerConfig(8, rope=True, n_kv_heads=2, **c)),
    "S4 in a Transformer": lambda **c: Transformer(TransformerConfig(8, **c), mixer=s4_mixer),
    "SGConv": lambda **c: SGConvModel(SGConvConfig(8, max_len=40, kernel_dim=4, **c)),
}
RECURRENT = pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "SGConv"])


def s4_mixer(config, i):
    return S4(config.d_model, 8, not config.causal)


def model_of(kind, **options):
    torch.manual_seed(0)
    return MODELS[kind](**options).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_batch_mates_change_nothing(kind, causal):
    """The features of an example do not depend on how far it is padded, nor with what."""
    model = model_of(kind, n_channels=3, causal=causal)
    x = torch.randn(3, 40, 3).double()
    lengths = [40, 23, 1]
    keep = torch.arange(40) < torch.tensor(lengths)[:, None]
    padding = 0.0 if isinstance(model, Transformer) else torch.nan
    changed = torch.where(keep[..., None], x, padding)
    for b, n in enumerate(lengths):
        alone = model(x[b : b + 1, :n])[0]
        assert rel_err(model(x, keep)[b, :n], alone) < 1e-11
        assert rel_err(model(changed, keep)[b, :n], alone) < 1e-11
    without_keep = rel_err(model(x)[2, :1], alone)
    assert without_keep < 1e-11 if causal else without_keep > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["S4", "SGConv", "sinusoids"])
def test_an_exported_model_takes_any_batch_and_shorter_inputs(kind, causal):
    """It is exported at the longest length; shorter inputs are padded on the right."""
    model = model_of(kind, n_channels=3, causal=causal).eval()
    x = torch.randn(5, 9, 3).double()
    lengths = [9, 4, 8, 7, 1]
    keep = torch.arange(9) < torch.tensor(lengths)[:, None]  # (5, 9)
    batch = {0: torch.export.Dim("batch")}
    export = partial(torch.export.export, model, strict=False)
    with torch.no_grad():
        plain = export((x[:2],), dynamic_shapes=(batch,)).module()
        padded = export((x[:2], keep[:2]), dynamic_shapes=(batch, batch)).module()
        assert rel_err(plain(x), model(x)) < 1e-12
        assert rel_err(plain(x[:1]), model(x[:1])) < 1e-12
        for row, short, n in zip(padded(x, keep), x, lengths, strict=True):
            assert rel_err(row[:n], model(short[None, :n])[0]) < 1e-12


@RECURRENT
def test_generation_is_the_argmax_of_the_whole_and_of_each_prompt_alone(kind):
    model = model_of(kind, vocab_size=11, causal=True)
    head = partial(linear, weight=torch.randn(11, 8).double())
    prompts = torch.randint(0, 11, (5, 150), dtype=torch.uint8)
    lengths = torch.tensor([150, 1, 64, 149, 87], dtype=torch.int32)
    got = model.generate(prompts, 12, head, lengths=lengths)
    assert torch.equal(got, model.generate(prompts, 12, head, lengths=lengths.tolist()))
    assert torch.equal(got[:1], model.generate(prompts[:1], 12, head))
    assert torch.equal(got[:1], model.generate(prompts[:1], 12, head, temperature=1e-9))
    for prompt, length, want in zip(prompts, lengths, got, strict=True):
        tokens = prompt[None, :length]
        for _ in range(12):
            best = head(model(tokens))[:, -1].argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], 1)
        assert torch.equal(tokens[0, length:], want)
    assert len(got.unique()) > 3
    none = model.generate(prompts, 0, head)
    assert none.shape == (5, 0) and none.dtype == torch.int64


@RECURRENT
def test_sampling_follows_the_temperature(kind):
    logits = torch.tensor([0.0, 1.0, 2.0])
    model = model_of(kind, vocab_size=3, causal=True)
    prompt = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = model.generate(prompt, 1, lambda h: logits.expand(len(h), 3), temperature=2.0)
    share = drawn[:, 0].bincount(minlength=3) / 4000
    assert (share - (logits / 2).softmax(-1)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("L", "options", "message"),
    [
        (0, {}, r"got \[0, 0\]"),
        (5, {"lengths": [4, 0]}, r"got \[4, 0\]"),
        (5, {"lengths": [4, 6]}, r"to L = 5 .*got \[4, 6\]"),
        (5, {"lengths": [4]}, r"2 lengths .*got \[4\]"),
        (5, {"temperature": -1.0}, "temperature .*got .*-1"),
        (5, {"temperature": math.nan}, "temperature .*got .*nan"),
    ],
)
@pytest.mark.parametrize("kind", ["S4", "RoPE"])
def test_prompts_that_cannot_be_continued_are_refused(kind, L, options, message):
    model = model_of(kind, vocab_size=3, causal=True)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(2, L).long(), 2, nn.Linear(8, 3).double(), **options)
    for shape in ((5,), (0, 5)):
        message = r"expected prompt \(B, L\).* got " + re.escape(str(shape))
        with pytest.raises(ValueError, match=message):
            model.generate(torch.zeros(shape).long(), 2, nn.Linear(8, 3).double())


# ---------------------------------------------------------------- functions: shapes and dtypes

# L: torch's attention kernel for CPUs hides a NaN among fewer than 16 keys
LENGTHS = {  # X = I P, Y = O S
    "B": 2, "C": 4, "D": 3, "E": 8, "G": 2, "H": 4, "I": 2, "L": 17, "N": 4, "O": 3, "P": 5,
    "S": 4, "X": 10, "Y": 12, "1": 1, "*": 2,
}  # fmt: skip

torch.manual_seed(0)
S4_LAYER = S4(3, 4).double()
HEADS = Attention(8, 2, causal=True, rope=True).double()
VALUES = {"n_channels": 3, "causal": True}
QKV = "q BHnE, k BGLE, v BGLe, keep BL"
RING = "q BHnE, k BGLE, v BGLE, keep BL"
MIXER = "x BLD, keep BL"

# Axes in capitals have one length only, others any; * stands for any axes.
CALLS = {
    "attention": (attention.attention, QKV),
    "attention_slow": (attention.attention_slow, QKV),
    "attention_online": (attention.attention_online, QKV),
    "merge": (attention.merge, "out BHLE, lse BHL, out_block BHLE, lse_block BHL"),
    "sinusoids": (attention.sinusoids, "x *Le, positions L"),
    "rotate": (attention.rotate, "x *LE, positions L"),
    "Attention": (HEADS, "x BLE, keep BL, positions L"),
    "Attention.prefill": (lambda x: HEADS.prefill(x, HEADS.initial_state(2)), "x BlE"),
    "Attention.step": (lambda x_t: HEADS.step(x_t, HEADS.initial_state(2)), "x_t BE"),
    "fft_conv": (s4.fft_conv, "u blD, K Dl"),
    "fft_conv, both ways": (sgconv.fft_conv, "u blD, K *DL"),
    "two_level_kernel": (partial(s4.two_level_kernel, L=7), "E DNN, B_bar DN1, C DnN"),
    "S4": (S4_LAYER, MIXER),
    "S4.prefill": (lambda x: S4_LAYER.prefill(x, S4_LAYER.initial_state(2)), "x BlD"),
    "S4.step": (lambda x_t: S4_LAYER.step(x_t, S4_LAYER.initial_state(2)), "x_t BD"),
    "S4D": (S4D(3, 4).double(), MIXER),
    "DLR": (DLR(3, 4).double(), MIXER),
    "SGConv": (SGConv(3, 32, 4).double(), MIXER),
    "grid_linear": (structured_ffn.grid_linear, "x *X, V IOCP, U OSIC, bias Y"),
    "grid_linear, one block": (structured_ffn.grid_linear, "x *P, V 11CP, U 1S1C, bias S"),
    "S4Model": (S4Model(S4Config(4, 1, 4, **VALUES)).double(), MIXER),
    "SGConvModel": (SGConvModel(SGConvConfig(4, 1, 32, 4, **VALUES)).double(), MIXER),
    "Transformer": (Transformer(TransformerConfig(8, 1, 2, **VALUES)).double(), MIXER),
    "ring_attention": (dist_attention.ring_attention, RING),
    "allgather_attention": (dist_attention.allgather_attention, RING),
    "ulysses_attention": (dist_attention.ulysses_attention, RING),
}


def arguments(spec):
    """Return {name: its axes} and {name: a right tensor, with small integers as values}."""
    axes = dict(argument.split() for argument in spec.split(", "))
    tensors = {}
    for name, letters in axes.items():
        shape = [LENGTHS[letter.upper()] for letter in letters]
        tensors[name] = torch.randint(-3, 4, shape).double()
    if "keep" in axes:
        tensors["keep"] = tensors["keep"] > -3
        tensors["keep"][:, 0] = True
    if "positions" in axes:
        tensors["positions"] = torch.arange(LENGTHS["L"])
    return axes, tensors


def wrong_shapes(axes, shape):
    """Yield the shapes that broadcast where an axis has one length only."""
    for i, letter in enumerate(axes):
        if letter.isupper():
            yield *shape[:i], 1, *shape[i + 1 :]
    if "*" not in axes:
        yield from (shape[1:], (1, *shape), (*shape, 1))


def refuses(call, **arguments):
    """True if the call raises an error that names its input or is torch's own."""
    try:
        call(**arguments)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return True
    return False


@pytest.mark.parametrize("name", CALLS)
def test_a_shape_that_would_broadcast_is_refused(name):
    call, spec = CALLS[name]
    axes, right = arguments(spec)
    call(**right)
    accepted = []
    for argument, letters in axes.items():
        for shape in wrong_shapes(letters, tuple(right[argument].shape)):
            wrong = {argument: right[argument].new_ones(shape)}
            if not refuses(call, **{**right, **wrong}):
                accepted.append((argument, shape))
    assert not accepted


def first(result):
    """Return the output, without log-sum-exp or state."""
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", CALLS)
def test_integers_are_refused_or_mean_the_same(name):
    """Never rounded results in silence."""
    call, spec = CALLS[name]
    _, right = arguments(spec)
    want = first(call(**right))
    for argument, tensor in right.items():
        given = {**right, argument: tensor.long()}
        assert refuses(call, **given) or rel_err(first(call(**given)), want) < 1e-6, argument


@pytest.mark.parametrize("name", CALLS)
def test_nan_is_not_hidden(name):
    call, spec = CALLS[name]
    _, right = arguments(spec)
    hidden = []
    for argument, tensor in right.items():
        if not tensor.is_floating_point() or name == "sinusoids":
            continue
        wrong = tensor.clone()
        wrong[(0,) * tensor.ndim] = torch.nan
        results = call(**{**right, argument: wrong})
        if not torch.isnan(first(results)).any():
            hidden.append(argument)
    assert not hidden


# ---------------------------------------------------------------- sizes


def of_config(kind, config, **fields):
    return kind(config(**fields))


s4_model = partial(of_config, S4Model, S4Config)
sgconv_model = partial(of_config, SGConvModel, SGConvConfig)
transformer = partial(of_config, Transformer, TransformerConfig)
DT = {"dt_min": 1e-3, "dt_max": 0.1}
DROP = {"dropout": 0.0}

ARGUMENTS = {  # how to make it, its sizes, its numbers that are no sizes
    "S4": (S4, {"d_model": 4, "d_state": 4}, DT),
    "S4D": (S4D, {"d_model": 4, "d_state": 4}, DT),
    "DLR": (DLR, {"d_model": 4, "d_state": 4}, DT),
    "SGConv": (SGConv, {"d_model": 4, "max_len": 8, "kernel_dim": 2, "first_factor": 2}, {}),
    "SGConv2d": (SGConv2d, {"d_model": 4, "height": 3, "width": 3, "kernel_dim": 2}, {}),
    "Attention": (Attention, {"d_model": 8, "n_heads": 4, "n_kv_heads": 2}, {}),
    "LowRank": (LowRank, {"d_in": 8, "d_out": 8, "R": 2}, {}),
    "BlockDense": (BlockDense, {"d_in": 8, "d_out": 8, "R": 4, "n_blocks": 2}, {}),
    "BlockShuffle": (BlockShuffle, {"d_in": 8, "d_out": 8, "n_blocks": 2}, {}),
    "S4Model": (s4_model, {"d_model": 4, "n_layers": 1, "d_state": 4, "n_channels": 1}, DROP),
    "SGConvModel": (
        sgconv_model,
        {"d_model": 4, "n_layers": 1, "max_len": 8, "vocab_size": 3},
        DROP,
    ),
    "Transformer": (transformer, {"d_model": 4, "n_layers": 1, "d_ff": 4, "vocab_size": 3}, DROP),
    "S4.kernel": (S4_LAYER.kernel, {"L": 5}, {"rate": 1.0}),
    "S4D.kernel": (S4D(3, 4).kernel, {"L": 5}, {"rate": 1.0}),
    "SGConv.kernel": (SGConv(3, 16, 4).kernel, {"L": 5}, {}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_sizes_are_positive_integers_also_of_numpy_and_numbers_are_not_negative(name):
    make, sizes, numbers = ARGUMENTS[name]
    right = {size: np.int64(value) for size, value in sizes.items()} | numbers
    make(**right)
    wrong = [(size, value) for size in sizes for value in (0, -1, 1.5)]
    wrong += [(number, -1.0) for number in numbers]
    if "dropout" not in numbers:  # torch refuses nan there in the first training step
        wrong += [(number, math.nan) for number in numbers]
    accepted = [(n, value) for n, value in wrong if not refuses(make, **{**right, n: value})]
    assert not accepted
