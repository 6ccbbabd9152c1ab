# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared between the sourced files
# A real Kubernetes API server on loopback: etcd and kube-apiserver, no kubelet. Sourced.

kubernetes_built=$cache_dir/kube-apiserver-1.20.2 # made by dev/kube-apiserver

# Prints the folder of etcd and kube-apiserver, if they are there.
kubernetes_programs() {
    local dir=${KUBEBUILDER_ASSETS:-$kubernetes_built}
    [ -x "$dir/etcd" ] && [ -x "$dir/kube-apiserver" ] && echo "$dir"
}

# kubernetes_files DIR TOKEN_SUFFIX   creates a throw-away CA, certificates and tokens once
kubernetes_files() {
    [ ! -e "$1/tokens.csv" ] || return 0
    mkdir -p "$1"
    logged 'making the certificates of the cluster' "$1/openssl.log" kubernetes_make_files "$@"
}
kubernetes_make_files() {
    local suffix=$2
    umask 077
    cd "$1" || exit
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out ca.key
    openssl req -x509 -new -key ca.key -subj /CN=regcred-sandbox -days 3650 -sha256 \
        -addext keyUsage=critical,keyCertSign -out ca.crt
    kubernetes_sign server /CN=kube-apiserver $'extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1,DNS:localhost'
    kubernetes_sign admin /O=system:masters/CN=admin extendedKeyUsage=clientAuth
    openssl genrsa -out sa.key 2048
    printf '%s\n' "admin-token$suffix,admin,1,\"system:masters\"" "broker-token$suffix,broker,2,\"brokers\"" \
        "stranger-token$suffix,stranger,3,\"strangers\"" >tokens.csv.new
    mv tokens.csv.new tokens.csv # last: an interrupted start creates everything anew
}
# kubernetes_sign NAME SUBJECT EXTENSIONS
kubernetes_sign() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key"
    openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -sha256 -out "$1.crt" \
        -extfile <(printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n%s\n' "$3")
    rm "$1.csr"
}

# kubernetes_curl DIR PATH ARGUMENTS…   as admin, quiet
kubernetes_curl() {
    local dir=$1 path=$2
    shift 2
    curl -sSf -o /dev/null --max-time 5 --cacert "$dir/ca.crt" --cert "$dir/admin.crt" --key "$dir/admin.key" \
        "$(<"$dir/server")$path" "$@" 2>>"$dir/curl.log"
}
kubernetes_has_default_account() {
    kubernetes_curl "$1" /api/v1/namespaces/default/serviceaccounts/default ||
        kubernetes_curl "$1" /api/v1/namespaces/default/serviceaccounts -H 'Content-Type: application/json' \
            -d '{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"default"}}'
}

kubernetes_options=() # additional options for kube-apiserver

# kubernetes_audit DIR   -> kubernetes_options: logs every request for Secrets and ServiceAccounts to DIR/audit.log once it
# is answered. Metadata only: no bodies, hence no passwords.
kubernetes_audit() {
    mkdir -p "$1"
    cat >"$1/audit-policy.yaml" <<YAML
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
- level: Metadata
  resources: [{group: "", resources: [secrets, serviceaccounts]}]
- level: None
YAML
    kubernetes_options+=(--audit-policy-file="$1/audit-policy.yaml" --audit-log-path="$1/audit.log"
        --audit-log-maxsize=10240)
}

# kubernetes_start DIR BIN PORT ETCD_OPTION…   -> kubernetes_server; DIR/kubeconfig is the admin's
# Call kubernetes_files before, and kubernetes_wait before use. Returns early, so that other services start meanwhile.
kubernetes_start() {
    local dir=$1 bin=$2 port=$3 etcd
    shift 3
    launch_on_port etcd TERM "$dir/etcd.log" 0 "$bin/etcd" --data-dir "$dir/etcd" --logger zap \
        --listen-client-urls http://127.0.0.1:@PORT@ --advertise-client-urls http://127.0.0.1:@PORT@ \
        --listen-peer-urls http://127.0.0.1:0 --initial-advertise-peer-urls http://127.0.0.1:0 \
        --initial-cluster default=http://127.0.0.1:0 "$@"
    etcd=http://127.0.0.1:$launched_port
    launch_on_port kube-apiserver TERM "$dir/kube-apiserver.log" "$port" "$bin/kube-apiserver" \
        --etcd-servers="$etcd" --bind-address=127.0.0.1 --secure-port=@PORT@ --advertise-address=127.0.0.1 \
        --endpoint-reconciler-type=none --service-cluster-ip-range=10.96.0.0/16 \
        --tls-cert-file="$dir/server.crt" --tls-private-key-file="$dir/server.key" --client-ca-file="$dir/ca.crt" \
        --token-auth-file="$dir/tokens.csv" --anonymous-auth=true --authorization-mode=RBAC \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$dir/sa.key" \
        --service-account-signing-key-file="$dir/sa.key" --disable-admission-plugins=ServiceAccount \
        --allow-privileged=false "${kubernetes_options[@]}"
    kubernetes_server=https://127.0.0.1:$launched_port
    echo "$launched_pid" >"$dir/kube-apiserver.pid"
    echo "$kubernetes_server" >"$dir/server"
    (umask 077 && cat >"$dir/kubeconfig.new" <<YAML && mv "$dir/kubeconfig.new" "$dir/kubeconfig")
apiVersion: v1
kind: Config
current-context: sandbox
contexts: [{name: sandbox, context: {cluster: sandbox, user: admin}}]
clusters:
- name: sandbox
  cluster:
    server: $kubernetes_server
    certificate-authority-data: $(base64 -w 0 "$dir/ca.crt")
users:
- name: admin
  user: {token: "$(sed -n 's/,admin,.*//p' "$dir/tokens.csv")"}
YAML
}

# kubernetes_start_controllers DIR BIN   starts those controllers that need no nodes: namespaces get a ServiceAccount
# `default` and end when they are deleted, a Secret of a ServiceAccount gets a token, and owned objects are collected.
kubernetes_start_controllers() {
    local dir=$1 bin=$2 options=() help
    help=$("$bin/kube-controller-manager" --help)
    # Of old versions, which also serve plain HTTP.
    [[ $help != *' --port int'* ]] || options=(--port=0)
    launch kube-controller-manager TERM "$dir/kube-controller-manager.log" "$bin/kube-controller-manager" \
        --kubeconfig="$dir/kubeconfig" --leader-elect=false --secure-port=0 "${options[@]}" \
        --service-account-private-key-file="$dir/sa.key" --root-ca-file="$dir/ca.crt" \
        --controllers=namespace,serviceaccount,serviceaccount-token,root-ca-cert-publisher,garbagecollector
}

# kubernetes_wait DIR   waits for readiness, then creates the objects that controllers would create
kubernetes_wait() {
    local dir=$1 launched_pid
    launched_pid=$(<"$dir/kube-apiserver.pid")
    if ! await kube-apiserver "$dir/kube-apiserver.log" 120 kubernetes_curl "$dir" /readyz ||
        ! await kube-apiserver "$dir/curl.log" 60 kubernetes_has_default_account "$dir"; then
        die_with_log "kube-apiserver ended at its start" "$dir/kube-apiserver.log"
    fi
}
