//! What keeps a controller from acting that must not act any more.

use std::sync::OnceLock;

use crate::volume::error::Reason;

/// Open until it is closed, for good.
#[derive(Debug, Default)]
pub(crate) struct Fence(OnceLock<String>);

impl Fence {
    /// Closes it. Why it was closed first is why it stays closed.
    pub(crate) fn close(&self, why: &str) {
        self.0.get_or_init(|| why.to_owned());
    }

    /// Refuses once it is closed.
    pub(super) fn check(&self) -> Result<(), Reason> {
        self.0.get().map_or(Ok(()), |why| Err(Reason::Fenced(why.clone())))
    }
}
