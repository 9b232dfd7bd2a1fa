"""A look at all nodes of a job just before it trains. :mod:`run` is the table of contents."""
