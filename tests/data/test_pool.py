"""Tokenising by several processes: the same bytes as by one, bounded memory, nothing lost in a kill, nobody left."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
from documents import write
from grid import IMPORT_PATH
from transformers import ByT5Tokenizer

from tp2d_helpers import heartbeat
from tp2d_helpers.cache import clear_cache
from tp2d_helpers.cache.clear import DAY, UNFINISHED_DAYS
from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import pool
from tp2d_helpers.data import tokens as text_to_tokens
from tp2d_helpers.data.folder import Part, digest
from tp2d_helpers.data.rows import read
from tp2d_helpers.data.text import load_text
from tp2d_helpers.data.tokenizer import load_tokenizer
from tp2d_helpers.data.tokens import prepare_tokens
from tp2d_helpers.demo import demo_documents

SIZE = 20_000  # bytes of text in a part
# Asks for tokens as a script does that has no `if __name__ == "__main__"`. Told "-c", it is as in a notebook.
SCRIPT = """
import functools, sys
tokenizer, source, started, processes, size = sys.argv[1:]
open(started, "a").write("started\\n")
from tp2d_helpers.data import pool, tokens
tokens.SMALL, tokens.cores = 0, lambda: int(processes)
tokens.Job = functools.partial(pool.Job, size=int(size))
tokens.prepare_tokens(tokenizer, source)
"""


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer in Python, which has a token for each byte."""
    folder = tmp_path_factory.mktemp("slow")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """by(processes, size): from here on, tokenise by so many, however small the text is; by 0, in this process."""

    def choose(processes: int, size: int = SIZE) -> None:
        monkeypatch.setattr(text_to_tokens, "SMALL", 0 if processes else 10**9)
        monkeypatch.setattr(text_to_tokens, "cores", lambda: processes)
        monkeypatch.setattr(text_to_tokens, "Job", functools.partial(pool.Job, size=size))

    return choose


def some_text(folder: Path) -> str:
    """Short documents, empty ones, a copy, and one that is many parts long."""
    long = "\n".join(demo_documents()) + "\n é☃ 日本語🙂🙂 \n"
    rows = ["short", "", None, "  é☃ ", " \n", "short\n", long[:90_000], *demo_documents()[:20], " " * 50_000, "end"]
    return str(write(folder / "text.jsonl", rows))


def some_chats(folder: Path) -> str:
    """Chats, one without an answer and one that is longer than a part."""
    words = [*demo_documents()[:40], " ".join(demo_documents()[:30])]
    roles = ("user", "assistant")
    chats = [
        [{"role": role, "content": f"{role} {text}"} for role in roles[: 1 + (i != 3)]] for i, text in enumerate(words)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(folder / "chats.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def children(others: list[psutil.Process]) -> list[psutil.Process]:
    """Those of this process at any depth, but for `others`, which were there before."""
    return [process for process in psutil.Process().children(recursive=True) if process not in others]


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.parts/*.npz"))


@pytest.mark.parametrize("kind, make, processes", [
    ("fast", some_text, (1, 2, 3)), ("slow", some_text, (2,)), ("fast", some_chats, (1, 3)), ("slow", some_chats, (2,)),
])  # fmt: skip
def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaker: Callable, slow: str, by: Callable, kind: str,
    make: Callable, processes: tuple[int, ...],
) -> None:  # fmt: skip
    tokenizer, source, found = speaker("chatml") if kind == "fast" else slow, make(tmp_path), []
    for number in (0, *processes):
        monkeypatch.setenv("TP2D_CACHE", str(tmp_path / f"by {number}"))
        by(number)
        before = heartbeat.here().pulses
        found.append(contents(prepare_tokens(tokenizer, source, leave_out_rows="no_answer")))
        assert heartbeat.here().pulses > before
        assert [path.name.count(".") for path in (tmp_path / f"by {number}").glob("tokens-*") if path.is_dir()] == [0]
    assert all(each == found[0] for each in found)
    assert json.loads(found[0]["meta.json"])["documents"] == (25 if make is some_text else 40)


def test_a_part_that_an_example_is_refused_in(cache: Path, speaker: Callable, by: Callable, tmp_path: Path) -> None:
    """All of all parts are named, in order."""
    path = Path(some_chats(tmp_path))
    lines = path.read_text().splitlines()
    for number in (20, 30):
        lines[number] = json.dumps({"messages": [{"role": "user", "content": f"number {number}"}]})
    path.write_text("\n".join(lines))
    by(2)
    with pytest.raises(ConfigError, match=r"3 of 41 rows .* no_answer .*: 3, line 4 of .*; line 21 of .*; line 31 of"):
        prepare_tokens(speaker("chatml"), str(path))


# Killed.


def start(how: str, cache: Path, *arguments: Any) -> subprocess.Popen:
    script = cache.parent / "ask.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *(["-c", SCRIPT] if how == "notebook" else [str(script)]), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": IMPORT_PATH, "TP2D_CACHE": str(cache)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("how, ended_by", [("script", signal.SIGKILL), ("notebook", signal.SIGINT)])
def test_ended_and_asked_again(
    cache: Path, slow: str, by: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], how: str, ended_by: signal.Signals,
) -> None:  # fmt: skip
    """Nobody is left, and what was done is not done again, but for what was damaged."""
    source, size = str(write(tmp_path / "text.jsonl", ["\n".join(demo_documents() * 2), *demo_documents()])), 200_000
    asking = start(how, cache, slow, source, tmp_path / "started", 2, size)
    try:
        wait_for(lambda: len(parts(cache)) >= 3 or asking.poll() is not None)
        family = psutil.Process(asking.pid).children(recursive=True)
        assert len(family) == 3  # one that leads, and two that tokenise
        asking.send_signal(ended_by)
        _, error = asking.communicate(timeout=10)
    finally:
        asking.kill()
    wait_for(lambda: not [process for process in family if process.is_running()], 5)
    assert (tmp_path / "started").read_text() == "started\n"
    assert ended_by == signal.SIGKILL or "KeyboardInterrupt" in error
    assert [path for path in cache.glob("tokens-*") if path.suffix == ".parts"]
    clear_cache()  # what it began to write goes, what it had done stays
    first, second, *whole = parts(cache)
    first.write_bytes(first.read_bytes()[:-100])
    middle, data = second.stat().st_size // 2, bytearray(second.read_bytes())
    data[middle] ^= 1
    second.write_bytes(data)
    by(2, size)
    monkeypatch.setattr(text_to_tokens, "LONG", 0)
    resumed = contents(prepare_tokens(slow, source))
    there = int(re.search(r"tokenised .* MB/s, (\d+) of \d+ parts were there", capsys.readouterr().out)[1])
    assert there == len(whole) and not parts(cache)
    by(0)
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "undisturbed"))
    assert contents(prepare_tokens(slow, source)) == resumed


def test_a_process_that_dies(cache: Path, slow: str, by: Callable, tmp_path: Path) -> None:
    """As those do that Linux kills when the memory is full."""
    source = str(write(tmp_path / "text.jsonl", demo_documents() * 5))
    family: list[psutil.Process] = []
    before = children([])

    def kill() -> None:
        wait_for(lambda: parts(cache))
        family.extend(children(before))
        next(process for process in family if process.parent().pid == os.getpid()).kill()

    by(2)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match="a process that tokenises was killed, perhaps as the memory was full"):
        prepare_tokens(slow, source)
    killer.join()
    wait_for(lambda: not [process for process in family if process.is_running()], 5)


# The parts.


def test_parts_that_another_node_removes(cache: Path, slow: str, by: Callable, tmp_path: Path) -> None:
    """It was faster, and its lock was not seen here."""
    source = str(write(tmp_path / "text.jsonl", demo_documents()[:30]))
    by(2)
    expected = contents(prepare_tokens(slow, source))
    job = pool.Job(text_to_tokens.TextEncoder(load_tokenizer(slow)), load_text(source), tmp_path / "x.parts", 2, SIZE)
    found = []
    for part, _ in pool.run(job, lambda size: [path.unlink(missing_ok=True) for path in job.folder.glob("*.npz")]):
        found.append(part.tokens.tobytes())
    assert b"".join(found) == expected["tokens.bin"]


def test_parts_that_nobody_went_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path))
    for name in ("tokens-a", "tokens-b", "tokens-c"):
        (tmp_path / f"{name}.lock").touch()
        (tmp_path / f"{name}.parts").mkdir()
    then = time.time() - (UNFINISHED_DAYS + 1) * DAY
    os.utime(tmp_path / "tokens-a.parts", (then, then))
    (tmp_path / "tokens-c").mkdir()  # complete
    assert clear_cache() == ["tokens-a.parts", "tokens-c.parts"]


def test_a_part_is_read_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    part = Part(np.arange(999, dtype=np.uint32), np.array([9]), np.array([2**63 + 1], dtype=np.uint64),
                np.ones(999, dtype=np.uint8), np.array([2]))  # fmt: skip
    part.save(tmp_path / "part.npz")
    written = (tmp_path / "part.npz").read_bytes()
    assert (Part.load(tmp_path / "part.npz").tokens == part.tokens).all()
    for damaged in (b"", written[:100], written[:-1], written[:500] + b"?" + written[501:]):
        (tmp_path / "part.npz").write_bytes(damaged)
        assert Part.load(tmp_path / "part.npz") is None
    assert Part.load(tmp_path / "none.npz") is None


@pytest.mark.parametrize("text", ["a", " a b\n", "\n\n a  \n  b \n", "é\u3000日本\u3000", " ", ""])
def test_copies_are_told_however_a_text_is_divided(text: str) -> None:
    assert len({digest([text[:i], text[i:j], text[j:]]) for i in range(len(text)) for j in range(i, len(text))}) <= 1
    assert (digest([text]) is None) == (not text.strip())
    assert digest([text]) == digest([text.strip()])


# Memory.


def test_memory_does_not_grow_with_a_document(cache: Path, tokenizer: str, by: Callable, tmp_path: Path) -> None:
    """Tokenised as a whole, this one would need 1.5 GB."""
    source = str(write(tmp_path / "text.jsonl", ["\n".join(f"line {i} " + "ten chars " * 9 for i in range(30_000))]))
    load_text(source)
    before = children([])
    peaks, done = {True: 0, False: 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            used = []
            for process in children(before):
                try:
                    used.append(process.memory_full_info().pss)
                except psutil.Error:
                    continue
            peaks[len(used) > 1] = max(peaks[len(used) > 1], sum(used))

    by(2, 1_000_000)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prepare_tokens(tokenizer, source)
    finally:
        done.set()
        watcher.join()
    assert 0 < peaks[True] < peaks[False] + 400 * 2**20


def test_a_row_is_a_view_of_its_file() -> None:
    """A scalar of pyarrow would be a copy, for each part of a long document."""
    rows = datasets.Dataset.from_dict({"text": ["abc", None, "é☃", ""]})
    texts = [*read(rows, 0, 4)]
    assert [str(text) for text in texts] == ["abc", "", "é☃", ""] and [str(text) for text in read(rows, 2, 3)] == ["é☃"]
    whole = rows.data.column(0).chunk(0).cast("large_string").buffers()[2].address
    assert np.frombuffer(texts[0].data, np.uint8).ctypes.data == whole


def test_a_folder_of_parts_that_goes_while_one_is_written(
    tmp_path: Path, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node was faster. The tokens are made again where they are needed."""
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    job = pool.Job(text_to_tokens.TextEncoder(load_tokenizer(slow)), rows, tmp_path / "x.parts", 1, SIZE)
    save = np.savez

    def removing(file: Any, **arrays: Any) -> None:
        save(file, **arrays)
        shutil.rmtree(job.folder)

    monkeypatch.setattr(np, "savez", removing)
    begin, end = next(job.parts())
    assert job.make(begin, end, lambda size: None) and not job.folder.exists()
