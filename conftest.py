"""What every test needs, whatever it is about."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["pytester"]

# A time limit for each example fails on a busy machine, and says nothing about the code.
settings.register_profile("knormpress", deadline=None, print_blob=True)
settings.load_profile("knormpress")
