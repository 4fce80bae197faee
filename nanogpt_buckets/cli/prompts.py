"""`nanogpt-buckets generate --prompts FILE`: a file of prompts -> one line of JSON each, in order.

Written to a file, rows are appended as they are done, and the same command goes on after the last whole one. Each row
begins with what it belongs to - its prompt, and a key of settings and model - and so tells whose it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.lines import Record, read_records
from nanogpt_buckets.errors import BucketsError, TokenizerError, UsageError
from nanogpt_buckets.run.generation import Generation, Request
from nanogpt_buckets.settings import expanded
from nanogpt_buckets.values import whole_number

if TYPE_CHECKING:
    from nanogpt_buckets.run.engine import Engine

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")


class Job:
    """The prompts of a file, each with its settings, and where their rows go: a file, or standard output.

    Args:
        source: the file's name, or "-".
        path: the output file, which may have rows already; None for standard output.
        how: settings of prompts that name none, as `Request` takes them. Without a seed one is chosen, or found in the
            output file; prompt number n, counted from 0, has it plus n.

    Raises:
        UsageError: a line or a setting is wrong, or the output file cannot be one.
    """

    def __init__(self, source: str, path: Path | None, how: Mapping[str, Any]) -> None:
        Request("", **how)  # so that what is wrong with these is no line's fault
        self._source = "standard input" if source == "-" else f"the file {source!r}"
        self._records = read_records(source, ("prompt",), SETTINGS)
        self._path = None if path is None else expanded(path, "--output")
        self._exists = self._path is not None and _is_there(self._path)
        seed = how["seed"]
        if seed is None:
            seed = self._seed_found() if self._exists else None
        if seed is None:
            seed = secrets.randbits(63)
        self._requests = [self._request(record, how, seed + index) for index, record in enumerate(self._records)]

    def run(self, engine: Engine) -> None:
        """Generate what is not in the output file yet.

        Raises:
            UsageError: a prompt cannot be one, or the output file belongs to other prompts, settings or another model.
            BucketsError: it cannot be written, or a step failed.
        """
        model = engine.identity
        heads = [self._head(index, _key(request, model)) for index, request in enumerate(self._requests)]
        total = len(self._requests)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._opened()) if self._exists else None
            done, end = (0, 0) if file is None else self._kept(file, heads)
            if done == total:
                return output.say(f"nothing to do: the {output.count(total, 'row', 'rows')} of {self._path} are there")
            results = self._started(engine, done)
            if self._path is not None:
                file = file or stack.enter_context(self._opened("xb"))
                file.truncate(end)
                os.lseek(file.fileno(), end, os.SEEK_SET)
            if done:
                output.say(f"going on after row {done} of {total} in {self._path}")
            advance = stack.enter_context(output.progress("prompts", total))
            advance(done)
            try:
                for generation in results:
                    self._write(file, _row(heads[done], generation))
                    done += 1
                    advance(1)
            except KeyboardInterrupt:
                if file is not None:
                    output.complain(f"{done} of {total} rows are in {self._path}; the same command goes on after them")
                raise

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _request(self, record: Record, how: Mapping[str, Any], seed: int) -> Request:
        own = {name: value for name, value in record.settings.items() if (name, value) != ("seed", None)}
        try:
            return Request(record.text, **{**how, "seed": seed, **own})
        except UsageError as error:
            raise self._at(record, error) from None

    def _started(self, engine: Engine, done: int) -> Iterator[Generation]:
        """Have all prompts that are left checked, and coverage settled; an error of one names its line."""
        last: Record | None = None

        def requests() -> Iterator[Request]:
            nonlocal last
            for record, request in zip(self._records[done:], self._requests[done:], strict=True):
                last = record
                yield request
            last = None

        try:
            return engine.generate_each(requests())
        except (UsageError, TokenizerError) as error:
            raise error if last is None else self._at(last, error) from None

    def _at(self, record: Record, error: BucketsError) -> BucketsError:
        return type(error)(f"{self._source}, line {record.line}: {error.message}", hint=error.hint)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _head(self, index: int, key: str) -> dict[str, Any]:
        return {"index": index, "prompt": self._records[index].text, "key": key,
                "seed": self._requests[index].sampling.seed}  # fmt: skip

    def _seed_found(self) -> int | None:
        """Return the seed that was chosen when the output file was begun, as far as it can be made out."""
        chosen = [index for index, record in enumerate(self._records) if record.settings.get("seed") is None]
        if not chosen:
            return None
        with self._opened() as file:
            for index, line in enumerate(file):
                if index == chosen[0] and line.endswith(b"\n"):
                    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
                        seed = whole_number(json.loads(line)["seed"])
                        return None if seed is None else seed - index
                    return None
        return None

    def _kept(self, file: BinaryIO, heads: list[dict[str, Any]]) -> tuple[int, int]:
        """Return how many rows of the output file are whole, and where the last of them ends."""
        end = 0
        for index, line in enumerate(file):
            if index == len(heads):
                self._refuse("it has more rows than there are prompts")
            start = _opening(heads[index])
            if not line.endswith(b"\n"):  # the writer was stopped; its seed, if it chose one, is lost
                start = start[: start.rindex(b'"seed"')]
                if not (line.startswith(start) or start.startswith(line)):
                    self._refuse(f"its line {index + 1} is not the row of this prompt")
                return index, end
            if not line.startswith(start):
                self._refuse(f"its line {index + 1} is not the row of this prompt")
            end += len(line)
        return index + 1 if end else 0, end

    def _refuse(self, why: str) -> NoReturn:
        message = f"the output file {self._path} belongs to other prompts, settings or another model: {why}"
        raise UsageError(message, hint="name another file, or remove this one")

    def _opened(self, mode: str = "r+b") -> contextlib.AbstractContextManager[BinaryIO]:
        assert self._path is not None
        return _opened(self._path, mode)

    def _write(self, file: BinaryIO | None, row: bytes) -> None:
        if file is None:
            return output.put(row.decode("ascii"))
        try:
            rest = memoryview(row)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
        except OSError as error:
            hint = "the same command goes on after its last whole row"
            raise BucketsError(f"the output file {self._path} cannot be written: {error.strerror}", hint=hint) from None


def _opening(head: Mapping[str, Any]) -> bytes:
    """Return how a row begins: all that is known before it is generated."""
    return f"{json.dumps(head)[:-1]}, ".encode("ascii")


def _row(head: Mapping[str, Any], generation: Generation) -> bytes:
    made = {name: getattr(generation, name) for name in ("new_text", "finish_reason", "new_tokens")}
    return _opening(head) + f"{json.dumps(made)[1:]}\n".encode("ascii")


def _key(request: Request, model: str) -> str:
    """Return what stands for the settings of a request, its seed aside, and for the model and its tokenizer."""
    settings = {**asdict(request.sampling), "seed": None, "max_new_tokens": request.max_new_tokens}
    settings |= {"stops": request.stops, "plain_text": request.plain_text, "model": model}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("ascii")).hexdigest()[:16]


def _is_there(path: Path) -> bool:
    """Whether an output file exists; a UsageError if none can be there."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
        why = "it is not a regular file"
    except FileNotFoundError:
        if os.access(path.parent, os.W_OK | os.X_OK):
            return False
        why = "its directory is not there, or this user may not write there"
    except OSError as error:
        why = str(error.strerror)
    raise UsageError(f"the output file {path} cannot be written: {why}", hint="leave --output out for standard output")


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[BinaryIO]:
    """Open an output file that no other process is writing to."""
    try:
        file = cast(BinaryIO, open(path, mode))  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"the output file {path} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                hint = "wait until it is done, or name another file"
                raise UsageError(f"another process is writing the output file {path}", hint=hint) from None
        yield file
