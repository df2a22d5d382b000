"""Weights laid out for a CPU's products, once instead of in every pass.

A product of few rows by a matrix as it is stored spends much of its time on rearranging the matrix. On one thread, 60M
shape, whole passes in turns: 8, 16, 32 slots took 34, 49, 70 ms as stored and 23, 33, 53 ms packed. From two rows on, a
packed product gave a row the same bits whatever the rows beside it in every shape tried; the plain one did not.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

# The layout is chosen for so many rows, and is right for any: a few slots with a little look-ahead.
_ROWS = 32


class PackedLinear(nn.Module):
    """A linear map without bias whose weight cannot be read or trained any more, only applied."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), self._packed, None, "none", [], "")
        return rows.unflatten(0, x.shape[:-1])


def pack(module: Module) -> Module:
    """Replace the linear maps of a module in place where it helps: float32 on a CPU with oneDNN, for inference."""
    if torch.backends.mkldnn.is_available():
        _pack_children(module)
    return module


def _pack_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and _can_be_packed(child):
            setattr(module, name, PackedLinear(child.weight))
        else:
            _pack_children(child)


def _can_be_packed(linear: nn.Linear) -> bool:
    weight, *biases = linear.parameters()
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not biases
