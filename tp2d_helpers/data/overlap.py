"""Is what a run is evaluated on also what it is trained on? By the files that the names lead to, and by the text."""

from __future__ import annotations

import numpy as np

from tp2d_helpers.data.dataset import TokenDataset
from tp2d_helpers.data.files import config_of, local_files
from tp2d_helpers.data.hub import hub_dataset


def same_source(dataset_name: str, eval_dataset_name: str, dataset_config: str = "") -> str:
    """The files, or the split of a hub dataset, that two names both lead to, however they are spelt; "" without any."""
    configs = dataset_config, config_of(eval_dataset_name, dataset_name, dataset_config)
    sources = [*zip((dataset_name, eval_dataset_name), configs, strict=True)]
    try:
        trained, evaluated = (local_files(*source) for source in sources)
    except Exception:  # of several libraries; those who read the files say it
        return ""
    if trained and evaluated:
        known = {path.resolve() for path in trained.used}
        inodes = {(status.st_dev, status.st_ino) for path in trained.used if (status := path.stat())}
        both = [
            str(path) for path in evaluated.used
            if path.resolve() in known or (path.stat().st_dev, path.stat().st_ino) in inodes
        ]  # fmt: skip
        return ", ".join(both[:4]) + ", …" * (len(both) > 4)
    one, other = (hub_dataset(*source) for source in sources)
    return f"split {one[2]} of {one[0]}" if not (trained or evaluated) and one == other else ""


def repeated_documents(data: TokenDataset) -> tuple[int, int]:
    """(how many of the documents that it is evaluated on the training has too, how many these are).

    Two are the same if their text is, but for spaces at its ends. Of a dataset with another one to evaluate on.
    """
    evaluated = np.load(data.other.folder / "digests.npy")[_documents(data.other, data.eval_samples)]
    trained, wanted = np.load(data.folder / "digests.npy"), np.unique(evaluated)
    found = trained[wanted[np.searchsorted(wanted, trained).clip(max=len(wanted) - 1)] == trained]
    return int(np.isin(evaluated, found).sum()), len(evaluated)


def _documents(data: TokenDataset, samples: int) -> np.ndarray:
    """int64, the documents that the first samples have tokens of."""
    offsets, begins = np.load(data.folder / "offsets.npy"), data.starts[:samples]
    if data.packing is not True:
        begins = data.starts[: data.bounds[samples]]
    ends = begins + data.seq_length - 1 if data.packing is True else begins
    first, last = (np.searchsorted(offsets, places, side="right") - 1 for places in (begins, ends))
    return np.unique(np.concatenate([np.arange(i, j + 1) for i, j in zip(first, last, strict=True)]))
