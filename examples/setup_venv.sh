# Sourced by examples/quickstart.sh and tests/*.sh: the Python environment in the checkout.
#
#   ensure_venv ROOT EXTRAS [FOLDER MINORS]
#
# makes or reuses ROOT/.venv, or ROOT/FOLDER, with this package (editable), the given extras and Qwen's vocabulary file,
# at the versions of constraints-cpu.txt, and activates it. MINORS are the versions of Python that may be used, in the
# order in which they are looked for; "11 12 13" if not given. Each has its own version of Megatron-Core
# (docs/megatron_core.md). A stamp remembers what was installed from which setup.py and constraints, so the second call
# takes no time.

find_python() {  # find_python MINORS: on the PATH, or where pyenv keeps them
    local minor candidate
    for minor in $1; do
        for candidate in "python3.$minor" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python3; do
            if "$candidate" -c "import sys; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "error: Python 3.${1// / or 3.} is needed and was not found (Debian: apt-get install python3 python3-venv)" >&2
    return 2
}

make_venv() {
    local venv="$1" minors="$2" python
    python="$(find_python "$minors")" || return 2
    echo "setup: new environment $venv with $("$python" --version)"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "error: $python cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2
        return 2
    fi
}

# An environment names its own folder in its scripts, so it does not work in a checkout that was moved or copied.
is_at_home() {
    grep -qF -e "$1" -e "$(realpath "$1")" "$1/bin/activate" 2>/dev/null
}

ensure_venv() {
    local root="$1" extras="$2" venv="$1/${3:-.venv}" minors="${4:-11 12 13}" stamp started=$SECONDS
    stamp="$venv/.installed-$(cat "$root/setup.py" "$root/constraints-cpu.txt" | sha256sum | cut -c 1-16)-$extras"
    if ! "$venv/bin/python" -c '' 2>/dev/null || ! is_at_home "$venv"; then make_venv "$venv" "$minors" || return; fi
    source "$venv/bin/activate"
    if [[ -e "$stamp" ]]; then return; fi
    local install=(python -m pip install --quiet --quiet --disable-pip-version-check -c "$root/constraints-cpu.txt")
    echo "setup: installing torch"
    "${install[@]}" pip setuptools torch==2.13.0 || return
    echo "setup: installing megatron_vl[$extras] and what it needs ($((SECONDS - started)) s so far)"
    "${install[@]}" --no-build-isolation -e "$root[$extras]" || return
    "${install[@]}" --no-deps dashscope || return
    touch "$stamp"
    echo "setup: done in $((SECONDS - started)) s"
}
