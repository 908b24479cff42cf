"""benchmarks/token_mixing.py: the matrices found by probing are those of the shipped layers."""

import sys
from pathlib import Path

import pytest
import torch

from attention import Attention
from s4 import S4

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import token_mixing
from token_mixing import LIMIT, error, inputs, matrices, off_diagonal_rank, rank, toeplitz_error

L = 12
D = N = 4
X = inputs(L, D, 1)
LAYERS = {mixer.name: mixer.layer for mixer in token_mixing.mixers(L, D, N, d=2, R=3)}
M = {name: matrices(layer, X) for name, layer in LAYERS.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_m_v_is_the_output_of_the_layer_and_a_fault_shows(name):
    assert error(LAYERS[name], M[name], X) <= LIMIT
    for fault in (M[name].roll(1, -1), 1.01 * M[name]):
        assert error(LAYERS[name], fault, X) > LIMIT


def test_grouped_attention_with_rope_both_ways():
    torch.manual_seed(0)
    layer = Attention(8, 4, n_kv_heads=2, rope=True).double()
    x = inputs(L, 8, 1)
    matrix = matrices(layer, x)
    assert error(layer, matrix, x) <= LIMIT
    assert (matrix.sum(-1) - 1).abs().max() < 1e-12  # weights of a softmax


@pytest.mark.parametrize("name", LAYERS)
def test_each_matrix_has_the_structure_of_its_mixer(name):
    if name in ("attention", "S4", "S4D", "SGConv"):  # causal: the future is not read
        assert M[name].triu(1).abs().max() < 1e-12 and M[name].tril().abs().max() > 0.1
    if name in ("S4", "S4D", "SGConv"):  # convolutions: the first column is the kernel
        assert max(map(toeplitz_error, M[name])) < 1e-12
        kernel = LAYERS[name].kernel(L).detach()
        kernel[:, 0] += LAYERS[name].D_skip.detach()
        assert (M[name][..., 0] - kernel).abs().max() < 1e-12
    if name == "MLP":
        assert max(map(rank, M[name], M[name])) <= 3
    else:  # a state of N numbers bounds the rank off the diagonal
        assert (max(map(off_diagonal_rank, M[name])) <= N) == (name in ("S4", "S4D"))
    changed = token_mixing.change(LAYERS[name], X, inputs(L, D, 2))
    assert changed > 0.1 if name in ("attention", "MLP") else changed < 1e-12


def test_measures_by_hand():
    lag = torch.arange(6.0, dtype=torch.float64)[:, None] - torch.arange(6.0, dtype=torch.float64)
    decaying = 0.5**lag * (lag >= 0)  # a state of one number
    assert toeplitz_error(decaying) == 0 and off_diagonal_rank(decaying) == 1
    assert rank(decaying, decaying) == 6 and rank(decaying[2:, :2], decaying) == 1
    upset = decaying.clone()
    upset[3, 3] += 0.5  # off the mean of six by 5/12 of the largest, 1.5
    assert toeplitz_error(upset) == pytest.approx((0.5 - 0.5 / 6) / 1.5)
    assert off_diagonal_rank(decaying.T.contiguous()) == 1
    upset[4, 1] += 0.5
    assert off_diagonal_rank(upset) == 2


def test_a_layer_that_mixes_channels_is_found_out():
    conv = S4(D, N).double()

    def layer(x):
        return conv(x) + x.roll(1, -1)

    assert error(layer, token_mixing.probe(layer, X), X) > 0.1
