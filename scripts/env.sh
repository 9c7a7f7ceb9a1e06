# Sourced by the scripts beside it. `ensure_env` makes the virtual environment that they run in, .venv, or reuses it.
#
# PYTHON picks the interpreter (default: the first of python3, python3.13 ... python3.10 that is 3.10 or newer).
# QLORA_ENGINE_TORCH picks the torch requirement (default: plain torch beside an NVIDIA GPU, else a pinned release).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
venv=$root/.venv

SECONDS=0
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

# _pip VENV WORDS...: quiet; its whole output goes to a log, of which the end is shown when it fails.
_pip() {
    local target=$1 log=$root/.cache/pip.log
    shift
    if ! "$target/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        echo "error: pip install $* failed (whole log: $log)" >&2
        return 1
    fi
}

# make_env VENV STEP...: a virtual environment after one `pip install` for each STEP, whose words are its arguments.
# It is whole when its stamp, which is written last, tells of the same project file, interpreter and steps; a run
# that was interrupted leaves no stamp, and the next one goes on where pip stopped.
make_env() {
    local target=$1 python stamp step
    shift
    python=$(_find_python) || return 1
    stamp="$(cksum <pyproject.toml) $("$python" --version) $*"
    mkdir -p "$root/.cache"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$root/.cache/env.lock"
        flock -n 9 || { say "waiting for another set-up"; flock 9; }
    fi
    if [ "$(cat "$target/.stamp" 2>/dev/null)" != "$stamp" ]; then
        if [ "$("$target/bin/python" --version 2>&1)" != "$("$python" --version)" ] \
            || ! "$target/bin/python" -m pip --version >/dev/null 2>&1; then
            say "making ${target#"$root/"} with $("$python" --version)"
            rm -rf "$target"
            "$python" -m venv "$target" || { echo "error: '$python -m venv' failed (Debian: apt install python3-venv)" >&2; return 1; }
        fi
        for step in "$@"; do
            say "installing $step"
            # shellcheck disable=SC2086 # a step is several words
            _pip "$target" $step || return 1
        done
        printf '%s\n' "$stamp" >"$target/.stamp"
        say "${target#"$root/"} is ready"
    fi
    exec 9>&-
}

# The environment that everything but the matrix uses: torch first, so that nothing else chooses its build.
ensure_env() {
    local torch=${QLORA_ENGINE_TORCH:-}
    if [ -z "$torch" ]; then
        if has_gpu; then torch=torch; else torch=torch==2.13.0; fi
    fi
    make_env "$venv" "$torch" "--editable .[dev]"
}
