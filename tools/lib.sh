# shellcheck shell=bash
# Sourced by the scripts beside it: what the machine must have, and the virtual environment of this checkout.
#
# Two rules hold here. Whatever cannot go on says so in one line on standard error and exits 69 (EX_UNAVAILABLE), so
# that a log ends with what to do. And no mirror and no registry is named: apt and pip know theirs.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
PYTHON=''

note() { printf 'cidfs: %s\n' "$*" >&2; }

die() {
  note "$*"
  exit 69
}

# ---------------------------------------------------------------------------------------------------------------------
# Packages of the system

# as_root COMMAND...: through sudo where that asks nothing; a password prompt would hang a run without a terminal.
as_root() {
  if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi
}

# apt_get ARGUMENT...: never asks, waits for another apt, takes nothing that is only recommended.
apt_get() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 \
    -o APT::Install-Recommends=false "$@" < /dev/null
}

# apt_try PACKAGE...: sets APT_REASON when it fails.
apt_try() {
  local log times status=1
  note "installing $* (apt-get)"
  log=$(mktemp)
  for times in 1 2 3; do
    # A fresh image has no package lists, and old lists name versions that the mirror no longer has. A list that cannot
    # be had may be of another archive than the one that matters here: the installation decides.
    apt_get update > "$log" 2>&1 || true
    if apt_get install "$@" >> "$log" 2>&1; then
      hash -r
      status=0
      break
    fi
    # The first message: what comes after it only follows from it.
    APT_REASON=$(grep -m1 -E '^(E: |W: Failed to fetch)' "$log" || tail -n 1 "$log")
    ((times == 3)) || sleep 3
  done
  rm -f "$log"
  return "$status"
}

# need_apt PACKAGE...: goes on only where packages can be installed.
need_apt() {
  command -v apt-get > /dev/null ||
    die "missing: $* (Debian's names); there is no apt-get here: install them with this system's package manager"
  as_root true 2> /dev/null || die "missing: $*; run as root: apt-get install $*"
}

# apt_install PACKAGE...: called only with what was found missing.
apt_install() {
  need_apt "$@"
  apt_try "$@" || die "missing: $*; apt-get could not install them (${APT_REASON:-no message}): install them by hand"
}

# compiles [COMPILER-OPTION...]: a compiler without the C library's headers (or without its 32-bit half) is none.
compiles() {
  local out status=0
  out=$(mktemp)
  gcc "$@" -x c -o "$out" - 2> /dev/null <<< $'#include <stdio.h>\nint main(void) { return puts("") < 0; }' || status=1
  rm -f "$out"
  return "$status"
}

# ---------------------------------------------------------------------------------------------------------------------
# Python

# Prints "WHAT IS WRONG|BASE EXECUTABLE": nothing is wrong, `old`, `parts` (a module, the venv tool or the headers are
# not there) or, for a python that is a Debian package and can be completed by others, `debian` and those packages.
PYTHON_PROBE='
import sys
base = getattr(sys, "_base_executable", None) or sys.executable
if sys.version_info < (3, 11):
    raise SystemExit(print("old|" + base))
import importlib.util, os, sysconfig
have = lambda *names: all(importlib.util.find_spec(name) for name in names)
packages = []
if not have("venv", "ensurepip"):
    packages.append("python3-venv")
headers = (sysconfig.get_path("include"), sysconfig.get_config_var("INCLUDEPY"))
if not any(os.path.exists(os.path.join(folder or "", "Python.h")) for folder in headers):
    packages.append("python3-dev")
whole = have("_bz2", "_ctypes", "_lzma", "_sqlite3", "_ssl", "zlib")
debian = sys.base_prefix == "/usr" and os.path.exists("/var/lib/dpkg/status")
if whole and not packages:
    wrong = ""
elif whole and debian:
    wrong = "debian " + " ".join(packages)
else:
    wrong = "parts"
print(wrong + "|" + base)
'

# find_python: sets PYTHON to the first python3 of PATH that is new enough and whole; else PYTHON_PACKAGES to what makes
# Debian's python so.
find_python() {
  local candidate answer
  PYTHON='' PYTHON_PACKAGES=()
  while IFS= read -r candidate; do
    # A pyenv shim without a version, a broken link: not this one.
    answer=$("$candidate" -I -c "$PYTHON_PROBE" 2> /dev/null < /dev/null) || continue
    case $answer in
      '|'*)
        PYTHON=${answer#*|}
        return 0
        ;;
      debian*)
        answer=${answer%%|*}
        ((${#PYTHON_PACKAGES[@]})) || read -ra PYTHON_PACKAGES <<< "${answer#debian}"
        ;;
    esac
  done < <(venv_works && printf '%s\n' "$VENV/bin/python"; type -aP python3; printf '/usr/bin/python3\n')
  ((${#PYTHON_PACKAGES[@]})) || PYTHON_PACKAGES=(python3 python3-venv python3-dev)
  return 1
}

# ---------------------------------------------------------------------------------------------------------------------
# need_system: what cidfs needs of the machine. Installs it where it may.

need_system() {
  local missing=()
  [[ -c /dev/fuse ]] || as_root modprobe fuse 2> /dev/null || true
  [[ -c /dev/fuse ]] ||
    die "there is no /dev/fuse: load the kernel's fuse module, or give this container the device (--device /dev/fuse)"
  # libfuse opens it as whoever mounts; fusermount3, which is setuid, comes after that.
  if ! (: <> /dev/fuse) 2> /dev/null; then
    ((EUID == 0)) || die "/dev/fuse cannot be opened by you: an administrator must allow it (chmod 666 /dev/fuse)"
    die "/dev/fuse cannot be opened: this container needs --device /dev/fuse and the capability SYS_ADMIN"
  fi

  command -v fusermount3 > /dev/null || missing+=(fuse3)
  # The rest is for building; an environment that is up to date has that behind it.
  if ! venv_fresh ''; then
    pkg-config --exists fuse3 2> /dev/null || missing+=(libfuse3-dev)
    command -v pkg-config > /dev/null || missing+=(pkg-config)
    compiles || missing+=(gcc libc6-dev)
    find_python || missing+=("${PYTHON_PACKAGES[@]}")
  fi
  ((${#missing[@]})) || return 0

  apt_install "${missing[@]}"
  command -v fusermount3 > /dev/null || die "fuse3 is installed but fusermount3 is not in PATH ($PATH)"
  venv_fresh '' && return 0
  pkg-config --exists fuse3 || die "libfuse3-dev is installed but pkg-config does not know fuse3: check PKG_CONFIG_PATH"
  compiles || die "gcc is installed but cannot compile: try gcc on a small program by hand"
  find_python || die "missing: python3 >= 3.11 with venv and headers; the system's is older: put a newer one into PATH"
}

# need_gcc32: a compiler for 32-bit programs; one test runs such a program on the mount, to see its inode numbers fit.
need_gcc32() {
  # Only where the machine runs them.
  [[ $(uname -m) == x86_64 ]] || return 0
  compiles -m32 && return 0
  # gcc-multilib cannot be installed beside Debian's cross compilers; its parts can.
  need_apt gcc-multilib
  if apt_try gcc-multilib && compiles -m32; then return 0; fi
  apt_install libc6-dev-i386 "lib32gcc-$(gcc -dumpversion | cut -d. -f1)-dev"
  compiles -m32 || die "gcc cannot compile 32-bit programs (-m32): install gcc-multilib"
}

# ---------------------------------------------------------------------------------------------------------------------
# need_venv [EXTRAS]: .venv with this checkout installed into it, editable. EXTRAS as in pyproject.toml: `test`, `bench`.

# The environment's own python and pip run. Not so when its making was interrupted, or its python was upgraded.
venv_works() {
  [[ -x $VENV/bin/python && ! -e $VENV/.being-made ]] &&
    "$VENV/bin/python" -I -c 'import sys; assert sys.version_info >= (3, 11); import pip' 2> /dev/null
}

# What an installation depends on. The checkout's place is part of it: an environment does not survive being moved.
venv_key() {
  sha256sum < "$ROOT/pyproject.toml"
  "$VENV/bin/python" -I -c 'import sys; print(sys.version, sys.prefix)'
}

# venv_fresh EXTRAS: what was installed last is what would be installed now. With extras there is more than without.
venv_fresh() {
  local key stamp stamps
  [[ -x $VENV/bin/python && ! -e $VENV/.being-made ]] || return 1
  key=$(venv_key 2> /dev/null) || return 1
  if [[ -n $1 ]]; then stamps=("$VENV/.installed-$1"); else stamps=("$VENV"/.installed-*); fi
  for stamp in "${stamps[@]}"; do
    [[ -f $stamp && $(< "$stamp") == "$key" ]] && return 0
  done
  return 1
}

need_venv() {
  local extras=${1:-}
  venv_fresh "$extras" && return 0
  # One at a time; the lock is on a file that is there anyway, so that nothing is left over.
  (
    flock 9
    venv_fresh "$extras" || make_venv "$extras"
  ) 9< "$ROOT/pyproject.toml"
}

make_venv() {
  local extras=$1 log project=. key stamp
  [[ -z $extras ]] || project=".[$extras]"
  if [[ -e $VENV && ! -w $VENV ]]; then
    die "$VENV belongs to $(stat -c %U -- "$VENV"): run this as that user, or remove it"
  fi
  if ! venv_works; then
    [[ -n $PYTHON ]] || find_python || die "missing: ${PYTHON_PACKAGES[*]}; run: apt-get install ${PYTHON_PACKAGES[*]}"
    note "making ${VENV#"$ROOT/"} with $PYTHON"
    rm -rf -- "$VENV"
    mkdir -- "$VENV" || die "$VENV cannot be made"
    : > "$VENV/.being-made"
    "$PYTHON" -m venv "$VENV" > /dev/null 2>&1 9>&- || die "$PYTHON could not make a virtual environment at $VENV"
  fi
  note "installing cidfs${extras:+ with $extras} into ${VENV#"$ROOT/"} (pip)"
  # The stamp is written last. An environment in which pip was killed is made anew: half a package counts as installed.
  # Other extras that were installed for this very checkout stay: pip only adds.
  key=$(venv_key)
  for stamp in "$VENV"/.installed-*; do
    [[ -f $stamp && $(< "$stamp") == "$key" ]] || rm -f -- "$stamp"
  done
  : > "$VENV/.being-made"
  log=$(mktemp)
  if ! pip_install "$project" > "$log" 2>&1; then
    # pip retries a connection by itself, but not a name that did not resolve or an index that answered with an error.
    if grep -qiE 'connection|timed? ?out|resol|retrying|could not find a version|HTTP error|ssl' "$log"; then
      sleep 3
      pip_install "$project" > "$log" 2>&1 || pip_failed "$log"
    else
      pip_failed "$log"
    fi
  fi
  rm -f "$log"
  venv_key > "$VENV/.installed-$extras"
  rm -f -- "$VENV/.being-made"
}

pip_install() {
  cd -- "$ROOT" || return
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install -q --no-input -e "$1" < /dev/null 9>&-
}

pip_failed() {
  cat -- "$1" >&2
  rm -f -- "$1" "$VENV/.being-made"
  die "pip could not install cidfs's dependencies (its messages are above): mend that and run this again"
}

# ---------------------------------------------------------------------------------------------------------------------
# cache_dir: where what was downloaded stays, outside of the checkout

# usable_cache FOLDER: it is there, ours (a name in /var/tmp can be taken by anyone, and what lies there is run), and a
# Nix can live in it (no blanks in its name).
usable_cache() {
  [[ $1 == /* && $1 != *[[:space:]]* ]] && (umask 077 && mkdir -p -- "$1") 2> /dev/null && [[ -O $1 && -w $1 ]]
}

# cache_dir: prints the first place that will do. One that was asked for is not passed over.
cache_dir() {
  local candidate
  if [[ -n ${CIDFS_CACHE:-} ]]; then
    candidate=$(realpath -m -- "$CIDFS_CACHE")
    usable_cache "$candidate" ||
      die "CIDFS_CACHE=$CIDFS_CACHE must be a folder of yours, writable, without blanks in its name"
    printf '%s\n' "$candidate"
    return
  fi
  for candidate in "${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}/cidfs" "/var/tmp/cidfs-cache-$EUID"; do
    # Without a home the first one is /cidfs, which nobody meant.
    if [[ $candidate != /cidfs ]] && usable_cache "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no place to keep things in: set CIDFS_CACHE to a folder that you can write to"
}
