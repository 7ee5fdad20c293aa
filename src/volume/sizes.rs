//! What a volume takes, and how it is let to take more: the verbs of a node about sizes.

use tracing::info;
use uuid::Uuid;

use super::access::TargetPath;
use super::driver::Driver;
use super::error::{Error, Reason};
use super::id::VolumeId;
use super::ports::{Measure, Space, Usage};
use super::record::Record;
use super::size::{Bytes, SizeRange};

impl Driver {
    /// Size and use of a volume that is mounted at `path`: of the volume, not of the filesystem it shares. Its size is what was
    /// promised; free is what is left of that, or of the filesystem, if that is less. Inodes are zero where nobody counts them.
    ///
    /// # Errors
    /// [`Reason::NotMounted`], [`Reason::Waiting`] while its files are being counted, or as of
    /// [`Control::get`](super::control::Control::get).
    pub fn stats(&self, id: &VolumeId, path: &str) -> Result<Space, Error> {
        self.try_stats(id, path).map_err(|reason| self.error(Some(id), reason))
    }

    fn try_stats(&self, id: &VolumeId, path: &str) -> Result<Space, Reason> {
        let (pool, entry) = self.require(id)?;
        let not_mounted = || Reason::NotMounted(path.to_owned());
        let target = TargetPath::parse(path).map_err(|_| not_mounted())?;
        // Looked at, and nothing noted: this holds no operation on the volume.
        let there = self.host.mounted(&target).map_err(|_| not_mounted())?;
        let mounted = there.ok_or_else(not_mounted)?;
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        let usage = match pool.disk.measure(&record, mounted)? {
            Measure::Takes(usage) => usage,
            Measure::Elsewhere => return Err(not_mounted()),
            Measure::Counting => {
                let why = "nothing but a walk through its files can tell what it takes, and that has not ended yet; ask again";
                return Err(Reason::Waiting(why.into()));
            }
        };
        let inodes = pool.config.quotas.inodes(record.bytes);
        Ok(of_volume(&record, usage, inodes, pool.disk.space()?))
    }

    /// Lets a volume have what was promised to it; `size` says what the caller knows of that. What it has then. (In local mode
    /// nobody but this driver promises anything, so that it does so here, too.)
    ///
    /// # Errors
    /// [`Reason::NotPromised`], [`Reason::NoRoomToGrow`] in local mode, or as of
    /// [`Control::get`](super::control::Control::get).
    pub fn expand_here(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Error> {
        self.try_expand_here(id, size)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn try_expand_here(&self, id: &VolumeId, size: SizeRange) -> Result<Bytes, Reason> {
        let (_, entry) = self.require(id)?;
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        let Some(uid) = record.uid else {
            return self.try_expand(id, size);
        };
        // A cache may be late, and this is called as soon as more is promised.
        let promise = self.ledger.look_up(id)?.filter(|promise| promise.uid == uid);
        let promised = promise.ok_or(Reason::NoSuchVolume)?.bytes;
        if size.required > promised {
            let wanted = size.required;
            return Err(Reason::NotPromised { promised, wanted });
        }
        self.follow(id, uid, promised)
    }

    /// Lets a volume of this node have the size that its HostVolume has now.
    ///
    /// # Errors
    /// [`Reason::Running`], or the limit or the record cannot be written.
    pub fn follow_promise(&self, id: &VolumeId, uid: Uuid, promised: Bytes) -> Result<Bytes, Error> {
        self.follow(id, uid, promised)
            .map_err(|reason| self.error(Some(id), reason))
    }

    fn follow(&self, id: &VolumeId, uid: Uuid, promised: Bytes) -> Result<Bytes, Reason> {
        let _running = self.operations.on_volume(id)?;
        let (pool, entry) = self.require(id)?;
        let record = entry.record.map_err(Reason::BrokenRecord)?;
        if record.uid != Some(uid) {
            return Err(Reason::NoSuchVolume);
        }
        if promised <= record.bytes {
            return Ok(record.bytes);
        }
        pool.raise(record, promised)?;
        info!(volume.id = %id, node = %self.node, pool = %pool.config.name, size = %promised, "volume expanded");
        Ok(promised)
    }
}

/// What a volume has, takes and can still take.
fn of_volume(record: &Record, usage: Usage, inodes_max: Option<u64>, filesystem: Space) -> Space {
    let counted = usage.inodes.is_some();
    let inodes_used = usage.inodes.unwrap_or_default();
    let inodes = inodes_max.unwrap_or(filesystem.inodes);
    let inodes_left = inodes.saturating_sub(inodes_used).min(filesystem.inodes_available);
    Space {
        total: record.bytes,
        used: usage.bytes,
        available: record.bytes.less(usage.bytes).min(filesystem.available),
        inodes: if counted { inodes } else { 0 },
        inodes_used,
        inodes_available: if counted { inodes_left } else { 0 },
    }
}
