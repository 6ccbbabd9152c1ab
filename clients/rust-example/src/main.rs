//! The main job: two registry accounts become one Secret.

use std::{env, error::Error, fs};

use regcred::{
    Client,
    types::{CreateCluster, CreateRegistryAccount, CreateSecret},
};
use reqwest::header::{AUTHORIZATION, HeaderMap};

mod regcred {
    progenitor::generate_api!(spec = "../../openapi/openapi-3.0.json", interface = Builder);
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, format!("Bearer {}", env::var("REGCRED_TOKEN")?).parse()?);
    let http = reqwest::Client::builder().default_headers(headers).build()?;
    let client = Client::new_with_client(&env::var("REGCRED_URL")?, http);

    for (name, registry, password) in
        [("rust-5000", "registry.example.com:5000", "xxx1"), ("rust-6000", "registry.example.com:6000", "xxx2")]
    {
        let account = CreateRegistryAccount::builder().name(name).registry(registry);
        let account = account.username("dev".to_owned()).password(password.to_owned());
        client.create_registry_account().body(account).send().await?;
    }
    let kubeconfig = fs::read_to_string(env::var("KUBECONFIG")?)?;
    client.create_cluster().body(CreateCluster::builder().name("rust").kubeconfig(kubeconfig)).send().await?;
    let accounts = vec!["rust-5000".to_owned(), "rust-6000".to_owned()];
    let secret = CreateSecret::builder().name("rust-pull").accounts(accounts);
    let secret = client.create_secret().cluster("rust").namespace("default").body(secret).send().await?;
    println!("{} unlocks {}", secret.name, secret.keys.join(" and "));
    Ok(())
}
