"""Can this cluster run these settings? Asked on the driver, before a worker starts or a GPU is taken."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "Plan": "plan",
        "preflight": "plan",
    },
)
