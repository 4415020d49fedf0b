# Sourced by the other scripts: sets ROOT (this checkout) and PYTHON (an interpreter that has requirements.txt).
# With PYTHON set by the caller nothing is installed; without, $ROOT/.venv is made and kept up to date.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

_make_venv() {
    local venv="$1" wanted
    if ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
        if ! python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null; then
            echo "error: python3 is $(python3 --version 2>/dev/null || echo "not there"); this needs Python 3.10 to 3.12." \
                "Put one on PATH as python3, or set PYTHON to an interpreter that has requirements.txt." >&2
            return 1
        fi
        if ! python3 -c "import ensurepip, venv" 2>/dev/null; then
            echo "error: python3 lacks the venv module (Debian and Ubuntu: apt-get install python3-venv)." >&2
            return 1
        fi
        rm -f "$venv"/bin/python* "$venv/.ready"  # half-made, or links to an interpreter that is gone
        python3 -m venv "$venv"
    fi
    # .ready is written last, so that an install that was cut off, or of another requirements.txt, is repeated.
    wanted="$("$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$ROOT/requirements.txt")"
    if [[ "$(cat "$venv/.ready" 2>/dev/null)" != "$wanted" ]]; then
        echo "Installing requirements.txt into $venv (several minutes the first time)" >&2
        rm -f "$venv/.ready"
        "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r "$ROOT/requirements.txt"
        echo "$wanted" >"$venv/.ready"
    fi
}

# Ray starts its workers by a shell line in which the interpreter's path is not quoted, so from a path with a space (or
# another character that a shell minds) .venv is a link to a place without.
_make_place() {
    if [[ $ROOT =~ [^A-Za-z0-9_./@%+=:,-] && ! -L "$ROOT/.venv" ]]; then
        if [[ -e "$ROOT/.venv" && ! -e "$ROOT/.venv/.ready" ]]; then
            echo "error: $ROOT/.venv was made by something else, and can't be used from a path with such characters." \
                "Move it away, or set PYTHON to an interpreter that has requirements.txt." >&2
            return 1
        fi
        rm -rf "$ROOT/.venv"
        ln -s "$HOME/.cache/tp2d/environment-$(cksum <<<"$ROOT" | cut -d " " -f 1)" "$ROOT/.venv"
    fi
    [[ -d "$ROOT/.venv" ]] || (cd "$ROOT" && mkdir -p "$(readlink .venv || echo .venv)")
}

if [[ -z "${PYTHON:-}" ]]; then
    (
        # One at a time: a second script that starts meanwhile waits here, and then finds .ready. macOS has no flock.
        python3 -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX)" 2>/dev/null || true
        _make_place
        _make_venv "$(cd "$ROOT/.venv" && pwd -P)"
    ) 9>>"$ROOT/requirements.txt"  # nothing is written; on NFS only what is open for writing can be locked
    PYTHON="$(cd "$ROOT/.venv" && pwd -P)/bin/python"
fi
