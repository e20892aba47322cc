"""What a stranger gets from the wheel; `tox -e package` and `tox -e install` run this away from the checkout."""

from __future__ import annotations

import subprocess
import sysconfig
from importlib import metadata, resources
from pathlib import Path

import knormpress

ROOT = Path(__file__).parents[1]
SCRIPTS = sysconfig.get_path("scripts")


def main() -> None:
    """Fails where the wheel left something out."""
    package = Path(str(resources.files(knormpress)))
    assert package != ROOT / "knormpress", "the checkout was imported"
    assert metadata.version("knormpress") == knormpress.__version__
    for file in ("py.typed", *(f"plans/{path.name}" for path in (ROOT / "knormpress" / "plans").iterdir())):
        assert (package / file).is_file(), f"the wheel has no {file}"
    done = subprocess.run([f"{SCRIPTS}/knormpress", "--help"], capture_output=True, text=True, check=True)
    assert "sweep" in done.stdout
    print(f"knormpress {knormpress.__version__} is whole: {package}")


main()
