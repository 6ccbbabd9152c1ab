# shellcheck shell=bash disable=SC2034
# The data folder that `make run` keeps between runs. Sourced.

# Postgres runs as an unprivileged user where `make run` runs as root, and cannot enter root's own folders.
if is_root; then data_dir=/var/lib/regcred; else data_dir=${XDG_DATA_HOME:-$HOME/.local/share}/regcred; fi
data_dir=${REGCRED_DATA_DIR:-$data_dir}
# Variables for the command line, such as REGCRED_DATABASE_URL: `set -a; . FILE`.
data_env=$data_dir/regcred.env
data_key=$data_dir/admin.key
data_pid=$data_dir/run.pid # of the last `make run`
# Exists while the API serves: `api`, and `kubeconfig` once the cluster is ready.
data_running=$data_dir/running.env
# Exists while `make registries` runs: `registry_a`, `registry_b`, and `htpasswd_a`, the users of the first.
data_registries=$data_dir/registries.env

# api_status API KEY PATH   prints the status code
api_status() {
    curl -s -o /dev/null -w '%{http_code}' --max-time 5 -H @- "$1$3" <<<"${2:+Authorization: Bearer $2}" || true
}
