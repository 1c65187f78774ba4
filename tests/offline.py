"""A network that ends at this machine: what would leave it fails before a packet is sent."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Network:
    """What was asked of the network: names that were resolved, addresses that were connected to."""

    names: dict[str, Sequence[str]]
    resolved: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)


def only_loopback(monkeypatch: pytest.MonkeyPatch, names: Mapping[str, Sequence[str]]) -> Network:
    """Resolve `names` and numeric addresses alone, without asking anybody; connect to no other."""
    network = Network(dict(names))
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def resolved(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        host = host.decode() if isinstance(host, bytes) else host
        network.resolved.append(host)
        found = []
        for address in network.names.get(host, [host]):
            found += resolve(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return found

    def connected(self: socket.socket, address: Any) -> None:
        network.connected.append(address[0])
        assert address[0].startswith("127.") or address[0] == "::1", address
        connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket.socket, "connect", connected)
    return network
