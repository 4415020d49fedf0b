"""How fast text and chats become tokens in one process: of this checkout and of others, turn by turn.

    python ci/benchmark/tokenising.py [OTHER_CHECKOUT …] [--results ci/benchmark/results/tokenising_cpu.json]

Chats have one to four answers, and the template is ChatML's. Characters of the data, and not of what the template adds,
are counted. Each number is the best of `--times`, as other processes only make a turn slower.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 3000


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.measure)))
        return
    here = Path(__file__).resolve().parents[2]
    found: dict[Path, dict[str, float]] = {}
    for _ in range(given.times):
        for checkout in (here, *given.checkouts):
            best = found.setdefault(checkout, {})
            for name, value in _in_a_process(checkout.resolve()).items():
                best[name] = max(best.get(name, 0), value)
    results = {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
               "python": platform.python_version(), "versions": _versions(),
               "here": found.pop(here), "others": {_commit(path): rates for path, rates in found.items()}}  # fmt: skip
    print(json.dumps(results, indent=1))
    if given.results:
        given.results.write_text(json.dumps(results, indent=1) + "\n")


def _in_a_process(checkout: Path) -> dict[str, float]:
    """What a checkout measures: in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(checkout), *sys.path[1:]])
        environment = {**os.environ, "PYTHONPATH": path, "TP2D_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, __file__, "--measure", folder]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path) -> dict[str, float]:
    """chats/s and MB/s of chats and of text, of the package that is imported."""
    from tp2d_helpers.data import tokens
    from tp2d_helpers.demo import demo_documents, train_tokenizer

    documents = demo_documents()
    fast = train_tokenizer(documents[:10])
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder / "tokenizer")
    pieces = [text[:600] for text in documents if len(text) > 600]
    chats, size = [], 0
    for i in range(ROWS):
        turns = 2 * (1 + i % 4)
        contents = [pieces[(i * 7 + j) % len(pieces)][: 150 * (1 + j % 4)] for j in range(turns)]
        size += sum(map(len, contents))
        roles = ("user", "assistant")
        chats.append({"messages": [{"role": roles[j % 2], "content": text} for j, text in enumerate(contents)]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    whole = [{"text": text} for text in documents for _ in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    rates, tokens.SMALL = {}, 10**12  # one process, whatever the size
    for name, characters in (("text", sum(len(row["text"]) for row in whole)), ("chats", size)):
        tokens.prepare_tokens(str(folder / "tokenizer"), str(folder / f"{name}.jsonl"), progress=False)
        for file in (folder / "cache").glob("tokens-*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        begun = time.perf_counter()  # the rows are in the cache: reading them is not what is measured
        tokens.prepare_tokens(str(folder / "tokenizer"), str(folder / f"{name}.jsonl"), progress=False)
        seconds = time.perf_counter() - begun
        rates[f"{name}_mb_per_s"] = round(characters / 1e6 / seconds, 3)
        if name == "chats":
            rates["chats_per_s"] = round(len(chats) / seconds, 1)
    return rates


def _commit(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or checkout.name


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "datasets")}


if __name__ == "__main__":
    main()
