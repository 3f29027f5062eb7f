# Sourced by examples/quickstart.sh and tests/run.sh: the Python environment in the checkout.
#
#   ensure_venv ROOT EXTRAS
#
# makes or reuses ROOT/.venv with this package (editable), the given extras and Qwen's vocabulary file, at the versions
# of constraints-cpu.txt, and activates it. A stamp remembers what was installed from which setup.py and constraints, so
# the second call takes no time.

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or 3.12 is needed and was not found (Debian: apt-get install python3 python3-venv)" >&2
    return 2
}

make_venv() {
    local root="$1" python
    python="$(find_python)" || return 2
    echo "setup: new environment $root/.venv with $("$python" --version)"
    rm -rf "$root/.venv"
    if ! "$python" -m venv "$root/.venv"; then
        rm -rf "$root/.venv"
        echo "error: $python cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2
        return 2
    fi
}

# An environment names its own folder in its scripts, so it does not work in a checkout that was moved or copied.
is_at_home() {
    grep -qF -e "$1" -e "$(realpath "$1")" "$1/bin/activate" 2>/dev/null
}

ensure_venv() {
    local root="$1" extras="$2" stamp started=$SECONDS
    stamp="$root/.venv/.installed-$(cat "$root/setup.py" "$root/constraints-cpu.txt" | sha256sum | cut -c 1-16)-$extras"
    if ! "$root/.venv/bin/python" -c '' 2>/dev/null || ! is_at_home "$root/.venv"; then make_venv "$root" || return; fi
    source "$root/.venv/bin/activate"
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
