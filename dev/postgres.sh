# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared between the sourced files
# A private Postgres on loopback. Sourced.

# Prints the folder of the newest installed server; Debian does not put these programs on PATH.
postgres_bin() {
    local dir
    dir=$(find /usr/lib/postgresql/*/bin -name initdb -printf '%h\n' 2>/dev/null | sort -V | tail -n 1)
    [ -n "$dir" ] || die "the Postgres server is missing; run: make install"
    echo "$dir"
}
# Prints the user that Postgres runs as, because it refuses to run as root; empty if the caller is not root.
postgres_user() {
    is_root || return 0
    if getent passwd postgres >/dev/null; then echo postgres; else id -un 65534; fi
}

# postgres_init DIR DATA BIN PASSWORD   creates the data folder, as the user of run_as
postgres_init() {
    local dir=$1 data=$2 bin=$3 password=$4
    rm -rf "$data.new"
    cd "$dir" || exit
    setpriv "${run_as[@]}" "$bin/initdb" -D "$data.new" -U postgres -A trust -E UTF8 --locale=C.UTF-8 --no-instructions
    # Every connection needs a password; there is no local socket.
    echo 'host all all 127.0.0.1/32 scram-sha-256' >"$data.new/pg_hba.conf"
    setpriv "${run_as[@]}" "$bin/postgres" --single -D "$data.new" postgres <<SQL
CREATE ROLE regcred LOGIN CREATEDB PASSWORD '$password'
CREATE DATABASE regcred OWNER regcred
SQL
    mv "$data.new" "$data"
}
# postgres_service_role DIR DATA BIN PASSWORD   creates the role of the service, which owns nothing: `regcred migrate
# --grant-to regcred_service` grants its rights. Separate from postgres_init for data folders older than the role.
postgres_service_role() {
    local dir=$1 data=$2 bin=$3 password=$4
    cd "$dir" || exit
    setpriv "${run_as[@]}" "$bin/postgres" --single -D "$data" postgres <<SQL
CREATE ROLE regcred_service LOGIN PASSWORD '$password'
${superuser_password:+ALTER ROLE postgres PASSWORD '$superuser_password'}
SQL
    touch "$dir/service-role"
}

# postgres_start DIR PORT SETTING…   -> database_url (owner) and service_url
# The first start creates the data folder. The superuser can connect only if superuser_password is set at that time.
postgres_start() {
    local dir=$1 port=$2 bin user run_as=() password service_password settings=() data
    shift 2
    bin=$(postgres_bin)
    user=$(postgres_user)
    mkdir -p "$dir"
    chmod 755 "$dir"
    if [ -n "$user" ]; then
        run_as=(--reuid "$user" --regid "$(id -g "$user")" --init-groups)
        mkdir -p "$dir/as-$user"
        chown "$user:" "$dir/as-$user"
        data=$dir/as-$user/data
        setpriv "${run_as[@]}" test -w "$dir/as-$user" ||
            die "Postgres runs as the user $user, which cannot enter $dir: choose a folder that other users may enter"
    else
        data=$dir/data
    fi
    [ -s "$dir/password" ] || (umask 077 && openssl rand -hex 24 >"$dir/password")
    [ -s "$dir/service-password" ] || (umask 077 && openssl rand -hex 24 >"$dir/service-password")
    password=$(<"$dir/password") service_password=$(<"$dir/service-password")

    [ -d "$data" ] || logged 'creating the database' "$dir/initdb.log" postgres_init "$dir" "$data" "$bin" "$password"
    [ -e "$dir/service-role" ] || logged 'creating the role of the service' "$dir/initdb.log" \
        postgres_service_role "$dir" "$data" "$bin" "$service_password"
    for setting in "$@"; do settings+=(-c "$setting"); done
    # INT is Postgres' fast shutdown, which does not wait for clients.
    launch_on_port Postgres INT "$dir/postgres.log" "$port" "$bin/postgres" -D "$data" -p @PORT@ \
        -c listen_addresses=127.0.0.1 -c unix_socket_directories= "${settings[@]}"
    database_url=postgres://regcred:$password@127.0.0.1:$launched_port/regcred
    service_url=postgres://regcred_service:$service_password@127.0.0.1:$launched_port/regcred
    await Postgres "$dir/postgres.log" 60 "$bin/pg_isready" -q -h 127.0.0.1 -p "$launched_port" ||
        die_with_log "Postgres ended at its start" "$dir/postgres.log"
}
