//! Refusals as gRPC status codes. The code decides what the caller does next:
//!
//! - external-provisioner (`checkError`, pkg/controller/controller.go): `ResourceExhausted` lets the scheduler choose
//!   another node. `Unavailable`, `Aborted`, `DeadlineExceeded` and `Canceled` mean that a volume may have been made: it
//!   tries again, even when the PVC is gone. It tries again after minutes for `InvalidArgument`, after seconds for
//!   everything else, until the PVC is gone.
//! - kubelet (`isFinalError`, pkg/volume/csi/csi_client.go): with the same codes it assumes that the volume may be mounted;
//!   it tries again, and unpublishes in the end.
//!
//! Hence: a final code is proof that nothing made for this request remains.
#![warn(clippy::wildcard_enum_match_arm)]

use tonic::{Code, Status};

use crate::volume::disk::{BindError, DiskErrorKind};
use crate::volume::{Error, Reason};

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(code(&error.reason), error.to_string())
    }
}

fn code(reason: &Reason) -> Code {
    match reason {
        // Tried again until the other call has ended.
        Reason::Running(_) | Reason::Deleting => Code::Aborted,
        // The caller is wrong about what exists; it tries again in case that changes.
        Reason::NoSuchVolume | Reason::NotMounted(_) => Code::NotFound,
        // Never succeeds; tried again until the PVC is gone.
        Reason::Exists(_) => Code::AlreadyExists,
        Reason::EmptyRange(_) | Reason::Shrink { .. } | Reason::NoRoomToGrow { .. } | Reason::NotAllocated { .. } => {
            Code::OutOfRange
        }
        // The caller has the wrong socket.
        Reason::NotOnNodes => Code::Unimplemented,
        // Nothing was recorded: the pod can go to another node.
        Reason::OtherNode | Reason::NoSuchPool { .. } | Reason::NoRoom { .. } | Reason::NoNode(_) => {
            Code::ResourceExhausted
        }
        // The volume may be recorded there, or still be there: tried again until that is known.
        Reason::PoolUnusable { .. } | Reason::Api { .. } | Reason::Waiting(_) | Reason::Fenced(_) => Code::Unavailable,
        // Somebody has to change something first; tried again meanwhile.
        Reason::Ambiguous(..)
        | Reason::BrokenRecord(_)
        | Reason::DataMissing { .. }
        | Reason::PoolRemoved { .. }
        | Reason::Mounted(_)
        | Reason::InUse(_)
        | Reason::Predecessor { .. }
        | Reason::Successor { .. }
        | Reason::Exclusive(_)
        | Reason::Unenforced { .. }
        | Reason::Uncounted
        | Reason::NotReady(_) => Code::FailedPrecondition,
        Reason::Bind { source, .. } => bind_code(source),
        Reason::Disk(error) => disk_code(error.kind),
    }
}

fn bind_code(error: &BindError) -> Code {
    match error {
        // CSI: "volume published at target_path but is incompatible".
        BindError::Conflict(_) => Code::AlreadyExists,
        BindError::NoData | BindError::InTheWay(_) | BindError::Unproven => Code::FailedPrecondition,
        BindError::BadTarget(_) => Code::InvalidArgument,
        BindError::Disk(error) => disk_code(error.kind),
    }
}

fn disk_code(kind: DiskErrorKind) -> Code {
    match kind {
        // Nothing was recorded: another node may have room.
        DiskErrorKind::Full => Code::ResourceExhausted,
        // In use: tried again until it is not.
        DiskErrorKind::Busy => Code::FailedPrecondition,
        DiskErrorKind::Failed => Code::Internal,
        // The change took effect, but a power cut may undo it: tried again until it is durable.
        DiskErrorKind::Unsettled => Code::Unavailable,
    }
}
