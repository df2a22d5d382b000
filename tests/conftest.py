"""What many tests share: tiny checkpoints in both formats, their models, and a machine that behaves the same twice."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from models.checkpoint import Checkpoint, open_checkpoint
from models.decoder import Decoder
from models.mimi import MimiEncoder
from tests.s3 import S3Server, serve
from tests.tiny import write_original, write_trfs

# The same examples in every run, no file left behind, and no clock: a loaded machine is not a failure.
settings.register_profile("kikitori", derandomize=True, database=None, deadline=None, max_examples=20)
settings.load_profile("kikitori")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: the longest files must not be what one of several processes is left with."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices are slower on many threads, and sums are grouped by the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Unseeded randomness of one test is the same in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the original format, semantic VAD heads included; read only."""
    return write_original(tmp_path_factory.mktemp("tiny") / "original", num_extra_heads=4)


@pytest.fixture(scope="session")
def tiny_trfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_original` in the -trfs format; read only."""
    return write_trfs(tmp_path_factory.mktemp("tiny") / "trfs")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_original: Path) -> Checkpoint:
    """`tiny_original`, opened."""
    return open_checkpoint(tiny_original)


@pytest.fixture(scope="session")
def tiny_decoder(tiny_checkpoint: Checkpoint) -> Decoder:
    """Its decoder in float32; stateless, so it can be shared."""
    return tiny_checkpoint.load_decoder()


@pytest.fixture(scope="session")
def tiny_mimi(tiny_checkpoint: Checkpoint) -> MimiEncoder:
    """Its Mimi encoder; stateless, so it can be shared."""
    return tiny_checkpoint.load_mimi()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server of our own; every test makes its own buckets."""
    with ExitStack() as running:
        try:
            server = running.enter_context(serve(tmp_path_factory.mktemp("s3") / "server"))
        except OSError as error:
            pytest.skip(f"no S3 server can be started here: {error}")
        yield server
