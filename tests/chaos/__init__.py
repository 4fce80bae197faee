"""The chaos suite: faults put into every place where the store can meet them, and what became of each.

`scripts/chaos` runs it whole and `tests/store/test_chaos.py` a selection. Each module is one family of faults, with a
function `run` that yields tallies. The compiler is pretended, and no torch is imported.
"""
