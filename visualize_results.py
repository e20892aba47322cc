"""Draw the pictures into the current folder. The same as ``knormpress plot --output .``."""

import sys

from knormpress.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["plot", "--output", ".", *sys.argv[1:]]))
