"""The one shape every stage has: from an iterator of messages to an iterator of messages."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from pipeline.messages import Failure

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)


class Stage(Protocol[In, Out]):
    """One kind of work.

    `run` pulls from `inbox` only when it has room to work, so a slow stage slows the one before it. It passes on every
    `Failure` it receives and turns an `InputError` of its own into one. It never drops a stream.
    """

    def run(self, inbox: "Iterable[In | Failure]") -> "Iterator[Out | Failure]": ...
