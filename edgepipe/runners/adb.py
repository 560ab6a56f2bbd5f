"""Runs native bundles on an Android phone through adb: ``adb``, ``adb:SERIAL``.

Options: ``dir`` (folder on the phone, /data/local/tmp), ``run`` (put before the program),
``timeout``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe.runners._base import Address, Availability, Timing
from edgepipe.runners._remote import Shell
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle


@dataclass(frozen=True)
class Phone:
    """One phone; without a serial number the only one that is attached."""

    NAME: str
    shell: Shell

    def available(self, target: Target) -> Availability:
        """Whether adb is installed; whether a phone answers shows at the run."""
        if target.kind != "cpu":
            return Availability(False, f"it runs native bundles, not {target.kind}")
        if shutil.which("adb") is None:
            return Availability(False, "adb is not installed", "apt-get install adb")
        return Availability(True, "adb")

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Execute samples on the phone."""
        return self.shell.run_many(bundle, samples)

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing:
        """Time inferences on the phone."""
        return self.shell.bench(bundle, runs, warmup)


def at(address: Address) -> Phone:
    """The phone that ``address`` names. Raises UserError."""
    address.check("adb", ("dir", "run"))
    serial = ("-s", address.where) if address.where else ()
    # exec-out neither changes line ends nor mixes the streams, but loses the exit code; shell -T
    # with protocol v2 (Android 7 and later) keeps all three.
    name = f"adb:{address.where}" if address.where else "adb"
    shell = Shell(name, ("adb", *serial, "shell", "-T"),
                  address.options.get("dir", "/data/local/tmp"), address.options.get("run", ""),
                  address.timeout_s)  # fmt: skip
    return Phone(name, shell)
