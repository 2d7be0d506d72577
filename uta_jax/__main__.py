"""The command line, ``uta-jax COMMAND``: parses, calls one function, reports mistakes in a line."""

import argparse
import atexit
import gc
import sys

from uta_jax import UserError, __version__, quiet_tpu_library
from uta_jax.actions import ACTIONS, Command
from uta_jax.commands import COMMANDS


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other mistake is reported."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Once(argparse.Action):
    """An option with a value; given twice, the second would replace the first without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest, self.default) != self.default:
            parser.error(f"{option_string} is given twice, the second time as {values!r}: give one")
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="uta-jax",
        description="Unmasked Token Alignment in JAX: train, evaluate, convert, export.",
        epilog="Example: uta-jax train --config=configs/demo.py --workdir=runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"uta-jax {__version__}")
    _add_commands(parser, COMMANDS, "command", "COMMAND")
    return parser


def _add_commands(parser, commands: dict[str, Command], dest: str, metavar: str) -> None:
    subparsers = parser.add_subparsers(dest=dest, required=True, metavar=metavar)
    for name, command in commands.items():
        sub = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"Example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for argument, options in command.arguments:
            once = argument.startswith("-") and not options.keys() & {"action", "nargs"}
            sub.add_argument(argument, **({"action": _Once} if once else {}), **options)
        if name in ACTIONS:
            _add_commands(sub, ACTIONS[name], "action", "ACTION")


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code, or that of the mistake which it tells of in one line."""
    args, rest = _parser().parse_known_args(argv)
    quiet_tpu_library()
    takes_config = args.command in ("train", "plan")
    if rest and not (takes_config or str(getattr(args, "data", "")).endswith(".py")):
        name = f"uta-jax {args.command}"
        print(f"{name}: unexpected argument {rest[0]!r} (see {name} --help)", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args.command].run(args, rest) or 0
    except UserError as error:
        print(f"uta-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


# At its end the interpreter looks for cycles in all that JAX has traced: a second, for nothing.
atexit.register(gc.freeze)

if __name__ == "__main__":
    sys.exit(main())
