//! Lists of objects, of which only the metadata is requested.

use kube::api::ListParams;
use serde::{Deserialize, Deserializer};

use super::{
    ClusterClient, ClusterError,
    response::{Metadata, PartialObject},
    unbuildable,
};

/// Maximum number of pages of a list.
const PAGES_MAX: u32 = 400;

#[derive(Deserialize)]
struct List {
    metadata: ListMetadata,
    // Required: a response without `items` is not an empty list. API servers write that as `null`.
    #[serde(deserialize_with = "null_as_empty")]
    items: Vec<PartialObject>,
}

fn null_as_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PartialObject>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
struct ListMetadata {
    #[serde(rename = "continue")]
    continue_token: Option<String>,
}

impl ClusterClient {
    /// Lists objects, `page` at a time: a page must fit into the maximum length of a response.
    /// `objects` names them in errors.
    pub(super) async fn list_metadata(
        &self,
        requests: &kube::core::Request,
        params: ListParams,
        (page, objects): (u32, &str),
    ) -> Result<Vec<Metadata>, ClusterError> {
        let mut params = params.limit(page);
        let mut found = Vec::new();
        for _ in 0..PAGES_MAX {
            let request = requests.list_metadata(&params).map_err(unbuildable)?;
            let response = self.call(request, self.deadline()).await?;
            if !response.is_success() {
                return Err(response.error(self.server(), &format!("list {objects}")));
            }
            let list: List = response.read(self.server())?;
            found.extend(list.items.into_iter().map(|object| object.metadata));
            params.continue_token = list.metadata.continue_token.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return Ok(found);
            }
        }
        let detail = format!("{} lists more than {} {objects}", self.server(), page * PAGES_MAX);
        Err(ClusterError::Unreachable { detail })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_without_objects_differs_from_a_response_without_a_list() {
        let items = |json: &str| serde_json::from_str::<List>(json).map(|list| list.items.len()).ok();
        assert_eq!(items(r#"{"metadata":{},"items":null}"#), Some(0));
        assert_eq!(items(r#"{"metadata":{},"items":[]}"#), Some(0));
        assert_eq!(items(r#"{"metadata":{},"items":[{"metadata":{"name":"a"}}]}"#), Some(1));
        assert_eq!(items(r#"{"metadata":{}}"#), None);
    }
}
