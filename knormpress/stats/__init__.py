"""Statistics: arrays in, intervals and decisions out. No torch.

Imports none of the other folders; any of them may import it.
"""
