//! btrfs: subvolumes and quota groups (include/uapi/linux/btrfs.h).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};

use nix::Result;
use nix::errno::Errno;

/// The inode number of the top directory of every subvolume (`BTRFS_FIRST_FREE_OBJECTID`).
pub(in crate::linux) const TOP_INODE: u64 = 256;

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct VolumeArgs {
    fd: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_vol_args_v2`, in the variant that names a subvolume by its id.
#[repr(C)]
struct VolumeArgs2 {
    fd: i64,
    transaction: u64,
    flags: u64,
    _unused: [u64; 4],
    subvolume: u64,
    _name: [u8; 4032],
}

/// `struct btrfs_ioctl_fs_info_args`.
#[repr(C)]
struct FsInfo {
    _max_id: u64,
    _devices: u64,
    fsid: [u8; 16],
    _rest: [u64; 124],
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct InodeLookup {
    tree: u64,
    object: u64,
    _name: [u8; 4080],
}

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
struct Search {
    tree: u64,
    min_object: u64,
    max_object: u64,
    min_offset: u64,
    max_offset: u64,
    min_transaction: u64,
    max_transaction: u64,
    min_kind: u32,
    max_kind: u32,
    items: u32,
    _unused: u32,
    _unused64: [u64; 4],
    buffer: [u8; 3992],
}

/// `struct btrfs_ioctl_qgroup_limit_args`.
#[repr(C)]
struct QgroupLimit {
    qgroup: u64,
    flags: u64,
    max_referenced: u64,
    _max_exclusive: u64,
    _reserved: [u64; 2],
}

/// `struct btrfs_ioctl_qgroup_create_args`.
#[repr(C)]
struct QgroupCreate {
    create: u64,
    qgroup: u64,
}

/// `struct btrfs_ioctl_qgroup_assign_args`.
#[repr(C)]
struct QgroupAssign {
    assign: u64,
    from: u64,
    to: u64,
}

const _: () = assert!(
    size_of::<VolumeArgs>() == 4096
        && size_of::<VolumeArgs2>() == 4096
        && size_of::<FsInfo>() == 1024
        && size_of::<InodeLookup>() == 4096
        && size_of::<Search>() == 4096
        && size_of::<QgroupLimit>() == 48
);

mod raw {
    use super::{FsInfo, InodeLookup, QgroupAssign, QgroupCreate, QgroupLimit, Search, VolumeArgs, VolumeArgs2};
    const MAGIC: u8 = 0x94;
    nix::ioctl_write_ptr!(subvolume_create, MAGIC, 14, VolumeArgs);
    nix::ioctl_readwrite!(tree_search, MAGIC, 17, Search);
    nix::ioctl_readwrite!(inode_lookup, MAGIC, 18, InodeLookup);
    nix::ioctl_read!(subvolume_flags, MAGIC, 25, u64);
    nix::ioctl_write_ptr!(set_subvolume_flags, MAGIC, 26, u64);
    nix::ioctl_read!(fs_info, MAGIC, 31, FsInfo);
    nix::ioctl_write_ptr!(qgroup_assign, MAGIC, 41, QgroupAssign);
    nix::ioctl_write_ptr!(qgroup_create, MAGIC, 42, QgroupCreate);
    // The kernel only reads the structure, although the ioctl number says that it writes.
    nix::ioctl_read!(qgroup_limit, MAGIC, 43, QgroupLimit);
    nix::ioctl_write_ptr!(subvolume_destroy, MAGIC, 63, VolumeArgs2);
}

/// The UUID of the filesystem, in the form used below /sys/fs/btrfs.
pub(in crate::linux) fn fsid(file: impl AsFd) -> Result<String> {
    let mut info = FsInfo {
        _max_id: 0,
        _devices: 0,
        fsid: [0; 16],
        _rest: [0; 124],
    };
    // SAFETY: the kernel fills the structure, whose size is encoded in the ioctl number.
    unsafe { raw::fs_info(file.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(uuid::Uuid::from_bytes(info.fsid).hyphenated().to_string())
}

/// The id of the subvolume that an open file is in.
pub(in crate::linux) fn subvolume_of(file: impl AsFd) -> Result<u64> {
    look_up(file, 0, TOP_INODE).map(|found| found.tree)
}

/// The names that lead from the top of a subvolume to a directory in it, the last one first. BTRFS_IOC_INO_LOOKUP knows no paths
/// of more than 4,080 bytes, so this climbs from name to name.
pub(in crate::linux) fn names_up_from(file: impl AsFd, subvolume: u64, directory: u64) -> Result<Vec<CString>> {
    const INODE_REF: u32 = 12;
    /// `struct btrfs_inode_ref`: index, length of the name that follows.
    const REFERENCE: usize = 10;
    let (mut names, mut at) = (Vec::new(), directory);
    while at != TOP_INODE {
        // A directory has one name.
        let item = search(&file, subvolume, at, INODE_REF, 0)?.into_iter().next();
        let Item { offset: parent, bytes } = item.ok_or(Errno::ENOENT)?;
        let length = bytes.get(8..REFERENCE).and_then(|length| length.try_into().ok());
        let length = usize::from(u16::from_le_bytes(length.ok_or(Errno::EIO)?));
        let name = bytes.get(REFERENCE..REFERENCE + length).ok_or(Errno::EIO)?;
        names.push(CString::new(name).map_err(|_| Errno::EIO)?);
        at = parent;
    }
    Ok(names)
}

fn look_up(file: impl AsFd, tree: u64, object: u64) -> Result<InodeLookup> {
    let mut lookup = InodeLookup {
        tree,
        object,
        _name: [0; 4080],
    };
    // SAFETY: the kernel reads and fills the structure, whose size is encoded in the ioctl number.
    unsafe { raw::inode_lookup(file.as_fd().as_raw_fd(), &raw mut lookup) }?;
    Ok(lookup)
}

/// Makes a subvolume writable, if its owner has made it read-only.
pub(in crate::linux) fn make_writable(top: impl AsFd) -> Result<()> {
    /// `BTRFS_SUBVOL_RDONLY`
    const READ_ONLY: u64 = 2;
    let top = top.as_fd().as_raw_fd();
    let mut flags = 0_u64;
    // SAFETY: the kernel writes a number of this size.
    unsafe { raw::subvolume_flags(top, &raw mut flags) }?;
    if flags & READ_ONLY == 0 {
        return Ok(());
    }
    flags &= !READ_ONLY;
    // SAFETY: the kernel reads a number of this size.
    unsafe { raw::set_subvolume_flags(top, &raw const flags) }.map(drop)
}

/// Makes an empty subvolume.
pub(in crate::linux) fn create_subvolume(dir: impl AsFd, name: &CStr) -> Result<()> {
    let mut args = VolumeArgs { fd: 0, name: [0; 4088] };
    let bytes = name.to_bytes();
    // The last byte stays NUL.
    let room = args.name.get_mut(..bytes.len()).filter(|_| bytes.len() < 4088);
    room.ok_or(Errno::ENAMETOOLONG)?.copy_from_slice(bytes);
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::subvolume_create(dir.as_fd().as_raw_fd(), &raw const args) }.map(drop)
}

/// Destroys a subvolume with everything in it, except that it must contain no other subvolumes. Its space is freed
/// eventually. Linux 5.7.
pub(in crate::linux) fn destroy_subvolume(file: impl AsFd, id: u64) -> Result<()> {
    /// `BTRFS_SUBVOL_SPEC_BY_ID`
    const BY_ID: u64 = 1 << 4;
    let args = VolumeArgs2 {
        fd: 0,
        transaction: 0,
        flags: BY_ID,
        _unused: [0; 4],
        subvolume: id,
        _name: [0; 4032],
    };
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::subvolume_destroy(file.as_fd().as_raw_fd(), &raw const args) }.map(drop)
}

/// A subvolume inside another.
pub(in crate::linux) struct Nested {
    pub(in crate::linux) id: u64,
    /// The inode number of the directory that it is in.
    pub(in crate::linux) directory: u64,
    pub(in crate::linux) name: CString,
}

/// Subvolumes directly inside a subvolume, from the id `from`, as many as one call returns.
pub(in crate::linux) fn subvolumes_in(file: impl AsFd, id: u64, from: u64) -> Result<Vec<Nested>> {
    const ROOT_REF: u32 = 156;
    /// `struct btrfs_root_ref`: directory, sequence, length of the name that follows.
    const REFERENCE: usize = 18;
    let nested = |Item { offset, bytes }: &Item| {
        let directory = bytes.get(..8)?.try_into().map(u64::from_le_bytes).ok()?;
        let length = bytes.get(16..REFERENCE)?.try_into().map(u16::from_le_bytes).ok()?;
        let name = bytes.get(REFERENCE..REFERENCE + usize::from(length))?;
        Some(Nested {
            id: *offset,
            directory,
            name: CString::new(name).ok()?,
        })
    };
    let items = search(file, ROOT_TREE, id, ROOT_REF, from)?;
    Ok(items.iter().filter_map(nested).collect())
}

/// Whether there is a subvolume of this id, even if it is destroyed and not cleaned up yet.
pub(in crate::linux) fn exists(file: impl AsFd, id: u64) -> Result<bool> {
    const ROOT_ITEM: u32 = 132;
    search(file, ROOT_TREE, id, ROOT_ITEM, 0).map(|items| !items.is_empty())
}

/// The quota groups that a quota group is in, as many as one call returns.
pub(in crate::linux) fn groups_of(file: impl AsFd, qgroup: u64) -> Result<Vec<u64>> {
    const QUOTA_TREE: u64 = 8;
    const RELATION: u32 = 246;
    // Relations are stored both ways; the group that is in another has the lower number.
    let items = search(file, QUOTA_TREE, qgroup, RELATION, qgroup)?;
    Ok(items.iter().map(|item| item.offset).collect())
}

const ROOT_TREE: u64 = 1;

/// An item of a tree: what its key says beside the object and the kind, and its content.
struct Item {
    offset: u64,
    bytes: Vec<u8>,
}

/// Items of one kind about an object in a tree, from an offset, as many as one call returns.
fn search(file: impl AsFd, tree: u64, object: u64, kind: u32, from: u64) -> Result<Vec<Item>> {
    /// `struct btrfs_ioctl_search_header`: transaction, object, offset, kind, length.
    const HEADER: usize = 32;
    let mut search = Search {
        tree,
        min_object: object,
        max_object: object,
        min_offset: from,
        max_offset: u64::MAX,
        min_transaction: 0,
        max_transaction: u64::MAX,
        min_kind: kind,
        max_kind: kind,
        items: u32::MAX,
        _unused: 0,
        _unused64: [0; 4],
        buffer: [0; 3992],
    };
    // SAFETY: the kernel reads and fills the structure, whose size is encoded in the ioctl number.
    unsafe { raw::tree_search(file.as_fd().as_raw_fd(), &raw mut search) }?;
    let mut rest = search.buffer.as_slice();
    let mut found = Vec::new();
    for _ in 0..search.items {
        let Some((header, after)) = rest.split_at_checked(HEADER) else {
            break;
        };
        let offset = header[16..24].try_into().map(u64::from_ne_bytes).unwrap_or_default();
        let length = header[28..].try_into().map(u32::from_ne_bytes).unwrap_or_default();
        let Some((item, next)) = after.split_at_checked(length as usize) else {
            break;
        };
        found.push(Item {
            offset,
            bytes: item.to_vec(),
        });
        rest = next;
    }
    Ok(found)
}

/// The level of hostdir's quota groups ("hd"). Groups of level zero are those of the subvolumes themselves.
pub(in crate::linux) const LEVEL: u64 = 0x6864;

/// hostdir's quota group for a subvolume.
pub(in crate::linux) fn upper(subvolume: u64) -> u64 {
    (LEVEL << 48) | subvolume
}

/// The number of a quota group within its level.
pub(in crate::linux) fn number(qgroup: u64) -> u64 {
    qgroup & ((1 << 48) - 1)
}

/// Limits the bytes that a quota group references; `None` means no limit.
pub(in crate::linux) fn limit_qgroup(file: impl AsFd, qgroup: u64, bytes_max: Option<u64>) -> Result<()> {
    /// `BTRFS_QGROUP_LIMIT_MAX_RFER`
    const MAX_REFERENCED: u64 = 1;
    /// `BTRFS_QGROUP_CLEAR_VALUE`
    const NONE: u64 = u64::MAX;
    let mut limit = QgroupLimit {
        qgroup,
        flags: MAX_REFERENCED,
        max_referenced: bytes_max.unwrap_or(NONE),
        _max_exclusive: 0,
        _reserved: [0; 2],
    };
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::qgroup_limit(file.as_fd().as_raw_fd(), &raw mut limit) }.map(drop)
}

/// Makes a quota group. Idempotent.
pub(in crate::linux) fn create_qgroup(file: impl AsFd, qgroup: u64) -> Result<()> {
    match change_qgroup(file, qgroup, 1) {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Removes a quota group. Idempotent.
pub(in crate::linux) fn remove_qgroup(file: impl AsFd, qgroup: u64) -> Result<()> {
    match change_qgroup(file, qgroup, 0) {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

fn change_qgroup(file: impl AsFd, qgroup: u64, create: u64) -> Result<()> {
    let args = QgroupCreate { create, qgroup };
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::qgroup_create(file.as_fd().as_raw_fd(), &raw const args) }.map(drop)
}

/// Adds the quota group `from` to the group `to`. Idempotent.
pub(in crate::linux) fn join_qgroup(file: impl AsFd, from: u64, to: u64) -> Result<()> {
    match assign_qgroup(file, from, to, 1) {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Removes the quota group `from` from the group `to`.
pub(in crate::linux) fn leave_qgroup(file: impl AsFd, from: u64, to: u64) -> Result<()> {
    assign_qgroup(file, from, to, 0)
}

fn assign_qgroup(file: impl AsFd, from: u64, to: u64, assign: u64) -> Result<()> {
    let args = QgroupAssign { assign, from, to };
    // SAFETY: the kernel reads the structure, whose size is encoded in the ioctl number.
    unsafe { raw::qgroup_assign(file.as_fd().as_raw_fd(), &raw const args) }.map(drop)
}
