"""From logits to a token: greedy, or sampled with noise that depends on the stream and the step alone."""

# V text ids; the leading axes [...] are rows.

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed number: splitmix64's increment
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685


def choose(
    logits: Tensor, *, temperature: float, top_k: int | None, seed: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Pick a token per row: `[..., V]` -> ids int64 `[...]` and their log-probabilities under the plain softmax.

    At temperature 0 the best id wins, the lowest on a tie. Above it, Gumbel noise is added to `logits / temperature` of
    the `top_k` best ids, which samples from their softmax; a row's noise is a function of its `seed` and `step` (int64,
    broadcast to `[...]`), so a stream is sampled alike in any slot, batch, process or order.
    """
    if temperature > 0:
        scores = logits / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            floor = scores.topk(top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < floor, float("-inf"))
        ids = (scores + gumbel(seed, step, scores.shape[-1])).argmax(dim=-1)
    else:
        ids = logits.argmax(dim=-1)
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    return ids, chosen - logits.logsumexp(dim=-1)


def gumbel(seed: Tensor, step: Tensor, num_ids: int) -> Tensor:
    """Standard Gumbel noise, float32 `[..., V]`, by hashing (seed, step, id): the same on every device."""
    ids_V = torch.arange(num_ids, device=seed.device)
    bits = _splitmix(_splitmix(seed + step * _GOLDEN)[..., None] + ids_V * _GOLDEN)
    # 23 bits, in the middle of their interval, so that neither logarithm meets 0.
    uniform = ((bits & 0x7FFFFF).to(torch.float32) + 0.5) / 0x800000
    return -(-uniform.log()).log()


def _splitmix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap; shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
