"""The decoder's batch: a fixed number of slots, each holding one stream at a time, all moved by one pass.

A pass takes the next `lookahead` positions of every slot at once. The text token of the first is known; the others are
guessed, from what the last pass predicted for them. The longest prefix of guesses that equals what the model then says
is kept, the rest is done again: what comes out is, token for token, what one position per pass gives, because every
kept token was computed from the right tokens before it. Weights and keys are read once for all of them.

Everything a pass needs and makes lives on the device: embeddings of the audio to come, positions, guesses, tokens. The
host writes audio ahead of it (`feed`) and reads tokens behind it (`harvest`), and need not wait for any single pass.

Knows slots, not streams: who sits where, and when a stream is over, is the caller's business.
"""

# B slots, T positions of a pass, R places of a slot's ring, K codebooks, D channels.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.decoder import Decoder
from models.sampling import choose


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Harvest:
    """What a slot has emitted since it was last asked: ids and their log-probabilities, in order."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


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
    ) -> None:
        ring_frames = max(256, 4 * lookahead) if ring_frames is None else ring_frames
        if ring_frames < 2 * lookahead:
            raise ValueError(f"a ring of {ring_frames} frames is too short for passes of {lookahead}")
        self.num_slots, self.lookahead, self.ring_frames = num_slots, lookahead, ring_frames
        self._decoder = decoder
        self._padding_id, self._zero_logit = padding_id, zero_logit
        self._temperature, self._top_k = temperature, top_k
        self._start_D = self._start_vector(bos_row)
        self._cache = decoder.new_cache(num_slots, max_frames=lookahead)
        device, dim = decoder.device, decoder.config.dim
        # Position p of a stream is at place p modulo R.
        self._audio_BRD = torch.zeros(num_slots, ring_frames, dim, device=device, dtype=decoder.dtype)
        self._ids_BR = torch.zeros(num_slots, ring_frames, dtype=torch.int64, device=device)
        self._logprobs_BR = torch.zeros(num_slots, ring_frames, device=device)
        self._limit_B = torch.zeros(num_slots, dtype=torch.int64, device=device)  # positions whose audio is there
        self._seed_B = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # The text inputs of the next pass: the last token, then guesses.
        self._text_BT = torch.full((num_slots, lookahead), padding_id, dtype=torch.int64, device=device)
        self._row_B1 = torch.arange(num_slots, device=device)[:, None]
        self._offset_T = torch.arange(lookahead, device=device)
        self._fed = [0] * num_slots
        self._harvested = [0] * num_slots

    def _start_vector(self, bos_row: int | None) -> Tensor:
        config = self._decoder.config
        text = self._decoder.shared_row(config.text_card if bos_row is None else bos_row)
        audio_bos = torch.full((1, config.num_codebooks, 1), config.audio_card, device=self._decoder.device)
        return text + self._decoder.embed_audio(audio_bos)[0, 0]

    @torch.inference_mode()
    def start(self, slot: int, *, seed: int = 0) -> None:
        """Empty one slot for a new stream; the others notice nothing. `seed` matters only with a temperature."""
        self._cache.reset(torch.tensor([slot], device=self._decoder.device))
        self._limit_B[slot] = 0
        self._seed_B[slot] = seed
        self._text_BT[slot] = self._padding_id
        self._fed[slot] = self._harvested[slot] = 0

    def room(self, slot: int) -> int:
        """How many more positions `feed` will take for this slot now."""
        return self._harvested[slot] + self.ring_frames - self.lookahead - self._fed[slot]

    @torch.inference_mode()
    def feed(self, slot: int, codes_KT: Tensor) -> None:
        """Write the codes of a slot's next positions ahead of the passes.

        Position 0 is the BOS step: its codes are not looked at. Position t has the codes of audio frame t - 1.

        Raises:
            ValueError: there are more than `room(slot)`.
        """
        num_new = codes_KT.shape[1]
        if num_new > self.room(slot):
            raise ValueError(f"{num_new} positions, but slot {slot} has room for {self.room(slot)}")
        audio_TD = self._decoder.embed_audio(codes_KT[None])[0]
        places = torch.arange(self._fed[slot], self._fed[slot] + num_new, device=audio_TD.device) % self.ring_frames
        self._audio_BRD[slot, places] = audio_TD
        self._fed[slot] += num_new
        self._limit_B[slot] = self._fed[slot]

    @torch.inference_mode()
    def step(self) -> None:
        """One pass: every slot moves by at least one position and at most `lookahead`, as far as it has audio."""
        first_B, text_BT = self._cache.position_B, self._text_BT
        position_BT = first_B[:, None] + self._offset_T
        places_BT = position_BT % self.ring_frames
        x_BTD = self._audio_BRD[self._row_B1, places_BT] + self._decoder.text_embedding(text_BT)
        x_BTD = torch.where((position_BT == 0)[..., None], self._start_D, x_BTD)
        self._cache.begin(self.lookahead)
        logits_BTV = self._decoder.logits(self._decoder.hidden(x_BTD, self._cache))
        if self._zero_logit:
            logits_BTV = F.pad(logits_BTV, (0, 1))
        ids_BT, logprobs_BT = choose(
            logits_BTV,
            temperature=self._temperature,
            top_k=self._top_k,
            seed=self._seed_B[:, None],
            step=position_BT,
        )
        self._ids_BR[self._row_B1, places_BT] = ids_BT
        self._logprobs_BR[self._row_B1, places_BT] = logprobs_BT
        # The first token is right; every further one is, as long as the guesses before it were.
        right_BT = text_BT[:, 1:] == ids_BT[:, :-1]
        accepted_B = (1 + right_BT.long().cumprod(dim=1).sum(dim=1)).minimum(self._limit_B - first_B)
        self._guess(ids_BT, accepted_B)
        self._cache.advance(accepted_B)

    def _guess(self, ids_BT: Tensor, accepted_B: Tensor) -> None:
        """Next pass: the last accepted token, then this pass's predictions, then padding (Jacobi iteration)."""
        index_BT = accepted_B[:, None] - 1 + self._offset_T
        known = ids_BT.gather(1, index_BT.clamp(0, self.lookahead - 1))
        following = known.masked_fill(index_BT >= self.lookahead, self._padding_id)
        self._text_BT = torch.where((accepted_B > 0)[:, None], following, self._text_BT)

    @torch.inference_mode()
    def harvest(self, slots: Sequence[int]) -> list[Harvest]:
        """Read what these slots have emitted since they were last read; waits for the passes so far."""
        positions = self._cache.position_B.tolist()
        ids_BR, logprobs_BR = self._ids_BR.cpu().numpy(), self._logprobs_BR.cpu().numpy()
        harvests: list[Harvest] = []
        for slot in slots:
            places = np.arange(self._harvested[slot], positions[slot]) % self.ring_frames
            self._harvested[slot] = positions[slot]
            harvests.append(Harvest(ids=ids_BR[slot, places].astype(np.int32), logprobs=logprobs_BR[slot, places]))
        return harvests
