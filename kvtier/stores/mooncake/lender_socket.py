"""The socket of this host's lender: its name, and connections to it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from kvtier.errors import StoreUnavailableError

START_SECONDS = 30.0
"""Longest start of a lender. RDMA pins all of its memory, which takes seconds."""
_CREDENTIALS = struct.Struct("3i")


def lender_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides which memory is lent to which pool; engines that agree on it share a lender.

    Args:
        options: JSON values of `MooncakeOptions`.
    """
    names = ("master", "segment", "protocol", "devices", "host", "metadata", "connect_timeout")
    return {name: value for name, value in options.items() if name in names}


def lender_address(arguments: Mapping[str, Any]) -> bytes:
    """Return the abstract name of the socket of this user's lender with these arguments."""
    told = json.dumps([os.getuid(), arguments], sort_keys=True).encode()
    return b"\0kvtier-lender-" + hashlib.sha256(told).hexdigest()[:32].encode()


def connect(address: bytes) -> socket.socket | None:
    """Return a connection to the lender of that address; None if there is none.

    Raises:
        StoreUnavailableError: it is a process of another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(START_SECONDS)
        connection.connect(address)
        _, user, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
    except OSError:
        connection.close()
        return None
    if user != os.getuid():
        connection.close()
        raise StoreUnavailableError(f"a process of user {user} holds the name of this host's lender")
    return connection


def has_lender(options: Mapping[str, Any]) -> bool:
    """Return whether a lender with these options runs, or starts."""
    try:
        connection = connect(lender_address(lender_arguments(options)))
    except StoreUnavailableError:
        return False
    if connection is None:
        return False
    connection.close()
    return True
