"""The images, built without a daemon and used: buildah, its base made by debootstrap.

What the machine's package indexes are is known to its own apt and pip: debootstrap takes the mirror
from apt's lists, and the wheels come through this machine's pip.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgepipe

#: What the official small image does not have either.
_LEFT_OUT = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists",
)  # fmt: skip
_BASE = "edgepipe-base:test"
_ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot"}


class Engine:
    """buildah with a store of its own under ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.options = ["--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def __call__(self, *words: str | Path) -> str:
        return output(["buildah", *self.options, *map(str, words)])

    def use(self, image: str, folder: Path, script: str) -> str:
        """What a shell prints in a new container of ``image``, ``folder`` mounted at /mnt."""
        # buildah's own limit of 1024 open files is too low for zig, which starts many processes.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = ["--ulimit", f"nofile={files}:{files}"]
        container = self("from", "--pull-never", *limit, image).strip()
        try:
            mounted = ["--volume", f"{folder}:/mnt:ro"]
            return self("run", *mounted, container, "--", "sh", "-euc", script)
        finally:
            self("rm", container)


def output(words: list[str], **environment: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False,
                          env=_ENVIRONMENT | environment)  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def mirror() -> str:
    """Where apt gets Debian from."""
    lines = output(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
    return lines.split()[0]


def import_base(engine: Engine, folder: Path) -> None:
    """A Debian as small as its official image."""
    root = folder / "base"
    output(["debootstrap", "--variant=minbase", "bookworm", str(root), mirror()])
    for name in _LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
    container = engine("from", "scratch").strip()
    engine("add", "--quiet", container, root, "/")
    engine("commit", "--quiet", "--rm", container, _BASE)
    shutil.rmtree(root)


def download(repository: Path, wheels: Path) -> None:
    """The wheels of all images, through this machine's pip."""
    output([
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:",
        "-d", str(wheels), "-c", str(repository / "constraints.txt"),
        "-r", str(repository / "docker/cross.txt"), "pip==26.3", "hatchling",
        f"{repository}[wasmtime]",
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs_buildah
def test_images_are_built_and_compile(repository: Path, tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    download(repository, tmp_path / "wheels")
    import_base(engine, tmp_path)
    built = output(
        [str(repository / "docker/build"), "--engine", "buildah", "--tag", "test",
         "--base", _BASE, "--wheels", str(tmp_path / "wheels"), "edgepipe", "cross"],
        EDGEPIPE_ENGINE_OPTIONS=" ".join(engine.options),
    )  # fmt: skip
    sizes = re.findall(r"^built (\S+):test, ([\d.]+ [MG]B)$", built, re.MULTILINE)
    assert [name for name, _ in sizes] == ["edgepipe", "edgepipe-cross"]
    assert sizes[0][1].endswith(" MB"), sizes
    shutil.rmtree(tmp_path / "wheels")
    given = tmp_path / "given"
    given.mkdir()
    edgepipe.compile("digits", target="raspberry-pi-4", output=given / "pi")
    compile_web = (
        "cd /work; edgepipe compile digits --target wasm-simd --quiet -o web; "
        "sha256sum web/model.wasm; edgepipe validate web --data digits --max-top1-drop 0 "
    )
    small = engine.use("edgepipe:test", given, f"id -u; {compile_web} --runner wasmtime")
    cross = engine.use(
        "edgepipe-cross:test", given,
        f"id -u; {compile_web} --runner node; edgepipe validate /mnt/pi --runner qemu",
    )  # fmt: skip
    here = edgepipe.compile("digits", target="wasm-simd", output=tmp_path / "web")
    for printed in (small, cross):
        user, digest, *_ = printed.split()
        assert user == "1000"
        assert digest == here.manifest["files"]["model.wasm"]["sha256"]
        assert printed.rstrip().endswith("ok")
    wrong = engine.use(
        "edgepipe:test", given, "edgepipe validate /mnt/pi 2>&1 || echo code $?"
    )  # the control: no emulator in the small one
    assert "nothing here can run bundles for raspberry-pi-4" in wrong and "code 2" in wrong
    for image in ("edgepipe:test", "edgepipe-cross:test"):
        assert '"Healthcheck"' in engine("inspect", "--type", "image", image)
    shutil.rmtree(tmp_path / "store")


def test_the_script_tells_what_it_wants(repository: Path) -> None:
    script = str(repository / "docker/build")
    for arguments, message in [
        (["--engine", "buildah", "phone"], "no image 'phone'"),
        (["--engine", "rkt", "edgepipe"], "no engine 'rkt'"),
        (["jetson"], "jetson wants --l4t"),
        (["--l4t", "l4t-base:r32.7.1", "jetson"], "jetson wants --bundle"),
        (["--nothing"], "unknown option --nothing"),
        (["--wheels"], "--wheels wants a value"),
    ]:
        done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and message in done.stderr


ANSWERS = """#!/bin/sh
case "$*" in
info*) echo "$RUNTIMES" ;;
"image inspect edgepipe-jetson:latest") ;;
run*) echo "$*" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("runtimes", "arguments", "code", "message"),
    [
        ("io.containerd.runc.v2 nvidia runc ", ["--runs", "7"], 0,
         "run --rm --runtime nvidia edgepipe-jetson:latest --runs 7"),
        ("runc ", [], 2, "no runtime 'nvidia'"),
        ("nvidia ", ["--tag", "other"], 2, "no image edgepipe-jetson:other"),
        (None, [], 2, "no docker that answers"),
    ],
)  # fmt: skip
def test_the_script_for_the_board_runs_the_image_or_says_what_is_missing(
    repository: Path, tmp_path: Path, runtimes: str | None, arguments: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    docker = tmp_path / "docker"
    docker.write_text(ANSWERS if runtimes else "#!/bin/sh\nexit 1\n", encoding="utf-8")
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(repository / "docker/run-jetson"), *arguments], capture_output=True, text=True,
        env=environment | {"RUNTIMES": runtimes or ""}, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert message in (done.stderr if code else done.stdout)
