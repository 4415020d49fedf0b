#!/usr/bin/env bash
# Run the notebook on the embedded demo and store its outputs in tp_autotp.ipynb, without traces of this machine.
# No output is stored if a cell failed. The measured numbers in the text, and in that of the READMEs, are rewritten from
# ci/benchmark/results (without a run: ci/notebook numbers).
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1  # "auto" chooses the demo, also on a machine with GPUs
exec "$PYTHON" "$ROOT/ci/notebook" refresh
