"""gpu_kernels.py: kernels of all layers at once are those of the layers."""

import pytest
import torch
from test_s4 import Operations
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.prune import l1_unstructured

import s4
from gpu_kernels import JointS4Model
from s4 import S4, S4D, S4Config, S4Model, rel_err


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mixer", [s4.s4_mixer, s4.s4d_mixer, s4.dlr_mixer])
def test_joint_kernels_are_those_of_the_layers(mixer, causal):
    """Output and gradients; four layers take hardly more operations than one."""
    config = S4Config(5, 4, 8, n_channels=3, causal=causal)
    plain, fused = (kind(config, mixer).double() for kind in (S4Model, JointS4Model))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 50, 3).double()
    keep = torch.arange(50).expand(2, 50) < 40
    rate = {} if mixer is s4.dlr_mixer else {"rate": 2.0}
    found = []
    counts = []
    for model in (plain, fused):
        with Operations() as operations:
            y = model(x, keep, **rate)
            grads = torch.autograd.grad(y.sin().sum(), [*model.parameters()])
        found.append([y, *grads])
        counts.append(len(operations.names))
    assert max(map(rel_err, found[1], found[0])) < 1e-13
    assert counts[1] < counts[0] - (400 if mixer is s4.s4_mixer else 50)
    weights = {name: p.detach() for name, p in plain.named_parameters()}  # no nn.Parameter
    assert rel_err(functional_call(fused, weights, (x, keep), rate), found[0][0]) < 1e-13


def test_joint_kernels_need_plain_and_equal_layers():
    def unequal(config, i):
        return s4.s4_mixer(config, i, (S4, S4D)[i])

    def pruned(config, i):
        return l1_unstructured(s4.s4_mixer(config, i), "C", 0.5)

    def clamped(config, i):
        return register_parametrization(s4.s4_mixer(config, i), "log_dt", nn.Tanh())

    for mixer in (unequal, pruned, clamped):
        model = JointS4Model(S4Config(5, 2, 8, n_channels=3), mixer)
        with pytest.raises(ValueError, match=r"plain layers of one kind.*use S4Model"):
            model(torch.randn(2, 50, 3))
