"""What makes a step faster without changing its result, each by itself and each optional.

`optimizations` chooses and applies them; a training run is right without this room.
"""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "chosen_optimizations": "optimizations",
        "optimize": "optimizations",
    },
)
