"""Every kernel has a kind, and the parts of a pass are those of the slots that were given."""

import pytest
import torch

from benchmarks.anatomy import Anatomy, dissect, kind_of
from models.shapes import SHAPES, random_decoder
from models.slots import Slots


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("void gemmSN_TN_kernel<float, 128, 16, 2, 4, 10, 11, false>", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("_attend", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_add_and_rms_norm", "norms and gates"),
        ("_silu_times", "norms and gates"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
            "sampling",
        ),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise and the rest",
        ),
    ],
)
def test_kinds_are_told_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_pass_is_taken_apart() -> None:
    shape = SHAPES["tiny"]
    slots = Slots(random_decoder(shape.decoder), 2, lookahead=2, padding_id=3)
    anatomy = dissect(slots, num_codebooks=8, codebook_size=64, device=torch.device("cpu"))
    assert {"products", "attention", "sampling", "gaps"} <= anatomy.kind_seconds.keys()
    assert anatomy.pass_seconds > 0


def test_shares_are_of_the_sum() -> None:
    anatomy = Anatomy(pass_seconds=0.004, kind_seconds={"products": 0.003, "gaps": 0.001})
    assert anatomy.rows()[1:] == [
        ("products", "3.000", "75%"),
        ("gaps", "1.000", "25%"),
        ("a pass, not profiled", "4.000", ""),
    ]
    assert anatomy.as_json() == {"pass_ms": 4.0, "products": 3.0, "gaps": 1.0}
