"""The command line of the export.

python -m tp2d_helpers.checkpoint.export CHECKPOINT [--model NAME] [--output FOLDER] [--trust-remote-code]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tp2d_helpers.checkpoint.run_folder import checkpoint_tag
from tp2d_helpers.config import reason


def _recorded_model(path: Path) -> str:
    """`model_name` in the settings that a run recorded."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_name"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} does not say which model was trained ({reason(error)}): name it by --model") from None


def main(arguments: list[str] | None = None) -> None:
    """Export, and print the folder. A mistake is one line on stderr, and exit code 1."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder from a checkpoint; print its path.")
    parser.add_argument("checkpoint", type=Path, help="a folder checkpoint_<n> of a run")
    parser.add_argument("--model", help="the model that was trained (default: model_name in the run's config.json)")
    parser.add_argument("--output", type=Path, help="(default: the folder `export` beside the checkpoint)")
    parser.add_argument("--trust-remote-code", action="store_true", help="execute code that comes with the model")
    given = parser.parse_args(arguments)
    from tp2d_helpers.checkpoint.hugging_face import export_checkpoint  # PyTorch and all, which --help can do without

    try:
        run = checkpoint_tag(given.checkpoint).resolve().parents[1]
        model = given.model or _recorded_model(run / "config.json")
        print(export_checkpoint(given.checkpoint, model, given.output or run / "export", given.trust_remote_code))
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
