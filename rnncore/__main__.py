"""`python -m rnncore`: what runs here, why, and how fast."""

from __future__ import annotations

import argparse
import sys

from rnncore._command import bench, doctor, explain


def parser() -> argparse.ArgumentParser:
    """With a subcommand for each of doctor, explain and bench."""
    made = argparse.ArgumentParser(prog="python -m rnncore", description="What runs here, why, and how fast.")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (doctor, explain, bench):
        summary, _, details = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            module.__name__.rpartition(".")[2], help=summary, description=summary, epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_options(command)
        command.set_defaults(main=module.main)
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs a command; exit status 0, 2 for what cannot be run, 130 where it was interrupted."""
    args = parser().parse_args(argv)
    try:
        return args.main(args)
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"python -m rnncore {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
