"""The pictures of sweeps, plans and stored runs, one module each; ``draw`` writes them to files."""
