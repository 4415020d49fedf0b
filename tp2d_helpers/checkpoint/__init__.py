"""The run's folder: what it holds, saving and loading, another grid, and the export as a Hugging Face folder."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "Progress": "run_folder",
        "save_checkpoint": "save_load",
        "load_checkpoint": "save_load",
        "fit_to_world": "resize",
        "claim_run": "files",
        "lock_run": "files",
        "export_checkpoint": "hugging_face",
    },
)
