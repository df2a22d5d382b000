"""What a pass cannot do without: bytes moved and operations done, counted from the dims.

A pass of the decoder is bound by memory as long as few positions share one reading of the weights, and by arithmetic
beyond. Counted are weights and keys and values; embeddings are gathers of a few rows and activations stay in the
caches, so both are left out and the limit is a little too kind to the machine, never to us. Of the encoder, whose
activations are far larger than its weights, it is the activations that are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import DecoderConfig, MimiConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one device does at best, measured."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """The least a pass over all slots has to move and to compute."""

    weight_bytes: int
    cache_bytes: float
    flops: float

    @property
    def num_bytes(self) -> float:
        """Everything that crosses the memory bus."""
        return self.weight_bytes + self.cache_bytes

    def limit_seconds(self, machine: Machine) -> float:
        """The time below which this machine cannot do the pass."""
        return max(self.num_bytes / machine.bytes_per_second, self.flops / machine.flops_per_second)

    def bound(self, machine: Machine) -> str:
        """Which of the two it is: `memory` or `compute`."""
        by_memory = self.num_bytes / machine.bytes_per_second >= self.flops / machine.flops_per_second
        return "memory" if by_memory else "compute"


def num_parameters(config: DecoderConfig) -> int:
    """All values of the decoder, semantic heads left out."""
    embeddings = config.text_card + 1 + config.num_codebooks * (config.audio_card + 1)
    return num_parameters_read(config) + embeddings * config.dim


def num_parameters_read(config: DecoderConfig) -> int:
    """Values that every pass reads: all but the embedding tables, of which it gathers rows."""
    norms = (2 * config.num_layers + 1) * config.dim
    return _num_product_weights(config) + norms


def pass_cost(
    config: DecoderConfig, *, num_slots: int, num_positions: int, filled_context: float, itemsize: int
) -> PassCost:
    """The cost of one pass.

    Args:
        num_slots: streams in the pass.
        num_positions: positions of every stream, those guessed wrongly included.
        filled_context: positions of the past that a stream attends to, on average.
        itemsize: bytes of a weight, and of a key's or value's element.
    """
    row_bytes = 2 * config.num_layers * config.dim * itemsize  # the keys and values of one position
    return PassCost(
        weight_bytes=num_parameters_read(config) * itemsize,
        cache_bytes=num_slots * (filled_context + num_positions) * row_bytes,
        flops=num_slots
        * num_positions
        * (2 * _num_product_weights(config) + 4 * config.num_layers * config.dim * (filled_context + 1)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeCost:
    """The least that encoding has to move and to compute."""

    num_bytes: float
    flops: float

    def limit_seconds(self, machine: Machine) -> float:
        """The time below which this machine cannot do it."""
        return max(self.num_bytes / machine.bytes_per_second, self.flops / machine.flops_per_second)


def encode_cost(config: MimiConfig, *, seconds: float, itemsize: int) -> EncodeCost:
    """The cost of so much audio in long pieces.

    Bytes are the inputs and outputs of SEANet's convolutions, each moved once, as if everything between them were done
    on the way; weights are read once per call and the rest is small, so both are left out.

    Args:
        itemsize: bytes of an activation's element.
    """
    rate, flops, elements = float(config.sample_rate_hz), 0.0, 0.0
    for channels, width, kernel_size, stride in _convolutions(config):
        elements += rate * channels
        rate /= stride
        elements += rate * width
        flops += 2 * rate * channels * width * kernel_size
    layer = 2 * (4 * config.dim**2 + 2 * config.dim * config.mlp_dim) + 4 * config.dim * config.context
    flops += rate * config.num_layers * layer
    downsample = 2 * config.dim**2 * 2 * config.downsample_stride
    projections = 2 * 2 * config.dim * config.codebook_dim
    distances = 2 * config.num_codebooks * config.codebook_size * config.codebook_dim
    flops += config.frame_rate_hz * (downsample + projections + distances)
    return EncodeCost(num_bytes=seconds * elements * itemsize, flops=seconds * flops)


def _convolutions(config: MimiConfig) -> Iterator[tuple[int, int, int, int]]:
    """SEANet's, in order: channels in and out, kernel size, stride."""
    channels = config.num_filters
    yield 1, channels, config.kernel_size, 1
    for stride in config.strides:
        narrow = channels // config.compress
        yield channels, narrow, config.residual_kernel_size, 1
        yield narrow, channels, 1, 1
        yield channels, 2 * channels, 2 * stride, stride
        channels *= 2
    yield channels, config.dim, config.last_kernel_size, 1


def _num_product_weights(config: DecoderConfig) -> int:
    attention, mlp = 4 * config.dim**2, 3 * config.dim * config.mlp_dim
    return config.num_layers * (attention + mlp) + config.dim * config.text_card
