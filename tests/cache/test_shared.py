"""A cache that several users share, one that is only read, and one on a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import child
import pytest
import torch
from child import FIRST, SECOND
from safetensors.torch import save_file
from test_folders import folders, last_changed, make

from tp2d_helpers.cache import build_once, clear_cache, parts_of
from tp2d_helpers.cache.clear import UNUSED_DAYS
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data.folder import PartBuilder

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache that everybody may write to, as /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="tp2d-shared-", dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setenv("TP2D_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


def text_of(folder: Path) -> str:
    return (make(folder.parent, folder.name) / "file").read_text()


@root
def test_what_one_user_made_another_one_reads(shared: Path) -> None:
    """Models too, whose weights safetensors writes for their owner alone."""

    def weights(scratch: Path) -> None:
        save_file({"weight": torch.zeros(2)}, scratch / "model.safetensors")

    child.call(make, shared, "tokens-a", user=FIRST)
    assert child.call(text_of, shared / "tokens-a", user=SECOND) == "text"
    child.call(build_once, shared / "model", weights, user=FIRST)
    assert child.call((shared / "model" / "model.safetensors").read_bytes, user=SECOND)
    child.call(make, shared, "tokens-mine", user=FIRST, umask=0o077)
    with pytest.raises(ConfigError, match=rf"^TP2D_CACHE = '{shared}': {shared}/tokens-mine/\S* can't be read"):
        child.call(make, shared, "tokens-mine", user=SECOND)


@root
@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_lock_that_another_user_made(shared: Path, mode: int) -> None:
    """With the mode that older versions gave it, it can't be held; two may build at once then."""
    child.call(lambda: os.close(os.open(shared / "tokens-a.lock", os.O_CREAT, mode)), user=FIRST, umask=0)
    child.call(make, shared, "tokens-a", user=SECOND)
    assert text_of(shared / "tokens-a") == "text"


@root
def test_a_lock_is_for_whoever_may_write_to_the_folder(shared: Path) -> None:
    for mode, expected in ((0o1777, 0o666), (0o755, 0o644), (0o775, 0o664)):
        shared.chmod(mode)
        make(shared, f"tokens-{mode:o}")
        assert (shared / f"tokens-{mode:o}.lock").stat().st_mode & 0o777 == expected


@root
def test_a_cache_of_another_user_s(shared: Path) -> None:
    """What is there is used; what isn't, is an error that says what to do."""
    os.chown(shared, FIRST, FIRST)
    shared.chmod(0o755)
    child.call(make, shared, "tokens-a", user=FIRST)
    assert child.call(text_of, shared / "tokens-a", user=SECOND) == "text"
    words = rf"^TP2D_CACHE = '{shared}': {shared}/tokens-b\S* can't be read or written by this user.*set TP2D_CACHE to"
    with pytest.raises(ConfigError, match=words):
        child.call(make, shared, "tokens-b", user=SECOND)
    shared.chmod(0o700)
    with pytest.raises(ConfigError, match=rf"^TP2D_CACHE = '{shared}': {shared}/tokens-a can't be read"):
        child.call(make, shared, "tokens-a", user=SECOND)


@root
def test_each_user_clears_their_own(shared: Path) -> None:
    shared.chmod(0o777)
    for user, name in ((FIRST, "tokens-a"), (SECOND, "tokens-b")):
        child.call(make, shared, name, user=user, umask=0)
        child.call((shared / f"{name}.other-node.abc").mkdir, user=user, umask=0)
    for path in shared.iterdir():
        last_changed(path, UNUSED_DAYS + 1)
    assert child.call(clear_cache, user=SECOND) == ["tokens-b.other-node.abc", "tokens-b"]
    assert folders(shared) == ["tokens-a", "tokens-a.other-node.abc"]
    child.call(make, shared, "tokens-a", user=SECOND)  # which is a use of it
    assert child.call(clear_cache, user=FIRST) == ["tokens-a.other-node.abc"]


@root
def test_parts_that_another_user_left(shared: Path) -> None:
    """They are not gone on with."""
    part, file = PartBuilder().part(), "0.0-1.0.npz"
    for user in (FIRST, SECOND):
        child.call(lambda: part.save(parts_of(shared / "tokens-a") / file), user=user)
        assert child.call(lambda: (parts_of(shared / "tokens-a") / file).stat().st_uid, user=user) == user


# Without locks.


@pytest.fixture
def no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("TP2D_CACHE", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path


def test_without_locks_all_who_build_at_once_finish(no_locks: Path) -> None:
    together, names, errors = threading.Barrier(3), [], []

    def build(scratch: Path) -> None:
        together.wait(10)
        names.append(scratch.name)
        (scratch / "file").write_text("text")

    def ask() -> None:
        try:
            build_once(no_locks / "tokens-a", build)
        except BaseException as error:
            errors.append(error)

    builders = [threading.Thread(target=ask) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert not errors and len(set(names)) == 3
    assert folders(no_locks) == ["tokens-a"] and text_of(no_locks / "tokens-a") == "text"


def test_without_locks_a_damaged_folder_is_replaced_once(no_locks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever finds it replaced by another takes that one."""
    made, inside = make(no_locks, "tokens-a"), []
    (made / "file").write_text("t")

    def build(scratch: Path) -> None:
        (scratch / "file").write_text("text")
        inside.append(make(no_locks, "tokens-a").stat().st_ino)

    assert build_once(made, build).stat().st_ino == inside[0]
    assert folders(no_locks) == ["tokens-a"]
    assert capsys.readouterr().out.count("is damaged (file has 1 bytes, not 4)") == 2


def test_without_locks_what_was_touched_today_stays(no_locks: Path, make_old: Callable[[str, float], Path]) -> None:
    """Nothing tells whether it is being built."""
    make(no_locks, "tokens-a")
    kept, gone = make_old("tokens-a.this.abc", 0.9), make_old("tokens-a.this.abd", 1.1)
    assert clear_cache() == [gone.name] and kept.exists()


@pytest.fixture
def make_old(no_locks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Path]:
    """make_old(name, days): a folder of a builder on this machine."""
    monkeypatch.setattr("tp2d_helpers.cache.clear.host", lambda: "this")

    def make_one(name: str, days: float) -> Path:
        (no_locks / name).mkdir()
        last_changed(no_locks / name, days)
        return no_locks / name

    return make_one
