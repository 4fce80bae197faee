"""One Python child per risky job: a JSON request on stdin, JSON lines on stdout, and it never outlives its parent.

Compilers crash, hold devices until exit and can be killed for memory, so they run in a child. It is started as
`python -m MODULE`, never forked and never through multiprocessing, which would run the user's script again. The child
leads its own process group; it ends that whole group when its stdin closes, which happens however the parent dies.

Knows nothing of compiling or checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from nanogpt_buckets import errors
from nanogpt_buckets.errors import BucketsError, ChildFailed

Event = dict[str, Any]

# What would change generated code, or point a compiler at somebody else's cache. A child gets none of it.
_SCRUBBED_PREFIXES = ("TORCHINDUCTOR_", "TRITON_", "TORCH_COMPILE", "TORCH_LOGS", "AOT_INDUCTOR_", "INDUCTOR_")
_SCRUBBED_NAMES = (
    "ATEN_CPU_CAPABILITY", "PYTHONSTARTUP", "PYTHONINSPECT", "CXXFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS",
    "NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL",
)  # fmt: skip
_LOG_TAIL_BYTES = 4000
_LONGEST_S = 24 * 3600.0

_running: set[subprocess.Popen[bytes]] = set()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment less what would steer a compiler, plus `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SCRUBBED_NAMES and not name.startswith(_SCRUBBED_PREFIXES)
    }
    search = [entry for entry in [os.environ.get("PYTHONPATH")] if entry]
    # The child must import this very package, also when it was found through sys.path and not installed: so it comes
    # before what PYTHONPATH names, where another copy may be.
    package_parent = Path(__file__).resolve().parents[1]
    if package_parent != Path(sysconfig.get_path("purelib")).resolve():
        search.insert(0, str(package_parent))
    return kept | {"PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"} | dict(extra or {})


def run(
    module: str,
    request: Mapping[str, Any],
    *,
    workdir: Path,
    on_event: Callable[[Event], None] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = _LONGEST_S,
) -> Event:
    """Run `python -m module` on one request and return its last event.

    Args:
        module: a module that calls `serve`.
        request: plain JSON.
        workdir: the child's working directory; its stderr is kept there in child.log.
        on_event: called with each event as it comes, the last one included.
        environment: added to the cleaned environment.
        timeout_s: it is killed after so many seconds.

    Raises:
        ChildFailed: it ended, or was killed, without a result.
        BucketsError: of the class that the child raised.
    """
    log_path = workdir / "child.log"
    last: Event = {}
    with log_path.open("wb") as log:
        process = _start(module, workdir, log, environment)
        assert process.stdin is not None
        assert process.stdout is not None
        _running.add(process)
        overran = threading.Event()

        def stop() -> None:
            overran.set()
            _kill_group(process)

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                last = json.loads(line)
                if on_event is not None:
                    on_event(last)
            status = process.wait()
        finally:
            timer.cancel()
            _end(process)
    if status != 0 or last.get("event") != "done":
        raise _failure(last, status, log_path, f"was ended after {timeout_s:.0f} s" if overran.is_set() else "")
    return last


def _start(
    module: str, workdir: Path, log: IO[bytes], environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=workdir,
        env=clean_environment(environment),
        start_new_session=True,
    )


def end_all() -> None:
    """Kill every child of this process, from whichever thread it was started; `run` then raises ChildFailed."""
    for process in list(_running):
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes and leave nothing of the child's process group behind."""
    _kill_group(process)
    process.wait()
    _running.discard(process)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _failure(last: Event, status: int, log_path: Path, stopped: str) -> BucketsError:
    """Return the error that a child named as its own, or one that says how it ended."""
    kind: type[BucketsError] = ChildFailed
    if last.get("event") == "error":
        reason = str(last.get("message"))
        kind = errors.named(str(last.get("kind"))) or ChildFailed
    elif stopped:
        reason = f"the child {stopped} without a result"
    elif status < 0:
        reason = f"the child was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            reason += ", most likely for want of memory"
    else:
        reason = f"the child ended with status {status} and no result"
    failure = kind(reason, hint=last.get("hint"))
    failure.log = log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
    return failure


def serve(handler: Callable[[dict[str, Any], Callable[..., None]], Mapping[str, Any]]) -> None:
    """Be the child: read the request, call `handler(request, emit)`, and print its result as the `done` event.

    Args:
        handler: returns plain JSON; `emit(event, **fields)` reports progress. What it raises becomes an `error` event.
    """
    # Only events may reach the pipe: libraries and compilers that print do so on stderr.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")
        events.flush()

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        result = handler(request, emit)
    except BucketsError as error:
        emit("error", message=error.message, hint=error.hint, kind=type(error).__name__)
        sys.exit(1)
    except BaseException as error:
        emit("error", message=f"{type(error).__name__}: {error}".strip().splitlines()[0])
        raise
    emit("done", **result)


def _die_with_parent() -> None:
    # not sys.stdin, whose lock a daemon thread would still hold at interpreter shutdown
    while os.read(0, 4096):
        pass  # the end comes when the parent, the only writer, is gone
    os.killpg(0, signal.SIGKILL)
