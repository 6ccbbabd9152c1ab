"""Checks the pods of a rendered chart, and prints the objects of the Prometheus operator as JSON.

    check_pods.py MANIFEST

Checked: the restricted Pod Security Standard, a read-only root, limits of memory, a grace period that covers the drain, no
secret in a variable, and the owner's database URL in no other container than `migrate`.
"""

import json
import sys

import yaml

SECRET_VARIABLES = {"DATABASE_URL", "MASTER_KEYS", "API_KEY_PEPPER", "OUTBOUND_PROXY"}


def problems_of(pod):
    security = pod["securityContext"]
    if not security.get("runAsNonRoot") or security["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield "the pod is not restricted"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    for volume in pod["volumes"]:
        if not volume.keys() & {"projected", "secret"}:
            yield f"volume {volume['name']} is neither projected nor a Secret"
    for container in pod.get("initContainers", []) + pod["containers"]:
        yield from (f"{container['name']}: {problem}" for problem in problems_of_container(container))
    drain = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if pod["terminationGracePeriodSeconds"] < drain + 20 + 10:
        yield "the grace period is shorter than preStop, the default shutdown and 10 s"


def problems_of_container(container):
    security = container["securityContext"]
    expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    if security != expected:
        yield f"security context {security}"
    if "memory" not in container["resources"]["limits"]:
        yield "no limit of memory"
    for variable in container["env"]:
        if "valueFrom" in variable or variable["name"].removeprefix("REGCRED_") in SECRET_VARIABLES:
            yield f"{variable['name']} may hold a secret: use its _FILE variant"
    has_owner = any(mount["name"] == "owner" for mount in container["volumeMounts"])
    if has_owner != (container["name"] == "migrate"):
        yield "the owner's database URL belongs in `migrate` only"


def main():
    with open(sys.argv[1], encoding="utf-8") as manifest:
        objects = [document for document in yaml.safe_load_all(manifest) if document]
    deployments = [item for item in objects if item["kind"] == "Deployment"]
    if len(deployments) != 2:
        sys.exit(f"{len(deployments)} Deployments instead of 2")
    problems = [
        f"{item['metadata']['name']}: {problem}"
        for item in deployments
        for problem in problems_of(item["spec"]["template"]["spec"])
    ]
    if any(item["kind"] == "Secret" for item in objects):
        problems.append("the chart creates a Secret")
    if problems:
        sys.exit("\n".join(problems))
    print(json.dumps([item for item in objects if item["apiVersion"] == "monitoring.coreos.com/v1"]))


main()
