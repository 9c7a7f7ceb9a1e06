# Sourced by the scripts beside it. `ensure_env` makes the virtual environment that they run in, or reuses it.
#
# PYTHON picks the interpreter (default: the first of python3, python3.13 ... python3.10 that is 3.10 or newer).
# QLORA_ENGINE_TORCH picks the torch requirement (default: plain torch beside an NVIDIA GPU, else a pinned release).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
venv=$root/.venv

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10 or newer is needed (tried: ${PYTHON:-python3, python3.13 ... python3.10})" >&2
    return 1
}

# _pip REQUIREMENTS...: quiet; its whole output goes to a log, of which the end is shown when it fails.
_pip() {
    local log=$root/.cache/pip.log
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "error: pip install $* failed (whole log: $log)" >&2
        return 1
    fi
}

# The environment is whole when its stamp, which is written last, tells of the same project file, torch and
# interpreter; a run that was interrupted leaves no stamp, and the next one goes on where pip stopped.
ensure_env() {
    local python torch stamp
    python=$(_find_python) || return 1
    if [ -n "${QLORA_ENGINE_TORCH:-}" ]; then torch=$QLORA_ENGINE_TORCH
    elif has_gpu; then torch=torch
    else torch=torch==2.13.0
    fi
    stamp="$(cksum <pyproject.toml) $torch $("$python" --version)"
    mkdir -p "$root/.cache"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$root/.cache/env.lock"
        flock -n 9 || { say "waiting for another set-up of .venv"; flock 9; }
    fi
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            say "making .venv with $("$python" --version)"
            rm -rf "$venv"
            "$python" -m venv "$venv" || { echo "error: '$python -m venv' failed (Debian: apt install python3-venv)" >&2; return 1; }
        fi
        say "installing $torch"
        _pip "$torch" || return 1
        say "installing qlora-engine and its development tools"
        _pip --editable ".[dev]" || return 1
        printf '%s\n' "$stamp" >"$venv/.stamp"
        say ".venv is ready"
    fi
    exec 9>&-
}
