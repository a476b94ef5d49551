"""Books that are programs: what ``tools/tangle.py`` is made of."""
