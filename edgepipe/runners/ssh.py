"""Runs native bundles on a board through OpenSSH: ``ssh:pi``, ``ssh:user@host``.

The user's own ssh configuration counts: names, ports, keys, jump hosts. Options: ``dir`` (folder
on the board, /tmp), ``run`` (put before the program: ``run=taskset -c 3``), ``config`` (another
configuration file), ``timeout``. Nothing is ever asked: a key must be there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe.errors import UserError
from edgepipe.runners._base import Address, Availability, Timing
from edgepipe.runners._remote import Shell
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle


@dataclass(frozen=True)
class Board:
    """One board. Without a host it can be told of, but not be run on."""

    NAME: str
    host: str
    shell: Shell

    def available(self, target: Target) -> Availability:
        """Whether ssh is installed and a host was named; whether it answers shows at the run."""
        if target.kind != "cpu":
            return Availability(False, f"it runs native bundles, not {target.kind}")
        if shutil.which("ssh") is None:
            return Availability(False, "ssh is not installed", "apt-get install openssh-client")
        if not self.host:
            return Availability(False, "no board was named", "--runner ssh:HOST")
        return Availability(True, f"ssh {self.host}")

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Execute samples on the board."""
        return self.shell.run_many(bundle, samples)

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing:
        """Time inferences on the board."""
        return self.shell.bench(bundle, runs, warmup)


def at(address: Address) -> Board:
    """The board that ``address`` names. Raises UserError."""
    address.check("ssh", ("dir", "run", "config"))
    if address.where.startswith("-"):
        raise UserError(f"'{address.where}' is no host", where="--runner", fix="--runner ssh:HOST")
    connect_s = max(1, round(min(address.timeout_s, 15)))
    config = ("-F", address.options["config"]) if "config" in address.options else ()
    words = (
        "ssh", *config, "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect_s}",
        "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "--", address.where,
    )  # fmt: skip
    options = address.options
    shell = Shell(f"ssh:{address.where}", words, options.get("dir", "/tmp"), options.get("run", ""),
                  address.timeout_s)  # fmt: skip
    return Board(f"ssh:{address.where}", address.where, shell)
