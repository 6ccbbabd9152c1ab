//! Renders the document of a pull secret, once for all targets of a generation.

use std::{sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use tokio::time::Instant;
use uuid::Uuid;

use super::Reconciler;
use crate::{
    domain::{
        pull_secret::{ContentMac, Declaration},
        secret::SecretContent,
    },
    service::{ServiceError, connection},
    storage::{self, accounts::SealedCredential, pull_secrets::StoredPullSecret},
};

/// Lifetime of a rendered document.
const RENDER_TTL: Duration = Duration::from_secs(5);

/// A rendered document with its keyed hashes.
pub(super) struct Content {
    pub(super) secret: SecretContent,
    pub(super) mac: ContentMac,
    /// Selected accounts that are not in the document, because it has their key already.
    pub(super) left_out: Vec<Arc<SealedCredential>>,
}

pub(super) struct Rendered {
    generation: i64,
    version: i64,
    at: Instant,
    content: Arc<Content>,
}

/// Cache slot of a pull secret. Its lock is held while the document is rendered.
pub(super) type RenderSlot = Arc<tokio::sync::Mutex<Option<Rendered>>>;

impl Reconciler {
    /// Returns the document for a generation of a pull secret. The first caller renders it and
    /// records the accounts that it leaves out.
    pub(super) async fn render(
        &self,
        pull_secret: &StoredPullSecret,
        generation: i64,
    ) -> Result<Arc<Content>, ServiceError> {
        let slot = Arc::clone(self.renders.lock().entry(pull_secret.id).or_default());
        let mut slot = slot.lock().await;
        if let Some(rendered) = &*slot
            && rendered.generation == generation
            && rendered.version >= pull_secret.version
            && rendered.at.elapsed() < RENDER_TTL
        {
            return Ok(Arc::clone(&rendered.content));
        }
        let at = Instant::now();
        let content = Arc::new(self.assemble(&pull_secret.declaration).await?);
        if pull_secret.declaration.account_selector().is_some() {
            let mut ids: Vec<Uuid> = content.left_out.iter().map(|account| account.id).collect();
            ids.sort_unstable();
            let mut conn = connection(&self.pool).await?;
            storage::left_out::record(&mut conn, pull_secret.id, generation, &ids).await?;
        }
        *slot = Some(Rendered { generation, version: pull_secret.version, at, content: Arc::clone(&content) });
        Ok(content)
    }

    /// Renders the document of a declaration.
    pub(super) async fn assemble(&self, declaration: &Declaration) -> Result<Content, ServiceError> {
        let secret_type = declaration.secret_type;
        let (rendered, left_out) =
            self.docker_configs.assemble_stored(secret_type.profile(), &declaration.accounts).await?;
        let parts = [secret_type.as_str().as_bytes(), rendered.document.expose_secret().as_bytes()];
        let mac = self.peppers.current().content_mac(&parts);
        let secret = SecretContent::new(secret_type, &rendered.document);
        Ok(Content { secret, mac, left_out })
    }

    /// Evicts expired documents, and all declarations once no document is left.
    pub(super) fn evict_renders(&self) {
        let mut renders = self.renders.lock();
        renders.retain(|_, slot| match slot.try_lock() {
            Ok(rendered) => rendered.as_ref().is_some_and(|rendered| rendered.at.elapsed() < RENDER_TTL),
            // Being rendered.
            Err(_) => true,
        });
        if renders.is_empty() {
            self.declarations.lock().clear();
        }
    }
}
