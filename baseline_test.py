"""Measure the full cache, the first step of the quick guide. The same as ``knormpress baseline``."""

import sys

from knormpress.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["baseline", *sys.argv[1:]]))
