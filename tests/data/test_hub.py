"""Datasets of the hub: found in its cache, all splits and parts of them, every value as written, known by commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import IncompleteSnapshotError

from tp2d_helpers.config import ConfigError
from tp2d_helpers.data import hub, text
from tp2d_helpers.data.files import local_files
from tp2d_helpers.data.text import load_text, source_stamp
from tp2d_helpers.data.tokens import prepare_tokens

COMMIT = "a" * 40
Put = Callable[..., Path]


def lines(*texts: Any) -> str:
    return "".join(json.dumps({"text": each}) + "\n" for each in texts)


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """put({path: content}, name, commit): a snapshot in the hub's cache, of links, as `hf download` leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TP2D_CACHE", str(tmp_path / "cache"))

    def snapshot(files: dict[str, str | bytes], name: str = "org/name", commit: str = COMMIT) -> Path:
        base = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
        for number, (path, content) in enumerate(files.items()):
            blob, link = base / "blobs" / f"{commit[:3]}{number}", base / "snapshots" / commit / path
            for folder in (blob.parent, link.parent, base / "refs"):
                folder.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content.encode() if isinstance(content, str) else content)
            link.symlink_to(blob)
        (base / "refs" / "main").write_text(commit)
        return base / "snapshots" / commit

    return snapshot


def readme(*configs: str) -> str:
    return "---\nlicense: mit\nconfigs:\n" + "".join(configs) + "---\n# About\n"


def config(name: str, files: str, more: str = "") -> str:
    return f"- config_name: {name}\n  data_files:\n{files}{more}"


# Which files.


@pytest.mark.parametrize("name", ["train.jsonl", "data/train-00000-of-00001.jsonl", "train/a.jsonl", "any.jsonl"])
def test_a_dataset_that_was_downloaded(put: Put, name: str) -> None:
    put({name: lines("a", "b"), "README.md": "# No configs\n", ".gitattributes": ""})
    assert load_text("org/name")["text"] == ["a", "b"]


def test_splits_by_the_names_of_files(put: Put) -> None:
    put({f"{name}.jsonl": lines(name) for name in ("train", "dev", "test")})
    for split, found in (("train", "train"), ("validation", "dev"), ("test", "test")):
        assert load_text(f"org/name:{split}")["text"] == [found]
    with pytest.raises(ConfigError, match=r'Unknown split "tset"\. .*Its splits are train, validation, test; a part'):
        load_text("org/name:tset")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl.gz", ".json"])
def test_formats(put: Put, tmp_path: Path, suffix: str) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "007", "null"]})
    if suffix == ".parquet":
        table.to_parquet(tmp_path / "x")
    elif suffix in (".csv", ".tsv"):
        table.to_csv(tmp_path / "x", sep="\t" if suffix == ".tsv" else ",", index=False)
    else:
        table.to_json(tmp_path / "x", compression="gzip" if suffix.endswith("gz") else None)
    put({f"train{suffix}": (tmp_path / "x").read_bytes()})
    assert load_text("org/name")["text"] == ["a", "007", "null"]


@pytest.mark.parametrize("declared, wanted, found", [
    ([config("en", "  - {split: train, path: en/a*}\n"), config("de", "  - {split: train, path: de/*}\n")], "de", "de"),
    ([config("en", "  - {split: train, path: en/a*}\n", "  default: true\n"), config("de", "    de/*\n")], "", "en"),
    ([config("default", "    [en/a.jsonl]\n"), config("de", "    de/*\n")], "", "en"),
    ([config("only", "  - {split: train, path: de/a.jsonl}\n  - {split: test, path: en/*}\n")], "", "de"),
    ([config("one", "  - {split: train, path: [de/a.jsonl]}\n", "  data_dir: ''\n")], "one", "de"),
])  # fmt: skip
def test_configs(put: Put, declared: list[str], wanted: str, found: str) -> None:
    put({"README.md": readme(*declared), "en/a.jsonl": lines("en"), "de/a.jsonl": lines("de")})
    assert load_text("org/name", wanted)["text"] == [found]


def test_configs_that_are_not_there(put: Put) -> None:
    two = readme(config("en", "    en/*\n"), config("de", "    de/*\n"))
    put({"README.md": two, "en/a.jsonl": lines("en"), "de/a.jsonl": lines("de")})
    for wanted in ("", "fr"):
        with pytest.raises(ConfigError, match=rf"^dataset_config = '{wanted}': org/name has the configs en, de; take"):
            load_text("org/name", wanted)
    put({"train.jsonl": lines("a")}, "org/other")
    assert load_text("org/other", "default")["text"] == ["a"]
    with pytest.raises(ConfigError, match=r"^dataset_config = 'en': org/other has no configs"):
        load_text("org/other", "en")


def test_the_config_by_default(put: Put) -> None:
    both = [config(f"wikitext-{size}-raw-v1", f"  - {{split: train, path: {size}/train-*}}\n") for size in ("103", "2")]
    put({"README.md": readme(*both), "2/train-00000-of-00001.jsonl": lines("small")}, "Salesforce/wikitext")
    assert load_text("Salesforce/wikitext")["text"] == ["small"]  # the other config's files were never downloaded


def test_other_splits_need_not_be_there(put: Put) -> None:
    """As of those of a config that only the training's were downloaded of."""
    splits = (f"  - {{split: {split}, path: {name}.jsonl}}\n" for split, name in (("train", "a"), ("test", "b")))
    put({"README.md": readme(config("x", "".join(splits))), "a.jsonl": lines("a")})
    assert load_text("org/name")["text"] == ["a"]
    with pytest.raises(
        ConfigError,
        match=r"^dataset_name = 'org/name:test': .*a part of its files only.*`hf download org/name",
    ):
        load_text("org/name:test")
    with pytest.raises(
        ConfigError, match=r"^dataset_name = 'org/name:dev\[1:\]': Unknown split .dev.\. .* train, test; a"
    ):
        load_text("org/name:dev[1:]")


def test_files_that_are_missing(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their numbers, or by the list that newer clients keep."""
    shards = {f"data/train-0000{i}-of-00003.jsonl": lines(i) for i in (0, 2)}
    put(shards)
    with pytest.raises(ConfigError, match=r"org/name.*has a part of its files only"):
        load_text("org/name")
    folder = put({"train.jsonl": lines("a")}, "org/list")
    for lacking, whole in (("image.png", True), ("train2.jsonl", False)):

        def download(*_: Any, allow_patterns: list[str] | None, lacking: str = lacking, **__: Any) -> str:
            if allow_patterns is None or any(fnmatch(lacking, pattern) for pattern in allow_patterns):
                raise IncompleteSnapshotError(f"{lacking} is missing", str(folder))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", download)
        if whole:
            assert load_text("org/list")["text"] == ["a"]
        else:
            with pytest.raises(ConfigError, match="has a part of its files only"):
                load_text("org/list")


def test_ways_to_read_that_a_readme_asks_for(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for `datasets`, and so are formats that only it knows."""
    asked = []
    rows = datasets.Dataset.from_dict({"text": ["by datasets"]})
    monkeypatch.setattr(text, "_load_from_hub", lambda *names: asked.append(names[0]) or rows)
    put({"README.md": readme(config("x", "    a.csv\n", "  sep: ';'\n")), "a.csv": "text;n\na;1\n"}, "org/sep")
    put({"train.xml": "<a/>"}, "org/xml")
    put({"README.md": "# Only this, as `datasets` leaves it\n"}, "org/readme")
    for name in ("org/sep", "org/xml", "org/readme", "org/none"):
        assert load_text(name, "en" * (name == "org/readme"))["text"] == ["by datasets"]
    assert asked == ["org/sep", "org/xml", "org/readme", "org/none"]


def test_datasets_reads_the_hub_s_cache_too(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    put({"README.md": readme(config("x", "    a.csv\n", "  sep: ';'\n")), "a.csv": "text;n\na;1\nb;2\n"})
    assert load_text("org/name:train[1:]")["text"] == ["b"]


def test_values_of_files_whose_types_differ(put: Put) -> None:
    """In `datasets` the first file's type wins: 2, 3 and 4 would be True."""
    chat = [{"role": "user", "content": "n?"}, {"role": "assistant", "content": "n"}]
    firsts, seconds = ([{"messages": chat, "n": value} for value in values] for values in ((True, False), (2, "3", 4)))
    put(
        {
            f"train-{i}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
            for i, rows in enumerate((firsts, seconds))
        }
    )
    rows = load_text("org/name")
    assert [json.loads(chat)["more"]["n"] for chat in rows["messages"]] == [True, False, 2, "3", 4]
    assert rows["where"][2].startswith("line 1 of ") and rows["where"][2].endswith("train-1.jsonl")


def test_text_files(put: Put) -> None:
    put({"train.txt": "One line,\nand more.\n\nNext.\n"})
    assert load_text("org/name")["text"] == ["One line,\nand more.\n\nNext.\n"]
    assert load_text("org/name", text_files="paragraph")["text"] == ["One line,\nand more.", "Next."]


# Parts of splits.


@pytest.mark.parametrize("split", [
    "train[:10%]", "train[100:200]", "train[-7:]", "train[:-200]", "train+validation", "train[:5%]+validation[:5%]",
    "validation + train[10:12]", "train[33%:66%]", "train[:20%](pct1_dropremainder)", "all", "train[5:3]+train[1:2]",
    "train[:3]+train[:2]",
])  # fmt: skip
def test_parts_of_splits(put: Put, tmp_path: Path, split: str) -> None:
    """The same rows as of `datasets`."""
    files = {"train": [f"t{i}" for i in range(230)], "validation": [f"v{i}" for i in range(35)]}
    folder = put({f"{name}.jsonl": lines(*texts) for name, texts in files.items()})
    paths = {name: str(folder / f"{name}.jsonl") for name in files}
    expected = datasets.load_dataset("json", data_files=paths, split=split.replace(" ", ""))["text"]
    assert load_text(f"org/name:{split}")["text"] == expected[:] != []
    half = load_text(f"org/name:{split}", dataset_percentage=50.0)["text"]
    assert half == expected[: round(len(expected) / 2)]


@pytest.mark.parametrize("split, why", [
    ("train[:10", "Unrecognized instruction format"), ("train[10]", "Unrecognized instruction format"),
    ("train[:200%]", "Percent slice boundaries"), ("test[:10%]", 'Unknown split "test"'), ("train[9:]", "no rows"),
    ("train[:2.5%]", "Unrecognized instruction format"), ("train+", "Unrecognized instruction format"),
])  # fmt: skip
def test_wrong_parts(put: Put, split: str, why: str) -> None:
    put({f"{name}.jsonl": lines("a", "b") for name in ("train", "validation")})
    with pytest.raises(ConfigError) as error:
        load_text(f"org/name:{split}")
    assert str(error.value).startswith(f"dataset_name = 'org/name:{split}': {why}")
    assert "train, validation" in str(error.value) or why == "no rows"


@pytest.mark.parametrize("name", ["org/name:train[:10%]", "n:train[1:2]+test", "set:train*", "org/name:x[", "a.b:c?"])
def test_a_part_of_a_split_is_no_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is one."""
    monkeypatch.chdir(tmp_path)
    assert local_files(name) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jsonl").write_text(lines("a"))
    assert load_text(name)["text"] == ["a"]


# Its commit.


def test_its_commit(put: Put, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put({"train.jsonl": lines("first")})
    first, tokens = source_stamp("org/name:validation"), prepare_tokens(tokenizer, "org/name", progress=False)
    put({"train.jsonl": lines("second")}, commit="b" * 40)
    assert (first, source_stamp("org/name")) == (["org/name", COMMIT], ["org/name", "b" * 40])
    assert prepare_tokens(tokenizer, "org/name", progress=False) != tokens
    assert load_text("org/name")["text"] == ["second"]


def test_a_commit_that_nobody_knows(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = []
    for word in ("one", "one", "two"):
        rows = datasets.Dataset.from_dict({"text": [word, "more"]})
        monkeypatch.setattr(text, "_load_from_hub", lambda *_, rows=rows: rows)
        stamps.append(source_stamp("org/unknown"))
    assert stamps[0] == stamps[1] != stamps[2]
    monkeypatch.setattr(text, "_load_from_hub", lambda *_: 1 / 0)
    assert source_stamp("org/unknown") == ["org/unknown", None]


def test_stamps_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    assert source_stamp("demo") == source_stamp("") == source_stamp(str(tmp_path / "none.jsonl")) == []
    assert source_stamp(str(tmp_path))[0][0] == str(tmp_path / "a.jsonl")


# Online.


@pytest.fixture
def online(put: Put, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], list[Any]]:
    """online(files): from here on the hub has a dataset of these files; returns what is asked of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)

    def has(files: dict[str, str]) -> list[Any]:
        asked: list[Any] = []
        load, download = datasets.load_dataset_builder, huggingface_hub.snapshot_download

        def builder(name: str, config: str | None = None, **options: Any) -> Any:
            asked.append(name)
            splits = {path.partition(".")[0]: [f"hf://datasets/{name}@{COMMIT}/{path}"] for path in files}
            made = load("json", data_files={"train": [str(put(files) / next(iter(files)))]})
            made.config.data_files, made.hash = splits, COMMIT
            return made

        def fetch(
            name: str, allow_patterns: Iterable[str] | None = None, local_files_only: bool = False, **more: Any
        ) -> str:
            asked.append(allow_patterns)
            return download(name, allow_patterns=allow_patterns, **{**more, "local_files_only": True})

        monkeypatch.setattr(hub.datasets, "load_dataset_builder", builder)
        monkeypatch.setattr(hub, "snapshot_download", fetch)
        return asked

    return has


def test_a_dataset_that_is_fetched(online: Callable) -> None:
    asked = online({"train.jsonl": lines("t"), "validation[1].jsonl": lines("v")})
    assert load_text("org/name")["text"] == ["t"]
    assert asked == ["org/name", ["train.jsonl", "validation[[]1].jsonl", "README.md"]]


def test_a_hub_that_can_not_be_reached(online: Callable, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is taken; without any, the error is the hub's."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it")

    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        hub.datasets, "load_dataset_builder",
        lambda name, *args, **options: load(name, *args, **options) if name.startswith("/") else unreachable(),
    )  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=unreachable))
    # It would be tried twice, for half a minute each.
    monkeypatch.setattr(text, "_load_from_hub", lambda *_: pytest.fail("it was asked again"))
    put({"train.jsonl": lines("a")})
    assert load_text("org/name")["text"] == ["a"] and source_stamp("org/name") == ["org/name", COMMIT]
    with pytest.raises(ConfigError, match=r"can't be loaded \(ConnectionError: Couldn't reach it\)"):
        load_text("org/none")


def test_the_hub_is_asked_for_the_commit(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """For no longer than a few seconds, and not at all if it isn't to be."""
    asked = []

    def info(name: str, timeout: float) -> Any:
        asked.append((name, timeout))
        return SimpleNamespace(sha="c" * 40)

    put({"train.jsonl": lines("a")})
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=info))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for offline, commit in ((True, COMMIT), (False, "c" * 40)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", offline)
        assert source_stamp("org/name:train[:10%]") == ["org/name", commit]
    assert asked == [("org/name", hub.PATIENCE)]
