"""What a causal windowed attention remembers: a ring per row between calls, or the clip itself when it is all there.

A query at position p sees the keys of positions p - context + 1 .. p. Positions count from the start of the stream and
never wrap; only the place where a key is kept does.
"""

# B rows, T new positions, S ring places, H heads, E channels per head.

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers import rotary_tables

Window = Literal["exact", "ring"]

# Attention reads the filled part of the ring in whole blocks of this many places, so that one row's sums are grouped
# in the same way whatever the length of its neighbours.
_KEY_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The shape of one transformer's attention."""

    num_layers: int
    num_heads: int
    head_dim: int
    context: int
    rope_theta: float
    # exact: as above. ring: moshi's streaming Mimi writes the two latents of a frame before it attends, so both lose
    # the key that the second overwrites: query p sees (p | 1) - context + 1 .. p. (moshi `RingKVCache`)
    window: Window = "exact"


class Memory(Protocol):
    """Where an attention layer finds the keys of the past."""

    cos: Tensor
    sin: Tensor

    def attend(self, layer: int, q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
        """Remember k and v of `layer`, return the attention output `[B, T, H, E]`."""
        ...


class RingCache:
    """Keys and values of the last `context` positions of every row, and each row's own position.

    The ring has `max_new - 1` places more than the window, so that a call may bring up to `max_new` positions at once
    and its first query still finds its oldest key. A row that is not advanced after a call (`advance`) loses nothing:
    what was written for it is overwritten by its next call, and the keys it still needs are elsewhere in the ring.
    """

    def __init__(
        self, spec: AttentionSpec, *, num_rows: int, max_new: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.max_new = max_new
        self.num_places = spec.context + max_new - 1
        shape = (spec.num_layers, num_rows, self.num_places, spec.num_heads, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position_B = torch.zeros(num_rows, device=device, dtype=torch.int64)
        self._row_B1 = torch.arange(num_rows, device=device)[:, None]
        self._place_S = torch.arange(self.num_places, device=device)

    def reset(self, rows: Tensor) -> None:
        """Start the given rows (indices `[R]`) anew. Old keys stay in place and are never read: their positions are
        masked until overwritten."""
        self.position_B[rows] = 0

    def advance(self, count: Tensor | int) -> None:
        """Move every row by `count` positions (one number, or `[B]`)."""
        self.position_B += count

    def begin(self, num_new: int) -> None:
        """Prepare the call that brings `num_new` positions to every row."""
        if not 1 <= num_new <= self.max_new:
            raise ValueError(f"{num_new} new positions; this cache was made for 1 to {self.max_new}")
        new_BT = self.position_B[:, None] + torch.arange(num_new, device=self.position_B.device)
        self.cos, self.sin = rotary_tables(new_BT, head_dim=self.spec.head_dim, theta=self.spec.rope_theta)
        self._places_BT = new_BT % self.num_places
        self._num_keys = self._count_keys(num_new)
        self._mask = self._visible(new_BT)[:, None]

    def attend(self, layer: int, q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[self._row_B1, self._places_BT] = k_BTHE
        values[self._row_B1, self._places_BT] = v_BTHE
        out = F.scaled_dot_product_attention(
            q_BTHE.transpose(1, 2),
            keys[:, : self._num_keys].transpose(1, 2),
            values[:, : self._num_keys].transpose(1, 2),
            attn_mask=self._mask,
        )
        return out.transpose(1, 2)

    def _count_keys(self, num_new: int) -> int:
        if self.position_B.device.type != "cpu":
            return self.num_places  # asking the device how far it is would make it wait
        filled = int(self.position_B.max()) + num_new
        return min(self.num_places, -(-filled // _KEY_BLOCK) * _KEY_BLOCK)

    def _visible(self, new_BT: Tensor) -> Tensor:
        # After the write, place s holds the newest position that is s modulo the ring's size.
        last_B1 = new_BT[:, -1:]
        held_BS = last_B1 - (last_B1 - self._place_S[: self._num_keys]) % self.num_places
        query_BT1, held_B1S = new_BT[:, :, None], held_BS[:, None]
        newest_BT1 = query_BT1 | 1 if self.spec.window == "ring" else query_BT1
        return (held_B1S >= 0) & (held_B1S <= query_BT1) & (held_B1S > newest_BT1 - self.spec.context)


class WholeClip:
    """Attention over clips that are present as a whole, with the same window and no state; it can be differentiated.

    Queries are taken in blocks of `context`, each of which needs only its own block of keys and the one before: memory
    grows with the length of the clip, not with its square.
    """

    def __init__(self, spec: AttentionSpec, *, num_rows: int, length: int, device: torch.device) -> None:
        if spec.window != "exact":
            raise ValueError("whole clips are attended with the exact window")
        self._block = min(spec.context, length)
        self._length = length
        position_BT = torch.arange(length, device=device).expand(num_rows, length)
        self.cos, self.sin = rotary_tables(position_BT, head_dim=spec.head_dim, theta=spec.rope_theta)
        self._mask = self._visible(spec.context, device)

    def attend(self, layer: int, q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
        del layer
        q, k, v = (self._blocks(x) for x in (q_BTHE, k_BTHE, v_BTHE))
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=2) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), attn_mask=self._mask
        )
        return out.transpose(2, 3).flatten(1, 2)[:, : self._length]

    def _blocks(self, x_BTHE: Tensor) -> Tensor:
        """`[B, T, H, E]` -> `[B, N, block, H, E]`, zero-padded to whole blocks."""
        padding = -self._length % self._block
        return F.pad(x_BTHE, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, self._block))

    def _visible(self, context: int, device: torch.device) -> Tensor:
        """`[N, 1, block, 2 * block]`: within a block and its predecessor, who sees whom."""
        num_blocks = -(-self._length // self._block)
        query = torch.arange(self._block, device=device)[:, None]
        key = torch.arange(-self._block, self._block, device=device)[None]
        seen = (key <= query) & (key > query - context)
        first = seen & (key >= 0)  # nothing precedes the first block
        return torch.cat([first[None], seen.expand(num_blocks - 1, -1, -1)])[:, None]
