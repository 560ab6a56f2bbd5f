"""Runs native bundles on a board through OpenSSH: ``ssh:pi``, ``ssh:user@host``.

The user's own ssh configuration counts: names, ports, keys, jump hosts. Options: ``dir`` (folder
on the board, /tmp), ``run`` (put before the program: ``run=taskset -c 3``), ``config`` (another
configuration file), ``timeout``, ``retries``. Nothing is ever asked: a key must be there.
"""

from __future__ import annotations

from edgepipe.errors import UserError
from edgepipe.runners._base import Address
from edgepipe.runners._remote import Board


def at(address: Address) -> Board:
    """The board that ``address`` names; without a host it can be told of, but not be run on.

    Raises UserError.
    """
    address.check("ssh", ("dir", "run", "config", "retries"))
    if address.where.startswith("-"):
        raise UserError(f"'{address.where}' is no host", where="--runner", fix="--runner ssh:HOST")
    connect_s = max(1, round(min(address.timeout_s, 15)))
    config = ("-F", address.options["config"]) if "config" in address.options else ()
    words = (
        "ssh", *config, "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect_s}",
        "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "--", address.where,
    )  # fmt: skip
    options = address.options
    return Board(f"ssh:{address.where}", words, "openssh-client", options.get("dir", "/tmp"),
                 options.get("run", ""), address.timeout_s, address.retries,
                 missing="" if address.where else "--runner ssh:HOST")  # fmt: skip
