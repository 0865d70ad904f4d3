"""What a call of a network costs: operations by kind of layer, memory while it runs, memory kept for the way back.

Nothing here but `seconds_of` needs the numbers in the tensors. So it works on the meta device, too, where tensors have
a shape and no contents, and a network of any size takes no memory (lesson 03).
"""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

KINDS = ("convolutions", "linear layers", "attention", "attention to the text")


def operations_by_kind(call: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations of one call for each of `KINDS`; a multiplication and its addition are two.

    "attention" is the products of positions with positions, "attention to the text" those inside modules called
    `attn2`, as diffusers names cross-attention; the projections before and after them are linear layers. Norms,
    activations and biases are not counted. Plain attention is asked for, since not every fused kernel is counted.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        call()
    found = counter.get_flop_counts()
    everything, products = found.get("Global", {}), torch.ops.aten.bmm
    text = sum(ops.get(products, 0) for name, ops in found.items() if name.endswith("attn2"))
    convolutions = everything.get(torch.ops.aten.convolution, 0)
    attention = everything.get(products, 0)
    linear = sum(everything.values()) - convolutions - attention
    return dict(zip(KINDS, (convolutions, linear, attention - text, text), strict=True))


class _Ledger(TorchDispatchMode):
    """Enters every new piece of memory, and strikes it out when the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.entered: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            memory = x.untyped_storage()
            key, size = memory._cdata, memory.nbytes()
            if key not in given and key not in self.entered:  # neither a view of what came in, nor known already
                self.entered.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self.strike, key, size)
        return out

    def strike(self, key: int, size: int) -> None:
        self.entered.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that the tensors made during a call take at one moment; what was there before does not count.

    Gradients are off. What a kernel uses inside itself is not seen.
    """
    with torch.no_grad(), _Ledger() as ledger:
        call()
    return ledger.peak


def kept_bytes(net: nn.Module, *inputs: Any) -> int:
    """Bytes that PyTorch keeps from a forward pass of `net` for the backward pass; the weights do not count.

    Tensors kept under several names count once.
    """
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory._cdata not in weights:
            kept[memory._cdata] = memory
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = net(*inputs)
        total = sum(memory.nbytes() for memory in kept.values())
        del out
    return total


class FusedAttention(TorchFunctionMode):
    """Within `with FusedAttention():` attention never forms its matrix, on the meta device as on the processor.

    PyTorch chooses such a kernel (arXiv:2205.14135) on real devices by itself; on the meta device it takes the plain
    one, which stores a number for every pair of positions. Here it takes the processor's fused kernel.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def seconds_of(call: Callable[[], Any], turns: int = 3) -> float:
    """Seconds that a call takes, the median of `turns`; with more than one turn, another before them warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU answers before it is done
    times = []
    for _ in range(turns + (turns > 1)):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[-turns:])
