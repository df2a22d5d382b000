"""From logits to a token: greedy, or sampled with noise that depends on the stream and the step alone."""

# B rows, V text ids.

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed number: splitmix64's increment
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685


def choose(
    logits_BV: Tensor, *, temperature: float, top_k: int | None, seed_B: Tensor, step_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Pick a token per row: -> ids int64 `[B]` and their log-probabilities under the plain softmax, float32 `[B]`.

    At temperature 0 the best id wins, the lowest on a tie. Above it, Gumbel noise is added to `logits / temperature` of
    the `top_k` best ids, which samples from their softmax; the noise of row b is a function of `seed_B[b]` and
    `step_B[b]`, so a stream is sampled alike in any slot, batch or process.
    """
    if temperature > 0:
        scores = logits_BV / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            floor = scores.topk(top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < floor, float("-inf"))
        ids_B = (scores + gumbel(seed_B, step_B, scores.shape[-1])).argmax(dim=-1)
    else:
        ids_B = logits_BV.argmax(dim=-1)
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    return ids_B, logprobs_BV.gather(1, ids_B[:, None])[:, 0]


def gumbel(seed_B: Tensor, step_B: Tensor, num_ids: int) -> Tensor:
    """Standard Gumbel noise, float32 `[B, V]`, by hashing (seed, step, id): the same on every device."""
    ids_V = torch.arange(num_ids, device=seed_B.device)
    bits = _splitmix(_splitmix(seed_B + step_B * _GOLDEN)[:, None] + ids_V * _GOLDEN)
    # 23 bits, in the middle of their interval, so that neither logarithm meets 0.
    uniform = ((bits & 0x7FFFFF).to(torch.float32) + 0.5) / 0x800000
    return -(-uniform.log()).log()


def _splitmix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap; shifts are made logical by masking."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
