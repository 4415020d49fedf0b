"""Bytes sent, bytes held and seconds of a step, predicted from the settings alone; and what fits, the fastest first.

`python -m tp2d_helpers.planning.calibrate` measures the machine that the seconds are of.
"""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "tp_bytes": "traffic",
        "zero_bytes": "traffic",
        "state_bytes": "traffic",
        "Setting": "memory",
        "memory_per_gpu": "memory",
        "fastest": "candidates",
        "explain_out_of_memory": "out_of_memory",
    },
)
