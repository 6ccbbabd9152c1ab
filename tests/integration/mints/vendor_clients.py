"""Makes calls with the vendors' own clients.

Reads a JSON list of calls from standard input, and prints the list of their results: what the client
returned, or the text of its error.
"""

import base64
import json
import os
import sys


def epoch(utc):
    import datetime

    return utc.replace(tzinfo=datetime.timezone.utc).timestamp()


def refreshed(credentials):
    import google.auth.transport.requests

    credentials.refresh(google.auth.transport.requests.Request())
    return {"token": credentials.token, "expiresAt": epoch(credentials.expiry)}


def google_key(endpoint, key_file, scope, impersonate=None):
    from google.auth import impersonated_credentials
    from google.oauth2 import service_account

    info = json.loads(key_file) | {"token_uri": f"{endpoint}/token"}
    credentials = service_account.Credentials.from_service_account_info(info, scopes=[scope])
    if impersonate:
        credentials = impersonated_credentials.Credentials(
            credentials, impersonate, [scope], iam_endpoint_override=impersonation_url(endpoint, impersonate)
        )
    return refreshed(credentials)


def impersonation_url(endpoint, email):
    return f"{endpoint}/v1/projects/-/serviceAccounts/{email}:generateAccessToken"


def google_web_identity(endpoint, provider, token_file, scope, impersonate=None):
    from google.auth import identity_pool

    return refreshed(
        identity_pool.Credentials(
            audience=f"//iam.googleapis.com/{provider}",
            subject_token_type="urn:ietf:params:oauth:token-type:jwt",
            token_url=f"{endpoint}/v1/token",
            credential_source={"file": token_file},
            service_account_impersonation_url=impersonate and impersonation_url(endpoint, impersonate),
            scopes=[scope],
        )
    )


def google_metadata(scope):
    # The module reads GCE_METADATA_HOST when it is imported.
    from google.auth import compute_engine

    return refreshed(compute_engine.Credentials(scopes=[scope]))


def azure_secret(client_secret, **call):
    from azure.identity import ClientSecretCredential

    return pulled(ClientSecretCredential, call, client_secret=client_secret)


def azure_certificate(pem, **call):
    from azure.identity import CertificateCredential

    return pulled(CertificateCredential, call, certificate_data=pem.encode())


def azure_web_identity(token_file, **call):
    from azure.identity import WorkloadIdentityCredential

    return pulled(WorkloadIdentityCredential, call, token_file_path=token_file)


def pulled(credential, call, **proof):
    return manifest(
        credential(
            tenant_id=call["tenant"],
            client_id=call["client"],
            authority=f"https://{call['host']}",
            disable_instance_discovery=True,
            retry_total=0,
            **proof,
        ),
        **call,
    )


def azure_managed_identity(**call):
    from azure.identity import ManagedIdentityCredential

    return manifest(ManagedIdentityCredential(client_id=call["client"]), **call)


def manifest(credential, host, repository, tag, **_):
    from azure.containerregistry import ContainerRegistryClient

    client = ContainerRegistryClient(f"https://{host}", credential, retry_total=0)
    return {"digest": client.get_manifest(repository, tag).digest}


def aws_client(service, endpoint, region="us-east-1", **key):
    import botocore.config
    import botocore.session

    # Without a key, it looks for the identity of the container or instance.
    return botocore.session.Session().create_client(
        service,
        region_name=region,
        endpoint_url=endpoint,
        config=botocore.config.Config(retries={"max_attempts": 0}),
        **key,
    )


def aws_login(endpoint, key=None, assume_role=None, web_identity=None):
    key = key or {}
    if assume_role:
        assumed = aws_client("sts", endpoint, **key).assume_role(RoleSessionName="peer", **assume_role)
        key = session_key(assumed)
    if web_identity:
        sts = aws_client("sts", endpoint)
        key = session_key(sts.assume_role_with_web_identity(RoleSessionName="peer", **web_identity))
    data = aws_client("ecr-public", endpoint, **key).get_authorization_token()["authorizationData"]
    user, password = base64.b64decode(data["authorizationToken"]).decode().split(":", 1)
    return {"user": user, "token": password, "expiresAt": data["expiresAt"].timestamp()}


def session_key(answer):
    credentials = answer["Credentials"]
    return {
        "aws_access_key_id": credentials["AccessKeyId"],
        "aws_secret_access_key": credentials["SecretAccessKey"],
        "aws_session_token": credentials["SessionToken"],
    }


def result(call):
    before = dict(os.environ)
    os.environ.update(call.pop("variables", {}))
    try:
        return globals()[call.pop("call")](**call)
    except Exception as error:  # the test asserts its text
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        os.environ.clear()
        os.environ.update(before)


# No metadata service of this machine answers in place of the fake.
os.environ |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1", "AWS_CONFIG_FILE": "/dev/null"}
print(json.dumps([result(call) for call in json.load(sys.stdin)]))
