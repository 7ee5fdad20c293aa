//! Elected mode: volumes are promised in a [`Book`] that all controllers share, and made by their nodes later.
//!
//! Who leads does not matter for what is right: a name is taken by whoever enters it first, and an entry is only deleted
//! by its UID. Any number of controllers may do so at once. (All but one thing: two that promise the last room of a pool
//! at the same moment do not see each other's promise. The pool has then promised more than it has, as with overcommit.)

use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::control::{Control, Health, Volume, Want};
use super::error::{Error, Reason};
use super::fence::Fence;
use super::id::{NodeName, PoolName, VolumeId};
use super::ports::{Book, Draft, Hindrance, Promise, Stage};
use super::registry::Registry;
use super::size::{Bytes, SizeRange};

/// How long a delete waits for the node: below the 30 s that external-provisioner is told to wait (the chart's `--timeout`).
const DELETE_WAIT: Duration = Duration::from_secs(20);

/// After so long a delete is answered with what the node says, if it says anything: it tries again every second, so that
/// what it said before it was asked to delete is no longer there.
const HINDRANCE_WAIT: Duration = Duration::from_secs(3);

/// A controller.
pub struct Elected {
    book: Arc<dyn Book>,
    registry: Arc<Registry>,
    fence: Arc<Fence>,
}

impl Elected {
    /// A controller that enters promises in a book, and chooses nodes by what a registry says of them, until a fence closes.
    #[must_use]
    pub fn new(book: Arc<dyn Book>, registry: Arc<Registry>, fence: Arc<Fence>) -> Self {
        Self { book, registry, fence }
    }

    /// Refuses to change anything once the fence is closed.
    fn check(&self, id: &VolumeId) -> Result<(), Error> {
        self.fence.check().map_err(|reason| error(id, None, reason))
    }

    fn try_create(&self, id: &VolumeId, want: &Want) -> Result<Volume, (Option<NodeName>, Reason)> {
        let nowhere = |reason| (None, reason);
        // The cache may be late, so that it cannot say whether the name is taken; but where it knows the name, asking for a
        // node would count the volume twice.
        if self.registry.uid(id).is_some()
            && let Some(promise) = self.book.look_up(id).map_err(nowhere)?
        {
            return existing(promise, want);
        }
        if !want.size.admits(want.size.choose()) {
            return Err(nowhere(Reason::EmptyRange(want.size)));
        }
        let bytes = want.size.choose();
        let pool = &want.parameters.pool;
        if !self.registry.is_complete() {
            return Err(nowhere(Reason::Waiting(
                "this controller has not seen all nodes and volumes yet; it will be asked again".into(),
            )));
        }
        let node = match self.registry.choose(pool, bytes, &want.placement) {
            Ok(node) => node,
            // A final refusal is proof that there is no such volume; an earlier answer may have been lost.
            Err(refusal) => match self.book.look_up(id).map_err(nowhere)? {
                Some(promise) => return existing(promise, want),
                None => return Err(nowhere(refusal)),
            },
        };
        let draft = Draft {
            id: id.clone(),
            name: want.name.clone(),
            claim: want.claim.clone(),
            node: node.clone(),
            pool: pool.clone(),
            bytes,
            directory: want.parameters.directory,
        };
        let (promise, made) = self.book.promise(&draft).map_err(|reason| (Some(node), reason))?;
        if !made {
            return existing(promise, want);
        }
        self.registry.note(&promise);
        info!(volume.id = %id, node = %promise.node, pool = %promise.pool, size = %bytes, "volume promised");
        Ok(volume(promise))
    }

    fn try_delete(&self, id: &VolumeId) -> Result<(), (Option<NodeName>, Reason)> {
        let uid = match self.registry.uid(id) {
            Some(uid) => uid,
            None => match self.book.look_up(id).map_err(|reason| (None, reason))? {
                None => return Ok(()),
                Some(promise) => {
                    // What the watch has not seen yet must not pass for gone.
                    self.registry.note(&promise);
                    promise.uid
                }
            },
        };
        let left = self.book.delete(id, uid).map_err(|reason| (None, reason))?;
        let Some(promise) = left else {
            self.registry.forget(id, uid);
            return Ok(());
        };
        let at = |reason| (Some(promise.node.clone()), reason);
        // No disk has ever had data of it, so that nobody has to be waited for. Should its node begin to use it at this
        // moment, one of the two finds that the entry has changed.
        if promise.stage == Stage::Claimed && self.book.release(&promise).map_err(&at)? {
            self.registry.forget(id, uid);
            return Ok(());
        }
        self.wait_gone(&promise).map_err(at)?;
        info!(volume.id = %id, node = %promise.node, "volume deleted");
        Ok(())
    }

    fn try_expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, (Option<NodeName>, Reason)> {
        let found = self.book.look_up(id).map_err(|reason| (None, reason))?;
        let promise = found.ok_or((None, Reason::NoSuchVolume))?;
        let grown = self.grow(&promise, size);
        grown.map_err(|reason| (Some(promise.node.clone()), reason))
    }

    fn grow(&self, promise: &Promise, size: SizeRange) -> Result<Bytes, Reason> {
        let Promise { id, node, pool, .. } = promise;
        if promise.deleting {
            return Err(Reason::Deleting);
        }
        let wanted = match size.grow(promise.bytes) {
            None => return Err(Reason::Shrink { has: promise.bytes }),
            Some(None) => return Ok(promise.bytes),
            Some(Some(bytes)) => bytes,
        };
        // Not zero where it cannot be told: that would be a final refusal.
        let left = self.registry.left(node, pool)?;
        let room = promise.bytes.plus(left);
        if wanted > room {
            let pool = pool.clone();
            return Err(Reason::NoRoomToGrow { pool, wanted, room });
        }
        let Some(grown) = self.book.expand(promise, wanted)? else {
            return Err(Reason::Running("this volume".into()));
        };
        // The next one must not be promised the same room before the watch has shown this.
        self.registry.raise(&grown);
        info!(volume.id = %id, node = %node, pool = %pool, size = %wanted, "volume expanded");
        Ok(wanted)
    }

    fn wait_gone(&self, promise: &Promise) -> Result<(), Reason> {
        let Promise { id, uid, node, .. } = promise;
        let hindrance = match self.registry.wait_gone(id, *uid, HINDRANCE_WAIT) {
            Err(None) => self
                .registry
                .wait_gone(id, *uid, DELETE_WAIT.saturating_sub(HINDRANCE_WAIT)),
            other => other,
        };
        match hindrance {
            // The watch may be late, or have lost its memory; what is in the book is there.
            Ok(()) => match self.book.look_up(id)? {
                Some(found) if found.uid == *uid => Err(Reason::Waiting("it is not deleted yet".into())),
                Some(_) | None => Ok(()),
            },
            Err(Some(Hindrance { reason, message })) if reason == Hindrance::MOUNTED => Err(Reason::InUse(message)),
            Err(Some(Hindrance { message, .. })) => Err(Reason::Waiting(format!("it is not deleted yet; {message}"))),
            Err(None) => Err(Reason::Waiting(format!(
                "it is not deleted yet: hostdir on node {node} has not answered within {} s. It will when it runs; \
                 if the node is gone for good, delete the Node object",
                DELETE_WAIT.as_secs()
            ))),
        }
    }
}

impl Control for Elected {
    fn create(&self, want: &Want) -> Result<Volume, Error> {
        let id = VolumeId::for_name(&want.name);
        self.check(&id)?;
        self.try_create(&id, want)
            .map_err(|(node, reason)| error(&id, node, reason))
    }

    fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.check(id)?;
        self.try_delete(id).map_err(|(node, reason)| error(id, node, reason))
    }

    fn expand(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.check(id)?;
        self.try_expand(id, size)
            .map_err(|(node, reason)| error(id, node, reason))
    }

    fn expands_on_node(&self) -> bool {
        true
    }

    fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        match self.book.look_up(id) {
            Ok(Some(promise)) => Ok(volume(promise)),
            Ok(None) => Err(error(id, None, Reason::NoSuchVolume)),
            Err(reason) => Err(error(id, None, reason)),
        }
    }

    fn list(&self, after: Option<&VolumeId>, max: usize) -> Result<Vec<Volume>, Error> {
        Ok(self.registry.list(after, max))
    }

    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Option<Bytes> {
        self.registry.room(pool, segment)
    }

    fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.registry.filesystem(pool)
    }
}

impl Health for Elected {
    /// Not before all lists have been seen: a controller that knows no node would send every pod elsewhere.
    fn probe(&self, _: bool) -> Result<bool, Error> {
        self.fence.check().map_err(|reason| Error {
            volume: None,
            node: None,
            reason: Box::new(reason),
        })?;
        Ok(self.registry.is_complete())
    }
}

/// The volume that is there already, if it is what is wanted.
fn existing(promise: Promise, want: &Want) -> Result<Volume, (Option<NodeName>, Reason)> {
    let node = Some(promise.node.clone());
    if promise.deleting {
        return Err((node, Reason::Deleting));
    }
    if promise.name != want.name {
        return Err((node, Reason::Exists(format!("the other name {:?}", promise.name))));
    }
    let volume = volume(promise);
    volume.meets(want).map_err(|reason| (node, reason))?;
    Ok(volume)
}

fn volume(promise: Promise) -> Volume {
    Volume {
        id: promise.id,
        node: promise.node,
        pool: promise.pool,
        bytes: promise.bytes,
        directory: promise.directory,
        made_on: promise.made_on,
        uid: Some(promise.uid),
    }
}

fn error(id: &VolumeId, node: Option<NodeName>, reason: Reason) -> Error {
    Error {
        volume: Some(id.clone()),
        node,
        reason: Box::new(reason),
    }
}

#[cfg(test)]
#[path = "elected_tests.rs"]
mod tests;
