"""Measurements: `python -m bench.run` writes rows as data, `python -m bench.report` makes README's table of them."""
