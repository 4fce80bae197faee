"""The command line: parses, calls the library, prints. One file per noun; nothing here decides anything.

Exit codes: 0 ok, 1 a negative answer or a known failure, 2 usage, 3 a miss where compiling was not allowed, 4 damage,
5 a bucket failed to compile, 6 untrusted, 7 incompatible, 130 interrupted.
"""

from __future__ import annotations

import difflib
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
    "build": ("nanogpt_buckets.cli.build", "Compile the buckets of a plan that are not built yet."),
    "generate": ("nanogpt_buckets.cli.generate", "Continue a prompt."),
    "status": ("nanogpt_buckets.cli.status", "Say which buckets of a plan are built."),
    "bench": ("nanogpt_buckets.cli.bench", "Time the built buckets and compare them with the eager model."),
    "report": ("nanogpt_buckets.cli.report", "Say what the last run on this machine did."),
    "doctor": ("nanogpt_buckets.cli.doctor", "Say what works on this machine and what is wrong."),
    "cache": ("nanogpt_buckets.cli.cache", "Look at the cache and clear it: dir, ls, show, verify, rm, prune."),
}


class _Group(click.Group):
    """Imports a command when it is called, so that none waits for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        import importlib

        command: click.Command = getattr(importlib.import_module(_COMMANDS[cmd_name][0]), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; one that does not exist may be another, misspelt."""
        alike = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if alike and args[0] not in _COMMANDS:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{alike[0]}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; what it cannot take, its help explains."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            error.hint = error.hint or _see_help(f"{ctx.command_path} {ctx.invoked_subcommand}")
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _see_help(command: str) -> str:
    return f"{command} --help says what it takes"


def _dashes(name: str) -> str:
    """Accept --max_new_tokens, as nanoGPT spells it, for --max-new-tokens."""
    return name.replace("_", "-")


_EPILOG = (
    "Exit codes: 0 ok, 1 negative answer or known failure, 2 usage, 3 not built and compiling not allowed, "
    "4 damage, 5 a bucket failed to compile, 6 untrusted, 7 incompatible, 130 interrupted."
)


@click.command(
    cls=_Group,
    context_settings={"token_normalize_func": _dashes, "help_option_names": ["-h", "--help"], "max_content_width": 100},
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
    try:
        result: Any = cli.main(arguments, prog_name="nanogpt-buckets", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nanogpt-buckets"
        output.error(UsageError(error.format_message().rstrip("."), hint=_see_help(command)))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        output.complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        output.forget_stdout()  # the reader has gone, and knows
        sys.exit(1)
    except BucketsError as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        output.error(error)
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:  # a full disk or a limit reached where nobody expected it
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        output.flush_or_forget()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        output.error(BucketsError(f"the system refused: {reason}", hint="nanogpt-buckets doctor looks for the cause"))
        sys.exit(1)
    except Exception as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        output.complain(f"error: {type(error).__name__}: {error}".splitlines()[0])
        output.complain(f"hint: this is a bug in nanogpt-buckets; {_DEBUG_VARIABLE}=1 shows where")
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)
