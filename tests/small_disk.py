"""Run a command on a disk of a few kilobytes that only it can see: a file system in memory inside a name space of its
own, which ends with it.

Started by `test_full_disk`, as `unshare -rm python small_disk.py FOLDER KILOBYTES BEFORE COMMAND…`: the disk is put at
FOLDER, BEFORE is copied onto it, the command runs in it. Prints a JSON of the exit code, what was said, how much is
used, and the digest of every file before and after.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def digests(folder: Path) -> dict:  # name → sha256; of a folder "folder"
    "What is on the disk, hidden files too."
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def main() -> None:
    "Mount, copy, run, look."
    place, kilobytes, before, *words = sys.argv[1:]
    place = Path(place)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], check=True)
    shutil.copytree(before, place, dirs_exist_ok=True)
    there = digests(place)
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, errors="replace", timeout=900)
    room = os.statvfs(place)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize // 1024
    texts = {str(path.relative_to(place)): path.read_text() for path in place.rglob("predictions.json")}
    kept = os.environ.get("KEEP_DISK")  # a folder that gets a copy of what is left
    if kept:
        shutil.copytree(place, kept, dirs_exist_ok=True)
    print(
        json.dumps(
            dict(
                code=done.returncode,
                out=done.stdout,
                err=done.stderr,
                used=used,
                before=there,
                after=digests(place),
                texts=texts,
            )
        )
    )


if __name__ == "__main__":
    main()
