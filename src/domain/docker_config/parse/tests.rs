use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use rstest::rstest;

use super::*;

/// `config.json` as `docker login` writes it.
const CONFIG_JSON: &str = r#"{
	"auths": {
		"daocloud.io": {
			"auth": "bWFydGluOnB3MQ=="
		},
		"https://index.docker.io/v1/": {
			"auth": "bWFydGluOnB3Mg=="
		},
		"registry.example.com:5000": {
			"auth": "bWFydGluOnB3Mw=="
		}
	},
	"HttpHeaders": {
		"User-Agent": "Docker-Client/17.09.0-ce (linux)"
	}
}"#;

fn keys(config: &Config) -> Vec<&str> {
    config.entries.iter().map(|entry| entry.key.as_str()).collect()
}

fn refusal(input: impl AsRef<[u8]>) -> ParseError {
    Config::parse(input.as_ref()).unwrap_err()
}

#[test]
fn config_json_is_parsed() {
    let config = Config::parse(CONFIG_JSON.as_bytes()).unwrap();
    assert_eq!(config.form, Form::DockerConfigJson);
    assert_eq!(keys(&config), ["daocloud.io", "https://index.docker.io/v1/", "registry.example.com:5000"]);
    assert_eq!(config.entries[2].auth.text(), "bWFydGluOnB3Mw==");
    assert_eq!(config.others, ["HttpHeaders"]);
}

#[test]
fn helpers_and_store_are_parsed() {
    let config =
        Config::parse(br#"{"credsStore":"desktop","credHelpers":{"gcr.io":"gcloud"},"psFormat":"x"}"#).unwrap();
    assert_eq!(config.store.as_deref(), Some("desktop"));
    assert_eq!(config.helpers, [Helper { registry: "gcr.io".into(), name: "gcloud".into() }]);
    assert_eq!(config.others, ["psFormat"]);
}

#[rstest]
#[case(r#"{"reg.io":{"auth":"dTpw"}}"#)]
#[case(r#"{"reg.io":{"auth":"dTpw"},"https://index.docker.io/v1/":{"auth":"dTpw"}}"#)]
fn bare_map_is_a_legacy_dockercfg(#[case] input: &str) {
    let config = Config::parse(input.as_bytes()).unwrap();
    assert_eq!((config.form, config.entries[0].key.as_str()), (Form::Dockercfg, "reg.io"));
}

#[rstest]
#[case("{}")]
#[case("bnVsbA==")]
#[case(r#"{"auths":null}"#)]
#[case(r#"{"auths":{}}"#)]
#[case(r#"{"HttpHeaders":{}}"#)]
#[case(r#"{"proxies":{"default":{}},"plugins":{}}"#)]
fn config_without_entries_is_accepted(#[case] input: &str) {
    let config = Config::parse(input.as_bytes()).unwrap();
    assert_eq!((config.form, config.entries.len()), (Form::DockerConfigJson, 0));
}

#[test]
fn base64_is_accepted_with_or_without_padding_and_line_breaks() {
    let encoded = STANDARD.encode(CONFIG_JSON);
    let wrapped =
        encoded.as_bytes().chunks(76).map(|line| str::from_utf8(line).unwrap()).collect::<Vec<_>>().join("\n");
    for input in [encoded.as_str(), encoded.trim_end_matches('='), &wrapped, &format!("{encoded}\n")] {
        assert_eq!(keys(&Config::parse(input.as_bytes()).unwrap()).len(), 3);
    }
}

#[rstest]
#[case::json(r#"{"kind":"Secret","type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"VALUE"}}"#)]
#[case::yaml(
    "apiVersion: v1\nkind: Secret\nmetadata:\n  name: x\ntype: kubernetes.io/dockerconfigjson\ndata:\n  .dockerconfigjson: VALUE\n"
)]
#[case::yaml_document("---\nkind: Secret\ntype: kubernetes.io/dockerconfigjson\ndata: {.dockerconfigjson: 'VALUE'}\n")]
#[case::yaml_block("kind: Secret\ntype: kubernetes.io/dockerconfigjson\ndata:\n  .dockerconfigjson: >-\n    VALUE\n")]
fn manifest_of_a_secret_is_parsed(#[case] manifest: &str) {
    let config = Config::parse(manifest.replace("VALUE", &STANDARD.encode(CONFIG_JSON)).as_bytes()).unwrap();
    assert_eq!(keys(&config).len(), 3);
    assert_eq!(config.secret_type.as_deref(), Some("kubernetes.io/dockerconfigjson"));
}

#[test]
fn string_data_overrides_data_as_in_the_api_server() {
    let manifest = format!(
        "kind: Secret\ndata:\n  .dockercfg: {}\nstringData:\n  .dockercfg: |\n    {{\"reg.io\":{{\"auth\":\"dTpw\"}}}}\n",
        STANDARD.encode("{}")
    );
    let config = Config::parse(manifest.as_bytes()).unwrap();
    assert_eq!((config.form, keys(&config)), (Form::Dockercfg, vec!["reg.io"]));
}

#[rstest]
#[case::right_after("#", 16, 2)]
#[case::on_the_next_line("\n#", 17, 1)]
#[case::after_a_space(" #\n", 16, 3)]
fn stray_hash_after_the_last_brace_is_located(#[case] stray: &str, #[case] line: usize, #[case] column: usize) {
    let expected = Position { line, column };
    let damaged = format!("{CONFIG_JSON}{stray}");
    let plain = refusal(&damaged);
    assert_eq!(plain.position, Some(expected));
    assert!(plain.to_string().contains("stray `#` follows the document's last brace"), "{plain}");

    let encoded = STANDARD.encode(&damaged);
    assert_eq!(refusal(&encoded).position, Some(expected));
    let manifest = refusal(format!("kind: Secret\ndata:\n  .dockerconfigjson: {encoded}\n"));
    assert_eq!(manifest.position, Some(expected));
    assert!(manifest.to_string().contains("inside `.dockerconfigjson`: a stray `#`"), "{manifest}");
}

#[rstest]
#[case("", None, "empty")]
#[case(" \n", None, "empty")]
#[case(r#"{"auths":{}} {}"#, Some((1, 14)), "there is text after")]
#[case(r#"{"auths":{}}%"#, Some((1, 13)), "stray `%`")]
#[case(r#"{"auths":{}"#, Some((1, 11)), "ends too early")]
#[case("{\"auths\":{},\n}", Some((2, 1)), "comma")]
#[case("{'auths':{}}", Some((1, 2)), "double quotes")]
#[case("{\"auths\n\":{}}", Some((1, 8)), "missing double quote")]
#[case(r#"{"auths" {}}"#, Some((1, 10)), "invalid JSON")]
#[case("{\"auths\":{\"reg.io\":{},\n\"reg.io\":{}}}", Some((2, 8)), "a key twice")]
#[case(r#"{"auths":{"reg.io":{"auth":"a","auth":"b"}}}"#, Some((1, 37)), "a key twice")]
#[case(r#"{"auths":{},"Auths":{}}"#, None, "twice, in different case")]
#[case(r#"{"auths":{"reg.io":{"auth":"a","Auth":"b"}}}"#, None, "twice, in different case")]
#[case(r#"{"auths":[]}"#, None, "`auths` must be an object")]
#[case(r#"{"auths":{},"credHelpers":"x"}"#, None, "`credHelpers`")]
#[case(r#"{"auths":{},"credHelpers":{"x":1}}"#, None, "`credHelpers`")]
#[case(r#"{"auths":{},"credsStore":{}}"#, None, "`credsStore`")]
#[case("[]", None, "not a docker config")]
#[case("eyJhdXRocyI6eX0", Some((1, 10)), "inside the base64: invalid JSON")]
#[case("aGVsbG8", Some((1, 1)), "inside the base64: the text is not JSON")]
#[case("abcde", None, "base64 is invalid")]
#[case("kind: Pod\n", None, "neither a Secret nor a list")]
#[case("apiVersion: v1\nkind: List\nitems: []\n", None, "one Secret of it")]
#[case("kind: List\nitems: {}\n", None, "`items` of a list")]
#[case("kind: Secret\ndata:\n  password: cHc=\n", None, "not an image pull secret")]
#[case("kind: Secret\ndata: x\n", None, "must be objects")]
#[case("kind: Secret\ndata:\n  .dockerconfigjson: '!'\n", None, "inside `.dockerconfigjson`: the base64")]
#[case("kind: Secret\ndata:\n  .dockerconfigjson: eyJyZWcuaW8iOnt9fQ==\n", None, "other Secret type")]
#[case("kind: Secret\n  data: [\n", Some((2, 7)), "neither JSON nor YAML")]
#[case("kind: Secret\n---\nkind: Secret\n", Some((3, 1)), "several YAML documents")]
#[case("kind: Secret\ndata: {}\ndata: {}\n", Some((3, 1)), "a key twice")]
#[case("\u{feff}{}", Some((1, 1)), "byte order mark")]
fn invalid_input_is_rejected_with_its_position(
    #[case] input: &str,
    #[case] place: Option<(usize, usize)>,
    #[case] reason: &str,
) {
    let refusal = refusal(input);
    let found = refusal.position.map(|Position { line, column }| (line, column));
    assert!(refusal.detail.contains(reason), "{refusal}");
    assert_eq!(found, place, "{refusal}");
}

#[test]
fn invalid_utf8_is_rejected_with_its_position() {
    assert_eq!(refusal(b"{\n\"a\xff\":1}").position, Some(Position { line: 2, column: 3 }));
    assert!(refusal(b"\xff\xfe{\0}\0").to_string().contains("UTF-16"));
}

#[test]
fn too_large_or_deep_input_is_rejected() {
    let long = format!("{{\"auths\":{{}},\"x\":\"{}\"}}", "x".repeat(MAX_INPUT));
    assert!(refusal(long).to_string().contains("1 MiB"));
    let many: Vec<_> = (0..10_001).map(|at| format!("\"r{at}\":{{}}")).collect();
    assert!(refusal(format!("{{{}}}", many.join(","))).to_string().contains("more than 10000"));
    let barely_too_deep = format!("{{\"auths\":{}", "[".repeat(32));
    for nested in ["{\"a\":".repeat(MAX_INPUT / 5), barely_too_deep] {
        assert!(refusal(nested).to_string().contains("nested too deeply"));
    }
    for nested in ["[".repeat(MAX_INPUT), "- ".repeat(MAX_INPUT / 2), "a: ".repeat(MAX_INPUT / 3)] {
        let refusal = refusal(nested);
        assert!(refusal.detail.contains("nested too deeply"), "{refusal}");
    }
    let tenfold = |at: usize| format!("a{at}: &a{at} [{}]\n", vec![format!("*a{}", at - 1); 10].join(","));
    let laughs = (1..30).map(tenfold).collect::<String>();
    assert!(refusal(format!("a0: &a0 x\n{laughs}")).to_string().contains("anchors"));
}

#[test]
fn errors_do_not_repeat_the_input() {
    for input in [
        r#"{"auths":{"reg.io":{"auth":"CANARY"#,
        r#"{"auths":{"reg.io":{"password":CANARY}}}"#,
        r#"{"auths":{"CANARY":{},"CANARY":{}}}"#,
        r#"{"auths":"CANARY"}"#,
        "kind: Secret\nstringData: [CANARY\n",
        "kind: Secret\nCANARY: &a [*b]\n",
        "CANARY: CANARY: CANARY\n",
        "kind: CANARY\n",
        "CANARY!",
    ] {
        let refusal = refusal(input);
        assert!(!format!("{refusal} {refusal:?}").contains("CANARY"), "{refusal:?}");
    }
}

#[test]
fn debug_omits_entries() {
    let config = Config::parse(CONFIG_JSON.as_bytes()).unwrap();
    let shown = format!("{config:?} {:?}", config.entries);
    assert!(!shown.contains("bWFydGlu"), "{shown}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_parsed_or_rejected(input in any::<Vec<u8>>()) {
        let _ = Config::parse(&input);
    }

    #[test]
    fn arbitrary_text_around_a_config_is_parsed_or_rejected(before in "[ -~\n]{0,8}", after in "[ -~\n]{0,8}") {
        let _ = Config::parse(format!("{before}{CONFIG_JSON}{after}").as_bytes());
    }

    #[test]
    fn arbitrary_yaml_is_parsed_or_rejected(input in "(kind|data|type|[ \n:&*a!|>\\[{-])*") {
        let _ = Config::parse(input.as_bytes());
    }
}

#[test]
fn list_has_a_part_for_each_object() {
    let secret =
        |name: &str, data: &str| format!("{{kind: Secret, metadata: {{name: {name}, namespace: a}}, data: {data}}}");
    let items = [
        secret("good", "{.dockercfg: e30=}"),
        secret("tls", "{tls.key: e30=}"),
        secret("broken", "{.dockercfg: '!'}"),
        "{kind: ConfigMap}".to_owned(),
        "7".to_owned(),
    ];
    let parts = Part::parse_all(format!("kind: List\nitems: [{}]\n", items.join(", ")).as_bytes()).unwrap();
    let shown: Vec<_> = parts
        .iter()
        .map(|part| match part {
            Part::Config(config) => (config.source.as_deref().unwrap(), "config"),
            Part::NoConfig { source, reason: NoConfig::OtherSecret } => (source.as_str(), "another Secret"),
            Part::NoConfig { source, reason: NoConfig::OtherObject } => (source.as_str(), "another object"),
            Part::NoConfig { source, reason: NoConfig::Invalid(_) } => (source.as_str(), "invalid"),
        })
        .collect();
    let expected = [
        ("a/good", "config"),
        ("a/tls", "another Secret"),
        ("a/broken", "invalid"),
        ("items[3]", "another object"),
        ("items[4]", "another object"),
    ];
    assert_eq!(shown, expected);
}
