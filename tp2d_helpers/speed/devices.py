"""The one table of GPUs: peak, memory, bandwidths, by the datasheets.

What a device reports of itself comes first: a worker asks its GPU for its memory, and takes from here only what no GPU
reports. The driver, which may have none, knows GPUs by the names that Ray gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """A GPU: what its datasheet says, per GPU and direction; `memory` is what PyTorch reports as total, in GiB."""

    name: str
    memory: float
    memory_bandwidth: float  # byte/s
    link_bandwidth: float  # byte/s to the other GPUs of its node: NVLink, or else PCIe
    peak: float  # FLOP/s of the tensor cores, dense, 16 bit
    bf16: bool = True  # in hardware
    fp8: bool = False  # matmuls by the tensor cores at twice the peak


DEVICES = [
    Device("B200", 178.4, 7.7e12, 900e9, 2250e12, fp8=True),
    Device("H200 NVL", 139.8, 4.8e12, 450e9, 836e12, fp8=True),
    Device("H200", 139.8, 4.8e12, 450e9, 989e12, fp8=True),
    Device("H100 NVL", 93.1, 3.9e12, 300e9, 835e12, fp8=True),
    Device("H100 PCIe", 79.1, 2.0e12, 64e9, 756e12, fp8=True),
    Device("H100", 79.1, 3.35e12, 450e9, 989e12, fp8=True),
    Device("A100 40GB", 39.4, 1.555e12, 300e9, 312e12),
    Device("A100", 79.2, 2.0e12, 300e9, 312e12),
    Device("L40S", 44.4, 0.864e12, 32e9, 362e12),
    Device("L40", 44.4, 0.864e12, 32e9, 181e12),
    Device("L4", 22.0, 0.3e12, 32e9, 121e12),
    Device("A10G", 22.0, 0.6e12, 32e9, 70e12),
    Device("A10", 22.0, 0.6e12, 32e9, 125e12),
    Device("V100 16GB", 15.8, 0.9e12, 150e9, 125e12, bf16=False),
    Device("V100", 31.7, 0.9e12, 150e9, 125e12, bf16=False),
    Device("T4", 14.6, 0.32e12, 16e9, 65e12, bf16=False),
    Device("P100", 15.9, 0.732e12, 16e9, 21.2e12, bf16=False),
]


def device_named(name: str, memory: float | None = None) -> Device | None:
    """The device in `DEVICES` whose words are all in `name`, the one of most words; None if there is none.

    Words are compared whole: an L40 is no L4, a GH200 no H200, and an RTX A1000 no A100.

    Args:
        name: as the driver ("NVIDIA A100-SXM4-40GB") or Ray ("A100-40G", "NVIDIA_H100") writes it.
        memory: GiB that the device itself reports; replaces the table's.
    """
    words = {re.sub(r"^(\d+)G$", r"\1GB", word) for word in re.split(r"[^A-Z0-9]+", name.upper())}
    fitting = [device for device in DEVICES if words.issuperset(device.name.upper().split())]
    found = max(fitting, key=lambda device: len(device.name.split()), default=None)
    return replace(found, memory=memory) if found and memory else found


def devices_in(resources: Iterable[str]) -> dict[str, Device | None]:
    """{type: device, None if it is not in the table} of the GPU types among the names of Ray's resources."""
    prefix = "accelerator_type:"
    types = [name.removeprefix(prefix) for name in resources if name.startswith(prefix)]
    return {name: device_named(name) for name in types}


def smallest(devices: Iterable[Device]) -> Device:
    """The one with the least memory: of several types, a worker may get any."""
    return min(devices, key=lambda device: device.memory)
