"""What is built once per machine and kept between runs: the demo's model, rows, tokens, compiled kernels."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "cache_dir": "space",
        "build_once": "folders",
        "parts_of": "folders",
        "clear_cache": "clear",
        "check_space": "space",
        "is_full": "space",
    },
)
