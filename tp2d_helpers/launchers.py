"""What other launchers tell a process about its place: mpirun, torchrun, accelerate, AzureML, SageMaker, DLTS.

Nodes that one of them started pass its variables on to every worker, where they speak of another world.
"""

from __future__ import annotations

import os

# Beginnings of names that DeepSpeed 0.19, PyTorch 2.13, transformers 5.20 or accelerate 1.15 read on a worker. Ray's
# own (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...) are not among them.
OTHERS = (
    "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "MPI_LOCAL", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE",
    "AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV", "DLTS_JOB_ID", "TORCHELASTIC_", "ACCELERATE_USE_", "FSDP_",
)  # fmt: skip
# PyTorch reads this one as the process group is made, before the loop begins: torchrun's store would be waited for.
UNSET = {"TORCHELASTIC_USE_AGENT_STORE": "False"}


def forget_others() -> None:
    """Take out of this process's environment what another launcher left in it."""
    for name in [name for name in os.environ if name.startswith(OTHERS)]:
        del os.environ[name]


def be_rank(rank: int, world_size: int) -> None:
    """Say in this process's environment which rank it is of how many on this machine: DeepSpeed asks for it."""
    forget_others()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
