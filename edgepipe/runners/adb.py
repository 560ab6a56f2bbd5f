"""Runs native bundles on an Android phone through adb: ``adb``, ``adb:SERIAL``.

Options: ``dir`` (folder on the phone, /data/local/tmp), ``run`` (put before the program),
``timeout``, ``retries``.
"""

from __future__ import annotations

from edgepipe.runners._base import Address
from edgepipe.runners._remote import Board


def at(address: Address) -> Board:
    """The phone that ``address`` names, without a serial number the only one attached.

    Raises UserError.
    """
    address.check("adb", ("dir", "run", "retries"))
    serial = ("-s", address.where) if address.where else ()
    # exec-out neither changes line ends nor mixes the streams, but loses the exit code; shell -T
    # with protocol v2 (Android 7 and later) keeps all three.
    name = f"adb:{address.where}" if address.where else "adb"
    options = address.options
    return Board(name, ("adb", *serial, "shell", "-T"), "adb",
                 options.get("dir", "/data/local/tmp"), options.get("run", ""),
                 address.timeout_s, address.retries)  # fmt: skip
