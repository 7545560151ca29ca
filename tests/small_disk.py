"""Run commands on disks of a few kilobytes that only they can see: file systems in memory inside a name space of its
own, which ends with it.

Started by `test_full_disk`, as `unshare -rm python small_disk.py`, with a line of JSON for each command: the disk is
put at FOLDER, BEFORE is copied onto it, the command runs in it, in a fork that has torch already. Answers each with a
line of JSON: the exit code, what was said, how much is used, and the digest of every file before and after.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


def digests(folder: Path) -> dict:  # name → sha256; of a folder "folder"
    "What is on the disk, hidden files too."
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def forked(words: list[str], folder: Path) -> tuple[int, str, str]:  # exit code, output, errors
    "One of our commands in a fork of this process."
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.chdir(folder)
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                from dpt_nb.commands import main

                code = main(words) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
    return code, *texts


def run(place: str, kilobytes: int, before: str, words: list[str], keep: str) -> dict:
    "Mount, copy, run, look, unmount. `keep` is a folder that gets a copy of what is left, or nothing."
    place = Path(place)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], check=True)
    try:
        shutil.copytree(before, place, dirs_exist_ok=True)
        there = digests(place)
        code, out, err = forked(words, place)
        room = os.statvfs(place)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize // 1024
        texts = {str(path.relative_to(place)): path.read_text() for path in place.rglob("predictions.json")}
        if keep:
            shutil.copytree(place, keep, dirs_exist_ok=True)
        return dict(code=code, out=out, err=err, used=used, before=there, after=digests(place), texts=texts)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


if __name__ == "__main__":
    import onnxscript  # noqa: F401  what the forks need
    from forked import import_everything

    import_everything()

    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)
