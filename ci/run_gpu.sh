#!/usr/bin/env bash
# On a machine with 4 GPUs: run the notebook with ci/params/gpu.yaml, then check what it left behind.
#
#   ci/run_gpu.sh [--max-memory-gib N] [papermill options]     options come after gpu.yaml, so theirs win
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
limit=40  # GiB per GPU. Measured with gpu.yaml's batch on H200: 31 as 1 × 1, 19 as 2 × 1, 28 as 1 × 2
if [[ "${1:-}" == --max-memory-gib ]]; then
    limit="${2:?--max-memory-gib needs a number}"
    shift 2
fi
exec "$PYTHON" "$ROOT/ci/notebook" run --check --max-memory-gib "$limit" -- -f "$ROOT/ci/params/gpu.yaml" "$@"
