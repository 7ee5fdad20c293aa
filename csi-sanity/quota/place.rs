//! A disk with quotas, a driver with a pool on it, and helpers for both.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hostdir::csi::proto::volume_usage::Unit;
use hostdir::csi::proto::{CapacityRange, CreateVolumeRequest};

use hostdir_lab::client::{create_request, map};
use hostdir_lab::disk::{self, Filesystem};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, DEADLINE, Driver, Process, Scratch};

pub(super) const MIB: u64 = 1 << 20;

/// A disk, and everything else that a scenario needs.
pub(super) struct Place {
    pub(super) disk: PathBuf,
    pub(super) filesystem: Filesystem,
    /// Whether the disk has the simple quotas of btrfs.
    pub(super) simple: bool,
    pub(super) pool: PathBuf,
    pub(super) scratch: Scratch,
}

/// A driver that runs on the pool of a place.
pub(super) struct Served<'a> {
    pub(super) place: &'a Place,
    pub(super) process: Process,
    pub(super) client: Client,
}

impl Place {
    pub(super) fn new(scratch: Scratch, disk: PathBuf, filesystem: Filesystem, simple: bool) -> Self {
        // Several scenarios may use the same disk, one after the other.
        let count = names(&disk).len();
        let pool = disk.join(format!("pool-{count}"));
        scratch.mkdir("pods");
        Self {
            disk,
            filesystem,
            simple,
            pool,
            scratch,
        }
    }

    /// The driver, with settings of its pool in YAML, such as `quota: required`.
    pub(super) fn driver(&self, settings: &str) -> Driver {
        let path = self.scratch.path("config.yaml");
        let pool = self.pool.display();
        let text = format!("pools:\n- {{name: default, path: {pool}, overcommit: 1000, {settings}}}\n");
        fs::write(&path, text).expect("write the configuration");
        Driver::new(&self.scratch)
            .arg("--config")
            .arg(path.display().to_string())
    }

    pub(super) fn serve(&self, settings: &str) -> Served<'_> {
        let (process, client) = start(&self.driver(settings));
        Served {
            place: self,
            process,
            client,
        }
    }

    /// Starts the driver with quotas required.
    pub(super) fn start(&self) -> Served<'_> {
        self.serve("quota: required")
    }

    pub(super) fn target(&self, id: &str) -> PathBuf {
        self.scratch.path("pods").join(id)
    }

    /// The data directory of a volume.
    pub(super) fn data(&self, id: &str) -> PathBuf {
        self.pool.join("volumes").join(id).join("data")
    }

    /// The path of a volume's record.
    pub(super) fn record(&self, id: &str) -> PathBuf {
        self.pool.join("volumes").join(id).join("volume.json")
    }

    /// Reads the record of a volume.
    pub(super) fn read_record(&self, id: &str) -> serde_json::Value {
        let text = fs::read(self.record(id)).expect("read a record");
        serde_json::from_slice(&text).expect("a record is whole")
    }

    /// The project id in the record of a volume.
    pub(super) fn project(&self, id: &str) -> u64 {
        self.read_record(id)["project"].as_u64().expect("a project")
    }

    /// How much usage may differ from the bytes written, because of the filesystem's metadata.
    pub(super) fn slack(&self) -> u64 {
        // btrfs counts metadata nodes of 16 KiB, and reserves more while it writes.
        if self.filesystem.has_projects() {
            64 << 10
        } else {
            2 * MIB
        }
    }

    /// The ids that quotas know on the whole disk: see [`disk::known_to_quotas`].
    pub(super) fn known_to_quotas(&self) -> Vec<u64> {
        disk::known_to_quotas(self.filesystem, &self.disk)
    }
}

impl Served<'_> {
    /// Makes a volume with mode 0777 and publishes it. Returns its target.
    pub(super) fn volume(&self, id: &str, mib: u64) -> PathBuf {
        self.create(id, mib);
        self.publish(id)
    }

    pub(super) fn create(&self, id: &str, mib: u64) {
        self.client.create_as(request(id, mib)).expect("create");
    }

    pub(super) fn publish(&self, id: &str) -> PathBuf {
        let target = self.place.target(id);
        self.client.publish(id, &target).expect("publish");
        target
    }

    pub(super) fn unpublish(&self, id: &str) {
        self.client.unpublish(id, &self.place.target(id)).expect("unpublish");
    }

    pub(super) fn expand(&self, id: &str, mib: u64) {
        self.client
            .expand(id, i64::try_from(mib * MIB).expect("a size"))
            .expect("expand");
    }

    /// Unpublishes and deletes volumes, and waits until they are erased.
    pub(super) fn clear(&self, ids: &[&str]) {
        for id in ids {
            self.unpublish(id);
            self.client.delete(id).expect("delete");
        }
        self.trash_empties();
    }

    /// Waits until all deleted volumes are erased.
    pub(super) fn trash_empties(&self) {
        let trash = self.place.pool.join("trash");
        let start = Instant::now();
        while !names(&trash).is_empty() {
            let left = names(&trash).join(" ");
            assert!(start.elapsed() < DEADLINE, "not erased: {left}\n{}", self.process.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The total and used bytes or inodes of a volume.
    pub(super) fn stats(&self, id: &str, unit: Unit) -> (u64, u64) {
        let usage = self
            .client
            .stats(id, &self.place.target(id).to_string_lossy())
            .expect("stats");
        let usage = usage
            .into_iter()
            .find(|usage| usage.unit == i32::from(unit))
            .expect("the statistics have this unit");
        assert!(usage.available <= usage.total, "{usage:?}");
        let number = |number: i64| u64::try_from(number).expect("not negative");
        (number(usage.total), number(usage.used))
    }
}

/// A request for a volume with mode 0777.
pub(super) fn request(id: &str, mib: u64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        parameters: map(&[("mode", "0777")]),
        capacity_range: Some(CapacityRange {
            required_bytes: i64::try_from(mib * MIB).expect("a size"),
            limit_bytes: 0,
        }),
        ..create_request(id)
    }
}

/// Writes into a file until the disk or quota is full, or until `most` bytes are written. Returns the bytes written.
pub(super) fn fill(file: &Path, most: u64) -> u64 {
    let is_full = |error: &std::io::Error| matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let mut open = match OpenOptions::new().create(true).append(true).open(file) {
        Err(error) if is_full(&error) => return 0,
        opened => opened.expect("open a file"),
    };
    let block = vec![0x5a; 64 << 10];
    let mut written = 0;
    while written < most {
        match open.write(&block) {
            Ok(count) => written += count as u64,
            Err(error) if is_full(&error) => break,
            Err(error) => panic!("write {}: {error}", file.display()),
        }
    }
    // With delayed allocation the error may come only here.
    if let Err(error) = open.sync_all() {
        assert!(is_full(&error), "sync {}: {error}", file.display());
    }
    written
}

/// Runs `work` on a thread that is root without `CAP_SYS_RESOURCE`, as in a container: with this capability, ext4 ignores
/// limits.
pub(super) fn as_in_a_container<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_RESOURCE).expect("drop a capability");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether an unprivileged user can write `bytes` bytes into a new file.
pub(super) fn user_writes(file: &Path, bytes: u64) -> bool {
    let mut dd = Command::new("dd");
    dd.args(["if=/dev/zero", "bs=4096", "conv=fsync", "status=none"])
        .arg(format!("of={}", file.display()))
        .arg(format!("count={}", bytes / 4096))
        .uid(1000)
        .gid(1000);
    dd.output().expect("run dd").status.success()
}
