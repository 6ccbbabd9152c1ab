//! `/v1/clusters/{cluster}/namespaces/{namespace}/…/diagnose`

use actix_web::{
    HttpResponse, post,
    web::{Data, Path},
};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use crate::{
    domain::{
        caller::{Call, Identity},
        diagnosis::{Change, Container, ContainerKind, Diagnosis, NodeChoice, PodFacts, Subject, WorkloadKind},
        invalid::{FieldErrors, Invalid},
        matching::ImageReference,
        names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
    },
    http::{
        auth::{Caller, permission::DiagnosePods, require},
        body::Json,
        path_name,
        problem::ApiError,
        query::{FromQuery, Query},
    },
    service::{
        ServiceError,
        diagnosis::{Diagnoses, Remedies, Target},
    },
};

/// Maximum number of containers of a request.
const CONTAINERS_MAX: usize = 50;
/// Maximum number of pull secrets of a request.
const PULL_SECRETS_MAX: usize = 20;

/// Whether to carry out fixes.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ApplyQuery {
    /// Carries out the applicable fixes. The caller needs the permission of each change: 403 names a
    /// missing one, and nothing is changed. The answer is the diagnosis before the changes; diagnose
    /// again for their effect.
    #[param(value_type = Option<bool>, default = false)]
    apply: bool,
}

impl FromQuery for ApplyQuery {
    fn from_query(query: &mut Query<'_>) -> Self {
        Self { apply: query.flag("apply") }
    }
}

/// Pod that does not exist yet. The fields are named as in a pod.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiagnoseSpec {
    /// Images.
    #[schema(max_items = 50, example = json!(["registry.example.com:5000/os/alpine:3"]))]
    images: Option<Vec<String>>,
    /// Containers, instead of `images`. Their names are checked, too.
    #[schema(max_items = 50)]
    containers: Option<Vec<SpecContainer>>,
    /// Pull secrets, in order. Without any, those of the ServiceAccount are used.
    #[serde(default)]
    #[schema(max_items = 20)]
    image_pull_secrets: Vec<PullSecretReference>,
    /// Name of the ServiceAccount (`default`).
    service_account_name: Option<String>,
    /// Architecture that the pod requires, such as `arm64`.
    architecture: Option<String>,
}

/// Container of a request.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SpecContainer {
    /// Name, a DNS-1123 label.
    name: String,
    /// Image.
    image: String,
}

/// Reference to a pull secret, as in a pod.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PullSecretReference {
    /// Name of the Secret.
    name: String,
}

/// Diagnose the image pulls of a pod.
///
/// regcred reads the pod, its pull secrets and its events, finds the entries that the kubelet tries
/// for each image, and requests the manifest from the registry with these logins. A login is sent
/// only to the registry that its entry names. Each image has one verdict, and a fix.
///
/// The answer contains names, keys and fixed texts, never a value of a Secret or a text of another
/// server. Every diagnosis is audited, with the names of the Secrets that it reads.
#[utoipa::path(
    tag = "diagnosis",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        ("pod" = String, Path, description = "Name of the pod"),
        ApplyQuery,
    ),
    responses((status = OK, body = Diagnosis)),
)]
#[post("/clusters/{cluster}/namespaces/{namespace}/pods/{pod}/diagnose")]
pub async fn diagnose_pod(
    caller: Caller<DiagnosePods, ApplyQuery>,
    doctor: Data<Diagnoses>,
    remedies: Data<Remedies>,
    path: Path<(String, String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace, pod) = path.into_inner();
    let (cluster, namespace) = parse_place(&cluster, &namespace)?;
    let target = Target::Pod(parse_object("pod", &pod)?);
    let mut diagnosis = doctor.diagnose(&caller.identity, (&cluster, &namespace), target).await?;
    if caller.query.apply {
        apply(&caller.identity, &remedies, (&cluster, &namespace), &mut diagnosis).await?;
    }
    Ok(HttpResponse::Ok().json(diagnosis))
}

/// Diagnose the image pulls of the pods that a workload creates.
///
/// As for a pod, but by the template of the workload: a template without pull secrets gets those of
/// the ServiceAccount. Events are not read.
#[utoipa::path(
    tag = "diagnosis",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        (
            "kind" = String, Path,
            description = "`deployment`, `statefulset`, `daemonset`, `job` or `cronjob`, in any case"
        ),
        ("name" = String, Path, description = "Name of the workload"),
        ApplyQuery,
    ),
    responses((status = OK, body = Diagnosis)),
)]
#[post("/clusters/{cluster}/namespaces/{namespace}/workloads/{kind}/{name}/diagnose")]
pub async fn diagnose_workload(
    caller: Caller<DiagnosePods, ApplyQuery>,
    doctor: Data<Diagnoses>,
    remedies: Data<Remedies>,
    path: Path<(String, String, String, String)>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace, kind, name) = path.into_inner();
    let (cluster, namespace) = parse_place(&cluster, &namespace)?;
    let kind = WorkloadKind::parse(&kind).map_err(|invalid| ApiError::field("kind", invalid))?;
    let target = Target::Workload(kind, parse_object(kind.as_str(), &name)?);
    let mut diagnosis = doctor.diagnose(&caller.identity, (&cluster, &namespace), target).await?;
    if caller.query.apply {
        apply(&caller.identity, &remedies, (&cluster, &namespace), &mut diagnosis).await?;
    }
    Ok(HttpResponse::Ok().json(diagnosis))
}

/// Diagnose the image pulls of a pod before it is created.
///
/// As for a workload. A login whose entry has a wildcard is not sent, because the request names the
/// registry.
#[utoipa::path(
    tag = "diagnosis",
    params(
        ("cluster" = String, Path, description = "Name of the cluster"),
        ("namespace" = String, Path, description = "Namespace in the cluster"),
        ApplyQuery,
    ),
    request_body = DiagnoseSpec,
    responses((status = OK, body = Diagnosis)),
)]
#[post("/clusters/{cluster}/namespaces/{namespace}/diagnose")]
pub async fn diagnose_spec(
    caller: Caller<DiagnosePods, ApplyQuery>,
    doctor: Data<Diagnoses>,
    remedies: Data<Remedies>,
    path: Path<(String, String)>,
    body: Json<DiagnoseSpec>,
) -> Result<HttpResponse, ApiError> {
    let (cluster, namespace) = path.into_inner();
    let (cluster, namespace) = parse_place(&cluster, &namespace)?;
    let target = Target::Spec(Box::new(body.0.parse(&namespace)?));
    let mut diagnosis = doctor.diagnose(&caller.identity, (&cluster, &namespace), target).await?;
    if caller.query.apply {
        apply(&caller.identity, &remedies, (&cluster, &namespace), &mut diagnosis).await?;
    }
    Ok(HttpResponse::Ok().json(diagnosis))
}

async fn apply(
    caller: &Call,
    remedies: &Remedies,
    place: (&Name, &NamespaceName),
    diagnosis: &mut Diagnosis,
) -> Result<(), ApiError> {
    require_changes(caller, diagnosis.fixes().filter_map(|fix| fix.change.as_ref()))?;
    Ok(remedies.apply(caller, place, diagnosis).await?)
}

/// Refuses a caller that lacks the permission of a change.
fn require_changes<'a>(caller: &Identity, changes: impl IntoIterator<Item = &'a Change>) -> Result<(), ApiError> {
    changes.into_iter().try_for_each(|change| require(caller, change.permission()))
}

pub(super) fn parse_place(cluster: &str, namespace: &str) -> Result<(Name, NamespaceName), ApiError> {
    let cluster = path_name("cluster", cluster)?;
    let namespace = NamespaceName::parse(namespace).map_err(|invalid| ApiError::field("namespace", invalid))?;
    Ok((cluster, namespace))
}

/// An invalid name is reported as an unknown object.
fn parse_object(kind: &'static str, name: &str) -> Result<PodName, ApiError> {
    PodName::parse(name).map_err(|_| ServiceError::NotFound { kind, name: name.chars().take(100).collect() }.into())
}

impl DiagnoseSpec {
    fn parse(self, namespace: &NamespaceName) -> Result<PodFacts, ApiError> {
        let mut errors = FieldErrors::default();
        let containers = match (self.images, self.containers) {
            (Some(images), None) => parse_images(&mut errors, images),
            (None, Some(containers)) => parse_containers(&mut errors, containers),
            (None, None) => {
                errors.refuse("images", "is missing: provide `images` or `containers`");
                Vec::new()
            }
            (Some(_), Some(_)) => {
                errors.refuse("containers", "must be omitted: `images` already provides the images");
                Vec::new()
            }
        };
        if self.image_pull_secrets.len() > PULL_SECRETS_MAX {
            errors.refuse("imagePullSecrets", "has more than 20 entries");
        }
        let pull_secrets = self.image_pull_secrets.iter().enumerate();
        let pull_secrets: Vec<SecretName> = pull_secrets
            .filter_map(|(index, one)| {
                errors.take(&format!("imagePullSecrets[{index}].name"), SecretName::parse(&one.name))
            })
            .collect();
        let account = self.service_account_name.as_deref();
        let account = account.map_or_else(|| Ok(ServiceAccountName::default_account()), ServiceAccountName::parse);
        let service_account = errors.take("serviceAccountName", account);
        let architecture = self.architecture.map(|text| parse_architecture(&text)).transpose();
        let architecture = errors.take("architecture", architecture);
        Ok(errors.finish(|| {
            Some(PodFacts {
                subject: Subject::Spec,
                namespace: namespace.clone(),
                uid: None,
                containers,
                pull_secrets,
                has_invalid_reference: false,
                service_account: service_account?,
                nodes: architecture?.map(|one| NodeChoice::of_architecture(&one)).unwrap_or_default(),
            })
        })?)
    }
}

fn parse_images(errors: &mut FieldErrors, images: Vec<String>) -> Vec<Container> {
    check_count(errors, "images", images.len());
    let parsed = images.into_iter().take(CONTAINERS_MAX).enumerate().filter_map(|(index, image)| {
        errors.take(&format!("images[{index}]"), ImageReference::parse(&image))?;
        Some(container(Name::parse(&format!("image-{index}")).ok()?, image))
    });
    parsed.collect()
}

fn parse_containers(errors: &mut FieldErrors, containers: Vec<SpecContainer>) -> Vec<Container> {
    check_count(errors, "containers", containers.len());
    let parsed = containers.into_iter().take(CONTAINERS_MAX).enumerate().filter_map(|(index, one)| {
        let name = errors.take(&format!("containers[{index}].name"), parse_container_name(&one.name));
        errors.take(&format!("containers[{index}].image"), ImageReference::parse(&one.image))?;
        Some(container(name?, one.image))
    });
    parsed.collect()
}

fn check_count(errors: &mut FieldErrors, field: &str, count: usize) {
    if !(1..=CONTAINERS_MAX).contains(&count) {
        errors.refuse(field, "must have 1 to 50 entries");
    }
}

fn container(name: Name, image: String) -> Container {
    Container { name, kind: ContainerKind::Container, image, waiting: None, event: None, has_started: false }
}

/// The API server refuses a pod with another name of a container.
fn parse_container_name(name: &str) -> Result<Name, Invalid> {
    Name::parse(name).map_err(|invalid| {
        let plain: String = name.to_ascii_lowercase().replace(['.', '_'], "-");
        match Name::parse(&plain) {
            Ok(plain) => Invalid::new(format!("{invalid}: the API server refuses such a pod, write `{plain}`")),
            Err(_) => invalid,
        }
    })
}

fn parse_architecture(text: &str) -> Result<String, Invalid> {
    let is_word = (1..=16).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if is_word { Ok(text.to_owned()) } else { Err(Invalid::new("must be an architecture, such as arm64")) }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::{
        caller::{Actor, ActorKind, Permission, Role},
        grants::Grants,
        network::Networks,
    };

    #[rstest]
    #[case(Change::Sync { name: Name::parse("team-a").unwrap() }, Permission::WritePullSecrets)]
    #[case(Change::Deliver { secret: "pull".to_owned(), accounts: Vec::new() }, Permission::DeliverSecrets)]
    fn change_requires_its_own_permission(#[case] change: Change, #[case] expected: Permission) {
        for role in Role::ALL {
            let identity = Identity {
                actor: Actor { kind: ActorKind::ApiKey, id: None, name: "ci".to_owned() },
                role,
                grants: Grants::everything(),
                source_networks: Networks::default(),
                expires_at: None,
            };
            match require_changes(&identity, [&change]) {
                Ok(()) => assert!(role.allows(expected), "{role:?}"),
                Err(ApiError::Forbidden { permission, .. }) => {
                    assert_eq!((permission, role.allows(expected)), (expected, false), "{role:?}");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}
