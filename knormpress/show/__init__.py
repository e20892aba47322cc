"""Show results: tables and progress in the terminal, pictures, and the HTML page. No torch.

Imports ``records``, ``compare`` and ``stats``; only ``cli`` and ``pytest_plugin`` import it.
"""
