//! Keeps the memory of a service, which holds secrets, out of core dumps and away from other
//! processes of its user.

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Sets the core limit to 0 and makes the process not dumpable: other processes of the same user
/// can then neither attach to it nor read its memory or environment. Logs what the kernel reports
/// afterwards. A sandbox may refuse it, and the service runs all the same.
pub(super) fn protect_memory() {
    let limited = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let core_limit = getrlimit(Resource::Core).maximum;
    let is_dumpable = dumpable_behavior() != Ok(DumpableBehavior::NotDumpable);
    match limited.and(hidden) {
        Ok(()) => tracing::info!(core_limit, dumpable = is_dumpable, "process memory protected"),
        Err(error) => {
            tracing::warn!(core_limit, dumpable = is_dumpable, %error, "process memory not fully protected");
        }
    }
}
