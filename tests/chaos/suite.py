"""The families by number."""

from __future__ import annotations

from chaos import damaged, failing, killed, proxied, pruned, raced

FAMILIES = {1: killed.run, 2: damaged.run, 3: raced.run, 4: pruned.run, 5: failing.run, 6: proxied.run}
LONGEST_FIRST = (5, 1, 6, 3, 7, 2, 4, 8, 9)
