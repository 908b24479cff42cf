"""benchmarks/token_mixing.py: the matrices found by probing are those of the shipped layers."""

import sys
from pathlib import Path

import pytest
import torch

from attention import Attention, attention_slow
from s4 import S4

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from token_mixing import (
    LIMIT,
    change,
    error,
    inputs,
    matrices,
    mixers,
    off_diagonal_rank,
    probe,
    rank,
    toeplitz_error,
)

L = 12
D = N = 4
X = inputs(L, D, 1)
LAYERS = {mixer.name: mixer.layer for mixer in mixers(L, D, N, d=2, R=3)}
M = {name: matrices(layer, X) for name, layer in LAYERS.items()}
FAULTS = {
    "shifted": lambda matrix: matrix.roll(1, -1),
    "one percent off": lambda matrix: 1.01 * matrix,
    "one column lost": lambda matrix: matrix.index_fill(-1, torch.tensor([3]), 0),
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("name", LAYERS)
def test_m_v_is_the_output_of_the_layer_and_a_fault_shows(name):
    assert error(LAYERS[name], M[name], X) <= LIMIT
    for fault in FAULTS.values():
        assert error(LAYERS[name], fault(M[name]), X) > LIMIT


@pytest.mark.parametrize("kind", [{"n_kv_heads": 1}, {"rope": True}, {"causal": False}])
def test_attention_in_its_other_forms(kind):
    torch.manual_seed(0)
    layer = Attention(D, 2, **{"causal": True, **kind}).double()
    matrix = matrices(layer, X)
    assert error(layer, matrix, X) <= LIMIT
    assert (matrix.sum(-1) - 1).abs().max() < 1e-12  # weights of a softmax
    layer.attend = attention_slow
    assert (matrices(layer, X) - matrix).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["attention", "S4", "S4D", "SGConv"])
def test_causal_mixers_never_read_the_future(name):
    assert M[name].triu(1).abs().max() < 1e-12 and M[name].tril().abs().max() > 0.1


@pytest.mark.parametrize("name", ["S4", "S4D", "SGConv"])
def test_a_convolution_is_toeplitz_and_its_column_is_the_kernel(name):
    assert max(map(toeplitz_error, M[name])) < 1e-12
    kernel = LAYERS[name].kernel(L).detach()
    kernel[:, 0] += LAYERS[name].D_skip.detach()
    assert (M[name][..., 0] - kernel).abs().max() < 1e-12


def test_a_state_of_n_numbers_bounds_the_rank_off_the_diagonal():
    for name in ("S4", "S4D"):
        assert max(map(off_diagonal_rank, M[name])) <= N
    for name in ("attention", "SGConv", "Fourier"):
        assert max(map(off_diagonal_rank, M[name])) > N
    assert max(map(rank, M["MLP"])) <= 3


def test_measures_by_hand():
    lag = torch.arange(6.0, dtype=torch.float64)[:, None] - torch.arange(6.0, dtype=torch.float64)
    decaying = 0.5**lag * (lag >= 0)  # a state of one number
    assert toeplitz_error(decaying) == 0 and off_diagonal_rank(decaying) == 1
    assert rank(decaying) == 6 and rank(torch.ones(6, 6).double()) == 1
    upset = decaying.clone()
    upset[3, 3] += 0.5  # off the mean of six by 5/12 of the largest, 1.5
    assert toeplitz_error(upset) == pytest.approx((0.5 - 0.5 / 6) / 1.5)
    assert off_diagonal_rank(decaying.T.contiguous()) == 1
    upset[4, 1] += 0.5
    assert off_diagonal_rank(upset) == 2


@pytest.mark.parametrize("name", LAYERS)
def test_which_matrices_depend_on_the_input(name):
    changed = change(LAYERS[name], X, inputs(L, D, 2))
    if name in ("attention", "MLP"):
        assert changed > 0.1
    else:
        assert changed < 1e-12


def test_a_layer_that_mixes_channels_is_found_out():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = S4(D, N).double()

        def forward(self, x):
            return self.conv(x) + x.roll(1, -1)

    layer = Mixed()
    assert error(layer, probe(layer, X), X) > 0.1
