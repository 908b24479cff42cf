"""A training step as a CUDA graph: one call starts all kernels of a step.

    step = CapturedStep(take_step, model, optimizer)
    sums = step(batch)  # as take_step(batch)

On a GPU a small model spends most of a step launching kernels.  A CUDA graph captures the launches
of a step once and then replays them, in the same memory.  So, in a step that is captured,

    inputs          are copied into buffers, one set per shape of the batch
    shapes          do not depend on the data: ignored targets instead of x[mask]
    learning rates  are tensors, which every replay reads (see prepare_optimizer and set_lr)
    random numbers  follow torch's generator: torch.manual_seed before a step works as usual
    gradients       live within the step, which begins and ends with p.grad = None

Not included: steps of several processes, whose messages would have to be part of the graph.
"""

from functools import partial

import torch


def prepare_optimizer(optimizer, device, graphs):
    """Set AdamW up for this device.  Call it again after load_state_dict, which undoes it.

    On a GPU one operation updates a group of parameters, and learning rates are float32 tensors.
    graphs: True if steps will be captured.
    """
    gpu = torch.device(device).type == "cuda"
    for group in optimizer.param_groups:
        group["fused"] = gpu or None  # None: as torch chooses
        group["capturable"] = graphs
        lr = float(group["lr"])
        group["lr"] = torch.tensor(lr, device=device) if gpu else lr
    for state in optimizer.state.values():  # of a checkpoint, perhaps from another device
        state["step"] = state["step"].to(device if gpu else "cpu")


def set_lr(group, lr):
    """Set the learning rate of a group, in place if it is a tensor that graphs read."""
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class Graphs:
    """Captures functions as CUDA graphs.  They share memory: only one of them runs at a time."""

    def __init__(self, device="cuda"):
        if torch.device(device).type != "cuda":
            raise ValueError(f"CUDA graphs need a model on a CUDA device, not on {device}")
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # the default stream cannot be captured

    def warm_up(self, function):
        """Call the function: what is loaded at the first call cannot be captured."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            function()
        caller.wait_stream(self.stream)

    def capture(self, function):
        """Capture the launches of function() without running them.

        Returns replay() -> what function() returned; the next replay of any graph may overwrite it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = function()

        def replay():
            graph.replay()
            return out

        return replay


class CapturedStep:
    """Call a step on a batch: captured when a shape is new, replayed from then on.

    step(batch) -> tensor, where batch is a NamedTuple of tensors, or None in the place of one.  It
    may change what is in the state dicts of `model` and `optimizer` (AdamW), and torch's
    generators, nothing else, and must end with p.grad = None.
    Load checkpoints before the first call: a graph keeps using the tensors it was captured with.
    Each new shape costs one more step, and memory that is never freed.
    ValueError if the model is not on a CUDA device.
    """

    def __init__(self, step, model, optimizer, graphs=None):
        self.step = step
        self.model = model
        self.optimizer = optimizer
        self.graphs = graphs or Graphs(next(model.parameters()).device)
        self.captured = {}  # shapes -> buffers, replay

    def __call__(self, batch):
        shapes = tuple(None if t is None else (t.shape, t.dtype) for t in batch)
        if shapes not in self.captured:
            buffers = [None if t is None else t.clone() for t in batch]
            step = partial(self.step, type(batch)(*buffers))
            self.warm_up_and_undo(step)
            self.captured[shapes] = buffers, self.graphs.capture(step)
        buffers, replay = self.captured[shapes]
        for buffer, t in zip(buffers, batch, strict=True):
            if t is not None:
                buffer.copy_(t)
        return replay().clone()

    def warm_up_and_undo(self, step):

        old_states = set(self.optimizer.state)
        kept = list(self.model.state_dict().values())
        for state in self.optimizer.state.values():
            kept += state.values()
        copies = [t.clone() for t in kept]
        gpus = range(torch.cuda.device_count())
        with torch.random.fork_rng(gpus):
            self.graphs.warm_up(step)
        for t, copy in zip(kept, copies, strict=True):
            t.copy_(copy)
        for p in set(self.optimizer.state) - old_states:
            for t in self.optimizer.state[p].values():
                t.zero_()  # as AdamW begins
