"""Creates users and roles at an AWS peer, and prints their keys as JSON."""

import json
import sys

import botocore.config
import botocore.session

endpoint = sys.argv[1]
config = botocore.config.Config(retries={"max_attempts": 0})
session = botocore.session.Session()
iam = session.create_client(
    "iam",
    region_name="eu-central-1",
    endpoint_url=endpoint,
    aws_access_key_id="test",
    aws_secret_access_key="test",
    config=config,
)


def policy(*actions, **condition):
    statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement | condition]})


def trust(action, principal, condition):
    statement = {"Effect": "Allow", "Action": action, "Principal": principal, "Condition": {"StringEquals": condition}}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def user(name, *actions):
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    if actions:
        iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=policy(*actions))
    return {"id": key["AccessKeyId"], "secret": key["SecretAccessKey"]}


def role(name, trusted):
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=trusted)
    iam.put_role_policy(RoleName=name, PolicyName="own", PolicyDocument=policy("ecr:GetAuthorizationToken"))


keys = {"pull": user("pull", "ecr:GetAuthorizationToken", "sts:AssumeRole")}
if "--roles" in sys.argv:
    keys["denied"] = user("denied")
    account = "arn:aws:iam::000000000000"
    role("assumed", trust("sts:AssumeRole", {"AWS": f"{account}:user/pull"}, {"sts:ExternalId": "external-1"}))
    iam.create_open_id_connect_provider(
        Url="https://issuer.example", ClientIDList=["sts.amazonaws.com"], ThumbprintList=["a" * 40]
    )
    subject = {"issuer.example:sub": "system:serviceaccount:regcred:pull"}
    federated = {"Federated": f"{account}:oidc-provider/issuer.example"}
    role("federated", trust("sts:AssumeRoleWithWebIdentity", federated, subject))
print(json.dumps(keys))
