"""Real shared file systems on this machine: one export, mounted twice, with nothing between the two but a server.

Everything lives in one folder and ends with it. Knows nothing of caches.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
TOOLS = "/usr/sbin:/usr/local/sbin:/sbin"


class NotHere(Exception):
    """This cannot be run here, and why."""


@dataclass(frozen=True)
class Shared:
    """One export as two clients see it.

    Args:
        name: of the file system, as the table has it.
        a: where the first client mounted it.
        b: where the second did.
        export: where the server has it.
        links: whether hard links can be made through the mounts.
        stale_s: for how long a client may answer from what it remembers.
        version: of the software.
    """

    name: str
    a: Path
    b: Path
    export: Path
    links: bool
    stale_s: float
    version: str


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tool(name: str) -> str | None:
    """Return the path of a program, also where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{TOOLS}")


def install(needed: dict[str, str]) -> None:
    """Install the packages of the programs that are missing, by apt; `NotHere` if that cannot be."""
    packages = sorted({package for program, package in needed.items() if tool(program) is None})
    if not packages:
        return
    if tool("apt-get") is None:
        raise NotHere(f"{' and '.join(packages)} not installed, and there is no apt-get")
    say(f"installing {', '.join(packages)}")
    variables = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # which starts no service
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    missing = [program for program in needed if tool(program) is None]
    if done.returncode or missing:
        raise NotHere(f"apt-get could not install {', '.join(packages)}")


def run(*command: str | Path) -> str:
    """Run a command and return what it says; `NotHere` if it fails."""
    path = f"{os.environ.get('PATH', '')}:{TOOLS}"
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise NotHere(f"{Path(command[0]).name} failed: {' '.join(done.stdout.split())[:200]}")
    return done.stdout


def wait_for(what: Callable[[], bool], said: str, seconds: float = 20.0) -> None:
    """Wait until something is so; `NotHere` if it does not become so."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise NotHere(said)
        time.sleep(0.1)


@contextlib.contextmanager
def server(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in the foreground of a session of its own, and end it with all that it started there."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def unmount(place: Path) -> None:
    """Unmount, now or as soon as nobody is in it any more."""
    for command in (["umount", place], ["umount", "--lazy", place]):
        if not os.path.ismount(place) or subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def hard_links(place: Path) -> bool:
    """Whether a file of a file system can be given a second name."""
    one, two = place / "one", place / "two"
    one.touch()
    try:
        os.link(one, two)
        return True
    except OSError:
        return False
    finally:
        one.unlink()
        two.unlink(missing_ok=True)


# --- sshfs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sshd:
    """A private ssh server on this machine, that knows one key."""

    port: int
    folder: Path


@contextlib.contextmanager
def sshd(work: Path) -> Iterator[Sshd]:
    """Run an ssh server on a loopback port, with keys and a configuration that are thrown away."""
    install({"sshfs": "sshfs", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"})
    subsystem = next(filter(os.path.exists, SFTP_SERVERS), None)
    program = tool("sshd")
    if subsystem is None or program is None:
        raise NotHere("openssh has no sftp-server")
    folder = work / "sshd"
    folder.mkdir(mode=0o700, parents=True)
    for name in ("host", "client"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd refuses to start without
    port = free_port()
    lines = (
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", "PidFile none",
        f"AuthorizedKeysFile {folder}/client.pub", "PermitRootLogin prohibit-password", "PasswordAuthentication no",
        "KbdInteractiveAuthentication no", "UsePAM no", "StrictModes no", f"Subsystem sftp {subsystem}",
    )  # fmt: skip
    (folder / "config").write_text("\n".join(lines) + "\n")
    public = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public[0]} {public[1]}\n")
    with server([program, "-D", "-e", "-f", folder / "config"], folder / "log"):
        wait_for(lambda: answers("127.0.0.1", port), f"sshd did not start: {(folder / 'log').read_text()[:200]}")
        yield Sshd(port, folder)


@contextlib.contextmanager
def sshfs(work: Path, there: Sshd, name: str, options: str = "", stale_s: float = 20.0) -> Iterator[Shared]:
    """Mount one export twice by sshfs; each mount is a process with an ssh connection and a cache of its own."""
    folder = work / name.replace(" ", "-").replace(",", "")
    export, a, b = folder / "export", folder / "a", folder / "b"
    for place in (export, a, b):
        place.mkdir(mode=0o700, parents=True)
    command = f"ssh -F none -i {there.folder}/client -o UserKnownHostsFile={there.folder}/known -o BatchMode=yes"
    every = ["-p", str(there.port), "-o", f"ssh_command={command}", *(["-o", options] if options else [])]
    try:
        for place in (a, b):
            run("sshfs", f"root@127.0.0.1:{export}", place, *every)
        found = re.search(r"SSHFS version (\S+)", run("sshfs", "--version"))
        versions = f"sshfs {found[1] if found else 'unknown'}, {run('ssh', '-V').split(',')[0]}"
        yield Shared(name, a, b, export, hard_links(a), stale_s, versions)
    finally:
        for place in (a, b):
            unmount(place)


# --- GlusterFS --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def glusterfs(work: Path) -> Iterator[Shared]:
    """Mount one volume of one brick twice by GlusterFS's own client, with what the volume has by default."""
    install({"glusterd": "glusterfs-server", "glusterfs": "glusterfs-client", "gluster": "glusterfs-client"})
    folder = work / "glusterfs"
    brick, a, b, state, running = (folder / name for name in ("brick", "a", "b", "state", "run"))
    for place in (brick, a, b, state, running):
        place.mkdir(mode=0o700, parents=True)
    # not 127.0.0.1, which it refuses as a server's address; the port is fixed, since bricks ask there
    address = f"127.77.{secrets.randbelow(250)}.{1 + secrets.randbelow(250)}"
    socket_file, log = folder / "socket", folder / "log"
    options = {
        "working-directory": state, "run-directory": running, "glusterd-sockfile": socket_file,
        "transport-type": "socket", "transport.socket.bind-address": address, "transport.socket.listen-port": 24007,
    }  # fmt: skip
    text = "".join(f"    option {name} {value}\n" for name, value in options.items())
    (folder / "glusterd.vol").write_text(f"volume management\n    type mgmt/glusterd\n{text}end-volume\n")
    gluster = ("gluster", "--mode=script", f"--glusterd-sock={socket_file}", f"--log-file={folder}/cli.log")
    program = tool("glusterd")
    assert program is not None
    daemon = [program, "--no-daemon", f"--volfile={folder}/glusterd.vol", f"--log-file={log}"]
    with server([*daemon, f"--pid-file={folder}/pid"], folder / "said"):
        wait_for(lambda: answers(address, 24007) and socket_file.exists(), "glusterd did not start")
        try:
            run(*gluster, "volume", "create", "shared", f"{address}:{brick}/data", "force")
            run(*gluster, "volume", "start", "shared")
            mount = ("glusterfs", f"--volfile-server={address}", "--volfile-id=shared")
            for place in (a, b):
                run(*mount, f"--log-file={place}.log", place)
                wait_for(lambda place=place: os.path.ismount(place), f"{place.name} was not mounted")  # type: ignore[misc]
                place.chmod(0o700)
            version = run("glusterfs", "--version").split()[1]
            yield Shared("glusterfs", a, b, brick / "data", hard_links(a), 2.0, f"GlusterFS {version}")
        finally:
            for place in (a, b):
                unmount(place)
            with contextlib.suppress(NotHere, subprocess.TimeoutExpired):
                run(*gluster, "volume", "stop", "shared", "force")
            _end_bricks(running)
            written_elsewhere = str(brick / "data").strip("/").replace("/", "-")
            for left in Path("/var/log/glusterfs/bricks").glob(f"{written_elsewhere}.log*"):
                left.unlink()


def _end_bricks(running: Path) -> None:
    """End what glusterd started and did not stop, by the process numbers that it wrote down."""
    for file in running.rglob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)
