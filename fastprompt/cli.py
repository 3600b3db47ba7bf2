"""The command `fastprompt`. Each command imports what it needs, so that `--help` does not import torch."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    _add_calibrate(commands)
    if given[:1] == ["demo"]:
        print(f"fastprompt: error: {DEMO_MOVED}", file=sys.stderr)
        return 2
    args = parser.parse_args(given)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, for example `head`, is gone; Python must not write at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Mistake as error:
        print(f"fastprompt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastprompt: interrupted", file=sys.stderr)
        return 130


class Mistake(Exception):
    """What the user asked for cannot be done; the message says why."""


def _backends(args: argparse.Namespace) -> None:
    import fastprompt

    print(fastprompt.backends())


def _add_calibrate(commands: Any) -> None:
    text = "measure this machine's GPU, and write the profile that later calls follow"
    parser = commands.add_parser("calibrate", help=text, description=text)
    parser.add_argument(
        "--models", help="timm models, separated by commas; default ViT-S, B, L at 224 and 384"
    )
    parser.add_argument("--batch", type=int, help="images of a call; default 64")
    parser.add_argument("--prompts", help="numbers of prompts, separated by commas; default 50,10,100,0")
    parser.add_argument("--dtypes", help="default bfloat16,float32")
    parser.add_argument(
        "--out", help="the file to write; default FASTPROMPT_PROFILE, else in the user's cache folder"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which nothing new is begun; default 600"
    )
    parser.add_argument("--workers", type=int, help="processes that compile; default up to four")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="run it all on tiny shapes without a GPU; no times"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the profile in force, or why there is none"
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> None:
    if args.dry_run_cpu:
        # Read when Triton is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import fastprompt
    from fastprompt.calibration.show import shown

    if args.show:
        print(shown())
        return
    lists = {name: value.split(",") for name in ("models", "dtypes") if (value := getattr(args, name))}
    single = {name: getattr(args, name) for name in ("batch", "out", "time_limit", "workers")}
    options: dict[str, Any] = {
        **lists,
        **{name: value for name, value in single.items() if value is not None},
    }
    try:
        if args.prompts:
            options["prompts"] = [int(number) for number in args.prompts.split(",")]
        fastprompt.calibrate(**options, dry_run=args.dry_run_cpu, say=partial(print, flush=True))
    except (ValueError, RuntimeError) as error:
        raise Mistake(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
