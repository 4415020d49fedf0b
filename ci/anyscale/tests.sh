#!/usr/bin/env bash
# The template repository's test: the whole notebook, with short trainings, on the nodes of aws.yaml or gce.yaml.
set -euxo pipefail

# As the notebook does, where an error of the installation does not end the run at the cell that it belongs to.
uv pip install --system --no-deps -r python_depset.lock
uv pip install --system papermill==2.7.0
papermill README.ipynb /tmp/tp_autotp.out.ipynb --log-output --kernel python3 --cwd . \
    -p debug_steps 5 -p eval_samples 8 -p cluster_wait_seconds 600
