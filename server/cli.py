"""The command line: `foretoken serve | chat | bench | build-trigram | train-ctc | check-model`.

Each command lives in its own module, imported only when it runs, so that help and mistakes answer at once.
A mistake of the user is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from server import default_model
from server.config import Settings, SettingsError, add_flags, did_you_mean, load, unknown_flag
from server.errors import StartupError
from server.worker_process import WorkerProcess

COMMANDS = {
    "serve": ("server.cli", "serve a model over HTTP, in OpenAI's format; without one, SmolLM2-135M"),
    "chat": ("server.commands.chat", "talk to a running server in the terminal"),
    "bench": ("server.commands.bench", "measure a running server with speculation on and off"),
    "build-trigram": ("training.build_trigram", "make a corpus table for the tri-gram drafter"),
    "train-ctc": ("training.train_ctc", "train a CTC head for a model on the model's own answers"),
    "check-model": ("server.commands.check_model", "tell whether a model can be served, and in how much memory"),
}
"""Name -> module with `add_arguments(parser)` and `run(arguments) -> exit code`, and its help line."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are SettingsErrors, and which never guesses abbreviated flags."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage: one line, told by `main`."""
        raise SettingsError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. 2 means that what the user passed cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except StartupError as error:
        print(f"foretoken: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`foretoken bench | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"foretoken {version('foretoken')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise SettingsError(f"no such command: {name}{did_you_mean(name, COMMANDS)} (see `foretoken --help`)")
    module = importlib.import_module(COMMANDS[name][0])
    parser = CommandParser(prog=f"foretoken {name}", description=COMMANDS[name][1][0].upper() + COMMANDS[name][1][1:])
    module.add_arguments(parser)
    arguments, extra = parser.parse_known_args(rest)
    if extra:
        raise _extra_error(name, parser, extra)
    run = cast("Callable[[argparse.Namespace], int]", module.run)
    return run(arguments)


def _extra_error(name: str, parser: argparse.ArgumentParser, extra: list[str]) -> SettingsError:
    flag = next((word for word in extra if word.startswith("-")), None)
    if flag is None:
        return SettingsError(f"one argument too many: {extra[0]} (see `foretoken {name} --help`)")
    if name == "serve":
        return unknown_flag(flag)
    flag = flag.split("=", 1)[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return SettingsError(f"{flag}: no such flag{did_you_mean(flag, known)} (see `foretoken {name} --help`)")


def _help() -> str:
    lines = [
        "usage: foretoken COMMAND ...",
        "",
        "An inference server that answers faster without changing what it says.",
        "",
    ]
    lines += [f"  {name:<15}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "`foretoken COMMAND --help` tells the flags of a command."]
    return "\n".join(lines)


# ---- serve: only its flags live here, so that a wrong one is told before anything heavy is imported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken serve`: one for each setting, and MODEL as its first word."""
    parser.add_argument(
        "model_word",
        nargs="?",
        metavar="MODEL",
        help="folder, GGUF file or Hub id, as --model; none: the default model",
    )
    add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """`foretoken serve`: settings from all sources, then the server until it is told to stop."""
    flags = dict(vars(arguments))
    word = flags.pop("model_word")
    if word is not None and flags.setdefault("model", word) != word:
        raise SettingsError(f"two models: {word} and --model {flags['model']}; pass one")
    settings = load(flags, os.environ, without_model=default_model.defaults())
    if default_model.is_default(settings.model):
        _check_meant(settings, flags)
    worker = WorkerProcess()  # it imports for seconds, beside what this process imports
    try:
        from server.commands.serve import serve

        return serve(settings, worker)
    except BaseException:
        worker.close()
        raise


def _check_meant(settings: Settings, flags: Mapping[str, Any]) -> None:
    """No model was named: refuse what shows that one was meant, rather than serve the default model instead."""
    if settings.revision:
        raise SettingsError(f"--revision {settings.revision}: names a version of a Hub model, and no model is given")
    for name in ("api_key", "served_model_name"):
        words = flags.get(name, ())
        if len(words) > 1 and "/" in words[-1]:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(
                f"no model given, and {flag} ends in {words[-1]}: it takes every word after it, so write MODEL first"
            )


if __name__ == "__main__":
    sys.exit(main())
