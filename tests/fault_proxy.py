"""A small HTTP proxy that misbehaves on request: what networks and stores do on bad days, at a chosen moment.

Faults are taken from a list, each for the requests it names and as often as it says, so a test knows what happened.
Where a request is changed on its way, it is signed again: the store then sees a client that never sent the rest.
"""

import http.client
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Kind = Literal[
    "answer",  # the proxy itself, with `status` and `code`
    "reset",  # the connection breaks before the request is passed on
    "lose answer",  # ... after the request was carried out
    "reset body",  # ... after `num_bytes` of the answer's body
    "cut body",  # the connection is closed there, without an error
    "stall",  # nothing is passed on for `seconds`, then the connection breaks
    "stall body",  # the same after `num_bytes` of the answer's body
    "flip a byte",  # of the answer's body
    "flip a sent byte",  # of the request's body; no checksum of the client is passed on
    "short answer",  # the answer's body ends after `num_bytes`, and its headers agree
]
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong, for which requests, and how many times more."""

    kind: Kind
    times: int = 1_000_000
    method: str = ".*"
    path: str = ""  # searched in path and query
    status: int = 503
    code: str = "SlowDown"
    message: str = "so it is"
    num_bytes: int = 0
    seconds: float = 60.0


@dataclass(slots=True)
class FaultProxy:
    """What the proxy has to do, and what it has seen."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list[Fault])
    ignored_headers: set[str] = field(default_factory=set[str])  # in small letters; never passed on
    refused_headers: set[str] = field(default_factory=set[str])  # answered 501
    requests: list[str] = field(default_factory=list[str])  # "PUT /bucket/key?query"
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: Kind, **how: Any) -> None:
        """Add a fault; earlier ones go first."""
        self.faults.append(Fault(kind=kind, **how))

    def heal(self) -> None:
        """Forget all faults and all requests."""
        self.faults.clear()
        self.requests.clear()

    def count(self, pattern: str) -> int:
        """How many requests there were of this kind."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that strikes this request."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(upstream_port: int, *, key: str, secret: str) -> Iterator[FaultProxy]:
    """A proxy in front of a server on this machine, whose clients sign with these credentials."""

    class Handler(_Handler):
        upstream = upstream_port
        credentials = Credentials(key, secret)

    server = _Server(("127.0.0.1", 0), Handler)
    Handler.proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Handler.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a stalled answer may sleep on
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this is for."""
        del request, client_address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    upstream: int
    credentials: Credentials

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.take(self.command, self.path)
        kind = fault.kind if fault else ""
        if fault and kind in ("answer", "reset", "stall"):
            self._refuse(fault)
            return
        if self.proxy.refused_headers & {name.lower() for name in self.headers}:
            self._error(501, "NotImplemented", "a header you provided implies functionality that is not implemented")
            return
        status, headers, answer = self._forward(self._flipped(body) if kind == "flip a sent byte" else body, kind)
        if kind == "lose answer":
            self._reset()
            return
        if fault and kind == "short answer":
            answer = answer[: fault.num_bytes]
            headers["Content-Length"] = str(len(answer))
        self._answer(status, headers, self._flipped(answer) if kind == "flip a byte" else answer, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _refuse(self, fault: Fault) -> None:
        if fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault.kind == "answer":
            self._error(fault.status, fault.code, fault.message)
        else:
            self._reset()

    def _error(self, status: int, code: str, message: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._answer(status, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text, None)

    def _forward(self, body: bytes, kind: str) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
        dropped = self.proxy.ignored_headers | ({"content-md5"} if kind == "flip a sent byte" else set())
        if dropped & {name.lower() for name in headers}:
            headers = self._sign({name: value for name, value in headers.items() if name.lower() not in dropped}, body)
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            answer = response.read()
            kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS}
            if self.command != "HEAD":
                kept["Content-Length"] = str(len(answer))
            return response.status, kept, answer
        finally:
            connection.close()

    def _sign(self, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
        kept = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = f"http://{self.headers['Host']}{self.path}"
        request = AWSRequest(method=self.command, url=url, headers=kept, data=body)
        S3SigV4Auth(self.credentials, "s3", "us-east-1").add_auth(request)
        return dict(request.headers.items())

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault | None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.kind not in ("reset body", "cut body", "stall body"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.num_bytes])
        self.wfile.flush()
        if fault.kind == "stall body":
            time.sleep(fault.seconds)
        if fault.kind == "cut body":
            self.close_connection = True
        else:
            time.sleep(0.02)  # or the reset would overtake what was sent
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # `close` alone would wait for the files made of it
        self.close_connection = True

    def _flipped(self, body: bytes) -> bytes:
        if not body:
            return body
        changed = bytearray(body)
        changed[self.proxy.dice.randrange(len(body))] ^= 0xFF
        return bytes(changed)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args
