"""What is proved of a cache on a shared file system: eight checks, each with processes of their own at both mounts.

A check returns what it found, in words, or raises `Failed`. Knows nothing of how anything is mounted.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_mount.mounts import Shared, say
from shared_mount.users import User, variables

Json = dict[str, Any]
POLLED = 40
RACED = 40
KILLED = 30
# How much longer than a client may remember we wait for it to see what is there.
GRACE_S = 10.0


class Failed(Exception):
    """What was found is not what must be."""


def require(so: bool, why: str) -> None:
    if not so:
        raise Failed(why)


@dataclass
class Stage:
    """A cache of its own on a shared file system, for one check."""

    shared: Shared
    work: Path
    name: str
    rng: random.Random
    homes: int = field(default=0)

    def at(self, mount: Path) -> Path:
        """The cache directory as a mount shows it."""
        return mount / self.name

    @property
    def mounts(self) -> tuple[Path, Path]:
        """Where both clients mounted it."""
        return self.shared.a, self.shared.b

    @property
    def exported(self) -> Path:
        """The cache directory where the server has it."""
        return self.shared.export / self.name

    def home(self) -> Path:
        """A home directory that nobody had before, on this machine's own disk."""
        self.homes += 1
        return self.work / "homes" / f"{self.shared.name}-{self.name}-{self.homes}".replace(" ", "-")

    def user(self, mount: Path, lock: str = "") -> User:
        """Start a process that uses the cache through a mount."""
        return User(self.home(), self.at(mount), lock)

    def staged(self) -> int:
        """Count what is staged and has no name yet."""
        folder = self.exported / "v1" / "tmp"
        return len(list(folder.iterdir())) if folder.is_dir() else 0

    def cli(self, mount: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against the cache as a mount shows it."""
        command = [sys.executable, "-m", "nanogpt_buckets", *arguments, "--cache-dir", str(self.at(mount))]
        return subprocess.run(command, env=variables(self.home()), capture_output=True, text=True, timeout=300)


def looked(user: User, entries: Iterable[int]) -> list[Json]:
    """Return what a process finds of entries; `Failed` if anything is wrong, or not in the store's words."""
    reply = user.ask("look", entries=list(entries))
    require("answers" in reply, f"looking failed: {reply}")
    answers: list[Json] = reply["answers"]
    return answers


def all_verified(user: User, entries: Iterable[int], patience_s: float) -> tuple[list[Json], float]:
    """Look until every entry is verified; return the answers and how long it took. Nothing may be corrupt meanwhile."""
    entries, start = list(entries), time.monotonic()
    while True:
        answers = looked(user, entries)
        bad = [found for found in answers if found["word"] not in ("verified", "missing", "transient")]
        require(not bad, f"answered {bad[:2]}")
        after = time.monotonic() - start
        if all(found["word"] == "verified" for found in answers):
            return answers, after
        words = Counter(found["word"] for found in answers)
        require(after < patience_s, f"after {after:.0f} s still {dict(words)}")
        time.sleep(0.05)


def agreed(stage: Stage, entries: Iterable[int]) -> list[Json]:
    """Return the entries as both mounts see them; `Failed` if they are not whole, or not the same."""
    entries, patience = list(entries), stage.shared.stale_s + GRACE_S
    with stage.user(stage.shared.a) as a, stage.user(stage.shared.b) as b:
        deadline = time.monotonic() + patience
        while True:
            mine, theirs = all_verified(a, entries, patience)[0], all_verified(b, entries, patience)[0]
            if mine == theirs:
                return mine
            require(time.monotonic() < deadline, "the mounts do not agree")
            time.sleep(0.5)


def words(counts: Json) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "nothing"


# --- the checks -------------------------------------------------------------------------------------------------------


def two_builders(stage: Stage) -> str:
    """Two processes publish other bytes under the same keys at the same moment."""
    entries, published = range(1, RACED + 1), {"ann": {}, "bob": {}}
    with stage.user(stage.shared.a) as ann, stage.user(stage.shared.b) as bob:
        for entry in entries:
            ann.say("publish", builder="ann", entry=entry)
            bob.say("publish", builder="bob", entry=entry)
            for name, user in (("ann", ann), ("bob", bob)):
                reply = user.hear()
                require("digest" in reply, f"{name}: {reply}")
                published[name][entry] = reply["digest"]
        for user in (ann, bob):
            all_verified(user, entries, stage.shared.stale_s + GRACE_S)
    kept = agreed(stage, entries)
    require(stage.staged() == 0, f"{stage.staged()} files are left staged")
    told = {name: [published[name][e] for e in entries] for name in published}
    digests = [found["digest"] for found in kept]
    other = sum(len({a, b, c}) > 1 for a, b, c in zip(told["ann"], told["bob"], digests, strict=True))
    # without hard links a name cannot be taken on condition, so the later of two at once stays
    require(other == 0 or not stage.shared.links, f"{other} of {RACED} builders were told of another entry than stays")
    who = Counter(found["builder"] for found in kept)
    return f"{RACED} keys, each whole: {words(dict(who))}; told of another than stays {other}; staged 0"


def reader_beside_writer(stage: Stage) -> str:
    """One process publishes through a mount while another looks through the other, all the time."""
    entries, end = list(range(1, POLLED + 1)), stage.work / f"end-{stage.shared.name}-{stage.name}"
    with stage.user(stage.shared.a) as writer, stage.user(stage.shared.b) as reader:
        reader.say("poll", entries=entries, until=str(end))
        reply = writer.ask("publish_on", builder="ann", first=1, last=POLLED + 1)
        end.touch()
        polled = reader.hear()
        require(reply == {}, f"the writer failed: {reply}")
        require("words" in polled, f"the reader failed: {polled}")
        require(set(polled["words"]) <= {"verified", "missing", "transient"}, f"{polled['bad'][:3]}")
        require(polled["lost"] == 0, f"{polled['lost']} times an entry that had been there was missing")
        _, after = all_verified(reader, entries, stage.shared.stale_s + GRACE_S)
        start, patience = time.monotonic(), stage.shared.stale_s + GRACE_S
        while reader.ask("listed").get("count") != POLLED:
            require(time.monotonic() - start < patience, "they are not all listed")
            time.sleep(0.1)
        listed = time.monotonic() - start
    return f"{words(polled['words'])}; all seen after {after:.1f} s, all listed after {listed:.1f} s"


def killed(stage: Stage) -> str:
    """A writer is killed at many instants; what it was writing is whole or absent, and can be published again."""
    with stage.user(stage.shared.a) as writer:
        start = time.monotonic()
        writer.ask("publish_on", builder="measure", first=1001, last=1011)
        one = (time.monotonic() - start) / 10
    counts: Counter[str] = Counter()
    left, entry = 0, 1
    with stage.user(stage.shared.b) as other:
        for number in range(KILLED):
            with stage.user(stage.mounts[0]) as writer:
                writer.say("publish_on", builder=f"killed{number}", first=entry, last=entry + 1000)
                time.sleep(stage.rng.uniform(0.0, 2.5 * one))
            reached = range(entry, entry + 5)
            found = looked(other, reached)
            require({each["word"] for each in found} <= {"verified", "missing"}, f"kill {number}: {found}")
            counts += Counter("whole" if each["word"] == "verified" else "absent" for each in found[:3])
            left = max(left, stage.staged())
            again = User(stage.home(), stage.at(stage.mounts[number % 2]))
            with again:
                for each in reached:
                    reply = again.ask("publish", builder="later", entry=each)
                    require("digest" in reply, f"kill {number}: publishing again: {reply}")
            agreed(stage, reached)
            entry += 5
    return f"{KILLED} kills: {words(counts)}; at most {left} files left staged; all published again"


def stale_lookup(stage: Stage) -> str:
    """A client has just been told that an entry is not there when the other publishes it."""
    delays, adopted, mine = [], 0, 0
    patience = stage.shared.stale_s + GRACE_S
    with stage.user(stage.shared.a) as a, stage.user(stage.shared.b) as b:
        for entry in range(1, 9):
            require(looked(b, [entry])[0]["word"] == "missing", "it was there before")
            require("digest" in a.ask("publish", builder="ann", entry=entry), "publishing failed")
            _, after = all_verified(b, [entry], patience)
            delays.append(after)
        for entry in range(101, 109):
            require(looked(b, [entry])[0]["word"] == "missing", "it was there before")
            first = a.ask("publish", builder="ann", entry=entry)
            reply = b.ask("publish", builder="bob", entry=entry)
            require("digest" in first and "digest" in reply, f"publishing failed: {first} {reply}")
            adopted += reply["digest"] == first["digest"]
            mine += reply["digest"] != first["digest"]
    kept = agreed(stage, [*range(1, 9), *range(101, 109)])
    require({found["builder"] for found in kept[:8]} == {"ann"}, "an entry was replaced")
    require(mine == 0 or not stage.shared.links, f"{mine} of 8 entries that were there already were replaced")
    return (
        f"seen after {min(delays):.2f} to {max(delays):.2f} s; a second build adopted {adopted} of 8, replaced {mine}"
    )


def deleted(stage: Stage) -> str:
    """Entries are deleted, pruned, and built anew by somebody else while a reader reads."""
    entries, end = list(range(1, 25)), stage.work / f"end-{stage.shared.name}-{stage.name}"
    with stage.user(stage.shared.a) as writer, stage.user(stage.shared.b) as reader:
        writer.ask("publish_on", builder="ann", first=1, last=25)
        all_verified(reader, entries, stage.shared.stale_s + GRACE_S)
        reader.say("poll", entries=entries, until=str(end))
        for turn, builder in enumerate(("bob", "cleo", "dan")):
            listed = stage.cli(stage.shared.a, "cache", "ls", "--json")
            keys = [key for key in _keys(listed.stdout) if stage.rng.random() < 0.5] if turn < 2 else []
            command = ("rm", *keys) if keys else ("prune", "--max-size", "1MB")
            done = stage.cli(stage.shared.a, "cache", *command, "--yes")
            require(done.returncode == 0, f"cache {command[0]}: exit {done.returncode}: {done.stderr[-300:]}")
            writer.ask("publish_on", builder=builder, first=1, last=25)
        end.touch()
        polled = reader.hear()
        require("words" in polled, f"the reader failed: {polled}")
        require("WRONG" not in polled["words"], "bytes were handed out that nobody built")
        bad = [said for said in polled["bad"] if not (said.startswith("transient") or "is missing from the" in said)]
        require(not bad, f"{bad[:3]}")
    kept = agreed(stage, entries)
    who = Counter(found["builder"] for found in kept)
    return f"{words(polled['words'])}, of which none wrong; in the end {words(dict(who))}"


def _keys(text: str) -> list[str]:
    import json

    return [row["key"] for row in json.loads(text)]


def locks(stage: Stage) -> str:
    """The lock of a bucket is taken at both mounts at once."""
    with stage.user(stage.shared.a) as a, stage.user(stage.shared.b) as b:
        require(a.ask("hold", entry=1, seconds=5.0)["held"], "the lock cannot be taken at all")
        excludes = not b.ask("hold", entry=1, seconds=2.0)["held"]
        for user in (a, b):
            user.ask("release")
        compiled = 0
        for entry in range(1, 9):
            for name, user in (("ann", a), ("bob", b)):
                user.say("publish", builder=name, entry=entry, alone=True)
            replies = [user.hear() for user in (a, b)]
            require(all("digest" in reply for reply in replies), f"{replies}")
            compiled += sum(reply["compiled"] for reply in replies)
    agreed(stage, range(1, 9))
    meaning = "excludes" if excludes else "excludes nobody: both compile, one is kept"
    return f"{meaning}; 8 buckets compiled {compiled} times by two; each whole"


def command_line(stage: Stage) -> str:
    """The command line's exit codes through the mounts."""
    with stage.user(stage.shared.a) as a:
        a.ask("publish_on", builder="ann", first=1, last=4)
    agreed(stage, range(1, 4))
    found = []
    for mount in stage.mounts:
        for command in ("ls", "verify"):
            done = stage.cli(mount, "cache", command)
            require(done.returncode == 0, f"cache {command}: exit {done.returncode}: {done.stderr[-300:]}")
            found.append(f"{command} 0")
    for blob in sorted(stage.at(stage.shared.a).glob("v1/blobs/*/*"))[:1]:
        blob.chmod(0o600)
        blob.write_bytes(b"x" * blob.stat().st_size)
    for mount in stage.mounts:
        deadline = time.monotonic() + stage.shared.stale_s + GRACE_S
        while (code := stage.cli(mount, "cache", "verify").returncode) != 4:
            require(time.monotonic() < deadline, f"cache verify of a damaged library: exit {code}")
            time.sleep(0.5)
        found.append("damaged: verify 4")
    return ", ".join(found)


def trust(stage: Stage) -> str:
    """Who is believed: a directory of one's own, one of a group with a lock file, a file of somebody else."""
    lock, patience = stage.work / f"{stage.shared.name.replace(' ', '-')}.lock", stage.shared.stale_s + GRACE_S
    with stage.user(stage.shared.a) as a:
        a.ask("publish_on", builder="ann", first=1, last=3)
        a.ask("write_lock", builder="ann", entries=[1, 2], path=str(lock))
    agreed(stage, [1, 2])
    modes = _modes(stage.at(stage.shared.b))
    os.chmod(stage.at(stage.shared.a), 0o2770)
    with stage.user(stage.shared.b) as plain, stage.user(stage.shared.b, str(lock)) as locked:
        _until(plain, 1, "untrusted", patience)
        require(looked(locked, [1])[0]["word"] == "verified", "a lock file does not vouch")
        refused = plain.ask("publish", builder="bob", entry=9)
        require(refused.get("error") == "UntrustedStore", f"published where others write: {refused}")
        for entry in (11, 12):
            require("digest" in locked.ask("publish", builder="bob", entry=entry), "nothing can be published")
    made = _modes(stage.at(stage.shared.a), newest=True)
    os.chmod(stage.at(stage.shared.a), 0o700)
    for path in [stage.exported, *stage.exported.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o400)
    with stage.user(stage.shared.b) as plain:
        _until(plain, 1, "verified", patience)
        manifest = next(stage.exported.glob("v1/entries/*/*.json"))
        os.chown(manifest, 54321, -1)
        deadline = time.monotonic() + patience
        while not any(found["word"] == "untrusted" for found in looked(plain, (1, 2, 11, 12))):
            require(time.monotonic() < deadline, "a file of user 54321 is believed")
            time.sleep(0.2)
    own, group = f"own directory: verified ({modes})", f"2770: refused, with a lock file verified ({made})"
    return f"{own}; {group}; another user's file: refused"


def _until(user: User, entry: int, word: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while (found := looked(user, [entry])[0])["word"] != word:
        require(time.monotonic() < deadline, f"not {word} but {found}")
        time.sleep(0.2)


def _modes(cache: Path, newest: bool = False) -> str:
    """Return the mode and owner that a manifest and its folder have."""
    manifest = max(cache.glob("v1/entries/*/*.json"), key=lambda path: path.stat().st_mtime)
    found = [(path, path.stat()) for path in (cache, manifest)]
    return ", ".join(f"{'file' if p.suffix else 'root'} {s.st_mode & 0o7777:o} of user {s.st_uid}" for p, s in found)


CHECKS: dict[str, Callable[[Stage], str]] = {
    "two builders at once": two_builders,
    "reader beside a writer": reader_beside_writer,
    "killed while publishing": killed,
    "stale negative lookup": stale_lookup,
    "deleted beside a reader": deleted,
    "locks": locks,
    "command line": command_line,
    "owner and mode": trust,
}


def check_all(shared: Shared, work: Path, seed: int, report: Callable[[str, str, str, str], None]) -> None:
    """Run every check on one file system and report each."""
    for number, (title, check) in enumerate(CHECKS.items()):
        say(f"{shared.name}: {title}")
        stage = Stage(shared, work, f"cache{number}", random.Random(f"{seed} {shared.name} {title}"))
        start = time.monotonic()
        try:
            found, result = check(stage), "pass"
        except Exception as error:  # one row says what was wrong, the others still run
            found, result = f"{type(error).__name__}: {error}", "FAIL"
        say(f"    {result} in {time.monotonic() - start:.1f} s: {found}")
        report(shared.name, title, result, found)
