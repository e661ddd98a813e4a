#!/bin/sh
# Prints the path of the newest Python that works here and that the dependencies have wheels for.
#
#   tools/find_python.sh          of any supported version, or $PYTHON where that is set
#   tools/find_python.sh 3.11     of exactly that version
#
# Each candidate is run before it is believed: a pyenv shim exists for versions that are switched off,
# and a distribution's Python may come without the modules that make a virtual environment.
# Prints nothing and exits 1 when there is none.
set -u

works() { # works COMMAND VERSION: runs, has that version, can make a virtual environment
    "$1" -c '
import sys, ensurepip, venv, ssl
wanted = sys.argv[1]
ensurepip.version()  # fails where its wheels were left out
found = "%d.%d" % sys.version_info[:2]
sys.exit(0 if found == wanted or (wanted == "any" and sys.version_info >= (3, 11)) else 1)
' "$2" </dev/null >/dev/null 2>&1
}

candidates() { # candidates VERSION: one a line, those of a user's own choice before the system's
    name="python$1"
    old_ifs=$IFS
    IFS=:
    for folder in $PATH; do printf '%s\n' "$folder/$name"; done
    IFS=$old_ifs
    for root in "${PYENV_ROOT:-$HOME/.pyenv}" "$HOME/.pyenv"; do
        for folder in "$root/versions/$1" "$root/versions/$1".*; do printf '%s\n' "$folder/bin/python"; done
    done
    for folder in "$HOME"/.local/share/uv/python/cpython-"$1".* /opt/*; do printf '%s\n' "$folder/bin/$name"; done
    printf '%s\n' "/usr/local/bin/$name" "/opt/homebrew/bin/$name" "/usr/bin/$name"
    for folder in $(printf '%s' "$PATH" | tr ':' ' '); do printf '%s\n' "$folder/python3" "$folder/python"; done
}

HOME=${HOME:-/nonexistent}
if [ $# -eq 0 ] && [ -n "${PYTHON:-}" ]; then
    if works "$PYTHON" any; then
        command -v "$PYTHON"
        exit 0
    fi
    echo "PYTHON=$PYTHON does not run, is older than 3.11 or cannot make a virtual environment" >&2
    exit 1
fi
for version in ${1:-3.13 3.12 3.11}; do
    found=$(candidates "$version" | while IFS= read -r candidate; do
        if [ -x "$candidate" ] && works "$candidate" "$version"; then
            printf '%s\n' "$candidate"
            break
        fi
    done)
    if [ -n "$found" ]; then
        printf '%s\n' "$found"
        exit 0
    fi
done
exit 1
