"""A folder as one machine sees it over a network file system: python network_disk.py DISK MOUNT SECONDS.

MOUNT shows the content of DISK. Like an NFS client, the kernel keeps pages of its own for each mount, writes a changed
page back whole, and remembers for SECONDS which names exist, which do not, and the files' sizes. Two mounts of one disk
are two machines. Needs libfuse, and the right to mount (root).
"""

import os
import sys

import mfusepy

NAMES = ("st_gid", "st_mode", "st_nlink", "st_size", "st_uid")
TIMES = ("st_atime", "st_ctime", "st_mtime")
DISK_NAMES = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize", "f_namemax")


class Disk(mfusepy.Operations):
    """Passes each call on to a folder."""

    use_ns = True

    def __init__(self, root: str):
        self.root = root

    def _path(self, path: str) -> str:
        return self.root + path

    def access(self, path, mode):
        return 0

    def getattr(self, path, fh=None):
        found = os.lstat(self._path(path))
        times = {name: getattr(found, f"{name}_ns") for name in TIMES}
        return {name: getattr(found, name) for name in NAMES} | times

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._path(path))]

    def mkdir(self, path, mode):
        return os.mkdir(self._path(path), mode)

    def rmdir(self, path):
        return os.rmdir(self._path(path))

    def unlink(self, path):
        return os.unlink(self._path(path))

    def rename(self, old, new, flags=0):
        return os.rename(self._path(old), self._path(new))

    def chmod(self, path, mode):
        return os.chmod(self._path(path), mode)

    def utimens(self, path, times=None):
        return os.utime(self._path(path), ns=times)

    def open(self, path, flags):
        return os.open(self._path(path), flags)

    def create(self, path, mode, fi=None):
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        return os.truncate(self._path(path), length)

    def flush(self, path, fh):
        return 0

    def fsync(self, path, datasync, fh):
        return os.fsync(fh)

    def fsyncdir(self, path, datasync, fh):
        return 0

    def release(self, path, fh):
        return os.close(fh)

    def statfs(self, path):
        found = os.statvfs(self._path(path))
        return {name: getattr(found, name) for name in DISK_NAMES}


if __name__ == "__main__":
    disk, mount, seconds = sys.argv[1:]
    remembered = dict.fromkeys(("entry_timeout", "attr_timeout", "negative_timeout"), float(seconds))
    mfusepy.FUSE(Disk(disk), mount, foreground=True, **remembered)
