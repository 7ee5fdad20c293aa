//! The names in a pool:
//!
//! ```text
//! <pool>/.hostdir/pool.json              identity of the pool
//! <pool>/.hostdir/lock                   held while a process serves the pool, flock(2)
//! <pool>/.hostdir/new/<volume id>.<n>/   volumes being made
//! <pool>/volumes/<volume id>/volume.json the record
//! <pool>/volumes/<volume id>/data/       the tenant's directory, and the only thing ever mounted
//! <pool>/trash/<volume id>.<n>/          deleted, being erased
//! ```

use std::ffi::{CStr, CString};

use super::dir::Dir;
use crate::volume::disk::DiskError;
use crate::volume::id::VolumeId;

pub(super) const META: &CStr = c".hostdir";
pub(super) const IDENTITY: &CStr = c"pool.json";
pub(super) const NEW_IDENTITY: &CStr = c"pool.json.new";
pub(super) const LOCK: &CStr = c"lock";
pub(super) const NEW: &CStr = c"new";
pub(super) const VOLUMES: &CStr = c"volumes";
pub(super) const TRASH: &CStr = c"trash";
pub(super) const RECORD: &CStr = c"volume.json";
pub(super) const NEW_RECORD: &CStr = c"volume.json.new";
pub(super) const DATA: &CStr = c"data";

/// The name of a volume's directory.
pub(super) fn dir_name(id: &VolumeId) -> CString {
    CString::new(id.as_str()).expect("a volume id has no NUL")
}

/// `<name>.<n>`, the name of an entry of `new/` and `trash/`.
pub(super) fn numbered(name: &str, n: u64) -> CString {
    let bytes: Vec<u8> = format!("{name}.{n}").bytes().filter(|byte| *byte != 0).collect();
    CString::new(bytes).expect("no NUL is left")
}

/// Opens the tenant's directory of a volume; `volumes` is the directory of all volumes.
pub(super) fn open_data(volumes: &Dir, id: &VolumeId) -> Result<Dir, DiskError> {
    let mut path = dir_name(id).into_bytes();
    path.push(b'/');
    path.extend(DATA.to_bytes());
    volumes.child(&CString::new(path).expect("neither has a NUL"))
}
