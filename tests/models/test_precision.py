"""The switches are set inside the block and as before after it, also when it is left by an exception."""

import pytest
import torch

from models.precision import float32_products


def switches() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_both_switches_are_set_and_put_back(kind: str) -> None:
    def fail() -> None:
        with float32_products(kind):
            assert switches() == (kind, kind)
            raise ZeroDivisionError

    before = switches()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert switches() == before


def test_blocks_nest() -> None:
    with float32_products("tf32"):
        with float32_products("ieee"):
            assert switches() == ("ieee", "ieee")
        assert switches() == ("tf32", "tf32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_strict_is_strict_on_a_gpu() -> None:
    """TF32 keeps 10 bits: an error near 1e-3, against 1e-6."""
    x, weight = torch.randn(4, 64, 4000, device="cuda"), torch.randn(64, 64, 3, device="cuda")
    exact = torch.nn.functional.conv1d(x.double(), weight.double())
    for kind, smallest, largest in (("ieee", 0.0, 1e-5), ("tf32", 1e-5, 1e-2)):
        with float32_products(kind):
            error = (torch.nn.functional.conv1d(x, weight) - exact).norm() / exact.norm()
        assert smallest <= error < largest
