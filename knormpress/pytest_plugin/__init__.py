"""The pytest plugin: options, fixtures that measure and gate, and the comparison of a run with stored runs.

It imports the measuring code only when a test needs it, so that pytest starts without torch; nothing imports it.
"""
