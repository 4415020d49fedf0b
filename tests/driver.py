"""Launch a run in a process that can be killed: `python driver.py '<settings as JSON>'`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tp2d_helpers.config import make_config
from tp2d_helpers.launch import launch
from tp2d_helpers.preflight.plan import preflight

if __name__ == "__main__":
    launch(preflight(make_config(**json.loads(sys.argv[1]))))
