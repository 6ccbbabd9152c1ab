"""The main job of regcred, with a client that openapi-python-client generates: two registry accounts become one Secret."""

import os
from pathlib import Path

from regcred_client import AuthenticatedClient
from regcred_client.api.clusters import create_cluster
from regcred_client.api.registry_accounts import create_registry_account
from regcred_client.api.secrets import create_secret
from regcred_client.models import CreateCluster, CreateRegistryAccount, CreateSecret, Problem, Secret

client = AuthenticatedClient(base_url=os.environ["REGCRED_URL"], token=os.environ["REGCRED_TOKEN"])

for name, registry, password in [
    ("python-5000", "registry.example.com:5000", "xxx1"),
    ("python-6000", "registry.example.com:6000", "xxx2"),
]:
    account = CreateRegistryAccount(name=name, registry=registry, username="dev", password=password)
    created = create_registry_account.sync(client=client, body=account)
    assert not isinstance(created, Problem), created
kubeconfig = Path(os.environ["KUBECONFIG"]).read_text()
create_cluster.sync(client=client, body=CreateCluster(name="python", kubeconfig=kubeconfig))
body = CreateSecret(name="python-pull", accounts=["python-5000", "python-6000"])
secret = create_secret.sync("python", "default", client=client, body=body)
assert isinstance(secret, Secret), secret
print(secret.name, "unlocks", " and ".join(secret.keys))
