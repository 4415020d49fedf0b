"""What is read from a checkpoint's files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from tp2d_helpers.checkpoint.resize import safe_loading
from tp2d_helpers.checkpoint.shards import _load


class ByGetattr:
    """Pickled as Python 3.11.0 to 3.11.3 pickles the member of an enum, or as somebody who means harm."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple:
        return getattr, (self.kind, self.name)


def test_a_zero_stage_that_python_3_11_0_wrote(tmp_path: Path) -> None:
    torch.save({"zero_stage": ByGetattr(ZeroStageEnum, "gradients")}, tmp_path / "file.pt")
    assert _load(tmp_path / "file.pt") == {"zero_stage": ZeroStageEnum.gradients}
    with safe_loading():
        assert torch.load(tmp_path / "file.pt")["zero_stage"] is ZeroStageEnum.gradients


@pytest.mark.parametrize("kind, name", [(ZeroStageEnum, "__subclasses__"), (LossScaler, "backward")])
def test_getattr_gives_nothing_else(tmp_path: Path, kind: type, name: str) -> None:
    torch.save({"zero_stage": ByGetattr(kind, name)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="holds code that is not executed: getattr"):
        _load(tmp_path / "file.pt")
