"""One command for a visit to a GPU: `python -m bench.gpu --out DIR`."""
