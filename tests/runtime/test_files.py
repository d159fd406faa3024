"""Locks, and files that are written whole."""

import os
import re
import subprocess
import sys
import threading

import pytest

from logra import store
from logra.runtime import files


def test_a_lock_of_another_host(tmp_path, monkeypatch):
    """A heartbeat that goes on is respected; one that has stopped is waited for, then the lock is taken."""
    monkeypatch.setattr(files, "LOCK_LEASE_SECONDS", 1.0)
    path = tmp_path / "log.lock"
    code = "import filelock, sys, time; lock = filelock.SoftFileLease(sys.argv[1], lease_duration=1.0)"
    code += "; lock.acquire(); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    holder.stdout.readline()
    text = path.read_text()
    holder.kill()
    holder.wait()
    path.write_text(re.sub("host=.*", "host=elsewhere", text))
    touching = threading.Event()

    def touch() -> None:
        while not touching.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ValueError, match="another one at work"), files.locked(path, "log"):
        pass
    touching.set()
    thread.join()
    with files.locked(path, "log"):
        assert "host=elsewhere" not in path.read_text()


@pytest.mark.parametrize("links", [True, False])
def test_linked_files(tmp_path, monkeypatch, links):
    """The same files in another folder, or copies where the file system has no hard links; what was there is gone."""
    source, folder = tmp_path / "train", tmp_path / "other"
    for path in (source, folder):
        path.mkdir()
    (source / "data.arrow").write_text("examples")
    (folder / "old").touch()
    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    files.link_files(source, folder)
    assert [path.name for path in folder.iterdir()] == ["data.arrow"]
    assert (folder / "data.arrow").read_text() == "examples"
    assert (folder / "data.arrow").samefile(source / "data.arrow") == links
    files.remove(folder)
    assert (source / "data.arrow").read_text() == "examples"


def test_a_folder_that_was_removed_does_not_come_back(tmp_path):
    """A shard of a run whose folder is gone is an error; it makes no folder with a part of the run."""
    shard = store.Shard(tmp_path / "log/gradients", 0, range(2), {"gradients": {}, "factors": {}})
    with pytest.raises(FileNotFoundError):
        shard.write({}, {})
    assert not (tmp_path / "log").exists()
    (tmp_path / "log").mkdir()
    assert shard.write({}, {}) > 0
