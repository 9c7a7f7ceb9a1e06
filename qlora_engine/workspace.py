"""The folder beside an output folder where a run keeps finished work until the output appears as a whole.

For an output ``models/small`` it is ``models/.small.unfinished``, on the same file system:

    lock         held by the process that works here; the kernel drops it when that process dies
    run.json     what the run is: options and input; a resumed run must be the same
    pieces/      finished parts, each written under a temporary name, flushed and renamed
    result/      the output being put together
    done/        the output, whole: ``result`` renamed
    replaced/    the previous output, between the two renames that put the new one in its place

So the output folder is at any moment absent, the old one, or the whole new one. After a kill between the two
renames neither name may exist: the next run that is given the same output finishes or undoes the exchange.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import Lock, read_json_object, sync_folder, write_json

RUN_FILE = "run.json"
_SPARE = 64 << 20  # bytes for configs, tokenizer and the file system


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and next(folder.iterdir(), None) is None


def _differences(then: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*then, *now}):
            found += _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if then == now else [f"{where} was {then!r:.60}, is {now!r:.60}"]


@dataclass
class Workspace:
    """An open workspace; the process holds its lock."""

    out: Path
    root: Path
    _lock: Lock
    _may_replace: bool = False  # the user agreed to lose what is in ``out``

    @staticmethod
    def folder_for(out: Path) -> Path:
        """Where the unfinished work for ``out`` lies."""
        return out.parent / f".{out.name}.unfinished"

    @classmethod
    def tidy(cls, out: Path) -> None:
        """Finish or undo what a run was doing when it was cut off after its output was whole; else nothing.

        Raises:
            InputError: another process works on ``out``.
        """
        out = Path(os.path.realpath(out))
        root = cls.folder_for(out)
        if os.path.lexists(root):
            _check_ours(root, out)
            workspace = cls(out, root, Lock(root / "lock", out))
            workspace._recover()
            workspace.close(remove=not (root / RUN_FILE).exists())

    @classmethod
    def open(
        cls, out: Path, run: dict[str, Any], *, overwrite: bool = False, resume: bool = False
    ) -> Workspace:
        """Lock and prepare the workspace for ``out``.

        Args:
            out: Output folder; its parents are made. Absent or empty, or with ``overwrite`` any folder.
            run: JSON-able description of options and input.
            overwrite: Replace what is there once the new output is whole; unfinished work is discarded.
            resume: Go on with what an interrupted run of the same description left.

        Raises:
            InputError: ``out`` exists, unfinished work exists and neither flag was given, the unfinished
                work is of another description, or another process works here. Nothing is changed then.
            OSError: the folders cannot be made.
        """
        out = Path(os.path.realpath(out))
        check_output(out, overwrite=overwrite or resume)
        out.parent.mkdir(parents=True, exist_ok=True)
        root = cls.folder_for(out)
        is_new = not os.path.lexists(root)
        if not is_new:
            _check_ours(root, out)
        root.mkdir(exist_ok=True)
        workspace = cls(out, root, Lock(root / "lock", out))
        try:
            workspace._recover()
            workspace._begin(run, overwrite=overwrite, resume=resume)
        except BaseException:
            workspace.close(remove=is_new)
            raise
        return workspace

    def _recover(self) -> None:
        """Undo an exchange of old and new output that was cut off; clear up after a finished one."""
        replaced = self.root / "replaced"
        if replaced.exists() and not self.out.exists():
            os.rename(replaced, self.out)
            sync_folder(self.out.parent)
        elif replaced.exists() or not (self.result.exists() or self.is_done):
            self._clear()  # the new one is in its place

    def _begin(self, run: dict[str, Any], *, overwrite: bool, resume: bool) -> None:
        file = self.root / RUN_FILE
        may_replace = overwrite
        if file.exists() and not (overwrite and not resume):
            if not resume:
                count = len(list(self.pieces.glob("*.done")))
                raise InputError(
                    f"an unfinished run for {self.out} lies in {self.root} ({count} layers done): --resume "
                    "goes on with it, --overwrite begins anew"
                )
            before = read_json_object(file)
            may_replace |= bool(before.get("may_replace"))
            differences = _differences(before.get("run"), run)
            if differences:
                raise InputError(
                    f"cannot resume {self.out}, this is not the same run: {'; '.join(differences[:3])} "
                    "(--overwrite begins anew)"
                )
        check_output(self.out, overwrite=may_replace)
        self._may_replace = may_replace
        if not file.exists() or (overwrite and not resume):
            self._clear()
            self.pieces.mkdir()
            self.result.mkdir()
            write_json(file, {"may_replace": may_replace, "run": run})

    def _clear(self) -> None:
        """Remove everything but the lock; run.json first: what is half removed is no run any more."""
        (self.root / RUN_FILE).unlink(missing_ok=True)
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    @property
    def pieces(self) -> Path:
        """Folder of finished parts."""
        return self.root / "pieces"

    @property
    def result(self) -> Path:
        """Folder in which the output is put together."""
        return self.root / "result"

    @property
    def is_done(self) -> bool:
        """Whether the output is whole and only has to be published."""
        return (self.root / "done").exists()

    def check_space(self, needed: int) -> None:
        """Raise where ``needed`` bytes, less those that are here already, do not fit on the disk.

        Raises:
            OSError: ENOSPC.
        """
        there = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        missing, free = needed + _SPARE - there, shutil.disk_usage(self.root).free
        if free < missing:
            raise OSError(
                errno.ENOSPC,
                f"{self.out.parent} has {free / 1e9:.2f} GB free, and this run needs about "
                f"{missing / 1e9:.2f} GB",
            )

    def finish(self) -> None:
        """Declare that ``result`` is whole: flush its folders, then rename it in one step."""
        for folder, _, _ in os.walk(self.result):
            sync_folder(Path(folder))
        os.rename(self.result, self.root / "done")
        sync_folder(self.root)

    def publish(self) -> None:
        """Put the whole output in its place and remove the workspace.

        Raises:
            OSError: somebody else put something there meanwhile; the output stays in the workspace.
        """
        if self.out.exists() and not _is_empty(self.out):
            if not self._may_replace:
                raise FileExistsError(
                    errno.EEXIST,
                    f"{self.out} was filled by something else while this ran; the output is whole in "
                    f"{self.root / 'done'}",
                )
            os.rename(self.out, self.root / "replaced")
        os.rename(self.root / "done", self.out)
        sync_folder(self.out.parent)
        self.close(remove=True)

    def close(self, *, remove: bool) -> None:
        """Give up the lock; ``remove`` deletes the workspace and all that was kept in it."""
        if remove:
            self._clear()
        self._lock.release(remove=remove)
        if remove:
            try:
                self.root.rmdir()
            except OSError:  # another process has just begun to wait for the lock here
                return
            sync_folder(self.root.parent)


def _check_ours(root: Path, out: Path) -> None:
    """Refuse a folder of another's under the workspace's name: what is in it would be removed."""
    if root.is_symlink() or not root.is_dir():
        raise InputError(f"{root} is no folder, and unfinished work for {out} is kept there; remove it")
    names = {path.name for path in root.iterdir()}
    if names and not names & {"lock", RUN_FILE}:
        raise InputError(
            f"{root} holds '{min(names)}' and no unfinished work, which for {out} is kept there; move it away"
        )


def check_apart(out: Path, source: Path, what: str) -> None:
    """Refuse an output folder that is, or holds, the input ``source``, a ``what``.

    Raises:
        InputError: it does.
    """
    read, written = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if read.is_relative_to(written):
        raise InputError(
            f"{out} is or contains the {what} {source}, which would be lost; give another folder"
        )


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, without writing anything.

    Raises:
        InputError: it exists, is no folder, or its file system or parents do not let it be made.
    """
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out} exists and is not a folder")
        if not overwrite and not _is_empty(out):
            raise InputError(
                f"{out} exists and is not empty; give another folder, or --overwrite to replace it"
            )
        here = Path(os.path.realpath(os.curdir))
        if Path(os.path.realpath(out)) in (here, *here.parents):
            raise InputError(f"{out} is or holds the current folder and would be replaced; give another")
        if os.path.ismount(out):
            raise InputError(
                f"{out} is a mount point, which cannot be replaced as a whole; give a folder in it"
            )
    parent = next(parent for parent in out.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"cannot make {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {out}: no permission to create files in {parent}")
