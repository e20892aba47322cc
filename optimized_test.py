"""Measure pruned caches against the full one. The same as ``knormpress sweep``."""

import sys

from knormpress.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
