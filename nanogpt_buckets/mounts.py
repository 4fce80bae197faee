"""Which file system a path is on, as Linux tells it: its type, whether it is shared over a network, read-only, noexec.

Knows nothing of what is stored there. Elsewhere than on Linux every answer is "unknown" and says nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    ("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "wekafs")
)
_NETWORK_STARTS = ("virtiofs", "fuse.gcs", "fuse.glusterfs", "fuse.mount-s3", "fuse.s3", "fuse.sshfs")
# What acdirmax is where the table does not say it.
_NFS_KEEPS_S = 60


@dataclass(frozen=True)
class Mount:
    """A mounted file system: where, of what kind ("ext4", "nfs4"), and the options of both, for example "noexec"."""

    point: str = ""
    kind: str = "unknown"
    options: frozenset[str] = frozenset()

    @property
    def network(self) -> bool:
        """Whether other machines see the same files."""
        return self.kind in _NETWORK or self.kind.startswith(_NETWORK_STARTS)

    @property
    def names_kept_s(self) -> int:
        """For how long this machine may not see what another one named; 0 if it sees that at once or nobody knows."""
        if not self.kind.startswith("nfs") or self.options & {"noac", "lookupcache=none", "lookupcache=pos"}:
            return 0
        said = [option.removeprefix("acdirmax=") for option in self.options if option.startswith("acdirmax=")]
        return int(said[0]) if said and said[0].isdecimal() else _NFS_KEEPS_S


def mount_of(path: Path) -> Mount:
    """Return the file system that holds a path, or would hold it if it were made."""
    best = Mount()
    try:
        text = _TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return best
    place = os.path.realpath(path)
    for line in text.splitlines():
        mount = _parse(line)
        inside = place == mount.point or place.startswith(mount.point.rstrip("/") + "/")
        if inside and len(mount.point) >= len(best.point):  # of two on one point the later hides the earlier
            best = mount
    return best


def _parse(line: str) -> Mount:
    # ID PARENT DEV ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS; blanks are octal escapes
    left, _, right = line.partition(" - ")
    point, options = left.split()[4:6]
    kind, *rest = right.split()
    everything = {*options.split(","), *(rest[-1].split(",") if rest else ())}
    return Mount(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point), kind, frozenset(everything))
