"""The command `fastprompt`. Each command imports what it needs, so that `--help` does not import torch."""

import argparse
import os
import sys
from collections.abc import Sequence

from fastprompt import __version__

DEMO_MOVED = (
    "the demo is not part of the package: in a checkout of the repository, run `make demo` or "
    "`python -m examples.digits`"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; wrong usage exits with 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="fastprompt", description="Fast, exact visual prompt tuning of timm Vision Transformers."
    )
    parser.add_argument("--version", action="version", version=f"fastprompt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser(
        "backends", help="show which backends support which operations on this machine"
    ).set_defaults(run=_backends)
    if given[:1] == ["demo"]:
        print(f"fastprompt: error: {DEMO_MOVED}", file=sys.stderr)
        return 2
    args = parser.parse_args(given)
    try:
        args.run()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, for example `head`, is gone; Python must not write at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fastprompt: interrupted", file=sys.stderr)
        return 130


def _backends() -> None:
    import fastprompt

    print(fastprompt.backends())


if __name__ == "__main__":
    sys.exit(main())
