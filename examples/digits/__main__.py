"""The command line of the demo: `python -m examples.digits`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("sklearn", "matplotlib", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code; a mistake of the caller exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a small ViT on the digits 0 to 4, freeze it, and tune prompts on 200 images of the digits "
        "5 to 9. Writes a table (results.json, results.md) and a figure (results.png).",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder of the results (demo-out)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="draws of labelled images to average over (3)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of seconds without meaningful numbers"
    )
    options = parser.parse_args(arguments)
    if options.seeds is not None and not 1 <= options.seeds <= 100:
        parser.error(f"--seeds must be 1 to 100; got {options.seeds}")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not found; run pip install -e '.[train]'")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").touch()  # fail now, not after minutes of training
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}; name another folder")

    from examples.digits.terminal import show

    show(options.out, seeds=options.seeds, quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
