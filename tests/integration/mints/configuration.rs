//! Variables of mints.

use base64::{Engine, prelude::BASE64_STANDARD};
use regcred::{clients::mint::AmbientConfig, config::Reader};

use crate::support::process::Installation;

/// Reads `REGCRED_MINT_AMBIENT` with this value.
fn ambient(clouds: &str) -> Result<AmbientConfig, String> {
    let lookup = |name: &str| match name {
        "REGCRED_DATABASE_URL" => Some("postgres://127.0.0.1/regcred".to_owned()),
        "REGCRED_MASTER_KEYS" => Some(format!("test:{}", BASE64_STANDARD.encode([1; 32]))),
        "REGCRED_API_KEY_PEPPER" => Some(BASE64_STANDARD.encode([2; 32])),
        "REGCRED_MINT_AMBIENT" => Some(clouds.to_owned()),
        "AWS_ROLE_ARN" => Some("arn:aws:iam::123456789012:role/regcred".to_owned()),
        "AZURE_CLIENT_ID" => Some("client".to_owned()),
        _ => None,
    };
    let config = Reader::new(&lookup).serve().map_err(|error| error.to_string())?;
    Ok(config.mint.client.ambient)
}

#[test]
fn ambient_identities_are_those_of_the_listed_clouds() {
    for (clouds, [aws, gcp, azure]) in [
        ("", [false; 3]),
        (" ,", [false; 3]),
        ("aws", [true, false, false]),
        (" azure , gcp ", [false, true, true]),
        ("gcp,aws,azure,", [true; 3]),
    ] {
        let ambient = ambient(clouds).expect("a good list");
        assert_eq!([ambient.aws.is_some(), ambient.gcp, ambient.azure.is_some()], [aws, gcp, azure], "{clouds:?}");
        // Variables of the platform count for listed clouds only.
        assert_eq!(ambient.aws.is_some_and(|aws| aws.role_arn.is_some()), aws, "{clouds:?}");
        assert_eq!(ambient.azure.is_some_and(|azure| azure.client_id.is_some()), azure, "{clouds:?}");
    }
    for clouds in ["oracle", "aws,oracle", "AWS", "aws gcp", "aws;gcp", "*"] {
        let error = ambient(clouds).err().unwrap_or_default();
        assert!(error.contains("REGCRED_MINT_AMBIENT"), "{clouds:?}: {error}");
    }
}

#[tokio::test]
async fn unknown_cloud_keeps_the_service_from_starting() {
    let installation = Installation::new("postgres://127.0.0.1/regcred").with("REGCRED_MINT_AMBIENT", "aws,oracle");
    for command in ["serve", "worker"] {
        let exit = installation.run(&[command]).await;
        assert_eq!(exit.code, Some(64), "{exit:?}");
        let expected = "REGCRED_MINT_AMBIENT: must be a list of aws, gcp and azure";
        assert!(exit.stderr.contains(expected), "{exit:?}");
    }
}
