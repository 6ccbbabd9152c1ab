# shellcheck shell=bash disable=SC2034
# The data folder that `make run` keeps between its runs. Sourced.

# Root's own folders are closed to the unprivileged user that Postgres then runs as.
if is_root; then data_dir=/var/lib/regcred; else data_dir=${XDG_DATA_HOME:-$HOME/.local/share}/regcred; fi
data_dir=${REGCRED_DATA_DIR:-$data_dir}
# For regcred's command line: `set -a; . FILE`. REGCRED_DATABASE_URL and the like.
data_env=$data_dir/regcred.env
data_key=$data_dir/admin.key
# While `make run` is up: where its API and its cluster are.
data_running=$data_dir/running.env

# api_status API KEY PATH   prints the status alone
api_status() {
    curl -s -o /dev/null -w '%{http_code}' --max-time 5 -H @- "$1$3" <<<"${2:+Authorization: Bearer $2}" || true
}
