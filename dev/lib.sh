# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run.
set -euo pipefail

: "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
export HOME
# Used by the scripts that source this file.
# shellcheck disable=SC2034
project_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache_dir=${XDG_CACHE_HOME:-$HOME/.cache}/regcred
# Programs that were unpacked because the machine has none (see dev/install); its own come first.
PATH=$PATH:/usr/sbin:/sbin:$cache_dir/tools/bin
# Everything here is on loopback, which no proxy may see.
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
    say "--- the end of $2:"
    tail -n 25 "$2" >&2 || true
    die "$1"
}
is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }
# Prints the path of libfaketime: that of the machine, or what dev/install unpacked.
faketime_library() {
    local library
    for library in /usr/lib/*/faketime /usr/lib64/faketime /usr/lib/faketime "$cache_dir/tools/lib"; do
        library+=/libfaketimeMT.so.1
        [ ! -e "$library" ] || { echo "$library" && return; }
    done
    return 1
}

# --- Processes -------------------------------------------------------------------------------------------------------
# Every process that a script starts is its direct child, in a session of its own (so that a terminal's Ctrl-C reaches
# the script alone, which then stops them in order), and is told to end by the kernel if the script is killed.

# "pid signal name", in the order of their start. Signal GROUP means TERM for the process group, TREE for all descendants.
started=()
run_as=()  # options of setpriv; a function sets it locally to run something as another user
launched_pid=0
launched_port=0
scratch='' # a folder to remove at the end

# launch NAME SIGNAL LOG COMMAND…   -> launched_pid; SIGNAL is what ends the process cleanly
launch() {
    local name=$1 signal=$2 log=$3
    shift 3
    setsid setpriv "${run_as[@]}" --pdeathsig "${signal/GROUP/TERM}" -- "$@" </dev/null >>"$log" 2>&1 &
    launched_pid=$!
    started+=("$launched_pid $signal $name")
}

# launch_on_port NAME SIGNAL LOG PORT COMMAND…   -> launched_pid, launched_port
# PORT 0 takes a free one, again if somebody else was faster. @PORT@ in COMMAND is replaced.
launch_on_port() {
    local name=$1 signal=$2 log=$3 port=$4 try
    shift 4
    for try in 1 2 3 4 5; do
        launched_port=$port
        [ "$port" != 0 ] || launched_port=$(free_port)
        launch "$name" "$signal" "$log" "${@//@PORT@/$launched_port}"
        await "$name" "$log" 60 owns_port "$launched_pid" "$launched_port" && return
        unset 'started[-1]'
        if [ "$port" != 0 ] || [ "$try" = 5 ] || ! tail -n 20 "$log" | grep -qi 'address already in use'; then
            die_with_log "$name ended at its start" "$log"
        fi
    done
}

# await NAME LOG SECONDS CONDITION…   waits for the condition; 1 when the process that was launched last has ended
await() {
    local name=$1 log=$2 deadline=$((SECONDS + $3))
    shift 3
    until "$@"; do
        kill -0 "$launched_pid" 2>/dev/null || return 1
        [ "$SECONDS" -lt "$deadline" ] || die_with_log "$name was not ready in time" "$log"
        sleep 0.1
    done
}

# step LABEL LOG COMMAND…   a long command, its output in LOG, with a sign of life every 20 seconds
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
            say "  … $((SECONDS - begin)) s: ${doing:-still at it}"
        fi
    done
    wait "$launched_pid" || status=$?
    unset 'started[-1]'
    [ "$status" = 0 ] || die_with_log "$label failed (exit code $status)" "$log"
    say "  done in $((SECONDS - begin)) s"
}

# kill_tree PID SIGNAL   the process and all that descend from it, wherever they moved
kill_tree() {
    local child
    for child in $(cat "/proc/$1/task/"*/children 2>/dev/null || true); do kill_tree "$child" "$2"; done
    kill -"$2" "$1" 2>/dev/null || true
}

# foreground COMMAND…   runs a command with our terminal, input and output; it may take long, and a signal ends it.
# It gets all our open files but 9, which dev/run holds its lock with.
foreground() {
    local status=0
    # Not really in the foreground, where it would keep this script from hearing a signal. In our process group, so that
    # Ctrl-C reaches it too; a background command would ignore that.
    setpriv --pdeathsig TERM -- env --default-signal=INT,QUIT "$@" <&0 9>&- &
    started+=("$! TREE $1")
    wait $! || status=$?
    unset 'started[-1]'
    return "$status"
}

# logged LABEL LOG FUNCTION…   runs a shell function with its output in LOG; its first failing command is its end
logged() {
    local label=$1 log=$2 status=0
    shift 2
    # In the background, because `function || …` would switch `set -e` off in the function.
    ("$@") </dev/null >>"$log" 2>&1 &
    started+=("$! TERM $label")
    wait $! || status=$?
    unset 'started[-1]'
    [ "$status" = 0 ] || die_with_log "$label failed" "$log"
}

# Stops what was started, the last first, each within 15 seconds.
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

# Stops everything and removes the scratch folder, however the script ends.
at_exit() {
    local status=$?
    trap '' INT TERM HUP
    stop_started
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
# A port below the range from which outgoing connections take theirs.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)) && port_is_taken "$port"; do :; done
    echo "$port"
}
# owns_port PID PORT   does this very process listen there? (An answer alone could come from a stranger.)
owns_port() {
    local inode
    inode=$(awk -v address="$(printf '0100007F:%04X' "$2")" '$4 == "0A" && $2 == address { print $10 }' /proc/net/tcp)
    [ -n "$inode" ] && find "/proc/$1/fd" -lname "socket:\[$inode\]" 2>/dev/null | grep -q .
}

# --- Debian packages, unpacked without being installed ----------------------------------------------------------------

# apt_in DIR ARGUMENTS…   apt-get with a state of its own in DIR, which apt_setup made
apt_in() {
    local dir=$1
    shift
    apt-get -qq -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$dir/lists" -o Dir::Cache="$dir" -o Acquire::Languages=none \
        -o Acquire::GzipIndexes=true -o APT::Sandbox::User=root "$@"
}
# Loads the lists of the Debian archive that this machine's apt is configured with.
apt_setup() {
    local dir=$1 archive
    has apt-get || die "this needs apt-get of Debian 12"
    # shellcheck disable=SC2016 # the words with $ are apt's
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
