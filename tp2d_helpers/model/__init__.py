"""The grid of ranks, what AutoTP must make of each weight, and the engine that trains it."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "ModelParallelUnit": "mpu",
        "ModelFacts": "facts",
        "load_config": "facts",
        "load_model": "engine",
        "get_mixed_precision_dtype": "engine",
        "setup_model_with_autotp": "engine",
        "shard_table": "table",
    },
)
