"""Studies of dam.flows, a module each: `python -m benchmarks.flows`."""
