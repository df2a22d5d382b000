"""How exactly products of float32 numbers are computed on a GPU.

Torch's own defaults differ: strict for matrices, TF32 for convolutions, which keeps 10 bits of mantissa where float32
has 23 and bfloat16 7. Whoever means float32 has to say so.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]

# Through `Any` because the stubs of torch know only the older `allow_tf32`, which must not be mixed with these.
_matmul: Any = torch.backends.cuda.matmul
_conv: Any = getattr(torch.backends.cudnn, "conv")  # noqa: B009


@contextmanager
def float32_products(kind: Literal["ieee", "tf32"]) -> Generator[None]:
    """Inside the block, products of matrices and convolutions in float32 are strict (`ieee`), or TF32.

    The switches are the process's, so other threads see them too. They are read when a kernel is launched: what is
    still under way at the end of the block keeps what it was launched with.
    """
    before = _matmul.fp32_precision, _conv.fp32_precision
    _matmul.fp32_precision = _conv.fp32_precision = kind
    try:
        yield
    finally:
        _matmul.fp32_precision, _conv.fp32_precision = before
