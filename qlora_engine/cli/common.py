"""What all commands share: errors on one line, recipe files, KEY=VALUE options, plain output where wanted."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click
from rich.console import Console

from qlora_engine.distributed import leave, lost_another, say_once
from qlora_engine.errors import InputError, did_you_mean
from qlora_engine.files import at_home

INTERRUPTED = 130  # as a shell reports SIGINT
_NAMES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-,")


def one_line(text: object) -> str:
    """``text`` without line breaks and control characters (names come from files of strangers)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def describe_os_error(error: OSError) -> str:
    """What went wrong and where, on one line."""
    if error.errno == errno.ENOSPC and error.filename is None and error.strerror:
        return f"no space left on the disk: {error.strerror}" if "free" in error.strerror else error.strerror
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def fail(program: str, message: object) -> NoReturn:
    """Print one line to stderr (one process of torchrun's does) and exit with status 2."""
    line = f"{program}: error: {one_line(message)}"
    say_once(lambda: print(line, file=sys.stderr, flush=True))
    raise SystemExit(2)


def kept_work(out: Path | None, what: str) -> str:
    """What to add to an error of a run that writes ``out``, once finished ``what`` lies in its workspace."""
    from qlora_engine.workspace import RUN_FILE, Workspace

    if out is None:
        return ""
    root = Workspace.folder_for(Path(os.path.realpath(out)))
    kept = os.path.exists(root / RUN_FILE)  # where Path.exists raises, for a name that is too long, False
    return f"; finished {what} are kept in {root}, --resume goes on" if kept else ""


def run_command(
    program: str,
    command: click.Command,
    arguments: Sequence[str] | None = None,
    *,
    hint: Callable[[], str] = lambda: "",
) -> NoReturn:
    """Run a click command as a process: 0 done, 2 the user's input or the disk, 130 interrupted.

    Any other exception is a bug in this program and keeps its traceback. Of several processes that torchrun
    started, one prints the line.

    Args:
        program: Its name, in messages.
        command: What to run.
        arguments: Instead of the process's own.
        hint: What to add to an error of the disk or an interruption, e.g. how to go on.
    """
    try:
        status = command.main(args=arguments, prog_name=program, standalone_mode=False)
        leave()
    except click.UsageError as error:
        fail(program, f"{error.format_message()} (see {program} --help)")
    except click.ClickException as error:
        fail(program, error.format_message())
    except InputError as error:
        fail(program, error)
    except OSError as error:
        fail(program, f"{describe_os_error(error)}{hint()}")
    except (KeyboardInterrupt, click.Abort):
        print(f"{program}: interrupted{hint()}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BaseException as error:
        if not lost_another(error):
            raise
        fail(program, f"another process of this run has ended{hint()}")
    raise SystemExit(status if isinstance(status, int) else 0)


def package_version() -> str:
    """This package's version."""
    try:
        return metadata.version("qlora-engine")
    except metadata.PackageNotFoundError:
        return "not installed"


def _forget_stdout() -> None:
    """The reader of our output has gone (head, less): go on with the work, and print to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class _Console(Console):
    """rich's, but for ending the process when the reader of the output goes away."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _forget_stdout()


def emit(text: str) -> None:
    """Print one line to stdout at once."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _forget_stdout()


def console(stream: TextIO, *, quiet: bool = False) -> Console:
    """A console that honours NO_COLOR and is plain where ``stream`` is not a terminal."""
    width = None if stream.isatty() else int(os.environ.get("COLUMNS", "100"))
    return _Console(file=stream, quiet=quiet, highlight=False, soft_wrap=False, width=width)


def parse_pairs(option: str, texts: Sequence[str], convert: Callable[[str], Any]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a dict; the key may hold ``=``, the value may not.

    Raises:
        InputError: no ``=``, an empty side, a key given twice, or a value that ``convert`` refuses.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.rpartition("=")
        if not (separator and key and value):
            raise InputError(f"{option} {text!r} is not of the form REGEX=VALUE")
        if key in found:
            raise InputError(f"{option} gives '{key}' twice")
        try:
            found[key] = convert(value)
        except ValueError as error:
            raise InputError(f"{option} {text!r}: {error}") from error
    return found


def whole_number(text: str) -> int:
    """An integer, or a ValueError that says so in plain words."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A number, as an int where it is one."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    return int(value) if value == value // 1 and abs(value) < 1 << 53 else value


def parse_targets(option: str, values: Sequence[str]) -> tuple[str, ...] | str:
    """Module names (repeated or comma-separated), or one regex, or ``all-linear``.

    Raises:
        InputError: a regex together with anything else.
    """
    if len(values) == 1 and values[0].lower() == "all-linear":
        return "all-linear"
    regexes = [value for value in values if not _NAMES.issuperset(value)]
    if regexes:
        if len(values) > 1:
            raise InputError(
                f"{option}: give names, or one regular expression, not {regexes[0]!r} among others"
            )
        return regexes[0]
    return tuple(name for value in values for name in value.split(",") if name)


class UserPath(click.Path):
    """A path; ``~`` is the home folder also where no shell has seen it (quoted, ``--html=~/x.html``)."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The text as a Path."""
        return at_home(os.fspath(super().convert(value, param, ctx)))


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file, .toml, .yaml, .yml or .json: one table of option names and values.

    Raises:
        InputError: no such file, another ending, not readable, or not a table.
    """
    path = at_home(path)
    if not path.is_file():
        raise InputError(f"--config: no such file: {path}")
    if path.stat().st_size > 10_000_000:
        raise InputError(f"--config: {path} is larger than 10 MB")
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        values = _parser(path)(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config: {path} must hold a table of options")
    return values


def _parser(path: Path) -> Callable[[str], Any]:
    ending = path.suffix.lower()
    if ending == ".json":
        return json.loads
    if ending == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        return tomllib.loads
    if ending in (".yaml", ".yml"):
        import yaml

        class Loader(yaml.SafeLoader):
            """Without aliases: a few lines of them stand for billions of values."""

            def compose_node(self, parent: Any, index: Any) -> Any:
                if self.check_event(yaml.AliasEvent):
                    raise yaml.YAMLError("aliases (*name) are not accepted")
                return super().compose_node(parent, index)

        def load(text: str) -> Any:
            try:
                return yaml.load(text, Loader)
            except yaml.YAMLError as error:
                raise ValueError(one_line(error)) from error

        return load
    raise InputError(f"--config: {path.name} must end in .toml, .yaml, .yml or .json")


def recipe_defaults(values: Mapping[Any, Any], command: click.Command) -> dict[str, Any]:
    """A recipe's values as click's defaults, so that the command line wins.

    Keys are the long options without their dashes, ``-`` or ``_`` within; a mapping stands for REGEX=VALUE
    pairs and a list for a repeated option.

    Raises:
        InputError: an unknown key (the nearest known one is named), or a value of a wrong kind.
    """
    parameters: dict[str, click.Parameter] = {}
    for parameter in command.params:
        names = [option.lstrip("-") for option in (*parameter.opts, *parameter.secondary_opts)]
        for name in (*names, parameter.name or ""):
            if name and parameter.name not in ("config", "help", "version"):
                parameters[name.replace("-", "_")] = parameter
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in parameters:
            near = did_you_mean(name, parameters).replace("_", "-")
            raise InputError(f"--config: unknown option {str(key)!r}{near}")
        parameter = parameters[name]
        assert parameter.name is not None
        if parameter.name in defaults:
            raise InputError(f"--config: {key!r} is given twice")
        defaults[parameter.name] = _recipe_value(str(key), value, parameter)
    return defaults


def _recipe_value(key: str, value: Any, parameter: click.Parameter) -> Any:
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    if is_flag != isinstance(value, bool):
        wanted = "true or false" if is_flag else "not true or false"
        raise InputError(f"--config: {key!r} is {value!r:.60}; it must be {wanted}")
    if is_flag:
        return value
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in value.items()]
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
        raise InputError(f"--config: {key!r} is {value!r:.60}; it must hold numbers and texts")
    if not parameter.multiple if isinstance(parameter, click.Option) else True:
        if len(items) != 1:
            raise InputError(f"--config: {key!r} takes one value, got {len(items)}")
        return str(items[0])
    return [str(item) for item in items]
