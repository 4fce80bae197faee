"""Every error a user can meet, with the hint that gets them out of it and the exit code the command line returns.

Knows nothing of how errors are shown: only `cli/` prints. Imports nothing of the project.
"""

from __future__ import annotations

import re

# What a terminal obeys rather than shows, what reorders the text around it, and what is no character at all.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Return text that is safe on a terminal, whoever wrote it: controls become escapes, but for those to `keep`."""
    return _UNSHOWN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class BucketsError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: one sentence, without a full stop, holding the user's own value; made `printable` here, for all.
        hint: what to do, preferably a command that can be pasted; None gives the hint usual for the kind of error.
    """

    exit_code = 1
    usual_hint: str | None = None
    log = ""  # the end of what a child that raised this wrote on stderr

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        super().__init__(self.message)
        self.hint = self.usual_hint if hint is None else printable(hint, "\n")
        if self.hint:
            self.add_note(f"hint: {self.hint}")  # so that a traceback shows it, too


def named(kind: str) -> type[BucketsError] | None:
    """Return the error class of this name, as another process wrote it, or None if there is none."""
    found = globals().get(kind)
    return found if isinstance(found, type) and issubclass(found, BucketsError) else None


class UsageError(BucketsError, ValueError):
    """An argument that cannot be right, whatever the state of the machine."""

    exit_code = 2


class PlanError(UsageError):
    """A bucket or plan that this model cannot have."""


class ModelError(BucketsError):
    """The model cannot be used."""

    usual_hint = "see that the file is there and that this user may read it"


class ModelNotFound(ModelError, FileNotFoundError):
    """No such model, file, or local copy of the weights."""


class UnsupportedModel(ModelError):
    """A model we could read but would not compute exactly."""

    usual_hint = "what can be used: gpt2 to gpt2-xl, folders of class GPT2LMHeadModel, checkpoints of nanoGPT"


class CheckpointDamaged(ModelError):
    """A checkpoint that is truncated, is something else, or holds pickled objects we refuse."""

    usual_hint = "copy, download or save the model again; nothing of it was used"


class TokenizerError(BucketsError, ValueError):
    """There is no tokenizer, or it is not the one this model was trained with."""

    usual_hint = "give the tokenizer the model was trained with: --tokenizer and a meta.pkl, a folder, or gpt2"


class UnknownCharacter(TokenizerError):
    """Text outside a character-level vocabulary."""


class BackendUnavailable(BucketsError):
    """The backend or target asked for cannot be used on this machine."""


class DeviceError(BucketsError):
    """An accelerator did not do what it was asked."""

    usual_hint = "nanogpt-buckets doctor examines the device; nothing in the cache was changed"


class NonFiniteLogits(BucketsError, ArithmeticError):
    """A bucket returned NaN or infinity, so there is nothing to sample from."""


class CompileFailed(BucketsError):
    """At least one bucket could not be compiled or did not pass the gate."""

    exit_code = 5
    usual_hint = "nanogpt-buckets doctor examines the compiler"


class GateFailed(CompileFailed):
    """A compiled bucket does not compute what the eager model computes."""

    usual_hint = "it was thrown away; --backend eager runs without compiling, another --target may compile rightly"


class ChildFailed(BucketsError):
    """A child process ended without a result."""

    usual_hint = "run it again; if it fails again, nanogpt-buckets doctor looks for the cause"


class CacheError(BucketsError):
    """The cache directory cannot be used."""

    usual_hint = "nanogpt-buckets doctor examines the cache directory"


class TransientError(CacheError):
    """The cache could not be read or written this time; nothing stored was changed."""

    usual_hint = "nothing was changed; try again, and if it fails again ask nanogpt-buckets doctor"


class CacheMiss(CacheError):
    """No compiled bucket reaches the request, and compiling was not allowed."""

    exit_code = 3


class CorruptEntry(CacheError):
    """Stored bytes are not what their digest says they are."""

    exit_code = 4
    usual_hint = "nanogpt-buckets build compiles what is damaged again"


class UntrustedStore(CacheError):
    """Someone else could have written the native code that would be run."""

    exit_code = 6


class IncompatibleEntry(CacheError):
    """Made for another machine or by a newer release; left alone."""

    exit_code = 7
    usual_hint = "nanogpt-buckets build compiles one for this machine"
