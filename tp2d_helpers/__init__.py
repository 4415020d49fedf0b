"""Helpers of the tutorial `tp_autotp.ipynb`: 2D-parallel training with DeepSpeed AutoTP, ZeRO and Ray Train.

A section of the notebook is a module here, or some: `config`; `cluster`, `storage` and `preflight`; `planner`,
`memory`, `estimate` and `fit`; `tokens`, `dataloader` and `evaluation`; `mpu`, `sharding`, `engine`, `layers`,
`reductions`, `optimizer`, `kernels` and `graphs`; `run_folder`, `checkpoint`, `checkpoint_writer`, `resize` and
`export`; `metrics`, `startup`, `guard`, `elastic` and `out_of_memory`; `display`. `demo` holds the embedded default.
"""

import os
import time

IMPORTED = time.time()  # as a worker's imports began: this package is the first of the large ones

import torch  # noqa: E402

if not torch.cuda.is_available():  # DeepSpeed reads it as it is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
