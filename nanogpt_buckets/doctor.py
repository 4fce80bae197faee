"""What works on this machine and what is wrong: versions, processor, backend, compiler, and the places it keeps things.

Every finding is a fact with a verdict; what is wrong comes with the way out. Changes nothing, except that it may find
out where this node's own directory is, and that a place which is named is tried: what is written there for that goes
again. Knows nothing of models, of any one backend, nor of how findings are shown.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from nanogpt_buckets import backends, node, settings
from nanogpt_buckets.backends import host, memfile
from nanogpt_buckets.errors import BucketsError
from nanogpt_buckets.findings import Finding, Verdict
from nanogpt_buckets.mounts import Mount, mount_of
from nanogpt_buckets.node import prune, sources
from nanogpt_buckets.owners import doubted
from nanogpt_buckets.store.entries import Entries
from nanogpt_buckets.store.entry import Miss, Status, manifest_of
from nanogpt_buckets.store.objects import Objects
from nanogpt_buckets.store.probe import probe_directory, probe_objects
from nanogpt_buckets.store.store import Store
from nanogpt_buckets.store.transfer import is_directory, place_of
from nanogpt_buckets.store.trust import check_all, why_shared
from nanogpt_buckets.store.vouch import Trust
from nanogpt_buckets.versions import installed

_LIBRARIES = ("torch", "transformers", "tokenizers", "tiktoken", "safetensors")
_VARIABLES = (
    settings.CACHE_DIR_VARIABLE, settings.LOCAL_DIR_VARIABLE, settings.LAYERS_VARIABLE, settings.REMOTE_VARIABLE,
    settings.REMOTE_MODE_VARIABLE, settings.TRUSTED_VARIABLE, settings.POLICY_VARIABLE, "NANOGPT_BUCKETS_DEBUG",
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "HF_HUB_OFFLINE", "TMPDIR", "CXX", "OMP_NUM_THREADS",
)  # fmt: skip
# A few buckets of the largest model; a compiler's working directory.
_LOW_BYTES = 200_000_000
_LOW_FILES = 1000


def examine(place: str | None = None) -> list[Finding]:
    """Look at this machine and at where entries are; never raises for what it finds.

    Args:
        place: a directory, a tar file or a URL, as `place_of` takes it, which is tried, too; None for the default
            cache directory, which is looked at.

    Raises:
        UsageError: there can be no such directory.
    """
    directory = None if place is not None and not is_directory(place) else settings.cache_dir(place)
    return [
        *_versions(),
        *_machine(),
        *_backend(),
        *(_elsewhere(str(place)) if directory is None else _cache(directory)),
        *(probe_directory(directory) if directory is not None and place is not None else ()),
        *_node(),
        *_directory("temporary", Path(tempfile.gettempdir()), needed_to="build"),
        *(Finding("environment", name, os.environ[name]) for name in _VARIABLES if name in os.environ),
    ]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "nanogpt-buckets", metadata.version("nanogpt-buckets"))
    yield Finding("versions", "python", f"{platform.python_version()} ({sys.executable})")
    for library in _LIBRARIES:
        version = installed(library)
        hint = "pip install --force-reinstall nanogpt-buckets"
        yield _judged("versions", library, version or "not installed", version is None, hint, Verdict.PROBLEM)


def _judged(topic: str, name: str, value: str, wrong: bool, hint: str, verdict: Verdict = Verdict.WARNING) -> Finding:
    """Return a fact that needs a verdict and a hint only if something is wrong with it."""
    return Finding(topic, name, value, verdict, hint) if wrong else Finding(topic, name, value)


def _machine() -> Iterator[Finding]:
    libraries = ", ".join(f"{name} {number}" for name, number in sorted(host.own_versions().items()))
    yield Finding("machine", "system", f"{platform.system()} {platform.machine()}, {libraries or 'C library unknown'}")
    usable, seen = host.cpu_count(), host.visible_cpu_count()
    more = usable != seen and "OMP_NUM_THREADS" not in os.environ
    hint = f"OMP_NUM_THREADS={usable}: torch starts a thread for each of {seen} processors, more than the quota"
    yield _judged("machine", "processors", f"{usable} usable, {_processor()}", more, hint)
    load = os.getloadavg()[0]  # OpenMP's threads wait for each other actively, and where others run too very long
    text = f"{load:.1f} processes want to run, on average of the last minute"
    help_ = "OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=passive help where others must run too"
    yield _judged("machine", "load", text, load > usable + 0.5, f"steps will be many times slower; {help_}")
    yield Finding("machine", "memory", f"{host.available_memory_bytes() / 1e9:.1f} GB available")
    sealed = memfile.in_memory()
    text = "yes: a noexec cache works, nothing can change after the check" if sealed else "no"
    hint = "libraries are loaded from private copies in this node's directory, which must allow execution"
    yield _judged("machine", "libraries from memory", text, not sealed, hint)


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or "of unknown kind"


def _backend() -> Iterator[Finding]:
    for name in backends.BACKENDS:
        yield from backends.backend_for(name).findings()
    if Path("/dev/nvidiactl").exists():
        yield Finding("backend", "cuda", "a GPU is here; this release runs on the CPU")
    chosen = backends.backend_for()
    why = "there is a Neuron device" if chosen.name == "neuron" else "there is no Neuron device"
    yield Finding("backend", "chosen", f"{chosen.name}: {why}")
    try:
        target = chosen.target(None)
    except (BucketsError, metadata.PackageNotFoundError) as error:
        yield Finding("backend", "target", str(error), Verdict.PROBLEM, getattr(error, "hint", None) or "")
        return
    levels = [*host.levels_here(), host.NATIVE]
    also = f"; this CPU can run {', '.join(levels)}" if target in levels else ""
    yield Finding("backend", "target", f"{target}{also}")
    compiler = chosen.compiler()
    versions = ", ".join(f"{name} {text}" for name, text in sorted((compiler or {}).items()))
    hint = f"{chosen.install}; buckets that are built already run without"
    yield _judged("backend", "compiler", versions or f"no {chosen.needs} found", compiler is None, hint)


def _cache(path: Path) -> Iterator[Finding]:
    yield from _directory("cache", path, needed_to="build into it")
    shared = why_shared(path)
    try:
        check_all(path)
        if path.is_dir():
            yield Finding("cache", "trust", "only you or root can write it")
        else:
            yield Finding("cache", "content", "there is no cache here yet")
    except BucketsError as error:
        yield Finding("cache", "trust", error.message, Verdict.PROBLEM, error.hint or "")
        if not shared:
            return
    if path.is_dir():
        hint = "nanogpt-buckets cache verify --repair mends them; the next build replaces what it needs"
        yield _content(Store(path, Trust(looks=bool(shared))), hint)


def _elsewhere(place: str) -> Iterator[Finding]:
    """Say what a tar file or an object store holds, or why it cannot be used."""
    yield Finding("cache", "place", place)
    try:
        entries = place_of(place, Trust(looks=True))
        if isinstance(entries.tier, Objects):
            yield from probe_objects(entries.tier)
            return
        doubt = doubted(Path(str(entries.tier)), "cache pull takes the lock file: --locked FILE")
        text = doubt.message if doubt else "only you or root can write it"
        yield _judged("cache", "trust", text, doubt is not None, (doubt.hint if doubt else None) or "")
        yield _content(entries, "take it again from where it was written: nanogpt-buckets cache push FILE.tar")
    except BucketsError as error:
        yield Finding("cache", "place", error.message, Verdict.PROBLEM, error.hint or "")


def _content(entries: Entries, hint: str) -> Finding:
    """Count entries and bytes; manifests are read, blobs are not."""
    try:
        found = [entries.glance(entry) for entry in entries.entries()]
    except BucketsError as error:
        return Finding("cache", "content", error.message, Verdict.PROBLEM, error.hint or "")
    blobs = {blob for manifest in filter(None, map(manifest_of, found)) for blob in manifest.blobs}
    damaged = sum(isinstance(entry, Miss) and entry.status is Status.CORRUPT for entry in found)
    text = f"{len(found)} entries, {sum({b.sha256: b.size for b in blobs}.values()) / 1e6:.1f} MB of compiled code"
    text += f", {damaged} damaged" if damaged else ""
    return _judged("cache", "content", text, damaged > 0, hint, Verdict.PROBLEM)


def _node() -> Iterator[Finding]:
    try:
        path = node.directory()
        yield from _directory("node", path, needed_to="preparing weights")
        if mount_of(path).network:
            hint = f"name a directory on this machine's own disk in {settings.LOCAL_DIR_VARIABLE}"
            yield Finding("node", "place", "shared over a network", Verdict.WARNING, hint)
        weights = [os.lstat(path).st_size for path in node.listed(sources.WEIGHTS, "*.safetensors")]
        useless = prune.plan()
    except (OSError, BucketsError) as error:
        yield Finding("node", "trust", str(error), Verdict.PROBLEM, getattr(error, "hint", None) or "")
        return
    yield Finding("node", "trust", "only you or root can write it")
    yield Finding("node", "content", f"{len(weights)} prepared models, {sum(weights) / 1e6:.1f} MB")
    if useless:
        text = f"{len(useless)} of no use, {sum(row.bytes for row in useless) / 1e6:.1f} MB"
        yield Finding("node", "leftovers", text, hint="nanogpt-buckets cache prune deletes them")


def _directory(topic: str, path: Path, *, needed_to: str) -> Iterator[Finding]:
    """Say where a directory is, whose, on what, and whether it can be written and has room."""
    mount = mount_of(path)
    try:
        place = next(place for place in (path, *path.parents) if place.exists())
        found, room = place.stat(), os.statvfs(place)
    except OSError as error:
        yield Finding(topic, "directory", f"{path}: {error.strerror}", Verdict.PROBLEM, "use another directory")
        return
    yield Finding(topic, "directory", str(path) if place == path else f"{path} (not there yet)")
    if place == path:
        yield Finding(topic, "owner", f"{_user(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):04o}")
    options = ", ".join(sorted(mount.options & {"ro", "rw", "noexec"}))
    yield Finding(topic, "file system", f"{mount.kind} on {mount.point or '?'} ({options or 'options unknown'})")
    yield _writable(topic, place, mount, needed_to)
    free_files = room.f_favail if room.f_files else None
    text = f"{room.f_bavail * room.f_frsize / 1e9:.1f} GB free, "
    text += "files not counted" if free_files is None else f"{free_files} files more"
    low = room.f_bavail * room.f_frsize < _LOW_BYTES or (free_files is not None and free_files < _LOW_FILES)
    yield _judged(topic, "room", text, low, "make room: nanogpt-buckets cache prune --dry-run")


def _writable(topic: str, place: Path, mount: Mount, needed_to: str) -> Finding:
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and "ro" not in mount.options:
        return Finding(topic, "writable", "yes")
    if not place.is_dir():
        return Finding(topic, "writable", f"no: {place} is a file", Verdict.PROBLEM, "name a directory")
    if topic == "node":
        hint = f"{needed_to} needs it: name another directory in {settings.LOCAL_DIR_VARIABLE}"
        return Finding(topic, "writable", "no", Verdict.PROBLEM, hint)
    hint = f"what is there can be used; to {needed_to}, be its owner ({_user(place.stat().st_uid)}) or name another"
    return Finding(topic, "writable", "no", Verdict.WARNING, hint)


def _user(uid: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except (ImportError, KeyError):
        return str(uid)
