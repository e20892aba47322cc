"""What to keep: the policy as a value, and the part of a plan file that holds it. No torch.

Imports none of the other folders; any of them may import it.
"""
