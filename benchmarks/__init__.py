"""How fast the package is, as ratios that are measured side by side in one run. ``python -m benchmarks --help``."""
