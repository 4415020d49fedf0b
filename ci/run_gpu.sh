#!/usr/bin/env bash
# On a machine with 4 GPUs: run the notebook with ci/params/gpu.yaml, then check what it left behind.
#
#   ci/run_gpu.sh [--max-memory-gib N] [papermill options]     options come after gpu.yaml, so theirs win
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
checks=(--check)
if [[ "${1:-}" == --max-memory-gib ]]; then
    checks+=(--max-memory-gib "${2:?--max-memory-gib needs a number}")
    shift 2
fi
exec "$PYTHON" "$ROOT/ci/notebook.py" run "${checks[@]}" -- -f "$ROOT/ci/params/gpu.yaml" "$@"
