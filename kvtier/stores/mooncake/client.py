"""Joins a pool: makes Mooncake's own client, after a look at whether the master can be reached at all."""

from __future__ import annotations

import os
import socket
from typing import Any

from kvtier.errors import StoreUnavailableError, describe
from kvtier.stores.mooncake.options import MooncakeOptions


def own_address(options: MooncakeOptions) -> str:
    """Return the address at which other hosts reach this one.

    Raises:
        StoreUnavailableError: the master does not accept a connection.
    """
    # Mooncake tries for 90 seconds to reach a master that is not there.
    try:
        with socket.create_connection(options.master_address, options.connect_timeout) as connection:
            return options.host or str(connection.getsockname()[0])
    except OSError as error:
        raise StoreUnavailableError(f"mooncake_master at {options.master}: {describe(error)}") from error


def join(options: MooncakeOptions, lent_bytes: int = 0) -> Any:
    """Return a `MooncakeDistributedStore` of the pool.

    Args:
        lent_bytes: memory that this process lends to the pool until it ends or closes the client.

    Raises:
        StoreUnavailableError: the master does not accept a connection, or Mooncake cannot be loaded, or refuses.
    """
    host = own_address(options)
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # else it prints some twenty lines for every engine
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:  # its library needs others of the system
        raise StoreUnavailableError(f"Mooncake cannot be loaded: {error}") from error
    client = MooncakeDistributedStore()
    refusal = client.setup(
        host, options.metadata, lent_bytes, 0, options.protocol.value, options.devices, options.master
    )
    if refusal:
        raise StoreUnavailableError(f"Mooncake does not join the pool of {options.master}: error {refusal}")
    return client
