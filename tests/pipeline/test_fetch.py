import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from pipeline import retries
from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.fetch import cache_folder, describe, fetch, open_fetched
from pipeline.storage import Storage
from tests.fault_proxy import fault_proxy
from tests.s3 import KEY, SECRET, S3Server
from tests.tiny import write_original, write_trfs

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
HUB_ID = "org/name"


def asked(source: str | Path, revision: str = "main") -> CheckpointConfig:
    return CheckpointConfig(source=str(source), revision=revision)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both caches are empty, and the hub is out of reach."""
    monkeypatch.setenv("KIKITORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def copied(tiny_original: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that may be broken."""
    return Path(shutil.copytree(tiny_original, tmp_path / "copied"))


@pytest.fixture
def uploaded(tiny_original: Path) -> Iterator[str]:
    """A tiny checkpoint behind an fsspec URI."""
    memory = fsspec.filesystem("memory")
    for path in tiny_original.iterdir():
        memory.pipe_file(f"/test-fetch/stt/{path.name}", path.read_bytes())
    yield "memory://test-fetch/stt"
    memory.rm("/test-fetch", recursive=True)


def test_the_demo_ships_inside_the_package() -> None:
    fetched = fetch(asked("demo"))
    assert fetched.model_id == "demo"
    assert describe(open_fetched(fetched))["delay_seconds"] == 0.5


def test_a_folder_is_used_where_it_is(tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_original.parent)
    spellings = [tiny_original, f"file://{tiny_original}", tiny_original.name, f"./{tiny_original.name}/"]
    fetched = [fetch(asked(spelling)) for spelling in spellings]
    assert {(one.folder, one.revision) for one in fetched} == {(tiny_original.resolve(), fetched[0].revision)}
    assert [one.model_id for one in fetched] == [str(spelling) for spelling in spellings]
    assert names_in(tmp_path) == set()


def test_a_uri_is_copied_once_and_is_the_same_checkpoint(
    uploaded: str, tiny_original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch(asked(uploaded))
    assert fetched.model_id == uploaded
    assert fetched.revision == fetch(asked(tiny_original)).revision
    assert describe(open_fetched(fetched)) == describe(open_fetched(fetch(asked(tiny_original))))
    assert fetched.folder.is_relative_to(cache)
    monkeypatch.setattr(Storage, "download", _must_not_be_called)
    assert fetch(asked(uploaded + "/")).folder == fetched.folder


def test_another_version_behind_a_uri_is_another_checkpoint(uploaded: str) -> None:
    before = fetch(asked(uploaded))
    memory = fsspec.filesystem("memory")
    config = json.loads(memory.cat_file("/test-fetch/stt/config.json"))
    memory.pipe_file("/test-fetch/stt/config.json", json.dumps(config | {"existing_text_padding_id": 7}).encode())
    after = fetch(asked(uploaded))
    assert after.folder != before.folder
    assert after.revision != before.revision


def test_what_lies_beside_and_below_a_checkpoint_stays_where_it_is(uploaded: str, tiny_original: Path) -> None:
    """A folder of older weights below the checkpoint once took the place of its own."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/test-fetch/stt/older/model.safetensors", b"junk")
    memory.pipe_file("/test-fetch/stt/pytorch_model.bin", b"a pickle")
    fetched = fetch(asked(uploaded))
    open_fetched(fetched)
    assert names_in(fetched.folder) == names_in(tiny_original)


def test_a_copy_that_broke_off_leaves_nothing_behind(
    uploaded: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = Storage.download

    def unreliable(self: Storage, uri: str, out: BinaryIO) -> None:
        if uri.endswith("model.safetensors"):
            raise OSError("the line is dead")
        download(self, uri, out)

    monkeypatch.setattr(Storage, "download", unreliable)
    with pytest.raises(CheckpointError, match=r"could not be copied .*the line is dead"):
        fetch(asked(uploaded))
    assert names_in(cache / "checkpoints") == set()
    monkeypatch.undo()
    monkeypatch.setenv("KIKITORI_CACHE", str(cache))
    open_fetched(fetch(asked(uploaded)))


def test_a_copy_that_a_killed_process_left_is_removed_once_it_is_old(uploaded: str, cache: Path) -> None:
    old, young = (cache / "checkpoints" / name for name in (".kikitori-old", ".kikitori-young"))
    for left in (old, young):
        (left / "checkpoint").mkdir(parents=True)
        (left / "checkpoint" / "model.safetensors").touch()
    os.utime(old, (1, 1))
    fetched = fetch(asked(uploaded))
    assert names_in(cache / "checkpoints") == {young.name, fetched.folder.name}


def test_a_private_bucket_opens_with_the_options_of_the_checkpoint(
    tiny_original: Path, cache: Path, s3_server: S3Server
) -> None:
    uri = f"s3://{s3_server.new_bucket()}/stt"
    for path in tiny_original.iterdir():
        Storage(s3_server.options()).overwrite(f"{uri}/{path.name}", path.read_bytes())
    fetched = fetch(CheckpointConfig(source=uri, storage_options=s3_server.options()))
    assert (fetched.model_id, fetched.revision) == (uri, fetch(asked(tiny_original)).revision)
    assert describe(open_fetched(fetched)) == describe(open_fetched(fetch(asked(tiny_original))))
    wrong = s3_server.options() | {"secret": "hush-hush"}
    with pytest.raises(CheckpointError, match="correct the credentials") as refused:
        fetch(CheckpointConfig(source=uri, storage_options=wrong))
    assert "hush" not in str(refused.value)


def test_a_checkpoint_that_arrives_damaged_is_not_kept(
    tiny_original: Path, cache: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_BACKOFF_SECONDS", (0.001,))
    uri = f"s3://{s3_server.new_bucket()}/stt"
    for path in tiny_original.iterdir():
        Storage(s3_server.options()).overwrite(f"{uri}/{path.name}", path.read_bytes())
    with fault_proxy(s3_server.port, key=KEY, secret=SECRET) as proxy:
        config = CheckpointConfig(source=uri, storage_options=s3_server.options(endpoint=proxy.endpoint))
        proxy.fail("flip a byte", method="GET", path="model.safetensors", times=1_000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: its content has MD5"):
            fetch(config)
        assert names_in(cache / "checkpoints") == set()
        proxy.heal()
        proxy.fail("flip a byte", method="GET", path="model.safetensors", times=1)
        assert fetch(config).revision == fetch(asked(tiny_original)).revision


def test_a_cache_that_cannot_be_written_is_named(
    uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIKITORI_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="KIKITORI_CACHE names another"):
        fetch(asked(uploaded))


def test_the_cache_is_where_the_desktop_standard_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIKITORI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/kikitori/checkpoints")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/kikitori/checkpoints"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/nowhere/at/all", r"'/nowhere/at/all' is not a folder here, and not a hub id \(org/name\), a URI or `demo`"),
        ("./nowhere", "is not a folder here"),
        ("~nobody-at-all/x", "is not a folder here"),
        ("nowhere", "is not a folder here"),
        ("a/b/c", "is not a folder here"),
        ("file:///nowhere", "is not a folder here"),
        ("memory://test-fetch/nothing", "there is no config.json"),
        ("nowhere://bucket/stt", "no way to read nowhere:// here"),
    ],
)
def test_what_is_nowhere_is_named_with_where_it_could_have_been(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fetch(asked(source))


def test_without_the_hub_the_user_hears_what_to_do() -> None:
    with pytest.raises(CheckpointError) as refused:
        fetch(asked("nobody/nothing"))
    message = str(refused.value)
    assert message.startswith("checkpoint nobody/nothing (revision main) is not in the local hub cache")
    assert all(word in message for word in ("`kikitori fetch`", "local folder", "`demo`"))


def lay_out_cache(root: str, checkpoint: Path, *, commit: str = COMMIT, ref: str = "main") -> Path:
    """The hub cache as `huggingface_hub` lays it out; -> the snapshot."""
    repository = Path(root) / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for path in checkpoint.iterdir():
        blob = repository / "blobs" / f"{commit[0]}-{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / blob.name)
    return snapshot


@pytest.mark.parametrize("write", [write_original, write_trfs])
def test_what_is_in_the_hub_cache_needs_no_network(write: Callable[[Path], Path], tmp_path: Path) -> None:
    snapshot = lay_out_cache(constants.HF_HUB_CACHE, write(tmp_path / "made"))
    for revision in ("main", COMMIT):
        fetched = fetch(asked(HUB_ID, revision))
        assert (fetched.folder, fetched.model_id, fetched.revision) == (snapshot, HUB_ID, COMMIT)
        open_fetched(fetched).load_decoder()


def test_a_revision_is_resolved_to_its_commit(tiny_original: Path) -> None:
    lay_out_cache(constants.HF_HUB_CACHE, tiny_original)
    lay_out_cache(constants.HF_HUB_CACHE, tiny_original, commit=OTHER_COMMIT, ref="v2")
    assert [fetch(asked(HUB_ID, name)).revision for name in ("main", "v2")] == [COMMIT, OTHER_COMMIT]
    with pytest.raises(CheckpointError, match=r"org/name \(revision v3\) is not in the local hub cache"):
        fetch(asked(HUB_ID, "v3"))


def test_a_hub_cache_that_lacks_a_file_names_it(tiny_original: Path) -> None:
    (lay_out_cache(constants.HF_HUB_CACHE, tiny_original) / "mimi.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint org/name: .*mimi\.safetensors is missing"):
        open_fetched(fetch(asked(HUB_ID)))


class Hub:
    """As much of the hub's HTTP interface as downloading a repository takes."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.downloaded: list[str] = []
        self.error: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                body, headers = b"", {}
                status, code = hub.error or (200, "")
                if hub.error:
                    headers["X-Error-Code"] = code
                elif self.path.startswith(f"/api/models/{HUB_ID}/tree/"):
                    listing = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in hub.files.items()
                    ]
                    body, headers["Content-Type"] = json.dumps(listing).encode(), "application/json"
                else:
                    name = self.path.rpartition("/")[2]
                    body = hub.files[name]
                    headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
                    if with_body:
                        hub.downloaded.append(name)
                self.send_response(status)
                for header, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(header, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        return Handler


@pytest.fixture
def hub(tiny_original: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub({path.name: path.read_bytes() for path in tiny_original.iterdir()})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("sys.stderr", io.StringIO())  # its progress bars
    yield served
    served.close()


def test_from_the_hub_comes_what_a_checkpoint_needs_and_nothing_else(hub: Hub, tiny_original: Path) -> None:
    hub.files |= {"pytorch_model.bin": b"a pickle", "README.md": b"#", "other.safetensors": b""}
    fetched = fetch(asked(HUB_ID))
    assert (fetched.model_id, fetched.revision) == (HUB_ID, COMMIT)
    assert names_in(fetched.folder) == names_in(tiny_original)
    assert sorted(hub.downloaded) == sorted(names_in(tiny_original))
    open_fetched(fetched)
    hub.downloaded.clear()
    assert fetch(asked(HUB_ID)) == fetched
    assert hub.downloaded == []


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "RepoNotFound", "the hub knows no such repository, or it is private and HF_TOKEN is not set"),
        (404, "RepoNotFound", "the hub knows no such repository"),
        (403, "GatedRepo", "is gated: accept its terms on the hub, then set HF_TOKEN"),
        (404, "RevisionNotFound", "the repository has no such revision"),
        (404, "EntryNotFound", "lacks a file that a checkpoint needs"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, status: int, code: str, said: str) -> None:
    hub.error = (status, code)
    with pytest.raises(CheckpointError, match=rf"checkpoint org/name \(revision main\).*{said}"):
        fetch(asked(HUB_ID))


@pytest.mark.parametrize(
    "name", ["config.json", "mimi_config.json", "model.safetensors", "mimi.safetensors", "tokenizer.model"]
)
def test_a_missing_file_is_named_with_what_is_there(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=rf"/{name} is missing; the folder holds: ") as refused:
        open_fetched(fetch(asked(copied)))
    assert str(copied) in str(refused.value)


def test_wrong_tensors_are_named_all_at_once(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["text_linear.weight"] = tensors["text_linear.weight"][:5].clone()
    tensors["surprise"] = tensors.pop("out_norm.alpha")
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        open_fetched(fetch(asked(copied)))
    message = str(refused.value)
    assert "missing: out_norm.alpha [1, 1, 64]" in message
    assert "left over: surprise [1, 1, 64]" in message
    assert "wrong shape: text_linear.weight is [5, 64], expected [64, 64]" in message


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("config.json", b"{", "config.json is not readable JSON"),
        ("config.json", b"[]", "config.json holds a JSON list, expected an object"),
        ("config.json", b"{}", "is neither an original Kyutai config"),
        ("model.safetensors", b"", "is not a whole safetensors file"),
        ("tokenizer.model", b"junk", "is not a tokenizer"),
    ],
)
def test_a_damaged_file_is_named(copied: Path, name: str, data: bytes, said: str) -> None:
    (copied / name).write_bytes(data)
    with pytest.raises(CheckpointError) as refused:
        open_fetched(fetch(asked(copied)))
    assert name in str(refused.value)
    assert said in str(refused.value)


def test_a_cut_file_is_not_loaded(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        open_fetched(fetch(asked(copied)))


def test_a_revision_of_a_folder_follows_from_its_content(copied: Path, tiny_original: Path, tmp_path: Path) -> None:
    original = fetch(asked(tiny_original)).revision
    assert fetch(asked(copied)).revision == original
    (copied / "README.md").write_text("notes change nothing")
    assert fetch(asked(copied)).revision == original
    assert fetch(asked(write_original(tmp_path / "seed-1", seed=1, num_extra_heads=4))).revision != original


def _must_not_be_called(*args: object) -> Any:
    raise AssertionError("a file was fetched again")
