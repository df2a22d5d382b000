"""Small encoded files made at test time."""

import io
import tempfile
import wave
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import OutputContainer
from numpy.typing import NDArray


def sine(seconds: float, *, rate_hz: int = 24_000, tone_hz: float = 440.0) -> NDArray[np.float32]:
    """[S], peak 0.5."""
    return (0.5 * np.sin(2 * np.pi * tone_hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def wav(samples: NDArray[np.float32], *, rate_hz: int = 24_000) -> bytes:
    """16-bit PCM of `[S]` or `[S, channels]`."""
    columns = samples if samples.ndim == 2 else samples[:, None]
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(columns.shape[1])
        writer.setsampwidth(2)
        writer.setframerate(rate_hz)
        writer.writeframes(np.round(columns * 32768).clip(-32768, 32767).astype("<i2").tobytes())
    return file.getvalue()


def encoded(
    samples: NDArray[np.float32],
    *,
    container: str,
    codec: str,
    rate_hz: int = 24_000,
    layout: str = "mono",
    options: dict[str, str] | None = None,
) -> bytes:
    """`[S]`, the same in every channel of the layout, in any container and codec PyAV can write."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "audio")  # a real file, because some options make ffmpeg open it once more
        with av.open(str(path), "w", format=container, options=options or {}) as output:
            _write(output, samples, codec=codec, rate_hz=rate_hz, layout=layout)
        return path.read_bytes()


def _write(output: OutputContainer, samples: NDArray[np.float32], *, codec: str, rate_hz: int, layout: str) -> None:
    stream = output.add_stream(codec, rate=rate_hz, layout=layout)
    context = stream.codec_context
    if codec.startswith("wma"):
        context.bit_rate = 128_000  # it has no default of its own
    frame = AudioFrame.from_ndarray(np.repeat(samples, context.layout.nb_channels)[None], format="flt", layout=layout)
    frame.sample_rate, frame.pts = rate_hz, 0
    frame_size = context.frame_size or 1024
    to_codec = AudioResampler(format=context.format, layout=layout, rate=rate_hz, frame_size=frame_size)
    for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
        output.mux(stream.encode(part))
    output.mux(stream.encode(None))


def video_without_sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(stream.encode(None))
    return file.getvalue()
