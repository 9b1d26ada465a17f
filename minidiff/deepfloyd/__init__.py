"""DeepFloyd IF's own parts, and what trains and judges a cascade; `minidiff/__init__.py` has the reading order."""
