"""One command a file, as far as cli.py does not hold it; cli.py registers them. Heavy imports belong in functions."""
