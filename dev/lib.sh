# shellcheck shell=bash
# Functions that the scripts of this folder share. Sourced, never run.
set -euo pipefail

: "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
export HOME
# Used by the scripts that source this file.
# shellcheck disable=SC2034
project_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache_dir=${XDG_CACHE_HOME:-$HOME/.cache}/regcred
# Programs that dev/install unpacked; those of the machine come first.
PATH=$PATH:/usr/sbin:/sbin:$cache_dir/tools/bin
# All services are on loopback: bypass proxies.
no_proxy=127.0.0.1,localhost${no_proxy:+,$no_proxy}
NO_PROXY=$no_proxy
export PATH no_proxy NO_PROXY

say() { printf '%s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
# die_with_log MESSAGE LOG
die_with_log() {
    say "--- last lines of $2:"
    tail -n 25 "$2" >&2 || true
    die "$1"
}
is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }
# Prints the path of libfaketime: the installed one, or the one that dev/install unpacked.
faketime_library() {
    local library
    for library in /usr/lib/*/faketime /usr/lib64/faketime /usr/lib/faketime "$cache_dir/tools/lib"; do
        library+=/libfaketimeMT.so.1
        [ ! -e "$library" ] || { echo "$library" && return; }
    done
    return 1
}

# --- Processes -------------------------------------------------------------------------------------------------------
# Every started process is a direct child in its own session: a terminal's Ctrl-C reaches only the script, which then stops
# its children in order. If the script is killed, the kernel signals the children.

# "pid signal name" in start order. Signal GROUP means TERM for the process group, TREE for all descendants.
started=()
run_as=()  # options of setpriv; a function sets it locally to run a command as another user
launched_pid=0
launched_port=0
scratch='' # folder to remove at exit
after_stop='' # command to run at exit, when everything has stopped

# launch NAME SIGNAL LOG COMMAND…   -> launched_pid; SIGNAL ends the process cleanly
launch() {
    local name=$1 signal=$2 log=$3
    shift 3
    setsid setpriv "${run_as[@]}" --pdeathsig "${signal/GROUP/TERM}" -- "$@" </dev/null >>"$log" 2>&1 &
    launched_pid=$!
    started+=("$launched_pid $signal $name")
}

# launch_on_port NAME SIGNAL LOG PORT COMMAND…   -> launched_pid, launched_port
# PORT 0 means a free port, with retries if another process takes it first. Replaces @PORT@ in COMMAND.
launch_on_port() {
    local name=$1 signal=$2 log=$3 port=$4 attempt
    shift 4
    for attempt in 1 2 3 4 5; do
        launched_port=$port
        [ "$port" != 0 ] || launched_port=$(free_port)
        launch "$name" "$signal" "$log" "${@//@PORT@/$launched_port}"
        await "$name" "$log" 60 owns_port "$launched_pid" "$launched_port" && return
        unset 'started[-1]'
        if [ "$port" != 0 ] || [ "$attempt" = 5 ] || ! tail -n 20 "$log" | grep -qi 'address already in use'; then
            die_with_log "$name ended at its start" "$log"
        fi
    done
}

# await NAME LOG SECONDS CONDITION…   waits for the condition; returns 1 if the process launched last ended
await() {
    local name=$1 log=$2 deadline=$((SECONDS + $3))
    shift 3
    until "$@"; do
        kill -0 "$launched_pid" 2>/dev/null || return 1
        [ "$SECONDS" -lt "$deadline" ] || die_with_log "$name was not ready in time" "$log"
        sleep 0.1
    done
}

# step LABEL LOG COMMAND…   runs a long command with its output in LOG, and prints its progress every 20 seconds
step() {
    local label=$1 log=$2 begin=$SECONDS spoken=$SECONDS status=0 doing
    shift 2
    say "$label …"
    launch "$label" GROUP "$log" "$@"
    while kill -0 "$launched_pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - spoken >= 20)); then
            spoken=$SECONDS
            doing=$(grep '^==> ' "$log" | tail -n 1 || true)
            say "  … $((SECONDS - begin)) s: ${doing:-running}"
        fi
    done
    wait "$launched_pid" || status=$?
    unset 'started[-1]'
    [ "$status" = 0 ] || die_with_log "$label failed (exit code $status)" "$log"
    say "  done in $((SECONDS - begin)) s"
}

# kill_tree PID SIGNAL   signals the process and all its descendants, in any session
kill_tree() {
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null || true); do kill_tree "$child" "$2"; done
    kill -"$2" "$1" 2>/dev/null || true
}

# foreground COMMAND…   runs a command with the script's terminal, input and output; a signal ends it.
# It inherits all open files except 9, the lock of dev/run.
foreground() {
    local status=0
    # As a background job, because bash handles no signal while it waits for a foreground command. `env` restores the
    # default action of INT, which bash ignores for background jobs, so that Ctrl-C reaches the command too.
    setpriv --pdeathsig TERM -- env --default-signal=INT,QUIT "$@" <&0 9>&- &
    started+=("$! TREE $1")
    wait $! || status=$?
    unset 'started[-1]'
    return "$status"
}

# logged LABEL LOG FUNCTION…   runs a shell function with its output in LOG, until its first failing command
logged() {
    local label=$1 log=$2 status=0
    shift 2
    # In the background, because `function || …` disables `set -e` inside the function.
    ("$@") </dev/null >>"$log" 2>&1 &
    started+=("$! TERM $label")
    wait $! || status=$?
    unset 'started[-1]'
    [ "$status" = 0 ] || die_with_log "$label failed" "$log"
}

# Stops all started processes in reverse order, each within 15 seconds.
stop_started() {
    local entry pid signal name deadline target
    while [ "${#started[@]}" -gt 0 ]; do
        entry=${started[-1]}
        unset 'started[-1]'
        read -r pid signal name <<<"$entry"
        target=$pid
        case $signal in
        TREE) kill_tree "$pid" TERM ;;
        GROUP)
            target=-$pid
            kill -TERM -- "$target" 2>/dev/null || true
            ;;
        *) kill -"$signal" "$pid" 2>/dev/null || true ;;
        esac
        deadline=$((SECONDS + 15))
        while kill -0 -- "$target" 2>/dev/null; do
            if [ "$SECONDS" -ge "$deadline" ]; then
                say "$name (process $pid) does not stop; killing it"
                if [ "$signal" = TREE ]; then kill_tree "$pid" KILL; else kill -KILL -- "$target" 2>/dev/null || true; fi
                break
            fi
            sleep 0.05
        done
    done
}

# Stops everything and removes the scratch folder.
at_exit() {
    local status=$?
    trap '' INT TERM HUP
    stop_started
    $after_stop
    [ -z "$scratch" ] || rm -rf -- "$scratch"
    exit "$status"
}
clean_up_at_exit() {
    trap at_exit EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
}

# --- Ports -----------------------------------------------------------------------------------------------------------

port_is_taken() {
    awk -v port="$(printf ':%04X' "$1")" '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 }
        END { exit !found }' /proc/net/tcp /proc/net/tcp6 2>/dev/null
}
# Prints a free port below the range of outgoing connections.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)) && port_is_taken "$port"; do :; done
    echo "$port"
}
# owns_port PID PORT   whether this process listens there; an answer alone could come from another program
owns_port() {
    local inode
    inode=$(awk -v address="$(printf '0100007F:%04X' "$2")" '$4 == "0A" && $2 == address { print $10 }' /proc/net/tcp)
    [ -n "$inode" ] && find "/proc/$1/fd" -lname "socket:\[$inode\]" 2>/dev/null | grep -q .
}

# --- Debian packages, unpacked but not installed ----------------------------------------------------------------------

# apt_in DIR ARGUMENTS…   runs apt-get with its own state in DIR, made by apt_setup
apt_in() {
    local dir=$1
    shift
    apt-get -qq -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$dir/lists" -o Dir::Cache="$dir" -o Acquire::Languages=none \
        -o Acquire::GzipIndexes=true -o APT::Sandbox::User=root "$@"
}
# apt_setup DIR   downloads the package lists of the Debian archive that this machine's apt uses
apt_setup() {
    local dir=$1 archive
    has apt-get || die "this needs apt-get of Debian 12"
    # shellcheck disable=SC2016 # apt expands these words
    archive=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' |
        awk '$2 == "bookworm" && $3 == "main" && $1 ~ /\/debian\/?$/ { print $1; exit }')
    [ -n "$archive" ] || die "apt is not configured with Debian 12's archive (bookworm main)"
    mkdir -p "$dir"/{lists/partial,archives/partial}
    printf '%s [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s bookworm main\n' \
        deb "$archive" deb-src "$archive" >"$dir/sources.list"
    apt_in "$dir" update
}
# unpack_packages DIR ROOT PACKAGE…
unpack_packages() {
    local dir=$1 root=$2 package
    shift 2
    mkdir -p "$dir/debs" "$root"
    (cd "$dir/debs" && apt_in "$dir" download "$@")
    for package in "$dir"/debs/*.deb; do dpkg -x "$package" "$root"; done
    rm -r "$dir/debs"
}

# make_debian ROOT PACKAGE,…   creates a minimal Debian 12 with these packages in the folder ROOT; uses `scratch`, needs root
make_debian() {
    local archive
    has wget || die "debootstrap needs wget: install it"
    apt_setup "$scratch/apt"
    [ -e "$scratch/tools" ] || unpack_packages "$scratch/apt" "$scratch/tools" debootstrap
    archive=$(awk '$1 == "deb" { print $3; exit }' "$scratch/apt/sources.list")
    DEBOOTSTRAP_DIR=$scratch/tools/usr/share/debootstrap "$scratch/tools/usr/sbin/debootstrap" --variant=minbase \
        --include="$2" bookworm "$1" "$archive"
}
# copy_from_host ROOT FILE…   copies files of this machine to the same places of ROOT; missing ones are skipped
copy_from_host() {
    local root=$1 file
    shift
    for file in "$@"; do
        [ ! -e "$file" ] || cp -aL --parents "$file" "$root"
    done
}
