"""Boards through a real ssh server on the loopback, phones through a stand-in for adb."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import handmade
import numpy as np
import pytest

from edgepipe import runners
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import qemu
from edgepipe.target import Target

Made = Callable[[str], Bundle]
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
Y = handmade.NAMES[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ssh_config, whose host `board` is a server of our own with keys of its own."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name],
                       check=True)  # fmt: skip
    shutil.copy(folder / "user.pub", folder / "authorized")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it locks itself in before a login
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin yes\nMaxStartups 50\n"
    )
    client = (
        f"Host board\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user\n"
        f" IdentitiesOnly yes\n IdentityAgent none\n UserKnownHostsFile {folder}/known\n"
        " StrictHostKeyChecking accept-new\n"
    )
    (folder / "ssh_config").write_text(client)
    (folder / "keyless").write_text(client.replace(f"{folder}/user", f"{folder}/none"))
    (folder / "gone").write_text(client.replace(f"Port {port}", "Port 1"))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as client_socket:
                if client_socket.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "log").read_text()
        yield folder
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """The folder on the board; a test leaves nothing in it."""
    folder = tmp_path / "board dir"
    folder.mkdir()
    return folder


def spec(server: Path, remote: Path, config: str = "ssh_config", run: str = "") -> str:
    target = Target.load("raspberry-pi-4")
    launcher = run or " ".join(qemu.command(target))
    return f"ssh:board,config={server}/{config},dir={remote},timeout=20,run={launcher}"


@pytest.mark.slow
@pytest.mark.needs_sshd
@pytest.mark.needs_qemu
def test_samples_and_times_of_a_board(made: Made, server: Path, remote: Path) -> None:
    bundle, runner = made("raspberry-pi-4"), spec(server, remote)
    random = np.random.default_rng(1)
    x = random.standard_normal((3, handmade.COUNT)).astype(np.float32)
    inputs = {handmade.NAMES[0]: x, handmade.NAMES[1]: np.array(5)}
    got = bundle.run(inputs, runner)
    exact = handmade.expected(inputs)[Y]
    assert np.allclose(got[Y], exact, rtol=1e-6, atol=1e-6)
    assert not np.allclose(got[Y][::-1], exact, atol=1e-2)
    timing = runners.get(runner).bench(bundle, 10, 2)
    assert timing.emulated and timing.runs == 10 and len(timing.round_p50_ms) == 5
    assert timing.runner == "ssh:board" and timing.board == {}
    report = bundle.bench(runner=runner, runs=10)
    assert "say nothing of the device" in str(report)
    assert list(remote.iterdir()) == []


#: The program's shell is the child of the server's process for this connection.
BREAK = "kill -9 $(cut -d' ' -f4 /proc/$PPID/stat)"


def script(folder: Path, text: str) -> str:
    (folder / "launch").write_text(text)
    return f"sh {folder}/launch"


@pytest.mark.slow
@pytest.mark.needs_sshd
@pytest.mark.parametrize(
    ("config", "launch", "error", "message"),
    [
        ("ssh_config", BREAK, UserError, r"connection broke \(3 attempts\)"),
        ("ssh_config", "exit 7", EdgepipeError, r"failed \(7\)"),
        ("ssh_config", "kill -ILL $$", EdgepipeError, r"failed \(132\)"),
        ("keyless", "exit 1", UserError, "the connection broke: .*Permission denied"),  # not again
        ("gone", "exit 1", UserError, r"\(3 attempts\).*Connection refused"),
    ],
)
def test_what_goes_wrong_is_told_and_nothing_stays(
    made: Made, server: Path, remote: Path, tmp_path: Path,
    config: str, launch: str, error: type[Exception], message: str,
) -> None:  # fmt: skip
    runner = spec(server, remote, config, script(tmp_path, launch))
    with pytest.raises(error, match=message):
        made("raspberry-pi-4").run(handmade.inputs(), runner)
    assert list(remote.iterdir()) == []


def gone(pid: int) -> bool:
    """Whether a process that was killed has disappeared, which takes until its parent asks."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.needs_sshd
@pytest.mark.needs_qemu
@pytest.mark.parametrize("retries", [0, 1])
def test_a_connection_that_breaks_once_is_tried_again(
    made: Made, server: Path, remote: Path, tmp_path: Path, retries: int
) -> None:
    """The first program outlives its connection; the second try ends it and runs by itself."""
    bundle, inputs = made("raspberry-pi-4"), handmade.inputs()
    emulated = " ".join(qemu.command(bundle.target))
    (tmp_path / "tries").touch()
    launch = script(
        tmp_path,
        f"echo $$ >> {tmp_path}/tries\n"
        f'[ $(wc -l < {tmp_path}/tries) -gt 1 ] && exec {emulated} "$@"\n{BREAK}; sleep 600',
    )
    runner = spec(server, remote, run=launch) + f",retries={retries}"
    if retries:
        got = bundle.run(inputs, runner)
        assert np.allclose(got[Y], handmade.expected(inputs)[Y], rtol=1e-6, atol=1e-6)
    else:
        with pytest.raises(UserError, match="connection broke:"):
            bundle.run(inputs, runner)
    pids = [int(line) for line in (tmp_path / "tries").read_text().split()]
    assert len(pids) == 1 + retries
    assert gone(pids[0])
    assert list(remote.iterdir()) == []


@pytest.mark.slow
@pytest.mark.needs_sshd
def test_a_hanging_program_is_ended(made: Made, server: Path, remote: Path, tmp_path: Path) -> None:
    launch = script(tmp_path, f"echo $$ > {tmp_path}/hung; sleep 600")
    runner = spec(server, remote, run=launch).replace("timeout=20", "timeout=3")
    with pytest.raises(EdgepipeError, match="no sign of life within 3 s"):
        made("raspberry-pi-4").run(handmade.inputs(), runner)
    assert gone(int((tmp_path / "hung").read_text()))
    assert list(remote.iterdir()) == []


@pytest.mark.slow
@pytest.mark.needs_sshd
@pytest.mark.may_skip
def test_a_full_disk_is_told(made: Made, server: Path, remote: Path) -> None:
    options = ["-t", "tmpfs", "-o", "size=32k", "tmpfs"]
    if subprocess.run(["mount", *options, remote], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(UserError, match="the disk of ssh:board is full"):
            made("raspberry-pi-4").run(handmade.inputs(), spec(server, remote))
        assert list(remote.iterdir()) == []
    finally:
        subprocess.run(["umount", remote], check=True)


@pytest.mark.needs_sshd
def test_a_folder_that_is_not_there_is_told(made: Made, server: Path, remote: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        made("raspberry-pi-4").run(handmade.inputs(), spec(server, remote / "none"))


def test_names_that_are_no_boards(made: Made) -> None:
    bundle = made("raspberry-pi-4")
    with pytest.raises(UserError, match="no board was named"):
        bundle.run(handmade.inputs(), "ssh")
    with pytest.raises(UserError, match="is no host"):
        bundle.run(handmade.inputs(), "ssh:-oProxyCommand=x")
    with pytest.raises(UserError, match="no option 'user'"):
        bundle.run(handmade.inputs(), "ssh:pi,user=me")
    with pytest.raises(UserError, match="retries '-1' is no number"):
        bundle.run(handmade.inputs(), "ssh:pi,retries=-1")
    with pytest.raises(UserError, match="it runs native bundles"):
        made("wasm-simd").run(handmade.inputs(), "ssh:pi")


ADB = """#!/bin/sh
if [ -s "$0.offline" ]; then
    sed -i 1d "$0.offline"
    echo "error: device offline" >&2
    exit 1
fi
if [ "$1" = -s ]; then
    [ "$2" = phone ] || { echo "error: device '$2' not found" >&2; exit 1; }
    shift 2
fi
[ "$1 $2" = "shell -T" ] || exit 99
shift 2
exec sh -c "$*"
"""


@pytest.mark.slow
@pytest.mark.needs_qemu
def test_a_phone(made: Made, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adb").write_text(ADB)
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    bundle = made("android-arm64")
    options = f"dir={remote},timeout=20,run={' '.join(qemu.command(bundle.target))}"
    inputs = handmade.inputs()
    for name in ("adb", "adb:phone"):
        got = bundle.run(inputs, f"{name},{options}")
        assert np.allclose(got[Y], handmade.expected(inputs)[Y], rtol=1e-6, atol=1e-6)
        assert runners.get(f"{name},{options}").bench(bundle, 5, 1).emulated
    with pytest.raises(UserError, match="'other' not found"):
        bundle.run(inputs, f"adb:other,{options}")
    offline = tmp_path / "adb.offline"
    offline.write_text("\n" * 1)
    assert np.array_equal(bundle.run(inputs, f"adb,{options}")[Y], got[Y])
    assert not offline.read_text()
    offline.write_text("\n" * 99)
    with pytest.raises(UserError, match=r"broke \(2 attempts\): error: device offline"):
        bundle.run(inputs, f"adb,{options},retries=1")
    assert len(offline.read_text()) > 90  # it gave up
    assert list(remote.iterdir()) == []


def test_what_the_board_tells(made: Made, tmp_path: Path) -> None:
    """Sensors as a Raspberry Pi (temperature) and a Jetson (voltage and current) show them."""
    import json

    files = {
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000",
        "class/thermal/thermal_zone0/temp": "48312",
        "class/thermal/thermal_zone1/temp": "51000",
        "class/hwmon/hwmon2/in1_input": "5000",
        "class/hwmon/hwmon2/curr1_input": "600",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    program = made("host").file("bench")
    words = [program, "--json", "--runs", "9", "--sys"]
    full, empty = (
        json.loads(subprocess.run([*words, f], capture_output=True, check=True).stdout)
        for f in (tmp_path, tmp_path / "nothing")
    )
    assert full["cpu_governor"] == "performance" and empty["cpu_governor"] == ""
    assert full["board"] == {
        "clock_mhz": 1800.0, "temperature_before_c": 51.0, "temperature_c": 51.0, "power_w": 3.0,
    }  # fmt: skip
    assert empty["board"] == {}
    printed = 0.5e-6 * full["per_second"]  # mean_ms has six decimals
    assert abs(full["per_second"] * full["mean_ms"] - 1000) < 1 + printed
    assert len(full["round_p50_ms"]) == 5


def test_a_program_without_input_ends_itself(made: Made) -> None:
    """The watchdog on the board: nobody needs to be there to end it."""
    with subprocess.Popen(
        [made("host").file("bench"), "run", "-", "-", "1", "--limit", "1"], stdin=subprocess.PIPE
    ) as process:
        assert process.wait(timeout=30) == -14
