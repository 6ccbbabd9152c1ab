//! TLS of the listener.

use std::{fs, os::unix::fs::symlink, time::Duration};

use reqwest::{Certificate, tls::Version};
use sqlx::{ConnectOptions, PgPool};

use super::{answers, connect};
use crate::{
    support::{
        eventually,
        files::TempDir,
        process::{Installation, Service},
    },
    verify::certificates::{Ca, ServerCertificate},
};

fn installation(pool: &PgPool, folder: &TempDir) -> Installation {
    Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_HTTP_TLS_CERTIFICATE_FILE", folder.path().join("tls.crt").to_str().expect("UTF-8"))
        .with("REGCRED_HTTP_TLS_KEY_FILE", folder.path().join("tls.key").to_str().expect("UTF-8"))
}

fn write(folder: &TempDir, pair: &ServerCertificate) {
    folder.write("tls.crt", &pair.certificate);
    folder.write("tls.key", &pair.key);
}

/// Requests `/healthz` with one trusted CA.
async fn ask(service: &Service, ca: &Ca, at_most: Version) -> reqwest::Result<reqwest::Response> {
    let trusted = Certificate::from_pem(ca.pem.as_bytes()).expect("a certificate");
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]).max_tls_version(at_most);
    let client = client.timeout(Duration::from_secs(20)).build().expect("a client");
    client.get(format!("https://{}/healthz", service.address)).send().await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn the_listener_accepts_only_tls(pool: PgPool) {
    let (folder, ca) = (TempDir::new(), Ca::new());
    write(&folder, &ca.certify());
    let installation = installation(&pool, &folder);
    let service = installation.serve().await;

    for version in [Version::TLS_1_2, Version::TLS_1_3] {
        let answer = ask(&service, &ca, version).await.expect("an answer");
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["strict-transport-security"], "max-age=31536000");
    }
    // An untrusted CA fails, and so does plain HTTP.
    assert!(ask(&service, &Ca::new(), Version::TLS_1_3).await.is_err());
    let plain = answers(service.address, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(!plain.contains("HTTP/1.1"), "{plain}");
    // A client that does not start a handshake is disconnected.
    super::read_to_the_end(&mut connect(service.address));

    let own = installation.with("REGCRED_HTTP_LISTEN", &service.address.to_string());
    assert_eq!(own.run(&["healthcheck"]).await.code, Some(0));
    let url = format!("https://{}/healthz", service.address);
    assert_eq!(own.run(&["healthcheck", &url]).await.code, Some(1));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_replaced_certificate_is_loaded_unless_it_is_invalid(pool: PgPool) {
    // Like a Secret volume: the files are links into a directory that is a link, which is replaced
    // atomically.
    let folder = TempDir::new();
    let publish = |name: &str, certificate: &str, key: &str| {
        fs::create_dir(folder.path().join(name)).expect("a folder");
        folder.write(&format!("{name}/tls.crt"), certificate);
        folder.write(&format!("{name}/tls.key"), key);
        symlink(name, folder.path().join("..data_new")).expect("a link");
        fs::rename(folder.path().join("..data_new"), folder.path().join("..data")).expect("replaced");
    };
    let [first, second, third] = [Ca::new(), Ca::new(), Ca::new()];
    let pair = first.certify();
    publish("1", &pair.certificate, &pair.key);
    for file in ["tls.crt", "tls.key"] {
        symlink(format!("..data/{file}"), folder.path().join(file)).expect("a link");
    }
    let service = installation(&pool, &folder).serve().await;
    assert_eq!(ask(&service, &first, Version::TLS_1_3).await.expect("an answer").status(), 200);

    let pair = second.certify();
    publish("2", &pair.certificate, &pair.key);
    eventually("the second certificate is shown", async || ask(&service, &second, Version::TLS_1_3).await.ok()).await;
    assert!(ask(&service, &first, Version::TLS_1_3).await.is_err());

    // The key of another certificate: the second pair remains in use, and the error is logged.
    publish("3", &third.certify().certificate, &pair.key);
    eventually("the log says that the pair is bad", async || {
        service.process.stderr().contains("tls certificate not reloaded").then_some(())
    })
    .await;
    assert_eq!(ask(&service, &second, Version::TLS_1_3).await.expect("an answer").status(), 200);
    assert!(ask(&service, &third, Version::TLS_1_3).await.is_err());

    let pair = third.certify_expired();
    publish("4", &pair.certificate, &pair.key);
    eventually("the log warns of the end", async || {
        service.process.stderr().contains("tls certificate expires soon").then_some(())
    })
    .await;
    let log = service.process.stderr();
    assert_eq!(log.matches("tls certificate not reloaded").count(), 1, "{log}");
    assert!(!log.contains("PRIVATE KEY"), "{log}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn certificate_expiry_is_a_metric_and_an_invalid_pair_prevents_the_start(pool: PgPool) {
    let (folder, ca) = (TempDir::new(), Ca::new());
    write(&folder, &ca.certify());
    let installation = installation(&pool, &folder);
    let service = installation.serve().await;
    // Plain HTTP: that listener is for the host and private networks.
    let metrics = service.operations().get("/metrics").await.body;
    let end = metrics.lines().find_map(|line| line.strip_prefix("regcred_tls_certificate_not_after_seconds "));
    let end: i64 = end.unwrap_or_else(|| panic!("{metrics}")).parse().expect("a number");
    assert!(end > chrono::Utc::now().timestamp(), "{end}");

    folder.write("tls.key", ca.certify().key);
    let refused = installation.run(&["serve"]).await;
    assert_eq!(refused.code, Some(64), "{refused:?}");
    assert!(refused.stderr.contains("tls.key: does not belong to the certificate"), "{refused:?}");
}
