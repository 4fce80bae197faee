"""The command line: parses, calls the library, prints. One file per noun; nothing here decides anything."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Any

import click

from nanogpt_buckets import __version__
from nanogpt_buckets.cli import output
from nanogpt_buckets.errors import BucketsError, UsageError

_DEBUG_VARIABLE = "NANOGPT_BUCKETS_DEBUG"

_COMMANDS = {
    "plan": "Choose the buckets that cost given traffic the least.",
    "build": "Compile the buckets of a plan that are not built yet.",
    "generate": "Continue a prompt.",
    "score": "Say how likely texts are: log-probabilities and perplexity.",
    "status": "Say which buckets of a plan are built.",
    "bench": "Time the built buckets and compare them with the eager model.",
    "report": "Say what the last run on this machine did.",
    "doctor": "Say what works on this machine and what is wrong.",
    "cache": "Look at the cache, copy it, clear it: dir, ls, show, verify, push, pull, rm, prune.",
    "trust": "Say whose signatures count: ls, add, revoke.",
}


class _Group(click.Group):
    """Imports a command when it is called, so that none waits for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command; one that does not exist may be another, misspelt."""
        if cmd_name in _COMMANDS:
            module = importlib.import_module(f"{__name__}.{cmd_name}")
            command: click.Command = getattr(module, cmd_name)
            return command
        if alike := difflib.get_close_matches(cmd_name, _COMMANDS, n=1):
            ctx.fail(f"No such command '{cmd_name}'. Did you mean '{alike[0]}'?")
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; what it cannot take, its help explains."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            error.hint = error.hint or _see_help(f"{ctx.command_path} {ctx.invoked_subcommand}")
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def _see_help(command: str) -> str:
    return f"{command} --help says what it takes"


_EPILOG = (
    "Exit codes: 0 ok, 1 negative answer or known failure, 2 usage, 3 not built and compiling not allowed, "
    "4 damage, 5 a bucket failed to compile, 6 untrusted, 7 incompatible, 130 interrupted."
)


@click.command(
    cls=_Group,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_new_tokens, as nanoGPT spells it
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="nanogpt-buckets")
def cli() -> None:
    """Compile a nanoGPT/GPT-2 step once per shape bucket, and run the cheapest bucket that fits."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code."""
    output.open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    output.set_verbosity(output.NORMAL)
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    """Run a command and return its exit code; say what went wrong."""
    try:
        result: Any = cli.main(arguments, prog_name="nanogpt-buckets", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nanogpt-buckets"
        output.error(UsageError(error.format_message().rstrip("."), hint=_see_help(command)))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        output.complain("interrupted")
        return 130
    except BrokenPipeError:
        output.forget_stdout()  # the reader has gone, and knows
        return 1
    except Exception as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        known = error if isinstance(error, BucketsError) else _unexpected(error)
        output.error(known)
        return known.exit_code


def _unexpected(error: Exception) -> BucketsError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError | MemoryError):  # a full disk or a limit reached where nobody expected it
        output.flush_or_forget()
        return BucketsError(f"the system refused: {reason}", hint="nanogpt-buckets doctor looks for the cause")
    return BucketsError(reason, hint=f"this is a bug in nanogpt-buckets; {_DEBUG_VARIABLE}=1 shows where")
