//! Version of an API server.

use http::Request;
use serde::Deserialize;
use tokio::time::Instant;

use super::{ClusterClient, ClusterError, unbuildable};

/// Maximum length of a version, in bytes.
const VERSION_MAX: usize = 64;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    git_version: String,
}

impl ClusterClient {
    /// Reads the version of the API server, or none if the credential may not read it.
    pub(super) async fn version(&self, deadline: Instant) -> Result<Option<String>, ClusterError> {
        let request = Request::get("/version").body(Vec::new()).map_err(unbuildable)?;
        let response = self.call(request, deadline).await?;
        match response.status {
            200 => {
                let version: Option<Version> = response.json();
                let version = version.map(|version| version.git_version).filter(|version| {
                    version.len() <= VERSION_MAX && version.bytes().all(|byte| byte.is_ascii_graphic())
                });
                version.map(Some).ok_or_else(|| ClusterError::Unreachable {
                    detail: format!("{} does not answer like a Kubernetes API server: check the URL", self.server()),
                })
            }
            403 => Ok(None),
            _ => Err(response.error(self.server(), "get the version")),
        }
    }
}
