"""``python -m knormpress`` and ``knormpress`` are the same command."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; where the packages of the extra ``harness`` are not installed, say so in one line."""
    try:
        from knormpress.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print('error: the commands are not installed; pip install "knormpress[harness]"', file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
