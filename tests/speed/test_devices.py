"""The table of GPUs: names are compared word by word."""

from __future__ import annotations

import pytest

from tp2d_helpers.speed.devices import DEVICES, device_named


@pytest.mark.parametrize("name, found", [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H100 NVL", "H100 NVL"), ("accelerator_type:L40S", "L40S"), ("NVIDIA L40", "L40"), ("L4", "L4"),
    ("A100-40G", "A100 40GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA_A10G", "A10G"), ("NVIDIA A10", "A10"), ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100 16GB"),
    ("NVIDIA GH200 480GB", None), ("NVIDIA RTX A1000", None), ("NVIDIA GB200", None), ("NVIDIA H20", None),
    ("NVIDIA A100X", None), ("TPU-V4", None), ("cpu", None), ("", None),
])  # fmt: skip
def test_names(name: str, found: str | None) -> None:
    device = device_named(name)
    assert (device and device.name) == found


def test_each_entry_is_found_by_its_name() -> None:
    assert [device_named(device.name) for device in DEVICES] == DEVICES


def test_what_the_device_reports_comes_first() -> None:
    assert device_named("NVIDIA A100-SXM4-80GB").memory == 79.2
    assert device_named("NVIDIA A100-SXM4-80GB", memory=79.15).memory == 79.15
