"""The convolution kernels of all layers of an S4Model at once, which is faster on a GPU.

    model = JointS4Model(S4Config(...))  # an S4Model with the same weights and outputs

Such a kernel takes many small operations, which cost a GPU as much as large ones.  So the layers,
which are of one kind and size, become one layer with the channels of all while it is computed.
"""

import torch
from torch import nn

from s4 import S4Model, require, s4_mixer


class JointS4Model(S4Model):
    """S4Model whose mixers get kernels computed together.

    forward raises ValueError unless all mixers are of the same kind and size.
    """

    def __init__(self, config, mixer=s4_mixer):
        super().__init__(config, mixer)
        # in a list, so that state_dict does not contain its weights twice
        self.joint = [Kernel(self.blocks[0].mixer)]

    def forward(self, x, keep=None, rate=1.0):
        h = self.embed_input(x)  # (B, L, D)
        mixers = [block.mixer for block in self.blocks]
        kernels = joint_kernels(self.joint[0], mixers, h.shape[1], rate)
        for block, K in zip(self.blocks, kernels, strict=True):
            h = block(h, keep, K=K)
        return self.norm(h)


class Kernel(nn.Module):
    """A module whose forward is layer.kernel, as functional_call calls no other method."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, L, rate):
        return self.layer.kernel(L, rate)


def joint_kernels(kernel, layers, L, rate=1.0):
    """Return layer.kernel(L, rate) of each layer, computed as if all were one layer.

    kernel: Kernel of one of the layers.
    """
    first = layers[0]
    for layer in layers:
        plain = not [*layer.children(), *layer.buffers()]  # else pruned, or parametrized
        same = type(layer) is type(first) and layer.C.shape == first.C.shape
        how = "use S4Model for other models"
        require(plain and same, f"joint kernels need plain layers of one kind and size: {how}")
    joint = {}
    for name, _ in first.named_parameters():
        parts = [getattr(layer, name) for layer in layers]
        axis = first.channel_axes.get(name, 0)
        joint[f"layer.{name}"] = torch.cat(parts, axis)
    # (layers * D, L), or (2, layers * D, L)
    K = torch.func.functional_call(kernel, joint, (L, rate))
    return K.chunk(len(layers), -2)
