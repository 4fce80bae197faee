"""Object stores on this machine, over HTTP: S3 as moto plays it, and Azure as Azurite does.

Knows nothing of mounts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from shared_mount.checks import Failed, require
from shared_mount.mounts import NotHere, answers, free_port, say, server, tool, wait_for
from shared_mount.users import User

BUCKET = "buckets"
# Azurite's own, as its documentation has them.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
WRONG_KEY = "A" * 86 + "=="


@dataclass(frozen=True)
class Service:
    """A running store: the place in it, what a client needs to know, and what makes that wrong."""

    place: str
    nowhere: str
    environment: Mapping[str, str]
    refused: Mapping[str, str] | None
    version: str


@contextlib.contextmanager
def moto(work: Path) -> Iterator[Service]:
    """Run moto's S3, which believes any credentials."""
    try:
        import boto3
        import moto as package
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed: pip install 'nanogpt-buckets[test]'") from error
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
        known = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
        version = f"moto {package.__version__}"
        yield Service(
            f"s3://{BUCKET}/team", "s3://nowhere-at-all/x", known | {"AWS_REGION": "us-east-1"}, None, version
        )
    finally:
        running.stop()


@contextlib.contextmanager
def azurite(work: Path) -> Iterator[Service]:
    """Install Azurite with npm and run its blob service."""
    npm = tool("npm")
    if npm is None:
        raise NotHere("npm is not installed")
    folder = work / "azurite"
    folder.mkdir()
    say("installing azurite")
    done = subprocess.run([npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "azurite"],
                          stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=600)  # fmt: skip
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    if done.returncode or not program.exists():
        raise NotHere("npm could not install azurite")
    port = free_port()
    options = ["--silent", "--skipApiVersionCheck", "--location", folder, "--blobPort", str(port)]
    with server([program, *options], folder / "log"):
        wait_for(lambda: answers("127.0.0.1", port), "azurite did not start")
        known = {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}", "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        }  # fmt: skip
        _make_container(known)
        version = subprocess.run([str(program), "--version"], capture_output=True, text=True).stdout.strip()
        place = f"az://{BUCKET}/team"
        wrong = known | {"AZURE_STORAGE_ACCOUNT_KEY": WRONG_KEY}
        yield Service(place, "az://nowhere/x", known, wrong, f"Azurite {version}")
    shutil.rmtree(folder, ignore_errors=True)


def _make_container(known: Mapping[str, str]) -> None:
    """Make the container by the service's own protocol: a signed request, by the library of its key."""
    import base64
    import hashlib
    import hmac
    import urllib.request
    from email.utils import formatdate

    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06", "Content-Length": "0"}
    signed = "PUT\n\n\n\n\n\n\n\n\n\n\n\n" + "".join(f"{n}:{headers[n]}\n" for n in ("x-ms-date", "x-ms-version"))
    signed += f"/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    made = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(made).decode()}"
    url = f"{known['AZURE_ENDPOINT']}/{BUCKET}?restype=container"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=10)
    except OSError as error:
        raise NotHere(f"the container could not be made: {error}") from error


# --- the checks -------------------------------------------------------------------------------------------------------


def check(
    name: str, start: Callable[[Path], AbstractContextManager[Service]], work: Path, report: Callable[..., None]
) -> None:
    """Run every check on one service and report each."""
    with start(work) as service:
        say(f"{name}: {service.version}")
        report(name, "started", "pass", service.version)
        for title, one in {
            "push and pull": _push_and_pull, "first stays": _first_stays, "no such bucket": _no_bucket,
            "wrong credentials": _refused,
        }.items():  # fmt: skip
            try:
                found = one(service, work / name.replace(" ", "-") / title.replace(" ", "-"))
                result = "not run" if found.startswith("it believes") else "pass"
            except Exception as error:
                found, result = f"{type(error).__name__}: {error}", "FAIL"
            say(f"{name}: {title}: {result}: {found}")
            report(name, title, result, found)


def _user(service: Service, work: Path, name: str, lock: str = "", known: Mapping[str, str] | None = None) -> User:
    home = work / name
    home.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in os.environ.items() if key.startswith("NO_PROXY")}
    return User(home, home / "cache", lock, {**plain, **(known or service.environment)})


def _push_and_pull(service: Service, work: Path) -> str:
    """What one machine pushes another pulls, by the lock file alone; pushed again nothing moves."""
    lock = work / "buckets.lock"
    entries = [1, 2, 3]
    with _user(service, work, "ci") as ci:
        ci.ask("publish_on", builder="ann", first=1, last=4)
        ci.ask("write_lock", builder="ann", entries=entries, path=str(lock))
        first, again = (ci.ask("push", builder="ann", entries=entries, place=service.place) for _ in range(2))
    require(first.get("states") == ["copied"] * 3, f"{first}")
    require(again.get("states") == ["there"] * 3, f"{again}")
    with _user(service, work, "node", str(lock)) as node:
        pulled = node.ask("pull", place=service.place)
        require(pulled.get("states") == ["copied"] * 3, f"{pulled}")
        found = node.ask("look", entries=entries)["answers"]
    require([each["word"] for each in found] == ["verified"] * 3, f"{found}")
    with _user(service, work, "stranger") as stranger:
        refused = stranger.ask("pull", place=service.place)
    require(refused.get("error") == "UntrustedStore", f"without a lock file: {refused}")
    return "3 copied, then 3 there; 3 pulled and verified; without a lock file refused"


def _first_stays(service: Service, work: Path) -> str:
    """Two builders push other builds of the same keys at once: of each key one stays, whole, and is told."""
    place, entries = f"{service.place}-raced", list(range(1, 9))
    with _user(service, work, "ann") as ann, _user(service, work, "bob") as bob:
        for name, user in (("ann", ann), ("bob", bob)):
            user.ask("publish_on", builder=name, first=1, last=9)
            user.say("push", builder=name, entries=entries, place=place)
        states = {name: user.hear() for name, user in (("ann", ann), ("bob", bob))}
        require(all("states" in told for told in states.values()), f"{states}")
        whole = 0
        for name, user in (("ann", ann), ("bob", bob)):
            mine = [e for e, state in zip(entries, states[name]["states"], strict=True) if state == "copied"]
            if not mine:
                continue
            lock = work / f"{name}.lock"
            user.ask("write_lock", builder=name, entries=mine, path=str(lock))
            with _user(service, work, f"node-{name}", str(lock)) as node:
                pulled = node.ask("pull", place=place)
                require("states" in pulled, f"what {name} was told is there cannot be pulled: {pulled}")
                whole += len(pulled["states"])
    require(whole == len(entries), f"{whole} of {len(entries)} keys are whole")
    won = {name: told["states"].count("copied") for name, told in states.items()}
    return f"8 keys raced for: {won['ann']} of ann, {won['bob']} of bob, each whole"


def _no_bucket(service: Service, work: Path) -> str:
    with _user(service, work, "ci") as ci:
        ci.ask("publish_on", builder="ann", first=1, last=2)
        said = ci.ask("push", builder="ann", entries=[1], place=service.nowhere)
    require("there is no such bucket" in said.get("why", ""), f"{said}")
    return str(said["why"])


def _refused(service: Service, work: Path) -> str:
    if service.refused is None:
        return "it believes any credentials"
    with _user(service, work, "ci", known=service.refused) as ci:
        ci.ask("publish_on", builder="ann", first=1, last=2)
        said = ci.ask("push", builder="ann", entries=[1], place=service.place)
    if "credentials are refused" not in said.get("why", ""):
        raise Failed(f"{said}")
    return str(said["why"])
