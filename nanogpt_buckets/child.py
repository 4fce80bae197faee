"""One Python child per risky job: a JSON request on stdin, JSON lines on stdout, and it never outlives its parent.

Compilers crash, hold devices until exit and can be killed for memory, so they run in a child. It is started as
`python -m MODULE`, never forked and never through multiprocessing, which would run the user's script again. The child
leads its own process group; it ends that whole group when its stdin closes, which happens however the parent dies.
Its directory is locked as long as the parent lives, and whoever next makes one sweeps those that nobody holds.

Knows nothing of compiling or checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanogpt_buckets import errors
from nanogpt_buckets.errors import BucketsError, ChildFailed

Event = dict[str, Any]

# What would change generated code, point a compiler at somebody else's cache, or make Python or a tool speak otherwise
# than expected: variables of torch; of GCC, Clang and linkers; of the locale; of Python. A child gets none of it.
_STEERING = re.compile(
    r"_?TORCH.*|PYTORCH_.*|_?INDUCTOR_.*|(DUMP_)?AOT.*|TRITON_.*|ATEN_.*|FX_.*|PT2_.*|PARTITIONER_.*|HALIDE_.*|TVM_.*"
    r"|CUT(LASS|EDSL)_.*|CUBLAS_.*|CUDA_(HOME|INC_PATH)|(ENABLE|DISABLE|UNSAFE|FAKE|LOG|TEARDOWN)_.*|TENSORIFY_.*|_SPLITTER_.*"
    r"|OMP_PREFIX|(C|CPP|CXX|LD|AS|NEURON_CC_)FLAGS|NEURON_COMPILE_CACHE_URL|CPATH|(C|CPLUS|OBJC|OBJCPLUS)_INCLUDE_PATH"
    r"|(LIBRARY|COMPILER|LD_RUN|L)_?PATH|GCC_.*|COLLECT_.*|DEPENDENCIES_OUTPUT|SUNPRO_DEPENDENCIES|SOURCE_DATE_EPOCH"
    r"|GNUTARGET|LDEMULATION|CCC_.*|CLANG_.*|_?CL_?|SDKROOT|MACOSX_DEPLOYMENT_TARGET|LANG|LANGUAGE|LC_.*"
    r"|PYTHON(?!(HOME|USERBASE|NOUSERSITE|PLATLIBDIR|DONTWRITEBYTECODE|PYCACHEPREFIX)$).*"
)
_OWN = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "LC_ALL": "C"}
_FOLDER = "nanogpt-buckets-work-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LOG_TAIL_BYTES = 4000
_LONGEST_S = 24 * 3600.0

_running: set[subprocess.Popen[bytes]] = set()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment less what would steer a compiler, plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not _STEERING.fullmatch(name)}
    # a relative entry is relative to this process's directory, which is not the child's
    search = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # The child must import this very package, also when it was found through sys.path and not installed: so it comes
    # before what PYTHONPATH names, where another copy may be.
    package_parent = Path(__file__).resolve().parents[1]
    if package_parent != Path(sysconfig.get_path("purelib")).resolve():
        search.insert(0, str(package_parent))
    return kept | _OWN | {"PYTHONPATH": os.pathsep.join(search)} | dict(extra or {})


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a new private directory under the temporary one; it goes afterwards, with those of killed processes."""
    sweep_folders()
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    lock = _claim(folder)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def sweep_folders() -> None:
    """Remove this user's work folders that nobody holds: their owners were killed. Never fails."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):
            # an empty one may be about to be locked
            if os.listdir(folder) and (lock := _claim(folder)) is not None:
                _remove(folder, lock)


def _claim(folder: Path) -> int | None:
    """Lock a folder of this user's until the descriptor is closed, or this process ends; None if that cannot be."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):  # another process has it, or the file system has no locks
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
        os.close(lock)
    return None


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


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
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=workdir,
            env=clean_environment(environment),
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    _running.add(process)
    timer = threading.Timer(timeout_s, _kill_group, [process])
    timer.daemon = True
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            # so paths are the same bytes to a child that speaks UTF-8, whatever this process's locale
            process.stdin.write(os.fsencode(json.dumps(request, ensure_ascii=False)) + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            last = json.loads(line)
            if on_event is not None:
                on_event(last)
        status = process.wait()
    finally:
        overran = not timer.is_alive()
        timer.cancel()
        _end(process)
    if status != 0 or last.get("event") != "done":
        raise _failure(last, status, log_path, f"was ended after {timeout_s:.0f} s" if overran else "")
    return last


def end_all() -> None:
    """Kill every child of this process, from whichever thread it was started; `run` then raises ChildFailed."""
    for process in list(_running):
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of the child's process group behind."""
    _kill_group(process)
    with contextlib.suppress(BrokenPipeError), process:
        _running.discard(process)


def _failure(last: Event, status: int, log_path: Path, stopped: str) -> BucketsError:
    """Return the error that a child named as its own, or one that says how it ended."""
    kind: type[BucketsError] = ChildFailed
    if last.get("no_room"):
        place = str(log_path.parents[1])
        reason = f"{os.strerror(errno.ENOSPC)} in {place}, where the child writes"
        last["hint"] = "make room" + (", or name another directory in TMPDIR" * (place == tempfile.gettempdir()))
    elif last.get("event") == "error":
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

    request = json.loads(sys.stdin.buffer.readline().decode("utf-8", "surrogateescape"))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        result = handler(request, emit)
    except BucketsError as error:
        emit("error", message=error.message, hint=error.hint, kind=type(error).__name__)
        sys.exit(1)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".strip()
        emit("error", message=text.splitlines()[0], no_room=any(os.strerror(number) in text for number in _NO_ROOM))
        raise
    emit("done", **result)


def _die_with_parent() -> None:
    # not sys.stdin, whose lock a daemon thread would still hold at interpreter shutdown
    while os.read(0, 4096):
        pass  # the end comes when the parent, the only writer, is gone
    os.killpg(0, signal.SIGKILL)
