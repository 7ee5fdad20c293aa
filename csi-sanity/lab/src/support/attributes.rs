//! What tenants can do to files that coreutils cannot: encryption (fscrypt), flags of links and pipes (file_setattr), and btrfs
//! subvolumes in chosen quota groups.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// `struct fscrypt_key_specifier` of a key that the kernel names, see include/uapi/linux/fscrypt.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct KeyName {
    kind: u32,
    reserved: u32,
    identifier: [u8; 16],
    rest: [u8; 16],
}

#[repr(C)]
struct AddKey {
    name: KeyName,
    size: u32,
    id: u32,
    reserved: [u32; 8],
}

/// `struct fscrypt_add_key_arg` with its key.
#[repr(C)]
struct AddKeyWithKey {
    args: AddKey,
    key: [u8; 64],
}

#[repr(C)]
struct RemoveKey {
    name: KeyName,
    status: u32,
    reserved: [u32; 5],
}

/// `struct fscrypt_policy_v1`, which gives the ioctl its number, and `struct fscrypt_policy_v2`.
#[repr(C)]
struct PolicyV1([u8; 12]);
#[repr(C)]
struct PolicyV2 {
    version: u8,
    contents: u8,
    names: u8,
    flags: u8,
    reserved: [u8; 4],
    identifier: [u8; 16],
}

const _: () = assert!(size_of::<AddKey>() == 80 && size_of::<RemoveKey>() == 64 && size_of::<PolicyV2>() == 24);

nix::ioctl_read!(set_policy, b'f', 19, PolicyV1);
nix::ioctl_readwrite!(add_key, b'f', 23, AddKey);
nix::ioctl_readwrite!(remove_key, b'f', 24, RemoveKey);

/// The key of a directory that was encrypted.
pub struct Key {
    /// A directory of the same filesystem: one that is encrypted keeps its names while it is open.
    beside: File,
    name: KeyName,
}

/// Encrypts an empty directory: all that is made in it from now on is encrypted.
pub fn encrypt(dir: &Path) -> Key {
    let beside = File::open(dir.parent().expect("it is in one")).expect("open the directory it is in");
    let dir = File::open(dir).expect("open the directory");
    let mut key = AddKeyWithKey {
        args: AddKey {
            name: KeyName {
                // FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
                kind: 2,
                reserved: 0,
                identifier: [0; 16],
                rest: [0; 16],
            },
            size: 64,
            id: 0,
            reserved: [0; 8],
        },
        key: [7; 64],
    };
    // SAFETY: the kernel reads the structure and the key behind it, of the size given, and writes the identifier.
    unsafe { add_key(dir.as_raw_fd(), (&raw mut key).cast()) }.expect("add the key");
    let name = key.args.name;
    let mut policy = PolicyV2 {
        version: 2,
        // FSCRYPT_MODE_AES_256_XTS, FSCRYPT_MODE_AES_256_CTS, FSCRYPT_POLICY_FLAGS_PAD_32
        contents: 1,
        names: 4,
        flags: 3,
        reserved: [0; 4],
        identifier: name.identifier,
    };
    // SAFETY: the kernel reads as much as the version says.
    unsafe { set_policy(dir.as_raw_fd(), (&raw mut policy).cast()) }.expect("encrypt the directory");
    Key { beside, name }
}

impl Key {
    /// Removes the key: from now on there are neither names nor contents.
    pub fn remove(self) {
        let mut args = RemoveKey {
            name: self.name,
            status: 0,
            reserved: [0; 5],
        };
        // SAFETY: the kernel reads and writes the structure.
        unsafe { remove_key(self.beside.as_raw_fd(), &raw mut args) }.expect("remove the key");
    }
}

/// `struct file_attr`, see include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct FileAttributes {
    flags: u64,
    others: [u32; 4],
}

/// Makes a file of any kind immutable, also a symbolic link: file_setattr(2), Linux 6.17.
pub fn make_immutable(file: &Path) -> nix::Result<()> {
    /// `FS_XFLAG_IMMUTABLE`
    const IMMUTABLE: u64 = 0x8;
    const GET: libc::c_long = 468;
    const SET: libc::c_long = 469;
    let name = CString::new(file.as_os_str().as_bytes()).expect("no NUL in a path");
    let mut attributes = FileAttributes::default();
    let (path, size, flags) = (name.as_ptr(), size_of::<FileAttributes>(), libc::AT_SYMLINK_NOFOLLOW);
    // SAFETY: the path is NUL-terminated, and the structure of the size given; both outlive the call.
    let got = unsafe { libc::syscall(GET, libc::AT_FDCWD, path, &raw mut attributes, size, flags) };
    Errno::result(got)?;
    attributes.flags |= IMMUTABLE;
    // SAFETY: as above.
    let set = unsafe { libc::syscall(SET, libc::AT_FDCWD, path, &raw const attributes, size, flags) };
    Errno::result(set).map(drop)
}

/// Whether the kernel has file_setattr(2).
pub fn links_can_have_flags() -> bool {
    make_immutable(Path::new("")) != Err(Errno::ENOSYS)
}

/// `struct btrfs_qgroup_inherit` with room for one group, see include/uapi/linux/btrfs.h.
#[repr(C)]
struct Inherit {
    flags: u64,
    groups: u64,
    copies: [u64; 2],
    limit: [u64; 5],
    group: u64,
}

impl Inherit {
    fn of(group: Option<u64>) -> Self {
        Self {
            flags: 0,
            groups: u64::from(group.is_some()),
            copies: [0; 2],
            limit: [0; 5],
            group: group.unwrap_or_default(),
        }
    }
}

/// `struct btrfs_ioctl_vol_args_v2`, in the variant that creates a subvolume.
#[repr(C)]
struct CreateArgs {
    fd: i64,
    transaction: u64,
    flags: u64,
    size: u64,
    inherit: u64,
    unused: [u64; 2],
    name: [u8; 4040],
}

const _: () = assert!(size_of::<CreateArgs>() == 4096 && size_of::<Inherit>() == 80);

nix::ioctl_write_ptr!(create_subvolume_v2, 0x94, 24, CreateArgs);

/// Makes a btrfs subvolume that is in this quota group only, or in none. Needs no privilege.
pub fn create_subvolume_in(path: &Path, group: Option<u64>) {
    /// `BTRFS_SUBVOL_QGROUP_INHERIT`
    const INHERIT: u64 = 1 << 2;
    let inherit = Inherit::of(group);
    let size = if group.is_some() { 80 } else { 72 };
    let mut args = CreateArgs {
        fd: 0,
        transaction: 0,
        flags: INHERIT,
        size,
        inherit: (&raw const inherit).addr() as u64,
        unused: [0; 2],
        name: [0; 4040],
    };
    let name = path.file_name().expect("a name").as_bytes();
    args.name[..name.len()].copy_from_slice(name);
    let dir = File::open(path.parent().expect("a parent")).expect("open the directory");
    // SAFETY: the kernel reads the arguments, and as much of the other structure as they say; both outlive the call.
    unsafe { create_subvolume_v2(dir.as_raw_fd(), &raw const args) }.expect("create a subvolume");
}
