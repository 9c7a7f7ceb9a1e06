"""Strategies for files from strangers, and what reading them may do: succeed, or fail with our own errors."""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import strategies as st

from qlora_engine.errors import InputError

SECONDS = 20  # no example takes one; a busy machine may make it a few
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, "", "..", "/etc/passwd", "\ud800", "\x00", "a" * 5000]),
    st.floats(),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*at, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _paths(item, (*at, number))


@st.composite
def mutated(draw: Any, document: Any, *, most: int = 3) -> Any:
    """A JSON document with one to ``most`` of its values replaced, removed, renamed or moved."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(_paths(found))))
        if not path:
            continue
        parent = found
        for step in path[:-1]:
            parent = parent[step]
        how = draw(st.sampled_from(["replace", "replace", "swap", "remove", "rename"]))
        if how == "replace":
            parent[path[-1]] = draw(values)
        elif how == "swap":  # another value of the same document
            other: Any = found
            for step in draw(st.sampled_from(list(_paths(found)))):
                other = other[step]
            parent[path[-1]] = copy.deepcopy(other)
        elif how == "remove" or not isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[draw(st.text(max_size=10))] = parent.pop(path[-1])
    return found


def text_of(value: Any) -> bytes:
    """As JSON, lone surrogates escaped."""
    return json.dumps(value).encode()


@st.composite
def torn(draw: Any, data: bytes) -> bytes:
    """Bytes with some flipped, cut out or doubled."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        length = draw(st.integers(0, 16))
        found[at : at + length] = draw(st.binary(max_size=16))
    return bytes(found)


@contextmanager
def in_time() -> Iterator[None]:
    """Nothing takes long."""

    def late(*_: Any) -> None:
        raise AssertionError(f"takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def only(*errors: type[Exception]) -> Iterator[None]:
    """Nothing leaves but InputError, OSError and ``errors``, and nothing takes long."""
    with in_time(), contextlib.suppress(InputError, OSError, *errors):
        yield


@pytest.fixture
def no_network_no_pickle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Sockets and unpickling raise; gives how often they were tried."""
    import pickle

    import torch

    tried: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            tried.append(name)
            raise AssertionError(name)

        return call

    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse(f"{module.__name__}.{name}"))
    return lambda: len(tried)
