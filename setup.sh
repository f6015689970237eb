#!/bin/sh
# Makes the environment: setup.sh VENV [PYTHON]. Refuses at once what has no engine wheel.
set -eu
venv=$1
chosen=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
lock=$here/requirements.lock

refuse() {
    echo "error: $1" >&2
    exit 2
}

platform="$(uname -s) $(uname -m)"
case $platform in
    "Linux x86_64" | "Linux aarch64") ;;
    *) refuse "$platform: the engine has wheels for x86-64 and aarch64 Linux only; use one (a container or a virtual machine does)" ;;
esac
case "$(getconf GNU_LIBC_VERSION 2>/dev/null)" in
    "glibc 2.2"[89] | "glibc 2."[3-9][0-9]) ;;
    "glibc "*) refuse "$(getconf GNU_LIBC_VERSION): the engine's wheels need 2.28 or later; use a newer release of this Linux" ;;
    *) refuse "this Linux has no glibc, which the engine's wheels need (2.28 or later); use Debian, Ubuntu, Fedora, …" ;;
esac

fits() {
    # 64 bit: a Raspberry Pi may run a 32-bit system on a 64-bit kernel.
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) or sys.implementation.name != "cpython" or sys.maxsize < 2**32)' 2>/dev/null
}

if [ -n "$chosen" ]; then
    fits "$chosen" || refuse "PYTHON=$chosen: the engine needs CPython 3.11 or 3.12, 64 bit"
    python=$chosen
else
    python=
    for candidate in python3.12 python3.11 python3 python; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || refuse "no CPython 3.11 or 3.12 (64 bit) found, which the engine needs; install one (apt install python3.11 python3.11-venv), or say make PYTHON=/path/to/python3.11"
fi

# Up to date already: the same lock, and an interpreter that still starts.
stamp=$venv/requirements.lock
if ! cmp -s "$lock" "$stamp" || ! fits "$venv/bin/python"; then
    [ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] ||
        refuse "$venv: exists and is no virtual environment; move it away, or say make VENV=another"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$python has no venv module; apt install python$version-venv"
    echo "setting up $venv with $python ($version): about 400 MB to download the first time"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --require-hashes --only-binary :all: --requirement "$lock" ||
        refuse "pip could not install what requirements.lock names; its message is above"
    # The project's own packages are importable from any folder.
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
        while read -r site; do echo "$here" >"$site/netship.pth"; done
    # The command of an installed package; with -P no file of the working folder is imported.
    cat >"$venv/bin/netship" <<'END'
#!/bin/sh
exec "$(dirname "$(readlink -f "$0")")/python" -P -m netship "$@"
END
    chmod +x "$venv/bin/netship"
    cp "$lock" "$stamp"
fi
echo "ready; activate it with:  . $venv/bin/activate"
