"""The families by number."""

from __future__ import annotations

from chaos import attacked, damaged, failing, hosts, killed, proxied, pruned, raced, releases

FAMILIES = {
    1: killed.run,
    2: damaged.run,
    3: raced.run,
    4: pruned.run,
    5: failing.run,
    6: proxied.run,
    7: attacked.run,
    8: hosts.run,
    9: releases.run,
}
LONGEST_FIRST = (5, 1, 6, 3, 7, 2, 4, 8, 9)
