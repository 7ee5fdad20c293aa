//! Opens a pool: checks that it is the right disk, locks it, and finds its volumes.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::syncfs;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::dir::{Dir, failed};
use super::durable::SyncedDir;
use super::eraser::Eraser;
use super::layout::{IDENTITY, LOCK, META, NEW, NEW_IDENTITY, TRASH, VOLUMES};
use super::pool::{PoolDisk, space};
use super::quota::Quota;
use super::threads::ThreadedDisk;
use super::usage::UsageCounter;
use super::{mountinfo, sys, target};
use crate::volume::access::TargetPath;
use crate::volume::disk::{Disk, DiskError, Mount, Opened, PoolConfig, PoolVolume, Unusable};
use crate::volume::id::VolumeId;
use crate::volume::quota::QuotaPolicy;
use crate::volume::record::PoolId;
use crate::volume::size::Bytes;

/// `pool.json`.
#[derive(Serialize, Deserialize)]
struct Identity {
    format: u32,
    id: PoolId,
    created: Timestamp,
    /// Bytes in use on the filesystem when the pool was made.
    #[serde(default)]
    foreign: Bytes,
}

impl Identity {
    const FORMAT: u32 = 1;
}

/// Opens a pool and locks it. Makes it if there is none, unless a disk must be mounted there first. The calling thread gets
/// descriptors of its own, see [`super::threads`].
pub(super) fn open(config: &PoolConfig) -> Result<Opened, Unusable> {
    sys::own_descriptors().map_err(|errno| {
        Unusable(format!(
            "cannot open it apart from the other pools (close_range: {errno})"
        ))
    })?;
    let root = open_root(config)?;
    let mount = mount_of(&root)?;
    require_mount(config, &mount)?;
    let (disk, Identity { id, foreign, .. }) = lock_and_identify(config, &root, &mount)?;
    let volumes = recover(config, &root, &disk)?;
    disk.eraser.start(Arc::clone(&disk.trash));
    let disk = ThreadedDisk::new(&config.name, disk)
        .map_err(|error| Unusable(format!("cannot start a thread for the calls to its disk: {error}")))?;
    Ok(Opened {
        id,
        filesystem: mount.filesystem,
        foreign,
        volumes,
        disk: Box::new(disk),
    })
}

fn require_mount(config: &PoolConfig, mount: &mountinfo::Entry) -> Result<(), Unusable> {
    if config.require_mount && is_on_root_filesystem(&config.path, mount) {
        return Err(Unusable(format!(
            "{} is not on a disk of its own, and requireMount is set: mount the disk there",
            config.path.display()
        )));
    }
    Ok(())
}

fn lock_and_identify(
    config: &PoolConfig,
    root: &Dir,
    mount: &mountinfo::Entry,
) -> Result<(PoolDisk, Identity), Unusable> {
    if config.expected.is_none() {
        require_pool_or_empty(root)?;
    }
    let meta = root.ensure_child(META)?;
    let lock = lock(&meta)?;
    let volumes = root.ensure_child(VOLUMES)?;
    let identity = identify(&meta, &volumes, config.expected)?;
    let trash = root.ensure_child(TRASH)?;
    let new = meta.ensure_child(NEW)?;
    meta.sync().and_then(|()| root.sync())?;
    let quota = Arc::new(Quota::find(config.quotas, &volumes, mount)?);
    quota.prepare_trash(&trash)?;
    let there = root.stat(c"").map_err(|errno| root.failed_itself("stat", errno))?;
    let disk = PoolDisk {
        path: config.path.clone(),
        identity: there.inode,
        mount_id: there.mount_id,
        meta,
        new,
        trash: Arc::new(SyncedDir::new(trash)),
        usage: UsageCounter::new(config.name.clone(), root.child(VOLUMES)?),
        volumes: SyncedDir::new(volumes),
        eraser: Eraser::new(config.name.clone(), Arc::clone(&quota)),
        quota,
        counter: AtomicU64::new(0),
        unsynced: Mutex::default(),
        _lock: lock,
    };
    Ok((disk, identity))
}

/// Finishes or undoes what an earlier process left, and finds the volumes.
fn recover(config: &PoolConfig, root: &Dir, disk: &PoolDisk) -> Result<Vec<PoolVolume>, Unusable> {
    disk.sweep()?;
    // An earlier process may have died between a change and its sync. From here on, answers rely on everything that is
    // found, so all of it must be durable first.
    syncfs(root).map_err(|errno| failed("sync the filesystem of", config.path.clone(), errno))?;
    let mut volumes = disk.load()?;
    disk.enforce_all(&volumes);
    disk.quota.sweep(&disk.volumes.dir);
    log_enforcement(config, disk);
    find_mounts(disk, &mut volumes)?;
    Ok(volumes)
}

fn log_enforcement(config: &PoolConfig, disk: &PoolDisk) {
    let pool = &config.name;
    match disk.enforcement() {
        Ok(kind) => info!(%pool, %kind, "volumes are limited to their sizes"),
        Err(why) if config.quotas.policy == QuotaPolicy::Off => info!(%pool, why, "volumes are not limited"),
        Err(why) => warn!(%pool, why, "volumes are not limited"),
    }
}

fn open_root(config: &PoolConfig) -> Result<Dir, Unusable> {
    let path = &config.path;
    let shown = path.display();
    match Dir::open(path) {
        Ok(root) => Ok(root),
        Err(error) => match error.source.downcast_ref() {
            Some(Errno::ENOENT) if config.require_mount => Err(Unusable(format!(
                "{shown} does not exist, and requireMount is set: mount its disk"
            ))),
            Some(Errno::ENOENT) => make_root(path).map_err(|error| {
                Unusable(format!(
                    "{shown} does not exist and cannot be made ({}); make it by hand",
                    error.with_cause()
                ))
            }),
            Some(Errno::ELOOP) => Err(Unusable(format!(
                "{shown} goes through a symbolic link; configure the real directory"
            ))),
            Some(Errno::ENOTDIR) => Err(Unusable(format!("{shown} is not a directory; configure one"))),
            Some(_) | None => Err(error.into()),
        },
    }
}

/// Makes the directory of a pool; its parent must exist.
fn make_root(path: &Path) -> Result<Dir, DiskError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed("open", path.to_owned(), Errno::EINVAL));
    };
    let name = std::ffi::CString::new(name.as_bytes()).map_err(|_| failed("open", path.to_owned(), Errno::EINVAL))?;
    let parent = Dir::open(parent)?;
    let root = parent.make_child(&name)?;
    parent.sync()?;
    info!(path = %path.display(), "made the directory of a new pool");
    Ok(root)
}

fn mount_of(root: &Dir) -> Result<mountinfo::Entry, DiskError> {
    let stat = root.stat(c"").map_err(|errno| root.failed_itself("stat", errno))?;
    mountinfo::find(stat.mount_id)?.ok_or_else(|| root.failed_itself("find the mount of", Errno::ENOENT))
}

/// Whether a pool is on the root filesystem of the node: if so, its path within the filesystem is its whole path. This also
/// holds in a container, where every pool is a mount, provided that the pool has the same path there as on the node.
fn is_on_root_filesystem(path: &Path, mount: &mountinfo::Entry) -> bool {
    let whole = path.strip_prefix("/").unwrap_or(path);
    mount
        .path_in_filesystem(path)
        .is_none_or(|within| within.ends_with(whole))
}

/// One process per pool: two processes would not know of each other, and work on one volume at the same time.
fn lock(meta: &Dir) -> Result<Flock<File>, Unusable> {
    let file = meta
        // Not for writing, so that the pool can be remounted read-only while the lock is held.
        .open_beneath(LOCK, OFlag::O_RDONLY | OFlag::O_CREAT, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|errno| meta.failed("create", LOCK, errno))?;
    Flock::lock(File::from(file), FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Unusable(format!(
            "a hostdir process still serves it (it holds {}/lock); it can be used when that process has ended",
            meta.path().display()
        )),
        errno => meta.failed("lock", LOCK, errno).into(),
    })
}

/// Refuses a directory that is not a pool and has something in it: it is somebody else's, and a pool empties its `trash`.
fn require_pool_or_empty(root: &Dir) -> Result<(), Unusable> {
    if let Some(meta) = root.find_child(META)?
        && meta.read(IDENTITY)?.is_some()
    {
        return Ok(());
    }
    // That has lost its identity: more is said of it later.
    if !is_empty(root, VOLUMES) && root.find_child(VOLUMES)?.is_some() {
        return Ok(());
    }
    let mut foreign = Vec::new();
    for name in root.names()? {
        let name = name?;
        // What a process leaves that dies before it has written the identity; `volumes` are looked at later.
        let name_is = |known: &CStr| name.as_c_str() == known;
        let allowed = name_is(META) || name_is(VOLUMES) || name_is(c"lost+found");
        let unused_trash = || name_is(TRASH) && is_empty(root, &name);
        if !(allowed || unused_trash()) {
            foreign.push(name.to_string_lossy().into_owned());
        }
    }
    if foreign.is_empty() {
        return Ok(());
    }
    foreign.sort_unstable();
    let (count, path) = (foreign.len(), root.path().display());
    foreign.truncate(3);
    Err(Unusable(format!(
        "{path} is not a pool and not empty ({count} entries, such as {}); a pool is made only in an empty directory: configure one, or \
         move these files away",
        foreign.join(", ")
    )))
}

fn is_empty(dir: &Dir, name: &CStr) -> bool {
    let mut names = dir.child(name).and_then(|child| child.names());
    names.as_mut().is_ok_and(|names| names.next().is_none())
}

/// The identity of the pool. Makes a new one only if there are no volumes and no id is expected.
fn identify(meta: &Dir, volumes: &Dir, expected: Option<PoolId>) -> Result<Identity, Unusable> {
    let path = meta.path().display();
    let Some(bytes) = meta.read(IDENTITY)? else {
        if volumes.names()?.next().is_some() {
            return Err(Unusable(format!(
                "{path}/pool.json is missing, but the pool has volumes; restore it from a backup, or move the volumes away"
            )));
        }
        return match expected {
            Some(id) => Err(Unusable(format!(
                "there is no pool yet, and poolId {id} is expected: mount its disk, or remove poolId to make a new pool"
            ))),
            None => make_identity(meta, volumes),
        };
    };
    let identity: Identity = serde_json::from_slice(&bytes).map_err(|error| {
        Unusable(format!(
            "{path}/pool.json cannot be read ({error}); restore it from a backup"
        ))
    })?;
    if identity.format != Identity::FORMAT {
        return Err(Unusable(format!(
            "{path}/pool.json has format {}, this hostdir supports format {}; use a version of hostdir that supports it",
            identity.format,
            Identity::FORMAT
        )));
    }
    match expected {
        Some(id) if id != identity.id => Err(Unusable(format!(
            "it is pool {}, and poolId {id} is expected: mount the right disk, or correct poolId",
            identity.id
        ))),
        _ => Ok(identity),
    }
}

fn make_identity(meta: &Dir, volumes: &Dir) -> Result<Identity, Unusable> {
    let random = sys::random().map_err(|errno| Unusable(format!("cannot make an id for it (getrandom: {errno})")))?;
    let identity = Identity {
        format: Identity::FORMAT,
        id: PoolId::from_random(random),
        created: Timestamp::now(),
        foreign: space(volumes)?.used,
    };
    let json = serde_json::to_vec_pretty(&identity).map_err(|error| Unusable(error.to_string()))?;
    meta.write(NEW_IDENTITY, &json)
        .and_then(|()| meta.rename(NEW_IDENTITY, IDENTITY))
        .and_then(|()| meta.sync())?;
    Ok(identity)
}

/// Notes where volumes of the pool are mounted already: the kernel knows what an earlier process did.
fn find_mounts(disk: &PoolDisk, volumes: &mut [PoolVolume]) -> Result<(), DiskError> {
    let mut by_id: HashMap<VolumeId, &mut PoolVolume> =
        volumes.iter_mut().map(|volume| (volume.id.clone(), volume)).collect();
    for entry in mountinfo::read()? {
        let Some(id) = volume_of(&entry.root) else { continue };
        let Ok(target) = TargetPath::parse(&entry.mount_point) else {
            continue;
        };
        if !may_be_mounted(disk, &id, &target, entry.id) {
            continue;
        }
        match by_id.get_mut(&id) {
            Some(volume) => volume.mounts.push(Mount { target, mode: None }),
            None => {
                warn!(volume.id = %id, %target, path = %disk.path.display(), "mounted, but not a volume of this pool");
            }
        }
    }
    Ok(())
}

/// Whether the mount with this id may be a mount of the volume.
fn may_be_mounted(disk: &PoolDisk, id: &VolumeId, target: &TargetPath, mount_id: u64) -> bool {
    let data = match disk.data(id) {
        Ok(None) => return false,
        Ok(Some(data)) => Some(data),
        Err(_) => None,
    };
    match target::mounted_stat(target) {
        // The mount is on top. If it shows another directory, it is of another pool or not of hostdir.
        Ok(Some(there)) if there.mount_id == mount_id => data.is_none_or(|data| data == there.inode),
        // Covered by another mount, or gone meanwhile. If in doubt, the volume counts as mounted.
        Ok(_) => true,
        Err(error) => {
            warn!(volume.id = %id, %target, %error, "cannot tell what is mounted");
            true
        }
    }
}

/// The volume whose directory seems to be mounted, judging by its path.
fn volume_of(root: &Path) -> Option<VolumeId> {
    let mut parts = root.as_os_str().as_bytes().rsplit(|byte| *byte == b'/');
    let (data, id, home) = (parts.next()?, parts.next()?, parts.next()?);
    let id = VolumeId::parse(std::str::from_utf8(id).ok()?).ok()?;
    (data == b"data" && home == b"volumes").then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(root: &str, mount_point: &str) -> mountinfo::Entry {
        mountinfo::Entry {
            id: 1,
            root: root.into(),
            mount_point: mount_point.into(),
            filesystem: "ext4".into(),
        }
    }

    #[test]
    fn a_pool_on_the_root_filesystem_is_told_from_one_on_its_own_disk() {
        let path = Path::new("/mnt/disk/hostdir");
        // On the node: the root filesystem; a mounted disk.
        assert!(is_on_root_filesystem(path, &mount("/", "/")));
        assert!(!is_on_root_filesystem(path, &mount("/", "/mnt/disk")));
        // In a container: hostPath from the root filesystem, from a btrfs root subvolume, from a mounted disk.
        assert!(is_on_root_filesystem(
            path,
            &mount("/mnt/disk/hostdir", "/mnt/disk/hostdir")
        ));
        assert!(is_on_root_filesystem(
            path,
            &mount("/@/mnt/disk/hostdir", "/mnt/disk/hostdir")
        ));
        assert!(!is_on_root_filesystem(path, &mount("/hostdir", "/mnt/disk/hostdir")));
        assert!(!is_on_root_filesystem(path, &mount("/", "/mnt/disk/hostdir")));
    }

    #[test]
    fn only_directories_of_volumes_look_like_them() {
        assert_eq!(volume_of(Path::new("/p/volumes/pvc-1/data")).unwrap().as_str(), "pvc-1");
        for root in [
            "/",
            "/data",
            "/volumes/../data",
            "/p/trash/pvc-1/data",
            "/p/volumes/pvc-1",
        ] {
            assert!(volume_of(Path::new(root)).is_none(), "{root}");
        }
    }
}
