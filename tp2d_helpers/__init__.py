"""Helpers of the tutorial `tp_autotp.ipynb`: 2D-parallel training with DeepSpeed AutoTP, ZeRO and Ray Train.

A section of the notebook is a module here, or two: `config`; `cluster` and `preflight`; `planner`; `tokens` and
`dataloader`; `mpu` and `engine`; `checkpoint` and `export`; `metrics` and `display`. `demo` holds the embedded default.
"""

import os

import torch

if not torch.cuda.is_available():  # DeepSpeed reads it as it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
