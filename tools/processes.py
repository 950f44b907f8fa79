"""Several processes (torchrun): shares of a batch, networks that lie in pieces on all devices.

All processes take their share of the same global batch, so that any number of them computes the
same gradients. All make the same calls in the same order: a forward of a sharded network, or a
function below, that one of them leaves out hangs the others. With one process each function does
the plain thing.
"""

import atexit
import gc
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     set_model_state_dict)
from torch.distributed.tensor import DTensor, distribute_tensor

WAIT = timedelta(hours=2)    # [ours] for a process that writes a large checkpoint; torch's: 10 min


def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first():
    """Whether this is the process that writes and prints for all."""
    return int(os.environ.get("RANK", 0)) == 0


def join_processes(device):
    """Lets the processes find each other. Does nothing when there is only one."""
    if processes() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
        # At the end the group goes, or its threads abort the process. What is left of sharded
        # networks holds it, so that goes first: the last one registered is the first to run.
        atexit.register(dist.destroy_process_group)
        atexit.register(gc.collect)


def share(batch):
    """This process's part of a global batch, a tensor or a list."""
    size = len(batch) // processes()
    start = int(os.environ.get("RANK", 0)) * size
    return batch[start:start + size]


def share_of(items):
    """This process's items of a sequence of any length: of two processes, every other one."""
    return items[int(os.environ.get("RANK", 0))::processes()]


def gather(part):
    """The tensors `part` [B, ...] of all processes, one after the other, on the CPU."""
    if processes() == 1:
        return part.cpu()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = [torch.empty_like(part, device=device) for _ in range(processes())]
    dist.all_gather(parts, part.to(device).contiguous())
    return torch.cat(parts).cpu()


def any_process(flag):
    """Whether flag is set in any process. Also a meeting point: all wait here for each other."""
    return bool(gather(torch.tensor([int(flag)])).any())


def micro_batches(batch, parts):
    """Cuts a batch, {name: tensor [B, ...]}, into `parts` smaller ones (--accumulation). Usually
    there is one part: the batch itself."""
    size = len(next(iter(batch.values()))) // parts
    cut = []
    for start in range(0, size * parts, size):
        cut.append({name: values[start:start + size] for name, values in batch.items()})
    return cut


# ================================================================== optimisers and states

def adamw(net, lr, betas, weight_decay):
    """The optimiser of what learns in a network: with LoRA not all of its parameters do."""
    learning = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def clip_and_step(optimizers, max_norm=math.inf):
    """Clips the gradients of all `optimizers` jointly, steps and clears them; returns the norm.
    A norm that is not finite changes no weight.

    Sharded gradients come averaged over the processes; those of the small networks that every
    process holds whole (f, the discriminator's heads) are averaged here.
    """
    grads = [p.grad for optimizer in optimizers for group in optimizer.param_groups
             for p in group["params"] if p.grad is not None]
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    if processes() > 1:
        for grad in whole:
            dist.all_reduce(grad.div_(processes()))
    # Several devices hold pieces of one gradient, so torch's clip_grad_norm_ takes one kind at a
    # time.
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, sharded) if part]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = torch.stack(norms).norm() if len(norms) == 2 else norms[0]
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1).item()  # as torch's clip_grad_norm_
    for grad in grads:
        grad.mul_(shrink)
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def whole_state(net):
    """The network's state, {name: whole tensor on the CPU}; empty but in the first process."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True,
                                                              cpu_offload=True))


def load_whole(net, state):
    """Puts a whole state, which only the first process needs to hold, into a network that may be
    sharded: each process receives its part."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes() > 1)
    set_model_state_dict(net, state, options=options)


# Not torch's state-dict helpers for optimisers: they step an optimiser that has no state yet, so
# that its first real step would count as the second one.

def optimizer_tensors(net, optimizer):
    """The optimiser's state as {"parameter.slot": whole tensor on the CPU}: no pickle, and no order
    to rely on. Empty but in the first process."""
    tensors = {}
    for name, parameter in net.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if first():
                tensors[f"{name}.{slot}"] = value.cpu()
    return tensors


def load_optimizer(net, optimizer, tensors):
    """Puts back what optimizer_tensors saved; only the first process needs to hold it. Rates and
    betas come from the settings."""
    names = dict(net.named_parameters())
    keys = [(key, tuple(value.shape), value.dtype) for key, value in tensors.items()]
    if processes() > 1:
        everybodys = [keys]
        dist.broadcast_object_list(everybodys)
        keys = everybodys[0]
    for key, shape, dtype in keys:
        name, slot = key.rsplit(".", 1)
        parameter = names[name]
        value = torch.empty(shape, dtype=dtype) if not first() else tensors[key]
        optimizer.state[parameter][slot] = spread(value.to(parameter.device, copy=True), parameter)


def spread(value, like):
    """The first process's whole tensor `value` for all: in pieces where `like` lies in pieces."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    if processes() > 1:
        dist.broadcast(value, 0)
    return value
