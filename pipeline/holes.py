"""Where a demuxer passed over bytes: what is damaged inside of a file is skipped by ffmpeg without a word.

Three signs, because containers differ in what they know of a packet:
- it knows its place and its time (WebM, FLV, MPEG-TS ...): bytes are left out before it, and its time jumps. A recorder
  that leaves silence out lets the time jump too, but leaves no bytes behind.
- it is whatever lies between two marks (raw MP3, AC-3): one packet is many times as large as all the others.
- it knows its size only (raw ADTS), or the place of a page of many (Ogg): all together do not add up to the file.
"""

import os
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import BinaryIO

from av.audio.stream import AudioStream
from av.packet import Packet

_BETWEEN_MARKS = frozenset({"mp3", "ac3", "eac3", "dts"})
_ADDING_UP = frozenset({"aac", "ogg"})
_FRAMING_BYTES = 512  # between packets that follow each other: headers of blocks and tags
_FRAMING_SHARE = 0.04  # of an Ogg file: headers of pages
_JUMP_SECONDS = 0.05
_OVERSIZE = 4  # times the usual
_USUAL_PACKETS = 15
_TAIL_BYTES = 256 * 1024  # four of the largest pages
_SMALLEST_BYTES = 100  # variable rates go from a few bytes in silence to hundreds in the next word
# What people and tools put between the frames of an MP3; joined episodes have one in the middle, with a picture in it.
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")


@dataclass(slots=True)
class Seams:
    """Follows the packets of one stream, and knows at its end how many seconds are missing between them."""

    file: BinaryIO
    container_name: str
    is_alone: bool  # the container holds nothing but this stream
    _jumped_seconds: float = 0.0
    _first_bytes: int | None = None  # where the first packet is
    _last_bytes: int = 0  # where the last page is
    _due_bytes: int = 0  # where the next packet should be
    _due_seconds: float | None = None  # and when
    _num_seconds: float = 0.0
    _num_bytes: int = 0
    _sizes_bytes: deque[int] = field(default_factory=lambda: deque(maxlen=_USUAL_PACKETS))  # the latest
    _oversized_bytes: int = 0

    def follow(self, packet: "Packet[AudioStream]") -> None:
        """The next packet, whether it can be decoded or not."""
        if packet.pos is None or not packet.size:
            return
        begin = None if packet.pts is None else float(packet.pts * packet.time_base)
        length = float((packet.duration or 0) * packet.time_base)
        if self._first_bytes is None:
            self._first_bytes = packet.pos
        elif begin is not None and self._due_seconds is not None:
            is_apart = packet.pos - self._due_bytes > _FRAMING_BYTES + packet.size
            jump_seconds = begin - self._due_seconds
            if is_apart and jump_seconds > _JUMP_SECONDS:
                self._jumped_seconds += jump_seconds
        self._last_bytes = packet.pos
        self._due_bytes, self._due_seconds = packet.pos + packet.size, None if begin is None else begin + length
        self._num_seconds += length
        self._keep_size(packet)

    def missing_seconds(self) -> float:
        """About how much sound was passed over."""
        if self._first_bytes is None or not self._num_bytes:
            return 0.0
        seconds_per_byte = self._num_seconds / self._num_bytes
        if self.container_name in _BETWEEN_MARKS:
            return self._oversized_bytes * seconds_per_byte
        if self.container_name in _ADDING_UP and self.is_alone:
            end = self._last_page_bytes() if self.container_name == "ogg" else self._file_bytes()
            unread_bytes = end - self._first_bytes - self._num_bytes
            return max(0.0, unread_bytes - _FRAMING_SHARE * self._num_bytes) * seconds_per_byte
        return self._jumped_seconds

    def _keep_size(self, packet: "Packet[AudioStream]") -> None:
        """Remember it; a packet between marks that is far too large is mostly something else, or a tag and harmless."""
        if self.container_name in _BETWEEN_MARKS:
            usual_bytes = max(median(self._sizes_bytes or [packet.size]), _SMALLEST_BYTES)
            if packet.size > _OVERSIZE * usual_bytes:
                if not any(tag in bytes(packet) for tag in _TAGS):
                    self._oversized_bytes += packet.size - round(usual_bytes)
                return
            self._sizes_bytes.append(packet.size)
        self._num_bytes += packet.size

    def _last_page_bytes(self) -> int:
        """Where the last page of an Ogg file begins, read or not; what comes behind it is something else."""
        size = self._file_bytes()
        before = self.file.tell()
        begin = self.file.seek(max(0, size - _TAIL_BYTES))
        place = self.file.read(_TAIL_BYTES).rfind(b"OggS")
        self.file.seek(before)
        return max(self._last_bytes, begin + place if place >= 0 else 0)

    def _file_bytes(self) -> int:
        before = self.file.tell()
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(before)
        return end
