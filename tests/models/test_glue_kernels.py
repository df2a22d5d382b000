"""One kernel gives what the plain code in `models/layers.py` gives, digit for digit where it can.

Without triton there is nothing to test; without a GPU the kernels are interpreted, in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

from models.layers import RMSNorm, add_and_norm, silu_times

pytest.importorskip("triton")

from models import glue_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# One unit in the last place: the order of a sum, and how a root or an exponential is computed.
CLOSE = {
    torch.float32: {"atol": 1e-6, "rtol": 1e-6},
    torch.float16: {"atol": 1e-4, "rtol": 2e-3},
    torch.bfloat16: {"atol": 1e-3, "rtol": 1e-2},
}

# Triton announces that its next version will round otherwise unless told; both are within the tolerances.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
can_run = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
# The interpreter cuts bfloat16 off instead of rounding it.
DTYPES = [dtype for dtype in CLOSE if dtype != torch.bfloat16 or DEVICE.type == "cuda"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@can_run
@dtypes
@pytest.mark.parametrize("dim", [64, 96, 2048])
@pytest.mark.parametrize("has_branch", [True, False])
def test_norms(dtype: torch.dtype, dim: int, has_branch: bool) -> None:
    norm = RMSNorm(dim, eps=1e-8).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    norm.to(dtype)
    x = (3 * torch.randn(2, 3, dim)).to(dtype)
    branch = torch.randn(2, 3, dim).to(dtype) if has_branch else None
    on_device = None if branch is None else branch.to(DEVICE)
    got = glue_kernels.add_and_rms_norm(x.to(DEVICE), on_device, norm.weight.to(DEVICE), eps=norm.eps)
    for mine, expected in zip(got, add_and_norm(x, branch, norm), strict=True):
        torch.testing.assert_close(mine.cpu(), expected, **CLOSE[dtype])


@can_run
@dtypes
@pytest.mark.parametrize("width", [16, 176, 1408])
def test_gates(dtype: torch.dtype, width: int) -> None:
    both = (2 * torch.randn(2, 3, 2 * width)).to(dtype)
    torch.testing.assert_close(glue_kernels.silu_times(both.to(DEVICE)).cpu(), silu_times(both), **CLOSE[dtype])


def test_in_the_interpreter() -> None:
    if DEVICE.type == "cuda" or INTERPRETED:
        pytest.skip("the tests above run as they are")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
