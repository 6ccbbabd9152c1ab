# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared between the sourced files
# Private registries on loopback: Debian's docker-registry behind htpasswd. Sourced.

# registry_start NAME DIR PORT USER PASSWORD [USER PASSWORD]…   -> registry_address; every user may read and write
registry_start() {
    local name=$1 dir=$2 port=$3
    shift 3
    has docker-registry || die "docker-registry is missing; run: make install"
    mkdir -p "$dir"
    (umask 077 && : >"$dir/htpasswd")
    while [ $# -gt 0 ]; do
        htpasswd -inB -C 5 "$1" <<<"$2" | sed '/^$/d' >>"$dir/htpasswd"
        shift 2
    done
    cat >"$dir/config.yml" <<YAML
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: $dir/data}
  delete: {enabled: true}
http: {addr: "127.0.0.1:0"}
auth:
  htpasswd: {realm: sandbox, path: $dir/htpasswd}
YAML
    launch_on_port "$name" TERM "$dir/registry.log" "$port" \
        env REGISTRY_HTTP_ADDR=127.0.0.1:@PORT@ docker-registry serve "$dir/config.yml"
    registry_address=127.0.0.1:$launched_port
}

# image_make DIR [PROGRAM TITLE]   -> an OCI layout of one small layer, built here because no registry to pull from is
# available. It runs PROGRAM, a static binary; TITLE makes the layer differ from others with the same program.
image_make() {
    local dir=$1 title=${3:-tiny test image} architecture=amd64 run='' layer config manifest
    mkdir -p "$dir/blobs/sha256" "$dir/root/etc"
    printf 'NAME="%s"\n' "$title" >"$dir/root/etc/os-release"
    if [ $# -gt 1 ]; then
        install -m 755 "$2" "$dir/root/program"
        architecture=$(dpkg --print-architecture)
        run='"Entrypoint":["/program"]'
    fi
    tar -C "$dir/root" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf "$dir/layer" .
    # blob FILE   moves the file into the layout; prints its digest and size
    blob() {
        local digest size
        digest=$(sha256sum "$1" | cut -d' ' -f1)
        size=$(stat -c %s "$1")
        mv "$1" "$dir/blobs/sha256/$digest"
        printf '"digest":"sha256:%s","size":%s' "$digest" "$size"
    }
    local type=application/vnd.oci.image
    layer=$(blob "$dir/layer")
    printf '{"architecture":"%s","os":"linux","config":{%s},"rootfs":{"type":"layers","diff_ids":["%s"]}}' \
        "$architecture" "$run" "$(cut -d'"' -f4 <<<"$layer")" >"$dir/config"
    config=$(blob "$dir/config")
    printf '{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"%s",%s},"layers":[{"mediaType":"%s",%s}]}' \
        $type.manifest.v1+json $type.config.v1+json "$config" $type.layer.v1.tar "$layer" >"$dir/manifest"
    manifest=$(blob "$dir/manifest")
    printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s",%s,"annotations":{"org.opencontainers.image.ref.name":"3"}}]}' \
        $type.manifest.v1+json "$manifest" >"$dir/index.json"
    printf '{"imageLayoutVersion":"1.0.0"}' >"$dir/oci-layout"
}

# image_push LAYOUT ADDRESS USER PASSWORD [NAME]   pushes the image as os/alpine:3, with a Docker manifest: the docker CLI
# of Debian 12 does not read OCI manifests
image_push() {
    local auth name=${5:-os/alpine:3}
    auth=$(umask 077 && mktemp "$1/auth.XXXXXX")
    printf '{"auths":{"%s":{"auth":"%s"}}}' "$2" "$(printf %s "$3:$4" | base64 -w 0)" >"$auth"
    skopeo --insecure-policy copy -q --format v2s2 --authfile "$auth" --dest-tls-verify=false "oci:$1:3" \
        "docker://$2/$name" >&2 ||
        die "pushing the image to the registry at $2 failed"
    rm "$auth"
}
