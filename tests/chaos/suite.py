"""The families by number."""

from __future__ import annotations

from chaos import damaged, failing, killed, pruned, raced

FAMILIES = {1: killed.run, 2: damaged.run, 3: raced.run, 4: pruned.run, 5: failing.run}
