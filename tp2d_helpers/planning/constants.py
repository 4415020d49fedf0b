"""What a machine reaches of its datasheet, as the planner takes it: fitted on H200, or measured by `calibrate`."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tp2d_helpers.cache import cache_dir
from tp2d_helpers.cache.space import in_words
from tp2d_helpers.checkpoint.files import read_json, write_json
from tp2d_helpers.speed.devices import Device

# Seconds to launch a layer's kernels, forward and backward; of a graph, to hand out its gradients. Hosts differ: steps
# of 24 compiled layers on 1 × 512 tokens took 42 to 87 ms, of graphs 11 to 14, of eager ones on 8 × 1024 151 to 232 ms.
HOST_LAYER = {"eager": 7.5e-3, "compiled": 2.8e-3, "graph": 0.3e-3}
HOST_STEP = 4e-3  # seconds on the host per optimizer step


@dataclass(frozen=True)
class Constants:
    """Every number of `step_time` that is neither counted nor a datasheet's.

    The defaults are of runs on two H200 of one host, torch 2.11, NCCL 2.28; tests/planning/test_step_time.py compares
    them all. In brackets, where a number is from: a profile is that of Qwen2-7B at tp 2, 4 × 4096 tokens per
    micro-batch.
    """

    matmuls: float = 0.73  # share of the peak that a large matmul reaches, its memory traffic apart (fit)
    fp8: float = 1.85  # times as fast, matmuls in fp8 with their casts (fit)
    attention: float = 0.37  # the same for flash attention, forward and backward (profile)
    memory: float = 0.86  # of the memory's bandwidth (profile: the kernel of the optimizer's step)
    links: float = 0.62  # of the links' bandwidth, in an all-reduce of 117 MB (alone 0.67, in the profile 0.58)
    network: float = 0.80  # of the network's (a guess)
    hidden: float = 0.80  # of a backward pass, the share ZeRO's collectives can hide behind, below stage 3 (a guess)
    latency: float = 20e-6  # seconds of a collective, times log2 of its ranks (a guess)
    host: float = 1.0  # times `HOST_LAYER` and `HOST_STEP`: above 1, a slower host
    source: str = "constants of H200"  # in words


def constants_of(device: Device) -> Constants:
    """What was measured on such a GPU, on this host if it was, else on the host where it was last; or the defaults.

    The cache may be on a disk that nodes share, and the driver's node may have no GPU.
    """
    found = sorted(cache_dir().glob(_file(device, "*").name), key=lambda path: path.stat().st_mtime)
    own = _file(device, socket.gethostname())
    names = {field.name for field in fields(Constants)}
    for path in [own, *reversed(found)]:
        if read_json(path).keys() == names:  # not those of another version
            return Constants(**read_json(path))
    return Constants()


def store(constants: Constants, device: Device) -> Path:
    """Keep what was measured here for `constants_of`; the file. Raises `ConfigError` if the cache can't be written."""
    path = _file(device, socket.gethostname())
    with in_words(path):
        write_json(path, asdict(constants))
    return path


def _file(device: Device, host: str) -> Path:
    return cache_dir() / f"planner-{device.name.replace(' ', '-')}@{host}.json"
