"""A packed model is the model: equal up to rounding, with the same tokens, and rows ignore their neighbours."""

import pytest
import torch
from torch import nn

from models.decoder import Decoder
from models.packing import PackedLinear, pack
from models.shapes import SHAPES, random_decoder
from models.slots import Slots

TINY = SHAPES["tiny"].decoder

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN to pack for")


def tokens(decoder: Decoder, *, num_slots: int, lookahead: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    slots = Slots(decoder, num_slots, lookahead=lookahead)
    for slot in range(num_slots):
        slots.feed(slot, torch.randint(64, (8, 60), generator=rng))
    for _ in range(60):
        slots.step()
    return [harvest.ids.tolist() for harvest in slots.harvest(range(num_slots))]


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_tokens_are_those_of_the_plain_model(num_slots: int, lookahead: int) -> None:
    plain, packed = random_decoder(TINY), pack(random_decoder(TINY))
    expected = tokens(plain, num_slots=num_slots, lookahead=lookahead)
    assert tokens(packed, num_slots=num_slots, lookahead=lookahead) == expected
    assert len(set(expected[0])) > 10


def test_every_product_is_packed_and_the_module_still_knows_where_it_is() -> None:
    decoder = pack(random_decoder(TINY))
    assert not [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    assert sum(isinstance(module, PackedLinear) for module in decoder.modules()) == 2 * 4 + 1
    assert (decoder.device, decoder.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("rows", "columns"), [(1536, 512), (64, 176)])
def test_a_row_does_not_depend_on_its_neighbours(rows: int, columns: int) -> None:
    """Bit by bit from two rows on; a single row may be a product of another kind."""
    linear = PackedLinear(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(128, columns, generator=torch.Generator().manual_seed(1))
    alone = linear(x[:2])
    assert all(torch.equal(linear(x[:num])[:2], alone) for num in (3, 7, 16, 33, 128))


def test_values_are_the_same_up_to_rounding() -> None:
    plain = nn.Linear(512, 96, bias=False)
    x = torch.randn(5, 7, 512)
    # 512 products of unit size, summed in another order: 1e-6 is a few roundings of such a sum.
    torch.testing.assert_close(PackedLinear(plain.weight)(x), plain(x), atol=1e-5, rtol=0)


def test_other_precisions_and_biases_stay_as_they_are() -> None:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False).to(torch.float64))
    assert [type(module) for module in pack(pair)] == [nn.Linear, nn.Linear]


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not compute in bfloat16"
)


@needs_bfloat16
def test_bfloat16_sums_in_float32_and_rows_ignore_their_neighbours() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(1536, 512, generator=rng).to(torch.bfloat16)
    x = torch.randn(128, 512, generator=rng).to(torch.bfloat16)
    (linear,) = pack(nn.Sequential(_linear(weight)))
    assert isinstance(linear, PackedLinear)
    exact = x.float() @ weight.float().T
    # Rounded once, at the end: within half a unit of bfloat16's 8 bits, and a little for the order of the sum.
    torch.testing.assert_close(linear(x).float(), exact, rtol=2**-8, atol=1e-4)
    assert all(torch.equal(linear(x[:num]), linear(x)[:num]) for num in (2, 3, 7, 16, 33))


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear
