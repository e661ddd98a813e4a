#!/bin/sh
# Makes a virtual environment with this package in it, editable, or brings an old one up to date.
#
#   tools/make_venv.sh FOLDER VERSION [REQUIREMENT...]
#
# VERSION is a Python version such as 3.11, or "newest"; each REQUIREMENT narrows the install, as "jax==0.10.*" does.
# Nothing happens, at once, when the folder was made by the same pyproject.toml and arguments.
set -eu

folder=$1
version=$2
shift 2
here=$(dirname "$0")
stamp="$folder/.installed"
key="$(cksum <pyproject.toml) $version ${PYTHON:-} $*"

if [ -x "$folder/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && "$folder/bin/python" -c ''; then
    exit 0
fi

if [ "$version" = newest ]; then
    python=$("$here/find_python.sh") || python=
else
    python=$("$here/find_python.sh" "$version") || python=
fi
if [ -z "$python" ]; then
    echo "No working Python ${version} found (3.11, 3.12 or 3.13 will do); name one with PYTHON=/path/to/python" >&2
    exit 1
fi

# Only a folder that is a virtual environment is ever removed.
if [ -e "$folder" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
    echo "$folder exists and is not a virtual environment: move it away" >&2
    exit 1
fi
rm -rf "$folder"
echo "Setting up $folder with $("$python" --version 2>&1); this takes a minute or two the first time ..."
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]' "$@"
printf '%s\n' "$key" >"$stamp"
