"""The kernel is the ring of `models/memory.py`: whatever comes in, wherever the rows are, it gives the same.

On a machine with triton and no GPU the kernel is interpreted, in a process of its own; without triton there is nothing
to test. Interpreted products are exact only in float32 and float16: bfloat16 is numbers to the interpreter, not floats.
"""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from models.layers import rotate
from models.memory import AttentionSpec, RingCache, Window

triton = pytest.importorskip("triton")

from models import ring_kernel  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
NUM_ROWS, NUM_HEADS = 3, 2
# Sums of up to 70 products in another order; and the last digit of the type that comes out.
CLOSE = {
    torch.float32: {"atol": 5e-6, "rtol": 1e-5},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
}

# Triton announces that its next version will round otherwise unless told; both are within the tolerances.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
can_run = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")


class Twins:
    """The ring under test and the plain one on the CPU, fed the same."""

    def __init__(self, *, window: Window, max_new: int, context: int, head_dim: int, dtype: torch.dtype) -> None:
        self.spec = AttentionSpec(
            num_layers=1, num_heads=NUM_HEADS, head_dim=head_dim, context=context, rope_theta=1e4, window=window
        )
        self.plain = RingCache(
            self.spec, num_rows=NUM_ROWS, max_new=max_new, device=torch.device("cpu"), dtype=torch.float32
        )
        shape = (NUM_ROWS, NUM_HEADS, self.plain.num_places, head_dim)
        # What was never written must not be read.
        self.keys, self.values = (torch.full(shape, float("nan"), device=DEVICE, dtype=dtype) for _ in range(2))
        self.dtype = dtype

    def call(self, num_new: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Output of the kernel and of the plain path."""
        shape = (NUM_ROWS, num_new, 3, NUM_HEADS, self.spec.head_dim)
        qkv = torch.randn(shape, generator=rng).to(self.dtype)
        self.plain.begin(num_new)
        cos, sin = self.plain.cos, self.plain.sin
        # As the kernel does it, and as a plain ring in the lesser type would: what is kept is rounded.
        q, k = (rotate(x, cos, sin).float() for x in qkv.unbind(2)[:2])
        expected = self.plain.attend(0, q, k, qkv[:, :, 2].float())
        got = ring_kernel.ring_attend(
            *qkv.to(DEVICE).unbind(2),
            keys_BHSE=self.keys,
            values_BHSE=self.values,
            position_B=self.plain.position_B.to(DEVICE),
            cos=cos.to(DEVICE),
            sin=sin.to(DEVICE),
            context=self.spec.context,
            like_moshi=self.spec.window == "ring",
        )
        return got.float().cpu(), expected


@can_run
@pytest.mark.parametrize("window", ["exact", "ring"])
@pytest.mark.parametrize("max_new", [1, 2, 4, 8, 32])
@pytest.mark.parametrize(("context", "head_dim"), [(5, 16), (70, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda"))
def test_the_kernel_is_the_ring(window: Window, max_new: int, context: int, head_dim: int, dtype: torch.dtype) -> None:
    """Rows at different positions that stand, move by what they like, begin anew and turn their rings."""
    unit = 2 if window == "ring" else 1  # moshi's ring is fed whole frames of two latents
    max_new = max(unit, max_new)
    twins = Twins(window=window, max_new=max_new, context=context, head_dim=head_dim, dtype=dtype)
    rng, tensors = random.Random(max_new), torch.Generator().manual_seed(max_new)
    twins.plain.advance(0)
    for _ in range(8):
        num_new = unit * rng.randint(1, max_new // unit)
        got, expected = twins.call(num_new, tensors)
        torch.testing.assert_close(got, expected, **CLOSE[dtype])
        if rng.random() < 0.2:
            twins.plain.reset(torch.tensor([rng.randrange(NUM_ROWS)]))
        twins.plain.advance(torch.tensor([unit * rng.randint(0, num_new // unit) for _ in range(NUM_ROWS)]))


@can_run
def test_a_ring_that_has_turned_often() -> None:
    """One position at a time, three turns, one row always three positions behind."""
    twins = Twins(window="exact", max_new=2, context=9, head_dim=16, dtype=torch.float32)
    tensors = torch.Generator().manual_seed(0)
    for step in range(30):
        got, expected = twins.call(1, tensors)
        torch.testing.assert_close(got, expected, **CLOSE[torch.float32])
        twins.plain.advance(torch.tensor([1, 1, int(step >= 3)]))


def test_in_the_interpreter() -> None:
    if DEVICE.type == "cuda" or INTERPRETED:
        pytest.skip("the tests above run as they are")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize(("num_new", "head_dim"), [(1, 64), (8, 64), (4, 128)])
def test_it_compiles_for_a_gpu_that_is_not_there(num_new: int, head_dim: int) -> None:
    """The interpreter takes what the compiler does not: a variable, say, that changes its shape within a loop."""
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"T": num_new, "H": 32, "S": 375 + num_new - 1, "E": head_dim, "CONTEXT": 375, "LIKE_MOSHI": False}
    strides = {"STRIDE_B": num_new * 96 * head_dim, "STRIDE_T": 96 * head_dim, "STRIDE_H": head_dim}
    constants = sizes | strides | {"BLOCK_T": 16, "BLOCK_S": 64}
    pointers = {name: "*bf16" for name in ring_kernel._attend.arg_names if name.endswith("_ptr")}
    signature = pointers | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64", "scale": "fp32"}
    source = ASTSource(
        fn=ring_kernel._attend, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    assert "mma.sync" in compiled.asm["ptx"]
    assert compiled.metadata.shared < 100 * 1024  # two programs at least share a processor


def test_what_is_supported() -> None:
    assert ring_kernel.is_supported(head_dim=64, max_new=32)
    assert not ring_kernel.is_supported(head_dim=48, max_new=1)
    assert not ring_kernel.is_supported(head_dim=64, max_new=256)
