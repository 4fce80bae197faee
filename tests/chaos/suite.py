"""The families by number: what each is about, and its function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from chaos import attacked, damaged, failing, hosts, killed, proxied, pruned, raced, releases
from chaos.kit import Tally, Task

FAMILIES: dict[int, tuple[str, Callable[[Task], Iterator[Tally]]]] = {
    1: ("a writer killed at each file-system call", killed.run),
    2: ("each byte and each length of a file, files exchanged", damaged.run),
    3: ("8 builders at once: locks real, lying, timing out", raced.run),
    4: ("readers beside prune and rm of everything", pruned.run),
    5: ("ENOSPC, EROFS, EDQUOT, EACCES, ESTALE, EBUSY, EIO from each call", failing.run),
    6: ("an object store that fails, at each request", proxied.run),
    7: ("policy x location x attack", attacked.run),
    8: ("two hosts and users, clocks a day apart", hosts.run),
    9: ("two releases on one directory", releases.run),
}
LONGEST_FIRST = (5, 1, 6, 3, 7, 2, 4, 8, 9)
