#!/usr/bin/env bash
# Lint, then every test and every cell of the notebook in one pytest run. The last line of output is pytest's.
#
#   ci/run_tests.sh [--all] [pytest options]     --all: the slow tests too; paths are relative to the repository
#
# Fails if either fails. A path among the options replaces tests/ and the notebook.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$ROOT"
export HF_HUB_OFFLINE=1  # no test may need the network

selection=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
    selection=()
    shift
fi

folders=()
for folder in tp2d_helpers tests ci images; do
    if [[ -d $folder ]]; then folders+=("$folder"); fi
done
status=0
"$PYTHON" -m ruff check "${folders[@]}" tp_autotp.ipynb || status=1
"$PYTHON" -m ruff format --check "${folders[@]}" || status=1
"$PYTHON" -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))' || status=1
if ((status)); then echo "error: lint found something; the tests run nevertheless" >&2; fi

# --nbval-lax compares the cells tagged nbval-check-output and runs the others; testpaths count if no path is given.
"$PYTHON" -m pytest -q --nbval-lax --nbval-current-env -o "testpaths=tests tp_autotp.ipynb" \
    ${selection[@]+"${selection[@]}"} "$@" || status=$?
exit "$status"
