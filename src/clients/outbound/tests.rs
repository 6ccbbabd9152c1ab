use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use proptest::prelude::*;
use rstest::rstest;

use super::*;

/// Resolver with the same addresses for every name; counts its lookups.
struct Fixed(Vec<IpAddr>, AtomicUsize);

impl Resolve for Fixed {
    fn resolve<'a>(&'a self, _: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Box::pin(async { Ok(self.0.clone()) })
    }
}

fn guard(allowed: &str, addresses: &[&str]) -> Guard {
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    Guard::with_resolver(allowed.parse().unwrap(), Arc::new(Fixed(addresses, AtomicUsize::new(0))))
}

#[rstest]
#[tokio::test]
async fn address_that_is_not_public_is_refused(
    #[values(
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "100.127.255.255",
        "169.254.0.1",
        "169.254.169.254",
        "169.254.170.2",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "fc00::1",
        "fdff::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "fd00:a9fe:a9fe::1",
        "fd00:100::100:200",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a9fe:a9fe",
        "2002:7f00:1::",
        "2001::1",
        "2001:db8::1",
        "3fff::1",
        "100::1",
        "5f00::1",
        "4000::1"
    )]
    address: &str,
) {
    let alone = guard("", &[address]).admit("name.example", 443).await;
    assert!(matches!(alone, Err(GuardError::Forbidden(_))), "{alone:?}");
    // A public address beside it changes nothing.
    let beside = guard("", &["8.8.8.8", address]).admit("name.example", 443).await;
    assert!(matches!(beside, Err(GuardError::Forbidden(_))), "{beside:?}");
    let literal = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    assert!(matches!(guard("", &[]).admit(&literal, 443).await, Err(GuardError::Forbidden(_))));
}

#[rstest]
#[tokio::test]
async fn public_address_is_admitted(
    #[values("8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1", "2a00::1", "223.255.255.255")] address: &str,
) {
    let addresses = guard("", &[address]).admit("name.example", 5000).await.unwrap();
    assert_eq!(addresses, [SocketAddr::new(address.parse().unwrap(), 5000)]);
}

#[rstest]
#[case("169.254.0.0/16", "169.254.169.254", false)]
#[case("0.0.0.0/0", "169.254.169.254", false)]
#[case("::/0", "fd00:ec2::254", false)]
#[case("::/0", "::ffff:169.254.169.254", false)]
#[case("fd00::/8", "fd00:c1::a9fe:a9fe", false)]
#[case("fd00::/8", "fd00:42::42", false)]
#[case("fd00:42::/32", "fd00:42::42", false)]
#[case("fd00::/8", "fd00:a9fe:a9fe::1", false)]
#[case("fd00::/8", "fd00:100::100:200", false)]
#[case("fd00:ec2::/32", "fd00:ec2::23", false)]
#[case("fd00:ec2::/32", "fd00:ec2:0:1::17", false)]
#[case("fd00:ec2::17", "fd00:ec2::17", true)]
#[case("fd00::/8", "fd00:ec3::17", true)]
#[case("fd00:42::42", "fd00:42::42", true)]
#[case("name.example", "169.254.169.254", false)]
#[case("169.254.169.254", "169.254.169.254", true)]
#[case("169.254.0.0/16", "169.254.1.1", true)]
#[case("name.example", "10.0.0.1", true)]
#[case("127.0.0.0/8", "::ffff:127.0.0.1", false)]
#[tokio::test]
async fn metadata_service_is_allowed_by_its_exact_address_only(
    #[case] allow: &str,
    #[case] address: &str,
    #[case] open: bool,
) {
    assert_eq!(guard(allow, &[address]).admit("name.example", 80).await.is_ok(), open);
}

#[rstest]
#[case(443, true)]
#[case(80, true)]
#[case(5000, true)]
#[case(8443, true)]
#[case(22, false)]
#[case(25, false)]
#[case(0, false)]
#[case(6379, false)]
#[case(5432, false)]
#[case(10250, false)]
#[tokio::test]
async fn port_of_another_service_is_refused(#[case] port: u16, #[case] good: bool) {
    assert_eq!(guard("", &["8.8.8.8"]).admit("name.example", port).await.is_ok(), good);
    assert!(guard("8.8.8.8/32", &["8.8.8.8"]).admit("name.example", port).await.is_ok());
}

#[tokio::test]
async fn name_is_resolved_once_and_address_never() {
    let resolver = Arc::new(Fixed(vec!["8.8.8.8".parse().unwrap()], AtomicUsize::new(0)));
    let guard = Guard::with_resolver(AllowList::default(), Arc::clone(&resolver) as Arc<dyn Resolve>);
    guard.admit("name.example", 443).await.unwrap();
    guard.admit("8.8.4.4", 443).await.unwrap();
    guard.admit("[2606:4700::1]", 443).await.unwrap();
    assert_eq!(resolver.1.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn name_without_an_address_is_not_admitted() {
    assert_eq!(guard("", &[]).admit("name.example", 443).await, Err(GuardError::NotResolved));
}

#[rstest]
#[case("https://auth.example/token")]
#[case("https://auth.example:8443/token?a=b")]
#[case("HTTPS://Auth.Example/token")]
#[case("https://8.8.8.8/token")]
#[case("https://[2606:4700::1]:5000/token")]
#[case("https://auth.example")]
#[case("https://xn--mnchen-3ya.example/token")]
fn unambiguous_url_is_accepted(#[case] url: &str) {
    assert!(parse_url(url, Schemes::Https).is_ok());
}

#[rstest]
#[case::plain_http("http://auth.example/token")]
#[case::file("file:///etc/passwd")]
#[case::gopher("gopher://auth.example/_GET")]
#[case::ftp("ftp://auth.example/")]
#[case::unix("unix:///var/run/docker.sock")]
#[case::data("data:text/plain,x")]
#[case::relative("/token")]
#[case::no_scheme("//auth.example/token")]
#[case::one_slash("https:/auth.example/token")]
#[case::three_slashes("https:///auth.example/token")]
#[case::user("https://user@auth.example/token")]
#[case::password("https://user:pass@auth.example/token")]
#[case::other_host_as_user("https://good.example@127.0.0.1/token")]
#[case::backslash("https://good.example\\@127.0.0.1/token")]
#[case::tab("https://auth.exa\tmple/token")]
#[case::line("https://auth.example/\r\nHost: x")]
#[case::fragment("https://auth.example/token#x")]
#[case::decimal("https://2130706433/token")]
#[case::octal("https://0177.0.0.1/token")]
#[case::hex("https://0x7f000001/token")]
#[case::hex_parts("https://0x7f.0.0.1/token")]
#[case::short("https://127.1/token")]
#[case::leading_zero("https://127.0.0.01/token")]
#[case::percent("https://127.0.0.%31/token")]
#[case::full_width("https://\u{ff11}27.0.0.1/token")]
#[case::circled("https://\u{2460}27.0.0.1/token")]
#[case::ideographic_dot("https://127\u{3002}0.0.1/token")]
#[case::long_v6("https://[0:0:0:0:0:0:0:1]/token")]
#[case::dotted_v6("https://[::ffff:127.0.0.1]/token")]
#[case::zone("https://[fe80::1%25eth0]/token")]
#[case::trailing_dot("https://localhost./token")]
#[case::trailing_dot_address("https://127.0.0.1./token")]
#[case::no_host("https://")]
#[case::port_zero("https://auth.example:0/token")]
#[case::empty_port("https://auth.example:/token")]
#[case::big_port("https://auth.example:65536/token")]
#[case::named_port("https://auth.example:http/token")]
#[case::empty("")]
fn ambiguous_url_is_refused(#[case] url: &str) {
    assert!(parse_url(url, Schemes::Https).is_err(), "{:?}", parse_url(url, Schemes::Https));
}

#[test]
fn long_url_is_refused() {
    assert!(parse_url(&format!("https://auth.example/{}", "a".repeat(3000)), Schemes::Https).is_err());
}

proptest! {
    #[test]
    fn accepted_url_leads_to_the_host_in_its_text(text in "(https?://)?[a-z0-9.:@\\[\\]%/x-]{0,40}") {
        if let Ok(url) = parse_url(&text, Schemes::HttpAndHttps) {
            let host = url.host_str().unwrap().to_owned();
            prop_assert!(text.to_ascii_lowercase().contains(&host));
            prop_assert!(url.username().is_empty() && url.password().is_none());
        }
    }
}

/// A person names the host, who could call it by other means; a metadata service has credentials.
#[rstest]
#[case(&["10.0.0.1"], "", true)]
#[case(&["127.0.0.1"], "", true)]
#[case(&["10.0.0.1", "169.254.169.254"], "", false)]
#[case(&["169.254.169.254"], "169.254.169.254", true)]
#[tokio::test]
async fn host_of_a_person_is_admitted_anywhere_but_at_a_metadata_service(
    #[case] addresses: &[&str],
    #[case] allowed: &str,
    #[case] is_admitted: bool,
) {
    let admitted = guard(allowed, addresses).admit_anywhere("reg.corp", 6379).await;
    assert_eq!(admitted.is_ok(), is_admitted, "{admitted:?}");
}

#[rstest]
#[case("", "localhost", false)]
#[case("10.0.0.0/8", "127.0.0.1", false)]
#[case("127.0.0.0/8", "localhost", true)]
#[case("127.0.0.0/8", "127.0.0.1", true)]
#[case("127.0.0.0/8", "[::1]", false)]
#[case("::1", "[::1]", true)]
#[case("localhost", "localhost", true)]
fn loopback_is_allowed_by_its_name_or_its_address(#[case] allowed: &str, #[case] host: &str, #[case] expected: bool) {
    assert_eq!(guard(allowed, &[]).allows_loopback(host), expected);
}
