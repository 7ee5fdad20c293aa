//! Trees of files as a hostile tenant makes them, at random.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Uid, mkfifo, setfsuid};

/// How many things the tenant tries.
const ATTEMPTS: usize = 300;

/// Longest path that a file is made at: a call takes no longer ones.
const PATH_MAX: usize = 4000;

/// Fills a directory, which anybody can write to. A tenant that is not root has no capabilities either. What the tenant tries may
/// fail; the same seed tries the same. Links lead to `outside`, and this follows none: the tenant is root on this machine.
pub fn grow(dir: &Path, outside: &Path, seed: u64, root: bool) {
    // The file system user id (credentials(7)) is that of this thread only.
    let before = (!root).then(|| setfsuid(Uid::from_raw(65534)));
    let mut tenant = Tenant {
        random: Random(seed),
        dirs: vec![dir.to_owned()],
        files: Vec::new(),
        outside: outside.to_owned(),
        root,
    };
    for _ in 0..ATTEMPTS {
        tenant.attempt();
    }
    before.map(setfsuid);
}

struct Tenant {
    random: Random,
    dirs: Vec<PathBuf>,
    /// Files that are no links.
    files: Vec<PathBuf>,
    outside: PathBuf,
    root: bool,
}

/// Numbers that look random (splitmix64): the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).expect("below 256")
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len())].clone())
    }

    /// A name of any bytes but `/` and NUL.
    fn name(&mut self) -> OsString {
        let length = *self.pick(&[1, 8, 250, 255]).as_ref().expect("there are some");
        let bytes = (0..length).map(|_| self.byte());
        let bytes: Vec<u8> = bytes
            .map(|byte| if matches!(byte, 0 | b'/') { b'x' } else { byte })
            .collect();
        OsStr::from_bytes(&bytes).to_owned()
    }
}

impl Tenant {
    fn attempt(&mut self) {
        // Half of the time where the tree is deepest.
        let deepest = self.dirs.last().cloned();
        let within = if self.random.below(2) == 0 {
            deepest
        } else {
            self.random.pick(&self.dirs.clone())
        };
        let new = within.expect("the first one is there").join(self.random.name());
        if new.as_os_str().len() > PATH_MAX {
            return;
        }
        match self.random.below(12) {
            0..4 => {
                if fs::create_dir(&new).is_ok() {
                    self.dirs.push(new);
                }
            }
            4 => {
                let made = fs::File::create_new(&new).and_then(|mut file| file.write_all(&[0; 5_000]));
                self.keep(made.is_ok(), new);
            }
            // A sparse file of a gigabyte.
            5 => {
                let made = fs::File::create_new(&new).and_then(|file| file.set_len(1 << 30));
                self.keep(made.is_ok(), new);
            }
            6 => drop(symlink(&self.outside, &new)),
            7 => {
                if let Some(file) = self.random.pick(&self.files.clone()) {
                    let _ = fs::hard_link(file, &new);
                }
            }
            8 => self.special(&new),
            9 => {
                let mode = u32::try_from(self.random.below(0o10000)).expect("a mode");
                let path = self.any();
                path.map(|path| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
            }
            10 => {
                if let Some(moved) = self.random.pick(&self.dirs.clone()[1..]) {
                    let _ = fs::rename(moved, &new);
                }
            }
            _ => self.immutable(),
        }
    }

    /// A file or directory that the tenant made, unless a link has taken its name.
    fn any(&mut self) -> Option<PathBuf> {
        let all = [&self.dirs[1..], &self.files].concat();
        let path = self.random.pick(&all)?;
        let is_link = fs::symlink_metadata(&path).ok()?.is_symlink();
        (!is_link).then_some(path)
    }

    fn keep(&mut self, made: bool, file: PathBuf) {
        if made {
            self.files.push(file);
        }
    }

    /// Makes a file that is not regular.
    fn special(&mut self, new: &Path) {
        match self.random.below(3) {
            0 => drop(mkfifo(new, Mode::S_IRWXU)),
            // Binding needs a short path.
            1 => drop(UnixListener::bind(new)),
            _ => drop(mknod(new, SFlag::S_IFBLK, Mode::S_IRWXU, makedev(7, 0))),
        }
    }

    /// Makes a file or directory immutable, which needs a capability that containers seldom have.
    fn immutable(&mut self) {
        if let (true, Some(path)) = (self.root, self.any()) {
            let flag = self.random.pick(&["+i", "+a"]).expect("there are some");
            let _ = Command::new("chattr").arg(flag).arg(path).output();
        }
    }
}
