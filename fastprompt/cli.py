"""The command `fastprompt`. Sub-commands import what they need themselves, so that `--help` costs nothing."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


class UsageError(Exception):
    """A mistake of the caller; printed as one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a mistake of the caller."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"fastprompt: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` for one, has gone; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fastprompt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastprompt", description="Fast, exact visual prompt tuning of timm Vision Transformers."
    )
    parser.add_argument("--version", action=_Version, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="prompt tuning on real handwritten digits against a linear probe, in minutes on a CPU",
        description="Train a small ViT on the digits 0-4, freeze it, tune prompts on 200 images of the digits 5-9, "
        "and write a table (results.json, results.md) and a figure (results.png).",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder for the results (demo-out)"
    )
    demo.add_argument(
        "--seeds", type=int, metavar="N", help="draws of labelled images to average over (default: 3)"
    )
    demo.add_argument("--quick", action="store_true", help="a smoke run of seconds; its numbers mean nothing")
    demo.set_defaults(run=_demo)

    backends = commands.add_parser("backends", help="which backends serve which operations here, or why not")
    backends.set_defaults(run=_backends)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fastprompt import __version__

        print(f"fastprompt {__version__}")
        parser.exit()


def _backends(args: argparse.Namespace) -> int:
    import fastprompt

    print(fastprompt.backends())
    return 0


def _demo(args: argparse.Namespace) -> int:
    if args.seeds is not None and not 1 <= args.seeds <= 100:
        raise UsageError(f"--seeds must lie in 1..100; got {args.seeds}")
    missing = [name for name in ("sklearn", "matplotlib", "rich") if not _installed(name)]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}; run pip install 'fastprompt[train]'")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # Found out now, not after minutes of training.
        (args.out / "results.json").touch()
    except OSError as error:
        raise UsageError(
            f"--out {args.out} cannot be written: {error.strerror}; name another folder"
        ) from error

    from fastprompt.demo.terminal import show

    show(args.out, seeds=args.seeds, quick=args.quick)
    return 0


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


if __name__ == "__main__":
    sys.exit(main())
