#!/usr/bin/env bash
# Run the notebook from start to end by papermill; by default what "auto" chooses (without GPUs: the embedded demo).
#
#   ci/run_notebook.sh [papermill options]     for example  -p tp_size 1   -f ci/params/gpu.yaml   --log-output
#
# Each run gets its own folder outputs/run_<date>_<pid>, unless the options set storage_path or experiment_name. What
# the run leaves, the executed notebook included, lies there; the last lines say where.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" "$ROOT/ci/notebook" run -- "$@"
