"""What lies between the products of a block, one kernel each: on a GPU a pass of few rows is otherwise mostly launches.

Written out in torch, a norm is nine kernels and a gate two, which move half a megabyte each for 128 rows; the 2.6B
model has 97 norms and 48 gates. Rounds where the plain code in `models/layers.py` does. For inference: nothing is
remembered for a backward pass.

Importing this needs triton, which the CUDA builds of torch bring along; `models/layers.py` imports it when it is there.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# The body of a kernel is another language with the grammar of this one; a type checker knows nothing about it.

# N rows, D channels, M channels of an MLP.

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATE_BLOCK = 1024


def add_and_rms_norm(x: Tensor, branch: Tensor | None, weight_D: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """`x + branch`, and its root-mean-square norm; without a branch, x itself and its norm."""
    dim = x.shape[-1]
    rows = x.contiguous()
    added = rows if branch is None else torch.empty_like(rows)
    normed = torch.empty_like(rows)
    block = triton.next_power_of_2(dim)
    _add_and_rms_norm[(rows.numel() // dim,)](
        rows,
        rows if branch is None else branch.contiguous(),
        weight_D,
        added,
        normed,
        eps,
        D=dim,
        BLOCK=block,
        HAS_BRANCH=branch is not None,
        num_warps=min(8, max(1, block // 256)),
    )
    return added, normed


def silu_times(gate_and_value: Tensor) -> Tensor:
    """`silu(a) * b` of `[..., a | b]`: `[..., 2M]` -> `[..., M]`."""
    both = gate_and_value.contiguous()
    width = both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], width))
    _silu_times[(out.numel() // width, triton.cdiv(width, _GATE_BLOCK))](
        both, out, M=width, BLOCK=_GATE_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _add_and_rms_norm(
    x_ptr,
    branch_ptr,
    weight_ptr,
    added_ptr,
    normed_ptr,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + d, mask=d < D, other=0.0)
    if HAS_BRANCH:
        x = (x.to(tl.float32) + tl.load(branch_ptr + row + d, mask=d < D, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(added_ptr + row + d, x, mask=d < D)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row + d, (x * (weight * scale)).to(normed_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _silu_times(both_ptr, out_ptr, M: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * M + m, mask=m < M, other=0.0).to(tl.float32)
    value = tl.load(both_ptr + row * 2 * M + M + m, mask=m < M, other=0.0)
    # Rounded once in between, as the two kernels of the plain code do.
    gate = (gate / (1.0 + tl.exp(-gate))).to(value.dtype).to(tl.float32)
    tl.store(out_ptr + row * M + m, (gate * value.to(tl.float32)).to(value.dtype), mask=m < M)
