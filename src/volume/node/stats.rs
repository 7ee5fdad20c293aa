//! What a volume uses: NodeGetVolumeStats.

use super::Node;
use crate::volume::access::TargetPath;
use crate::volume::disk::{Measure, Usage};
use crate::volume::error::{Error, Reason};
use crate::volume::id::VolumeId;
use crate::volume::record::Record;
use crate::volume::room::Space;

impl Node {
    /// Size and usage of the volume that is mounted at `path`, not of the filesystem that it shares. The size is what is
    /// allocated to the volume; the free space is what is left of that, or of the filesystem, if that is less. Inodes are
    /// zero where the filesystem does not count them.
    ///
    /// # Errors
    /// [`Reason::NotMounted`], [`Reason::Waiting`] while its files are being counted, [`Reason::Uncounted`], or as for
    /// [`Control::get`](crate::volume::Control::get).
    pub(crate) fn stats(&self, id: &VolumeId, path: &str) -> Result<Space, Error> {
        self.try_stats(id, path).map_err(|reason| self.error(Some(id), reason))
    }

    fn try_stats(&self, id: &VolumeId, path: &str) -> Result<Space, Reason> {
        let (pool, volume) = self.require(id)?;
        let not_mounted = || Reason::NotMounted(path.to_owned());
        let target = TargetPath::parse(path).map_err(|_| not_mounted())?;
        // This call changes nothing, so it does not lock the volume.
        let there = self.host.mounted(&target).map_err(|_| not_mounted())?;
        let mounted = there.ok_or_else(not_mounted)?;
        let record = volume.record.map_err(Reason::BrokenRecord)?;
        let usage = match pool.begin_call()?.disk.measure(&record, mounted)? {
            Measure::Takes(usage) => usage,
            Measure::Uncounted => return Err(Reason::Uncounted),
            Measure::Elsewhere => return Err(not_mounted()),
            Measure::Counting => {
                let why = "its files are still being counted, because no quota counts them; the call will be retried";
                return Err(Reason::Waiting(why.into()));
            }
        };
        let inodes = pool.config.quotas.inodes(record.spec.bytes);
        Ok(of_volume(&record, usage, inodes, pool.space()?))
    }
}

/// The size of a volume, what it uses, and what it can still use.
fn of_volume(record: &Record, usage: Usage, inodes_max: Option<u64>, filesystem: Space) -> Space {
    let counted = usage.inodes.is_some();
    let inodes_used = usage.inodes.unwrap_or_default();
    let inodes = inodes_max.unwrap_or(filesystem.inodes);
    let inodes_left = inodes.saturating_sub(inodes_used).min(filesystem.inodes_available);
    Space {
        total: record.spec.bytes,
        used: usage.bytes,
        available: record.spec.bytes.less(usage.bytes).min(filesystem.available),
        inodes: if counted { inodes } else { 0 },
        inodes_used,
        inodes_available: if counted { inodes_left } else { 0 },
    }
}
