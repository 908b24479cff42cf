"""CUDA graphs without a GPU: a tape of operations in place of gpu_step.Graphs, and as strict."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors_in(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Notes every operation with the very tensors that it reads and writes."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.own = []  # tensors made while recording: the graph's memory
        self.before = []  # tensors that may be written, and their values until then

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        waits = WAITS & set(function.tags)
        if function is torch.ops.aten.index.Tensor:  # tagged for masks
            waits = any(x.dtype == torch.bool for x in tensors_in(args[1]))
        if waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if function._schema.is_mutable:
            self.before += [(x, x.clone()) for x in inputs]
        outputs = function(*args, **kwargs)
        if function.namespace != "profiler":
            self.operations.append((function, args, kwargs, outputs))
        old = {memory(x) for x in inputs}
        self.own += [x for x in tensors_in(outputs) if memory(x) not in old]
        return outputs


class Tape:
    """As a CUDA graph, a replay runs no Python, and any replay may overwrite the memory of all."""

    def __init__(self, device="cpu"):
        self.captured = 0
        self.memory = []

    def warm_up(self, function):
        function()

    @torch.no_grad()
    def restore(self, before):
        for tensor, value in reversed(before):
            tensor.copy_(value)

    def capture(self, function):
        self.captured += 1
        recording = Recording()
        with torch.random.fork_rng([]), recording:
            out = function()
        self.restore(recording.before)  # a graph is captured without being run
        self.memory += recording.own

        @torch.no_grad()
        def replay():
            for tensor in self.memory:
                lost = torch.nan if tensor.is_floating_point() or tensor.is_complex() else 77
                tensor.fill_(lost)
            for operation, args, kwargs, outputs in recording.operations:
                again = tensors_in(operation(*args, **kwargs))
                for old, new in zip(tensors_in(outputs), again, strict=True):
                    if memory(old) != memory(new):  # else a view, or changed in place
                        old.copy_(new)
            return out

        return replay
