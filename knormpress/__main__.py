"""``python -m knormpress`` is the ``knormpress`` command."""

import sys

from knormpress.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
