"""Family 6: an object store behind a proxy that fails: refuses, stalls, cuts off, empties, contradicts and hangs up.

Each request of push, pull and listing is met by each fault, or all requests are. Then the faults end and the same
command succeeds. Nothing was deleted or replaced that was in order, and nothing wrong was loaded.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from chaos.kit import Build, LostEntry, Tally, Task, build, load, never_corrupt, publish, sound, whole
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.store import objects
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Miss, Verified
from nanogpt_buckets.store.lockfile import read_lock, write_lock
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import COPIED, OTHER, THERE, move, require_all
from nanogpt_buckets.store.vouch import Trust

FAULTS = ("503", "403", "timeout", "truncated", "empty", "emptied", "409", "412", "reset", "done, then reset")
MINE, FIRST, SECOND = build("mine"), build("first"), build("mine", 16)
_PATIENCE = datetime.timedelta(seconds=1)
_BODY = b"<Error><Code>%s</Code><Message>as the proxy says</Message></Error>"


class Proxy:
    """A service that hands requests on to another; the `number`-th since `begin`, or all from it on, meet a fault."""

    def __init__(self, target: str) -> None:
        proxy, self.deleted = self, []
        self.fault, self.number, self.for_good, self.count = "", 0, False, 0
        self._alone = threading.Lock()
        address = urlsplit(target)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def _hand_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._due(f"{self.command} {self.path}")
                if fault in ("503", "403", "409", "412"):
                    self._answer(int(fault), {"Content-Type": "application/xml"}, _BODY % _CODES[fault])
                elif fault == "timeout":
                    time.sleep(1.2 * _PATIENCE.total_seconds())
                    self.close_connection = True
                elif fault == "reset":
                    self._hang_up()
                elif fault == "empty":
                    self._answer(200, {}, b"")
                else:
                    self._relay(body, fault)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _hand_on

            def _relay(self, body: bytes, fault: str) -> None:
                upstream = http.client.HTTPConnection(address.hostname or "", address.port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                data, headers = answer.read(), dict(answer.getheaders())
                upstream.close()
                if fault == "done, then reset":
                    self._hang_up()
                elif fault == "truncated":
                    self._answer(answer.status, headers, data, data[: len(data) // 2])
                    self.close_connection = True
                elif fault == "emptied":
                    self._answer(answer.status, headers, b"")
                else:
                    self._answer(answer.status, headers, data)

            def _answer(self, status: int, headers: dict[str, str], data: bytes, sent: bytes | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data if sent is None else sent)

            def _hang_up(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def begin(self, fault: str = "", number: int = 0, for_good: bool = False) -> None:
        """Count requests anew, and let these meet a fault."""
        with self._alone:
            self.fault, self.number, self.for_good, self.count, self.deleted = fault, number, for_good, 0, []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _due(self, request: str) -> str:
        with self._alone:
            self.count += 1
            due = self.count == self.number or (self.for_good and self.count > self.number)
            if request.startswith("DELETE") and not (due and self.fault != "done, then reset"):
                self.deleted.append(request)
            return self.fault if due else ""


_CODES = {
    "503": b"SlowDown", "403": b"AccessDenied", "409": b"ConditionalRequestConflict", "412": b"PreconditionFailed"
}  # fmt: skip


class Scene:
    """A bucket that is emptied before each fault, with a proxy before it, and what two machines have at hand."""

    def __init__(self, task: Task, proxy: Proxy, direct: str) -> None:
        self.task, self.proxy = task, proxy
        self.there, self.target = _reached(direct), Store(task.where / "pulled")
        self.behind = _reached(proxy.url)
        self.own = Store(task.room("own"))
        publish(self.own, MINE, SECOND)
        write_lock(task.where / "buckets.lock", [MINE.manifest, SECOND.manifest], lambda parts: False)
        self.locked = Trust(read_lock(task.where / "buckets.lock"), only=True)

    def empty(self) -> None:
        """Delete all that is in the bucket, and what was pulled."""
        for kind in ("entries", "blobs"):
            for folder in self.there.names(kind):
                for name in self.there.names(f"{kind}/{folder}"):
                    self.there.delete(f"{kind}/{folder}/{name}")
        self.target = Store(self.task.room("pulled"))

    def push(self, source: Store, tier: Objects, *builds: Build) -> list[str]:
        there = Entries(tier, Trust(looks=True))
        return [moved.state for moved in move(source, [b.manifest for b in builds], there, lambda manifest: None)]

    def pull(self) -> None:
        source = Entries(self.behind, self.locked)
        for _ in move(source, require_all(source.entries(), source), self.target, lambda manifest: None):
            pass

    def found(self, each: Build, trust: Trust | None = None) -> Verified | Miss:
        """Load an entry from the bucket itself, which must be one of those that were published."""
        return load(Entries(self.there, trust or Trust(looks=True)), each.manifest, MINE, FIRST, SECOND)


def _reached(url: str) -> Objects:
    os.environ["AWS_ENDPOINT_URL"] = url
    return Objects("s3://buckets/here")


def run(task: Task) -> Iterator[Tally]:
    with _service() as direct:
        proxy = Proxy(direct)
        before = dict(os.environ), dict(objects._CLIENT), dict(objects._RETRIES)
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
        os.environ |= keys
        # a client that is soon tired, for a service on this machine
        second = datetime.timedelta(seconds=1)
        objects._CLIENT |= {"connect_timeout": _PATIENCE, "timeout": _PATIENCE}
        objects._RETRIES |= {"backoff": {"init_backoff": second / 100, "max_backoff": second / 50, "base": 2}}
        try:
            scene = Scene(task, proxy, direct)
            for name, prepare, act, judge in task.some(COMMANDS, 2):
                yield _each_request(task, scene, name, prepare, act, judge)
        finally:
            proxy.close()
            for now, then in zip((os.environ, objects._CLIENT, objects._RETRIES), before, strict=True):
                now.clear()
                now.update(then)


@contextlib.contextmanager
def _service() -> Iterator[str]:
    """Yield the address of an S3 service on this machine, with a bucket named buckets."""
    import boto3
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    WSGIRequestHandler.disable_nagle_algorithm = True  # else each answer is a twentieth of a second late
    service = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="buckets")
    try:
        yield f"http://{host}:{port}"
    finally:
        service.stop()


def _each_request(
    task: Task,
    scene: Scene,
    name: str,
    prepare: Callable[[Scene], None],
    act: Callable[[Scene], object],
    judge: Callable[[Scene], None],
) -> Tally:
    tally = Tally(6, name)

    def prepared() -> None:
        scene.empty()
        prepare(scene)

    prepared()
    scene.proxy.begin()
    act(scene)
    requests = scene.proxy.count
    judge(scene)
    points = [(n, fault, False) for n in range(1, requests + 1) for fault in FAULTS]
    points += [(1, fault, True) for fault in FAULTS]
    for number, fault, on in task.some(points, 2):
        with tally.case(f"{fault} at request {number}{' and on' * on}"):
            prepared()
            scene.proxy.begin(fault, number, on)
            with contextlib.suppress(BucketsError):
                act(scene)
            deleted = [request for request in scene.proxy.deleted if ".rejected" not in request]
            scene.proxy.begin()
            assert not deleted, deleted
            for each in (MINE, SECOND):
                scene.found(each)
                load(scene.target, each.manifest, each)
            act(scene)
            judge(scene)
    return tally


# --- what is done ----------------------------------------------------------------------------------------------------


def _whole(scene: Scene, *builds: Build) -> None:
    for each in builds:
        found = scene.found(each, scene.locked)
        if isinstance(found, Miss):
            raise LostEntry(f"{each.manifest.gate} in the bucket is {found.status}: {found.why}")


def _pulled(scene: Scene) -> None:
    whole(scene.target, MINE, SECOND)
    sound(scene.target)
    _whole(scene, MINE, SECOND)


def _nothing(scene: Scene) -> None:
    pass


def _pushed(scene: Scene) -> None:
    assert scene.push(scene.own, scene.there, MINE, SECOND) == [COPIED, COPIED]


def _taken(scene: Scene) -> None:
    """Let another builder be first with one of the keys."""
    other = Store(scene.task.room("other"))
    publish(other, FIRST)
    assert scene.push(other, scene.there, FIRST) == [COPIED]


def _push(scene: Scene) -> None:
    states = scene.push(scene.own, scene.behind, MINE, SECOND)
    assert set(states) <= {COPIED, THERE}, states
    _whole(scene, MINE, SECOND)  # what is said to have been copied is there


def _push_late(scene: Scene) -> None:
    states = scene.push(scene.own, scene.behind, MINE, SECOND)
    assert states[0] == OTHER, states


def _firsts(scene: Scene) -> None:
    found = scene.found(MINE)
    if not (isinstance(found, Verified) and found.manifest == FIRST.manifest):
        raise LostEntry(f"who was first is not there any more, but {getattr(found, 'manifest', found)!r:.200}")
    _whole(scene, SECOND)


def _list(scene: Scene) -> None:
    for each in Entries(scene.behind, scene.locked).family(MINE.manifest.family):
        never_corrupt(each)
    scene.behind.names("entries")


COMMANDS: tuple[tuple[str, Callable[[Scene], None], Callable[[Scene], object], Callable[[Scene], None]], ...] = (
    ("push", _nothing, _push, lambda scene: _whole(scene, MINE, SECOND)),
    ("push of what is there", _pushed, _push, lambda scene: _whole(scene, MINE, SECOND)),
    ("push where another build is", _taken, _push_late, _firsts),
    ("pull", _pushed, lambda scene: scene.pull(), _pulled),
    ("listing", _pushed, _list, lambda scene: _whole(scene, MINE, SECOND)),
)
