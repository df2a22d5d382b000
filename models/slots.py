"""The decoder's batch: a fixed number of slots, each holding one stream at a time, all moved by one pass.

A pass takes the next `lookahead` positions of every slot at once. The text token of the first is known; the others are
guessed, from what the last pass predicted for them. The longest prefix of guesses that equals what the model then says
is kept, the rest is done again: what comes out is, token for token, what one position per pass gives, because every
kept token was computed from the right tokens before it. Weights and keys are read once for all of them.

Everything a pass needs and makes lives on the device, in tensors that are made once: embeddings of the audio to come,
positions, guesses, tokens. So a pass can be recorded once as a CUDA graph, and the host need not wait for any single
one: it writes audio ahead (`feed`), starts passes, asks for what they will have made (`report`), and reads it (`read`)
whenever it likes, most usefully while further passes run. How far the device is by then, it knows between bounds: a
pass moves a slot by 1 to `lookahead` positions as long as there is audio. Without look-ahead that is exact.

Knows slots, not streams: who sits where, and when a stream is over, is the caller's business.
"""

# B slots, T positions of a pass, R places of a slot's ring, K codebooks, D channels.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.decoder import Decoder
from models.sampling import choose

# Kernels are compiled and chosen, and workspaces made, in passes before the one that is recorded.
_WARM_UP_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Harvest:
    """What a slot has emitted since it was last asked: ids and their log-probabilities, in order."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    num_moves: int  # passes that it took


@dataclass(slots=True, eq=False)
class _Tenant:
    """What the host knows about the stream in a slot."""

    num_fed: int = 0
    harvested: int = 0
    num_moves: int = 0  # as of the last harvest
    # Positions emitted once all passes started so far are done: so many surely, and not more than so many.
    least: int = 0
    most: int = 0


@dataclass(slots=True, eq=False)
class _Pages:
    """Where the device's counters and rings are copied to; on the host, and pinned if the copy is asynchronous."""

    position_B: Tensor
    moves_B: Tensor
    ids_BR: Tensor
    logprobs_BR: Tensor
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """The state of all slots at one moment, on its way to the host; to be read once, older ones first."""

    pages: _Pages
    tenants: tuple[_Tenant, ...]
    num_fed: tuple[int, ...]
    num_started: int  # passes


class Slots:
    """State of B streams in the decoder, and the pass that moves them.

    Args:
        decoder: the weights.
        num_slots: B.
        lookahead: positions per pass at most; 1 is plain decoding.
        padding_id: the first guess for a position nothing is known about.
        bos_row: row of transformers' shared table fed as the first text token; None for the model's own BOS.
        zero_logit: give the id `text_card` a logit of exactly 0, as the zero row of transformers' `lm_head` does.
        temperature: 0 for greedy. Sampling is exact under look-ahead too: its noise is a function of stream and
            position, so a drawn token is as determined as a greedy one.
        top_k: with a temperature, how many of the best ids may be drawn.
        ring_frames: R, how far the host may be ahead of or behind the device; 256 or more if it is not given.
        use_graphs: replay a recorded pass instead of launching its kernels one by one; None: on CUDA.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        *,
        lookahead: int = 1,
        padding_id: int = 0,
        bos_row: int | None = None,
        zero_logit: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        ring_frames: int | None = None,
        use_graphs: bool | None = None,
    ) -> None:
        device, dim = decoder.device, decoder.config.dim
        on_cuda = device.type == "cuda"
        if ring_frames is None:
            ring_frames = max(256, (64 if on_cuda else 4) * lookahead)
        if ring_frames < 2 * lookahead:
            raise ValueError(f"a ring of {ring_frames} frames is too short for passes of {lookahead}")
        self.num_slots, self.lookahead, self.ring_frames = num_slots, lookahead, ring_frames
        self._decoder = decoder
        self._padding_id, self._zero_logit = padding_id, zero_logit
        self._temperature, self._top_k = temperature, top_k
        self._start_D = self._start_vector(bos_row)
        self._cache = decoder.new_cache(num_slots, max_frames=lookahead)
        # Position p of a stream is at place p modulo R.
        self._audio_BRD = torch.zeros(num_slots, ring_frames, dim, device=device, dtype=decoder.dtype)
        self._ids_BR = torch.zeros(num_slots, ring_frames, dtype=torch.int64, device=device)
        self._logprobs_BR = torch.zeros(num_slots, ring_frames, device=device)
        self._limit_B = torch.zeros(num_slots, dtype=torch.int64, device=device)  # positions whose audio is there
        self._seed_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._moves_B = torch.zeros(num_slots, dtype=torch.int64, device=device)  # passes that moved the stream
        # The text inputs of the next pass: the last token, then guesses.
        self._text_BT = torch.full((num_slots, lookahead), padding_id, dtype=torch.int64, device=device)
        self._row_B1 = torch.arange(num_slots, device=device)[:, None]
        self._offset_T = torch.arange(lookahead, device=device)
        self._tenants = [_Tenant() for _ in range(num_slots)]
        self._num_started = 0
        self._spare_pages: list[_Pages] = []
        if use_graphs and not on_cuda:
            raise ValueError(f"there are no CUDA graphs on {device}")
        self._graph = self._record() if on_cuda and use_graphs is not False else None

    def _start_vector(self, bos_row: int | None) -> Tensor:
        config = self._decoder.config
        text = self._decoder.shared_row(config.text_card if bos_row is None else bos_row)
        audio_bos = torch.full((1, config.num_codebooks, 1), config.audio_card, device=self._decoder.device)
        return text + self._decoder.embed_audio(audio_bos)[0, 0]

    @torch.inference_mode()
    def _record(self) -> torch.cuda.CUDAGraph:
        """Record one pass. No slot has audio yet, so the passes before it move none, and it can be done at once."""
        with torch.cuda.device(self._limit_B.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_PASSES):
                    self._pass()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do with the device meanwhile is not our business.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._pass()
        return graph

    @torch.inference_mode()
    def start(self, slot: int, *, seed: int = 0) -> None:
        """Empty one slot for a new stream; the others notice nothing. `seed` matters only with a temperature."""
        # Filled by kernels: an index or a number that has to be copied to the device would make the host wait.
        self._cache.reset(self._row_B1[slot])
        for counter_B in (self._limit_B, self._moves_B):
            counter_B[slot].zero_()
        self._seed_B[slot].fill_(seed)
        self._text_BT[slot].fill_(self._padding_id)
        self._tenants[slot] = _Tenant()

    def room(self, slot: int) -> int:
        """How many more positions `feed` will take for this slot now."""
        tenant = self._tenants[slot]
        return tenant.harvested + self.ring_frames - self.lookahead - tenant.num_fed

    def num_ahead(self, slot: int) -> int:
        """Positions that were fed and that the passes started so far cannot have reached."""
        tenant = self._tenants[slot]
        return tenant.num_fed - tenant.most

    def may_move(self, slot: int) -> bool:
        """Whether another pass could move this slot; not if the passes started so far surely emit all it was fed."""
        tenant = self._tenants[slot]
        return tenant.least < tenant.num_fed

    def num_passes_until_news(self, slots: Iterable[int], *, at_most: int) -> int:
        """How many passes may be started before one of these slots could have emitted all it was fed; 1 at least.

        Until then nothing has to be read. Not more than fill a quarter of the ring, so that it need not run empty.
        """
        ahead = min(self.num_ahead(slot) for slot in slots)
        return max(1, min(at_most, ahead // self.lookahead, self.ring_frames // (4 * self.lookahead)))

    @torch.inference_mode()
    def feed(self, slot: int, codes_KT: Tensor) -> None:
        """Write the codes of a slot's next positions ahead of the passes; they may be on the host.

        Position 0 is the BOS step: its codes are not looked at. Position t has the codes of audio frame t - 1.

        Raises:
            ValueError: there are more than `room(slot)`.
        """
        num_new, tenant = codes_KT.shape[1], self._tenants[slot]
        if num_new > self.room(slot):
            raise ValueError(f"{num_new} positions, but slot {slot} has room for {self.room(slot)}")
        if not num_new:
            return
        audio_TD = self._decoder.embed_audio(self._upload(codes_KT)[None])[0]
        places = torch.arange(tenant.num_fed, tenant.num_fed + num_new, device=audio_TD.device) % self.ring_frames
        self._audio_BRD[slot].index_copy_(0, places, audio_TD)
        tenant.num_fed += num_new
        self._limit_B[slot].fill_(tenant.num_fed)

    def _upload(self, codes_KT: Tensor) -> Tensor:
        device = self._limit_B.device
        if device.type == "cuda" and codes_KT.device.type == "cpu":
            codes_KT = codes_KT.pin_memory()  # from pageable memory the host would wait for the passes before
        return codes_KT.to(device, non_blocking=True)

    @torch.inference_mode()
    def step(self, num_passes: int = 1) -> None:
        """Start passes. Each moves every slot by at least one position, at most `lookahead`, as far as it has audio."""
        for _ in range(num_passes):
            if self._graph is not None:
                self._graph.replay()
            elif (rows := self._worth_moving()) != []:
                self._pass(rows)
        self._num_started += num_passes
        for tenant in self._tenants:
            tenant.least = min(tenant.num_fed, tenant.least + num_passes)
            tenant.most = min(tenant.num_fed, tenant.most + num_passes * self.lookahead)

    def _worth_moving(self) -> list[int] | None:
        """On a CPU a pass costs what its rows cost, so slots that surely stand still are left out; None for all."""
        if self._limit_B.device.type != "cpu":
            return None
        moving = [slot for slot in range(self.num_slots) if self.may_move(slot)]
        if len(moving) == self.num_slots:
            return None
        if len(moving) * self.lookahead == 1:
            # A product of one row may be another kernel than that of two, with other last bits.
            moving = sorted([*moving, 0 if moving != [0] else 1])
        return moving

    def _pass(self, rows: list[int] | None = None) -> None:
        """Reads and writes tensors that stay where they are, and asks the device nothing.

        Args:
            rows: the slots that take part, ascending; None for all. B stands for their number here.
        """
        row_B1 = self._row_B1 if rows is None else torch.tensor(rows)[:, None]
        first_B, text_BT = self._cache.position_B, self._text_BT
        limit_B, seed_B = self._limit_B, self._seed_B
        if rows is not None:
            first_B, text_BT, limit_B, seed_B = first_B[rows], text_BT[rows], limit_B[rows], seed_B[rows]
        position_BT = first_B[:, None] + self._offset_T
        places_BT = position_BT % self.ring_frames
        x_BTD = self._audio_BRD[row_B1, places_BT] + self._decoder.text_embedding(text_BT)
        x_BTD = torch.where((position_BT == 0)[..., None], self._start_D, x_BTD)
        self._cache.begin(self.lookahead, rows=rows)
        logits_BTV = self._decoder.logits(self._decoder.hidden(x_BTD, self._cache))
        if self._zero_logit:
            logits_BTV = F.pad(logits_BTV, (0, 1))
        ids_BT, logprobs_BT = choose(
            logits_BTV,
            temperature=self._temperature,
            top_k=self._top_k,
            seed=seed_B[:, None],
            step=position_BT,
        )
        self._ids_BR[row_B1, places_BT] = ids_BT
        self._logprobs_BR[row_B1, places_BT] = logprobs_BT
        # The first token is right; every further one is, as long as the guesses before it were.
        right_BT = text_BT[:, 1:] == ids_BT[:, :-1]
        accepted_B = (1 + right_BT.long().cumprod(dim=1).sum(dim=1)).minimum(limit_B - first_B)
        self._text_BT.index_copy_(0, row_B1[:, 0], self._guesses(text_BT, ids_BT, accepted_B))
        self._moves_B.index_add_(0, row_B1[:, 0], (accepted_B > 0).long())
        self._cache.advance(accepted_B, rows=rows)

    def _guesses(self, text_BT: Tensor, ids_BT: Tensor, accepted_B: Tensor) -> Tensor:
        """Next pass: the last accepted token, then this pass's predictions, then padding (Jacobi iteration)."""
        index_BT = accepted_B[:, None] - 1 + self._offset_T
        known = ids_BT.gather(1, index_BT.clamp(0, self.lookahead - 1))
        following = known.masked_fill(index_BT >= self.lookahead, self._padding_id)
        return torch.where((accepted_B > 0)[:, None], following, text_BT)

    @torch.inference_mode()
    def report(self) -> Report:
        """Ask for the state behind the passes started so far; does not wait for them."""
        pages = self._spare_pages.pop() if self._spare_pages else self._new_pages()
        pages.position_B.copy_(self._cache.position_B, non_blocking=True)
        pages.moves_B.copy_(self._moves_B, non_blocking=True)
        pages.ids_BR.copy_(self._ids_BR, non_blocking=True)
        pages.logprobs_BR.copy_(self._logprobs_BR, non_blocking=True)
        if pages.copied is not None:
            pages.copied.record(torch.cuda.current_stream(self._limit_B.device))
        return Report(
            pages=pages,
            tenants=tuple(self._tenants),
            num_fed=tuple(tenant.num_fed for tenant in self._tenants),
            num_started=self._num_started,
        )

    def _new_pages(self) -> _Pages:
        on_cuda = self._limit_B.device.type == "cuda"

        def page(source: Tensor) -> Tensor:
            return torch.empty(source.shape, dtype=source.dtype, pin_memory=on_cuda)

        return _Pages(
            position_B=page(self._cache.position_B),
            moves_B=page(self._moves_B),
            ids_BR=page(self._ids_BR),
            logprobs_BR=page(self._logprobs_BR),
            copied=torch.cuda.Event() if on_cuda else None,
        )

    def read(self, report: Report, slots: Iterable[int] | None = None) -> list[Harvest]:
        """What these slots' streams, or all, had emitted at the time of the report and since they were last read.

        Waits for the passes before the report, not for later ones. A slot that was started anew since then gives the
        last tokens of the stream that was there before.
        """
        pages = report.pages
        if pages.copied is not None:
            pages.copied.synchronize()
        # All slots at once: a hundred and twenty-eight little gathers would take as long as a pass.
        wanted = np.arange(self.num_slots) if slots is None else np.fromiter(slots, np.int64)
        tenants = [report.tenants[slot] for slot in wanted]
        begins = np.fromiter((tenant.harvested for tenant in tenants), np.int64, len(tenants))
        counts = pages.position_B.numpy()[wanted] - begins
        ends = counts.cumsum()
        positions = np.arange(counts.sum()) + np.repeat(begins - ends + counts, counts)
        index = np.repeat(wanted, counts), positions % self.ring_frames
        ids = pages.ids_BR.numpy()[index].astype(np.int32)
        logprobs = pages.logprobs_BR.numpy()[index]
        moves = pages.moves_B.numpy()[wanted].tolist()
        self._spare_pages.append(pages)
        harvests: list[Harvest] = []
        for slot, tenant, count, end, num_moves in zip(
            wanted.tolist(), tenants, counts.tolist(), ends.tolist(), moves, strict=True
        ):
            new = slice(end - count, end)
            harvests.append(Harvest(ids=ids[new], logprobs=logprobs[new], num_moves=num_moves - tenant.num_moves))
            tenant.harvested, tenant.num_moves = tenant.harvested + count, num_moves
            self._narrow(tenant, report, slot)
        return harvests

    def _narrow(self, tenant: _Tenant, report: Report, slot: int) -> None:
        """Where a stream was at the time of the report says where the passes since then may have brought it."""
        num_since = self._num_started - report.num_started
        tenant.most = min(tenant.most, tenant.harvested + num_since * self.lookahead)
        tenant.least = max(tenant.least, min(tenant.harvested + num_since, report.num_fed[slot]))

    def harvest(self, slots: Sequence[int]) -> list[Harvest]:
        """Read what these slots have emitted since they were last read; waits for the passes so far."""
        return self.read(self.report(), slots)
