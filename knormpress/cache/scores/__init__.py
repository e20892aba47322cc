"""The built-in scores, each with its source, and their names. ``cache.score`` says what a score is."""
