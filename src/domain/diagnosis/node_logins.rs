//! Logins of nodes, which a diagnosis does not see: credential providers of clouds.

/// Whether nodes of a cloud usually log in to this registry by themselves (a kubelet's credential
/// provider): Amazon ECR, Google Artifact Registry, Azure Container Registry.
///
/// The patterns are those of the providers' documentation for `matchImages`.
pub(super) fn may_log_in(registry: &str) -> bool {
    let host = registry.split(':').next().unwrap_or_default();
    let is_below = |parent: &str| host.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'));
    let is_ecr = host.split('.').skip(1).take(2).eq(["dkr", "ecr"]) || host.split('.').nth(2) == Some("ecr-fips");
    let is_amazon = is_below("amazonaws.com") || is_below("amazonaws.com.cn");
    let is_google = host == "gcr.io" || is_below("gcr.io") || is_below("pkg.dev");
    let is_azure = is_below("azurecr.io") || is_below("azurecr.cn") || is_below("azurecr.us");
    is_ecr && is_amazon || is_google || is_azure
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("123456789012.dkr.ecr.eu-west-1.amazonaws.com", true)]
    #[case("123456789012.dkr.ecr-fips.us-east-1.amazonaws.com", true)]
    #[case("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", true)]
    #[case("europe-docker.pkg.dev", true)]
    #[case("eu.gcr.io", true)]
    #[case("gcr.io", true)]
    #[case("team.azurecr.io", true)]
    #[case("s3.eu-west-1.amazonaws.com", false)]
    #[case("public.ecr.aws", false)]
    #[case("xgcr.io", false)]
    #[case("reg.io:5000", false)]
    #[case("docker.io", false)]
    fn registry_of_a_cloud_is_recognized(#[case] registry: &str, #[case] expected: bool) {
        assert_eq!(may_log_in(registry), expected);
    }
}
