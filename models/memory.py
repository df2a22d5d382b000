"""What a causal windowed attention remembers: a ring per row between calls, or the clip itself when it is all there.

A query at position p sees the keys of positions p - context + 1 .. p. Positions count from the start of the stream and
never wrap; only the place where a key is kept does.
"""

# B rows, T new positions, S ring places, H heads, E channels per head.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layers import rotary_tables

Window = Literal["exact", "ring"]

# Attention reads the filled part of the ring in whole blocks of this many places, so that one row's sums are grouped
# in the same way whatever the length of its neighbours.
_KEY_BLOCK = 64

# On a CPU, so many neighbouring rows read as much of their rings as the fullest of them needs. More rows read more than
# they need, fewer cost more calls; 2 to 8 were within 15 % of each other on streams of LibriSpeech's lengths.
_GROUP_ROWS = 8


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
    rotates: bool  # whether `attend` turns q and k itself; otherwise they come turned

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
        self.num_rows = num_rows
        self.num_places = spec.context + max_new - 1
        self.rotates = _has_kernel(spec, max_new, device)
        # The places of one head lie together: attention reads them in one run.
        shape = (spec.num_layers, num_rows, spec.num_heads, self.num_places, spec.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position_B = torch.zeros(num_rows, device=device, dtype=torch.int64)
        self._all_B1 = torch.arange(num_rows, device=device)[:, None]
        self._place_S = torch.arange(self.num_places, device=device)

    def reset(self, rows: Tensor) -> None:
        """Start the given rows (indices `[R]`) anew. Old keys stay in place and are never read: their positions are
        masked until overwritten."""
        self.position_B[rows] = 0

    def advance(self, count: Tensor | int, *, rows: Sequence[int] | None = None) -> None:
        """Move the given rows, or all, by `count` positions (one number, or one per row)."""
        if rows is None:
            self.position_B += count
        else:
            self.position_B[torch.tensor(rows, device=self.position_B.device)] += count

    def begin(self, num_new: int, *, rows: Sequence[int] | None = None) -> None:
        """Prepare the call that brings `num_new` positions to the given rows (ascending), or to all of them."""
        if not 1 <= num_new <= self.max_new:
            raise ValueError(f"{num_new} new positions; this cache was made for 1 to {self.max_new}")
        device = self.position_B.device
        if rows is not None and device.type != "cpu":
            raise ValueError(f"a call with some rows only is for a CPU; on {device} all take part")
        self._row_B1 = self._all_B1 if rows is None else torch.tensor(rows, device=device)[:, None]
        new_BT = self.position_B[self._row_B1] + torch.arange(num_new, device=device)
        self.cos, self.sin = rotary_tables(new_BT, head_dim=self.spec.head_dim, theta=self.spec.rope_theta)
        if self.rotates:
            return
        self._places_BT = new_BT % self.num_places
        self._groups = list(self._group(new_BT, range(self.num_rows) if rows is None else rows))

    def attend(self, layer: int, q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if self.rotates:
            from models.ring_kernel import ring_attend

            return ring_attend(
                q_BTHE,
                k_BTHE,
                v_BTHE,
                keys_BHSE=keys,
                values_BHSE=values,
                position_B=self.position_B,
                cos=self.cos,
                sin=self.sin,
                context=self.spec.context,
                like_moshi=self.spec.window == "ring",
            )
        keys[self._row_B1, :, self._places_BT] = k_BTHE
        values[self._row_B1, :, self._places_BT] = v_BTHE
        q_BHTE = q_BTHE.transpose(1, 2)
        outs = [
            F.scaled_dot_product_attention(
                q_BHTE[group.queries],
                keys[group.rows, :, : group.num_keys],
                values[group.rows, :, : group.num_keys],
                attn_mask=group.mask,
            )
            for group in self._groups
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).transpose(1, 2)

    def _group(self, new_BT: Tensor, rows: Sequence[int]) -> Iterator["_Group"]:
        """Rows that are attended together, over the part of their rings that the fullest of them has filled."""
        if self.position_B.device.type != "cpu":  # asking the device how far it is would make it wait
            mask = self._visible(new_BT, self.num_places)[:, None]
            yield _Group(queries=slice(None), rows=slice(None), num_keys=self.num_places, mask=mask)
            return
        filled = (new_BT[:, -1] + 1).tolist()
        for queries in _runs(rows):
            num_keys = -(-max(filled[queries]) // _KEY_BLOCK) * _KEY_BLOCK
            num_keys = min(self.num_places, num_keys)
            yield _Group(
                queries=queries,
                rows=slice(rows[queries.start], rows[queries.start] + queries.stop - queries.start),
                num_keys=num_keys,
                mask=self._visible(new_BT[queries], num_keys)[:, None],
            )

    def _visible(self, new_BT: Tensor, num_keys: int) -> Tensor:
        # After the write, place s holds the newest position that is s modulo the ring's size.
        last_B1 = new_BT[:, -1:]
        held_BS = last_B1 - (last_B1 - self._place_S[:num_keys]) % self.num_places
        query_BT1, held_B1S = new_BT[:, :, None], held_BS[:, None]
        newest_BT1 = query_BT1 | 1 if self.spec.window == "ring" else query_BT1
        return (held_B1S >= 0) & (held_B1S <= query_BT1) & (held_B1S > newest_BT1 - self.spec.context)


def _has_kernel(spec: AttentionSpec, max_new: int, device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from models.ring_kernel import is_supported

    return is_supported(head_dim=spec.head_dim, max_new=max_new)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """Neighbouring rows of a call, attended over the same number of places."""

    queries: slice  # among the rows of the call
    rows: slice  # among the rows of the cache
    num_keys: int
    mask: Tensor


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """Indices of consecutive rows, `_GROUP_ROWS` at most."""
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1 or index - first == _GROUP_ROWS:
            yield slice(first, index)
            first = index


class WholeClip:
    """Attention over clips that are present as a whole, with the same window and no state; it can be differentiated.

    Queries are taken in blocks of `context`, each of which needs only its own block of keys and the one before: memory
    grows with the length of the clip, not with its square.
    """

    rotates = False

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
