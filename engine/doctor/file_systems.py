"""On what kind of file system a folder lies, read from the kernel's own list of mounts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorasmith.engine.doctor.check import is_wsl

MOUNTS: Final = Path("/proc/self/mountinfo")
NETWORK: Final = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "9p"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.glusterfs", "fuse.juicefs", "fuse.blobfuse2"),
    )
)
"""Kinds whose files lie on another machine."""
WINDOWS: Final = frozenset({"9p", "drvfs", "v9fs"})
"""Kinds by which WSL shows the drives of Windows."""
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
WITHOUT_LINKS: Final = frozenset({"vfat", "msdos", "exfat", "fuseblk", "ntfs", "ntfs3"})
"""Kinds without symbolic links or without Unix permissions, for which downloads take double room."""


@dataclass(frozen=True)
class FileSystem:
    """The file system of a folder: the kernel's name of its kind ("" where unknown), and where it is mounted."""

    kind: str
    mounted_at: str

    @property
    def is_windows(self) -> bool:
        """Whether it is a drive of Windows seen from WSL."""
        return self.kind in WINDOWS and is_wsl()

    @property
    def is_network(self) -> bool:
        """Whether its files lie on another machine."""
        return self.kind in NETWORK and not self.is_windows


def file_system_of(folder: Path, mounts: Path = MOUNTS) -> FileSystem:
    """Return the file system on which an existing `folder` lies; never raises."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        place = folder.resolve()
    except OSError:
        return FileSystem("", "")
    best = FileSystem("", "")
    for line in lines:
        # man proc_pid_mountinfo: … root, mount point, options, optional fields, "-", kind, source, options.
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")[0]
        if len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        # A later mount covers an earlier one on the same point.
        if place.is_relative_to(point) and len(point) >= len(best.mounted_at):
            best = FileSystem(kind, point)
    return best
