# shellcheck shell=bash
# The main job as curl commands: `make run` prints them, `make demo` runs them. Sourced.

# main_job API KEY_FILE KUBECONFIG CLUSTER SECRET  ACCOUNT REGISTRY PASSWORD  ACCOUNT REGISTRY PASSWORD  MORE_FIELDS
# Prints one paragraph per command. MORE_FIELDS is JSON that both accounts get.
main_job() {
    local api=$1 key_file=$2 kubeconfig=$3 cluster=$4 secret=$5
    local account_a=$6 registry_a=$7 password_a=$8 account_b=$9 registry_b=${10} password_b=${11} more=${12:-}
    cat <<JOB
export KUBECONFIG=$kubeconfig

call() { curl -sS --fail-with-body -w '\n' -H "Authorization: Bearer \$(cat $key_file)" -H 'Content-Type: application/json' "\$@"; }

call $api/v1/registry-accounts \\
  -d '{"name":"$account_a","registry":"$registry_a","username":"dev","password":"$password_a"$more}'

call $api/v1/registry-accounts \\
  -d '{"name":"$account_b","registry":"$registry_b","username":"dev","password":"$password_b"$more}'

kubectl config view --raw --minify --flatten | jq -Rs '{name: "$cluster", kubeconfig: .}' |
  call $api/v1/clusters -d @-

call $api/v1/docker-configs -d '{"accounts":["$account_a","$account_b"],"profile":"kubernetes"}'

call $api/v1/clusters/$cluster/namespaces/default/secrets \\
  -d '{"name":"$secret","accounts":["$account_a","$account_b"]}'
JOB
}
