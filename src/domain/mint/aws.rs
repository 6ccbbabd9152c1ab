//! AWS: regions, the hosts of their registries, and keys.

use secrecy::SecretString;

use crate::domain::invalid::Invalid;

/// Hosts of ECR Public.
pub const ECR_PUBLIC_HOSTS: [&str; 2] = ["public.ecr.aws", "ecr-public.aws.com"];
/// Region of the API of ECR Public.
pub const ECR_PUBLIC_REGION: &str = "us-east-1";

/// Domain of the services of a partition, by the start of its regions' names.
const SUFFIXES: [(&str, &str); 7] = [
    ("cn-", "amazonaws.com.cn"),
    ("eusc-", "amazonaws.eu"),
    ("us-isob-", "sc2s.sgov.gov"),
    ("us-isof-", "csp.hci.ic.gov"),
    ("eu-isoe-", "cloud.adc-e.uk"),
    ("us-iso-", "c2s.ic.gov"),
    ("", "amazonaws.com"),
];

/// AWS region, such as `eu-central-1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region(String);

impl Region {
    /// Parses a region. Regions that do not exist yet are accepted: they become a part of a host
    /// name, and of no other domain than AWS's.
    ///
    /// # Errors
    ///
    /// [`Invalid`] unless it consists of lower-case words and a number, joined by `-`.
    pub fn parse(region: &str) -> Result<Self, Invalid> {
        let parts: Vec<&str> = region.split('-').collect();
        let is_word = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase());
        let is_region = region.len() <= 32
            && parts.len() >= 3
            && parts.split_last().is_some_and(|(number, words)| {
                words.iter().all(is_word)
                    && (1..=2).contains(&number.len())
                    && number.bytes().all(|byte| byte.is_ascii_digit())
            });
        if is_region { Ok(Self(region.to_owned())) } else { Err(Invalid::new("must be a region such as eu-central-1")) }
    }

    /// Returns the region of ECR Public.
    #[must_use]
    pub fn of_ecr_public() -> Self {
        Self(ECR_PUBLIC_REGION.to_owned())
    }

    /// Returns the region as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the host of the ECR API.
    #[must_use]
    pub fn ecr_host(&self, fips: bool) -> String {
        let name = if fips { "api.ecr-fips" } else { "api.ecr" };
        format!("{name}.{}.{}", self.0, self.suffix())
    }

    /// Returns the host of the API of ECR Public.
    #[must_use]
    pub fn ecr_public_host(&self) -> String {
        format!("api.ecr-public.{}.{}", self.0, self.suffix())
    }

    /// Returns the host of AWS STS. In `GovCloud` each one is a FIPS endpoint.
    #[must_use]
    pub fn sts_host(&self, fips: bool) -> String {
        let name = if fips && !self.0.starts_with("us-gov-") { "sts-fips" } else { "sts" };
        format!("{name}.{}.{}", self.0, self.suffix())
    }

    /// Returns the domain of the region's services.
    #[must_use]
    pub fn suffix(&self) -> &'static str {
        let found = SUFFIXES.into_iter().find(|(start, _)| self.0.starts_with(start));
        found.map_or("amazonaws.com", |(_, suffix)| suffix)
    }

    /// Whether a host, in lower case, is an ECR registry in this region.
    #[must_use]
    pub fn has_registry(&self, host: &str) -> bool {
        let Some((account, rest)) = host.split_once('.') else { return false };
        if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return false;
        }
        let dual_stack = match self.suffix() {
            "amazonaws.com" => Some("on.aws"),
            "amazonaws.com.cn" => Some("on.amazonwebservices.com.cn"),
            _ => None,
        };
        let suffixes = [Some(self.suffix()), dual_stack];
        let names = ["dkr.ecr", "dkr-ecr", "dkr.ecr-fips", "dkr-ecr-fips"];
        let mut hosts =
            suffixes.into_iter().flatten().flat_map(|suffix| names.map(|name| format!("{name}.{}.{suffix}", self.0)));
        hosts.any(|known| known == rest)
    }
}

/// Key that signs requests.
#[derive(Debug, Clone)]
pub struct AwsKey {
    /// Id of the key.
    pub access_key_id: String,
    /// Secret of the key.
    pub secret_access_key: SecretString,
    /// Token of a temporary key.
    pub session_token: Option<SecretString>,
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("eu-central-1", Some("amazonaws.com"))]
    #[case("us-gov-west-1", Some("amazonaws.com"))]
    #[case("cn-north-1", Some("amazonaws.com.cn"))]
    #[case("eusc-de-east-1", Some("amazonaws.eu"))]
    #[case("us-iso-east-1", Some("c2s.ic.gov"))]
    #[case("us-isob-east-1", Some("sc2s.sgov.gov"))]
    #[case("eu-isoe-west-1", Some("cloud.adc-e.uk"))]
    #[case("us-isof-south-1", Some("csp.hci.ic.gov"))]
    #[case("", None)]
    #[case("eu-central", None)]
    #[case("eu-central-", None)]
    #[case("eu-central-1a", None)]
    #[case("EU-central-1", None)]
    #[case("eu.evil.example/-x-1", None)]
    #[case("eu-central-1.evil.example", None)]
    fn region_determines_the_domain(#[case] region: &str, #[case] suffix: Option<&str>) {
        assert_eq!(Region::parse(region).ok().map(|region| region.suffix()), suffix);
    }

    /// The rules of botocore's endpoints.
    #[rstest]
    #[case("us-east-1", false, "api.ecr.us-east-1.amazonaws.com", "sts.us-east-1.amazonaws.com")]
    #[case("us-east-1", true, "api.ecr-fips.us-east-1.amazonaws.com", "sts-fips.us-east-1.amazonaws.com")]
    #[case("us-gov-west-1", true, "api.ecr-fips.us-gov-west-1.amazonaws.com", "sts.us-gov-west-1.amazonaws.com")]
    #[case("cn-north-1", false, "api.ecr.cn-north-1.amazonaws.com.cn", "sts.cn-north-1.amazonaws.com.cn")]
    fn region_determines_the_hosts(#[case] region: &str, #[case] fips: bool, #[case] ecr: &str, #[case] sts: &str) {
        let region = Region::parse(region).unwrap();
        assert_eq!((region.ecr_host(fips), region.sts_host(fips)), (ecr.to_owned(), sts.to_owned()));
    }

    #[rstest]
    #[case("eu-central-1", "123456789012.dkr.ecr.eu-central-1.amazonaws.com", true)]
    #[case("us-east-1", "123456789012.dkr.ecr-fips.us-east-1.amazonaws.com", true)]
    #[case("eu-central-1", "123456789012.dkr-ecr.eu-central-1.on.aws", true)]
    #[case("cn-north-1", "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", true)]
    #[case("cn-north-1", "123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn", true)]
    #[case("us-iso-east-1", "123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", true)]
    #[case("eu-central-1", "123456789012.dkr.ecr.eu-west-1.amazonaws.com", false)]
    #[case("eu-central-1", "12345678901.dkr.ecr.eu-central-1.amazonaws.com", false)]
    #[case("eu-central-1", "12345678901x.dkr.ecr.eu-central-1.amazonaws.com", false)]
    #[case("eu-central-1", "123456789012.dkr.ecr.eu-central-1.amazonaws.com.evil.example", false)]
    #[case("eu-central-1", "evil.123456789012.dkr.ecr.eu-central-1.amazonaws.com", false)]
    #[case("eu-central-1", "123456789012.dkr.ecr.eu-central-1.amazonaws.com.cn", false)]
    #[case("cn-north-1", "123456789012.dkr.ecr.cn-north-1.amazonaws.com", false)]
    #[case("us-iso-east-1", "123456789012.dkr-ecr.us-iso-east-1.on.aws", false)]
    #[case("eu-central-1", "123456789012", false)]
    fn registry_belongs_to_one_region(#[case] region: &str, #[case] host: &str, #[case] expected: bool) {
        assert_eq!(Region::parse(region).unwrap().has_registry(host), expected);
    }
}
