//! Sets up the process before it serves anybody: drops privileges for good, and raises the limit of descriptors.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;
use tracing::warn;

/// The capabilities that hostdir needs, see capabilities(7).
const KEPT: [Capability; 6] = [
    // Mount and unmount volumes.
    Capability::CAP_SYS_ADMIN,
    // Reach directories that tenants have closed to others.
    Capability::CAP_DAC_OVERRIDE,
    // Set the mode of a volume's directory; erase from sticky directories.
    Capability::CAP_FOWNER,
    // Set the owner of a volume's directory.
    Capability::CAP_CHOWN,
    // Keep the set-group-id bit on it.
    Capability::CAP_FSETID,
    // Erase what tenants have made immutable.
    Capability::CAP_LINUX_IMMUTABLE,
];

/// Privileges that could not be dropped.
#[derive(Debug, Error)]
pub(crate) enum PrivilegeError {
    /// capget(2), capset(2) or prctl(2) failed.
    #[error("change the capabilities of this process")]
    Capabilities(#[from] CapsError),
    /// prctl(2) failed.
    #[error("forbid new privileges")]
    NewPrivileges(#[from] nix::Error),
}

/// Drops every capability except the few that hostdir needs, and the means to regain any. Threads inherit capabilities from
/// the thread that starts them, so call this before starting any.
///
/// # Errors
/// The kernel refuses. Then the process must not serve anything.
pub(crate) fn drop_privileges() -> Result<(), PrivilegeError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|kept| permitted.contains(kept)).collect();
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !kept.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    prctl::set_no_new_privs()?;
    Ok(())
}

/// Raises the soft limit of open files (getrlimit(2)) to the hard one: connections and calls need descriptors, and the usual soft
/// limit of 1,024 is for programs that use select(2).
pub(crate) fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!(%errno, "cannot raise the limit of open files");
    }
}
