"""Load on the example app of docs/examples/serving: ``python -m bench.serve``."""
