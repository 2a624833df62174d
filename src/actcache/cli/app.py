"""The `actcache` command: its verbs, and what becomes of their errors."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from actcache._version import __version__
from actcache.cli.examples import epilog
from actcache.cli.options import Settings, debug_option
from actcache.errors import (
    ActCacheError,
    AmbiguousVariantError,
    LayerRangeError,
    OptionError,
    SiteUnavailableError,
    UnknownSiteError,
    did_you_mean,
)

# Verb -> what the list of verbs says of it. Kept here so that plain --help imports no verb.
VERBS = {
    "demo": "Run the main job on the model that is part of the package.",
    "warmup": "Extract and store what is not yet stored.",
    "plan": "Say what a warm-up would compute and write.",
    "info": "Report on the store: models, prompts, sizes.",
    "list": "List the prompts that are stored for a model.",
    "show": "Show what is stored for one prompt.",
    "lens": "Show what each layer of a model would predict.",
    "stats": "Report norms, spreads and storage errors of every site.",
    "import": "Bring in activations from elsewhere.",
    "push": "Publish what is stored for a model as a dataset.",
    "pull": "Let a dataset answer for its model, fetched when it is read.",
    "load": "Write activations of a dataset into a file.",
    "migrate": "Give last tokens of a dataset files of their own.",
    "upgrade": "Bring a dataset of format 1.x to 2.0.",
    "dataset-info": "Say what a dataset of the Hub or in a folder holds.",
    "report": "Write one HTML page about the store or a dataset.",
    "sites": "List the places of a model that can be read.",
    "selftest": "Prove on this machine that a model's activations are right.",
    "verify": "Check every byte of the store, or repair it.",
    "evict": "Bring the store below a size.",
    "invalidate": "Forget stored prompts, so that they are computed again.",
    "clear": "Delete what is stored, for a model or altogether.",
    "config": "Say which settings are in force, and where each comes from.",
    "version": "Print versions.",
}


# What was typed cannot be, though only the model or the store may tell. That something is not there to be found, as a
# model or a prompt, is a failure: it may be there tomorrow.
_WRONG_USAGE = (OptionError, UnknownSiteError, SiteUnavailableError, LayerRangeError, AmbiguousVariantError)


class _Stopped(Exception):
    """A verb was stopped by Ctrl-C or SIGTERM."""


class Verbs(click.Group):
    """A group that imports the module of a verb when the verb is used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would print an empty line, also where no terminal has begun one with ^C.
            raise _Stopped from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"actcache.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        command.epilog = epilog(cmd_name)
        if ctx.resilient_parsing:
            # A shell asks what could stand here.
            from actcache.cli.completion import teach

            teach(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}.{did_you_mean(args[0], VERBS)}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        ctx.ensure_object(Settings).verb = name or ""
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage. `actcache VERB --help` says more about a verb.",
)
@click.version_option(__version__, message="actcache %(version)s")
@debug_option
@click.pass_context
def app(ctx: click.Context) -> None:
    """Capture language-model activations once, keep them safe, and map them back into memory."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(args: Sequence[str]) -> int:
    """Run the command on `args`; the exit status."""
    settings = Settings()
    try:
        result = app.main(list(args), prog_name="actcache", standalone_mode=False, obj=settings)
        # A full pipe or disk shows itself here and not while Python shuts down.
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing failed, and nothing may be printed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (click.Abort, KeyboardInterrupt, _Stopped):
        if sys.stderr.isatty():
            click.echo(err=True)
        return _fail(f"stopped. {_STOPPED.get(settings.verb, 'The same command begins anew.')}", 1)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "actcache"
        return _fail(f"{error.format_message()} See `{verb} --help`.", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except Exception as error:
        if settings.debug:
            raise
        if isinstance(error, ActCacheError):
            message = _as_options(str(error), settings.verb)
            return _fail(message, 2 if isinstance(error, _WRONG_USAGE) else 1)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _as_options(message: str, verb: str) -> str:
    """A message in which parameters of functions (``exist_ok=True``, ``tensors=``) are called as the options of a verb
    that they are (``--exist-ok``, ``--tensors``), and the token as where the command takes it from."""
    command = app.get_command(click.Context(app), verb)
    named: dict[str, str] = {}
    for option in command.params if command is not None else ():
        if not isinstance(option, click.Option) or not option.name:
            continue
        named |= {f"{name.lstrip('-').replace('-', '_')}=": name for name in option.opts}
        if option.name == "label_column":
            named["labels="] = option.opts[0]
        if option.name == "metadata_columns":
            named["metadata="] = named["metadata_columns="] = option.opts[0]
        if option.is_flag:
            named[f"{option.name}=True"] = option.opts[0]
            named |= {f"{option.name}=False": other for other in option.secondary_opts[:1]}
    # A verb's --token is something else.
    named["token="] = "HF_TOKEN"
    message = message.replace("pass token=", "set HF_TOKEN")
    return re.sub(r"\b\w+=(?:(?:True|False)\b|(?=[\s.,;:)]|$))", lambda found: named.get(found[0], found[0]), message)


def _fail(message: str, status: int) -> int:
    click.echo(f"actcache: {' '.join(message.split())}", err=True)
    return status


_KEPT = "What was finished is stored: the same command goes on from there."
_GONE = "What has gone has gone, all else is as it was: the same command goes on from there."
_GOES_ON = "The same command goes on from there."
_STOPPED = {
    "warmup": _KEPT,
    "lens": f"{_KEPT} No file is half written.",
    "report": f"{_KEPT} No file is half written.",
    "import": "What was brought in is stored: the same command brings in the rest.",
    "push": _GOES_ON,
    "pull": f"What has come is kept. {_GOES_ON}",
    "load": "No file is half written: the same command begins anew.",
    "migrate": _GOES_ON,
    "upgrade": _GOES_ON,
    "verify": "The store is as good as before: the same command begins anew.",
    "evict": _GONE,
    "invalidate": _GONE,
    "clear": _GONE,
}
"""What is said of verbs that change something, when they are stopped."""


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    """Ctrl-C, or a scheduler that wants its machine back, ends with what is on its way just then, such as files
    that are sent; once more, and it ends at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    raise KeyboardInterrupt


def _end_at_once(_signal: int, _frame: object) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.write(2, b"actcache: stopped at once. What was on its way begins anew.\n")
    os._exit(1)


def _open_standard_streams() -> None:
    """Whatever was closed leads nowhere: else the next file that is opened, one of the store perhaps, had its number,
    and what a library prints would go into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def main() -> NoReturn:
    """The entry point of the console script."""
    _open_standard_streams()
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        # A prompt may hold characters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    status = run(sys.argv[1:])
    # A Ctrl-C that passed through source text which a library executes, as dataclasses do during an import, counts as
    # never caught, and `python -m` then ends by that signal, until other source text was executed.
    exec("")
    sys.exit(status)
