//! Stops a controller that must not change anything any more.

use std::sync::OnceLock;

use crate::volume::error::Reason;

/// Open at first. Once closed, it stays closed for good.
#[derive(Debug, Default)]
pub(crate) struct Fence(OnceLock<String>);

impl Fence {
    /// Closes the fence. Only the first reason is kept.
    pub(crate) fn close(&self, why: &str) {
        self.0.get_or_init(|| why.to_owned());
    }

    /// Refuses once the fence is closed.
    pub(super) fn check(&self) -> Result<(), Reason> {
        self.0.get().map_or(Ok(()), |why| Err(Reason::Fenced(why.clone())))
    }
}
