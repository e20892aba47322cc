"""The nodes of a Ray cluster: connect to it, give its devices jobs, and hear how far they are.

It measures nothing: ``measure`` and ``tune``, which import it, say what a job is. Needs the extra ``cluster``; Ray is
imported inside functions. No torch.
"""
