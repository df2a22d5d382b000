"""Real processes of a test's own Ray: find them, kill them."""

import os
import signal
import time
from pathlib import Path


def descendants(root: int) -> set[int]:
    """Process ids below `root`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def actors(name: str, *, root: int | None = None) -> list[int]:
    """Process ids of Ray actors whose class is `name`, below this process (or `root`)."""
    matching: list[int] = []
    for pid in descendants(os.getpid() if root is None else root):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        if title.startswith(f"ray::{name}"):
            matching.append(pid)
    return sorted(matching)


def kill_one(name: str, *, root: int | None = None, within_seconds: float = 60.0) -> int:
    """SIGKILL the first such actor that shows up; -> its pid."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        for pid in actors(name, root=root):
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.02)
    raise TimeoutError(f"no {name} process within {within_seconds} s")
