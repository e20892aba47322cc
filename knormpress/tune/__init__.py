"""The search for a plan: one keep ratio per layer, to keep as few tokens as possible within an allowed loss.

Imports ``measure`` and what that imports; only ``cli`` imports it.
"""
