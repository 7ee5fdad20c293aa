//! One volume at a certain point of its life, and a bystander volume, for tests that break the next call.

use std::fs;
use std::path::{Path, PathBuf};

use tonic::Status;

use super::scratch::{is_mounted, mounts_below, names};
use super::{Client, Driver, Process, Scratch, wait_until};

const VOLUME: &str = "victim";
const BYSTANDER: &str = "bystander";
/// The size of the volume after and before [`Call::Expand`], in bytes.
const GROWN: i64 = 2 << 20;
const BEFORE: i64 = 1 << 20;
const CONTENT: &str = "written by a pod";

/// The call that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Create,
    FirstPublish,
    LaterPublish,
    Expand,
    Unpublish,
    /// DeleteVolume of a volume that was never published.
    DeleteUnused,
    /// DeleteVolume of a volume with files and directories, and their erasure.
    DeleteAndErase,
}

impl Call {
    pub const ALL: [Self; 7] = [
        Self::Create,
        Self::FirstPublish,
        Self::LaterPublish,
        Self::Expand,
        Self::Unpublish,
        Self::DeleteUnused,
        Self::DeleteAndErase,
    ];

    /// Whether the volume has data before the call.
    fn has_data(self) -> bool {
        match self {
            Self::Create | Self::FirstPublish | Self::DeleteUnused => false,
            Self::LaterPublish | Self::Expand | Self::Unpublish | Self::DeleteAndErase => true,
        }
    }

    pub fn deletes(self) -> bool {
        matches!(self, Self::DeleteUnused | Self::DeleteAndErase)
    }
}

/// A pool, two targets, and a driver.
pub struct Scene {
    scratch: Scratch,
    pub driver: Driver,
    pool: PathBuf,
    target: PathBuf,
    other_target: PathBuf,
    quotas: bool,
}

impl Scene {
    #[expect(clippy::new_without_default, reason = "it moves the thread into a mount namespace")]
    pub fn new() -> Self {
        Self::with(Scratch::new())
    }

    /// A scene below `dir`, whose pool requires quotas.
    pub fn with_quotas_in(dir: &Path) -> Self {
        let mut scene = Self::with(Scratch::new_in(dir));
        let config = format!(
            "pools: [{{name: default, path: {}, quota: required}}]\n",
            scene.pool.display()
        );
        fs::write(scene.scratch.path("config.yaml"), config).expect("write the configuration");
        scene.quotas = true;
        scene.driver = scene.healthy().with_faults();
        scene
    }

    fn with(scratch: Scratch) -> Self {
        let pool = scratch.path("pool");
        let targets = scratch.mkdir("pods");
        let driver = Driver::new(&scratch).pool("default", &pool).with_faults();
        let (target, other_target) = (targets.join(VOLUME), targets.join(BYSTANDER));
        Self {
            scratch,
            driver,
            pool,
            target,
            other_target,
            quotas: false,
        }
    }

    /// The same driver without faults.
    pub fn healthy(&self) -> Driver {
        let driver = Driver::new(&self.scratch);
        if self.quotas {
            driver
                .arg("--config")
                .arg(self.scratch.path("config.yaml").display().to_string())
        } else {
            driver.pool("default", &self.pool)
        }
    }

    /// Brings both volumes to the state before `call`.
    pub fn set(&self, client: &Client, call: Call) {
        client.create(BYSTANDER).expect("create");
        client.publish(BYSTANDER, &self.other_target).expect("publish");
        fs::write(self.other_target.join("file"), CONTENT).expect("write");
        if call == Call::Create {
            return;
        }
        client.create(VOLUME).expect("create");
        if call.has_data() {
            client.publish(VOLUME, &self.target).expect("publish");
            fs::create_dir_all(self.target.join("a/b")).expect("make directories");
            for file in ["file", "a/file", "a/b/file"] {
                fs::write(self.target.join(file), CONTENT).expect("write");
            }
        }
        if matches!(call, Call::LaterPublish | Call::DeleteAndErase) {
            client.unpublish(VOLUME, &self.target).expect("unpublish");
        }
    }

    /// Makes the call.
    pub fn act(&self, client: &Client, call: Call) -> Result<(), Status> {
        match call {
            Call::Create => client.create(VOLUME).map(drop),
            Call::FirstPublish | Call::LaterPublish => client.publish(VOLUME, &self.target),
            Call::Expand => client.expand(VOLUME, GROWN).map(drop),
            Call::Unpublish => client.unpublish(VOLUME, &self.target),
            Call::DeleteUnused | Call::DeleteAndErase => client.delete(VOLUME),
        }
    }

    /// Leaves in the pool what a process leaves that dies while it creates one volume and erases another.
    pub fn leave_unfinished(&self) {
        let (new, trash) = (
            self.pool.join(".hostdir/new/half.0"),
            self.pool.join("trash/dead.0/data"),
        );
        fs::create_dir_all(&new).expect("make a directory");
        fs::write(new.join("volume.json"), "{").expect("write");
        fs::create_dir_all(&trash).expect("make a directory");
        fs::write(trash.join("file"), CONTENT).expect("write");
    }

    /// Whether nothing unfinished is left in the pool.
    pub fn is_tidy(&self) -> bool {
        self.trash_is_empty() && names(self.pool.join(".hostdir/new")).is_empty()
    }

    pub fn trash_is_empty(&self) -> bool {
        names(self.pool.join("trash")).is_empty()
    }

    /// Whether the volume is in the pool.
    pub fn exists(&self) -> bool {
        self.pool.join("volumes").join(VOLUME).exists()
    }

    /// The size in the volume's record.
    fn size(&self) -> i64 {
        let record = fs::read(self.pool.join("volumes").join(VOLUME).join("volume.json")).expect("a record is there");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("a record is whole");
        record["bytes"].as_i64().expect("a size")
    }

    /// Whether the volume still has its first size.
    pub fn is_as_it_was(&self) -> bool {
        self.size() == BEFORE
    }

    /// Checks what must hold whatever happened to the call: no unfinished volume, no lost data, the bystander intact.
    pub fn check_integrity(&self, call: Call) {
        let bystander = fs::read_to_string(self.other_target.join("file")).expect("the bystander's file is there");
        assert_eq!(bystander, CONTENT);
        for id in names(self.pool.join("volumes")) {
            let record = fs::read(self.pool.join("volumes").join(&id).join("volume.json")).expect("a record is there");
            let record: serde_json::Value = serde_json::from_slice(&record).expect("a record is whole");
            assert_eq!(record["id"], id);
            assert!(record["bytes"] == BEFORE || (call == Call::Expand && record["bytes"] == GROWN));
        }
        if call.has_data() && (self.exists() || !call.deletes()) {
            let file = self.pool.join("volumes").join(VOLUME).join("data/a/b/file");
            assert_eq!(fs::read_to_string(file).expect("the volume's file is there"), CONTENT);
        }
    }

    /// Checks what must hold after the call has succeeded.
    pub fn check_effect(&self, client: &Client, call: Call) {
        let listed = client.list(0).iter().any(|id| id == VOLUME);
        assert_eq!(listed, !call.deletes(), "{call:?}: wrongly listed");
        assert_eq!(self.exists(), listed, "{call:?}: wrongly on disk");
        if call == Call::Expand {
            assert_eq!(self.size(), GROWN, "the volume did not grow");
        }
        let mounted = matches!(call, Call::FirstPublish | Call::LaterPublish | Call::Expand);
        assert_eq!(is_mounted(&self.target), mounted, "{call:?}: wrongly mounted");
        if call == Call::LaterPublish {
            assert_eq!(fs::read_to_string(self.target.join("file")).expect("read"), CONTENT);
        }
        if call == Call::Unpublish {
            assert!(!self.target.exists(), "the target was left behind");
        }
    }

    /// Checks what must hold after a call was refused because one step failed: everything made for it was removed at once.
    pub fn check_unmade(&self, call: Call) {
        assert_eq!(
            names(self.pool.join(".hostdir/new")),
            [""; 0],
            "{call:?}: an unfinished volume was left behind"
        );
        if matches!(call, Call::FirstPublish | Call::LaterPublish) && !self.is_mounted() {
            assert!(!self.target.exists(), "{call:?}: the target was left behind");
        }
    }

    /// Whether the volume is mounted.
    pub fn is_mounted(&self) -> bool {
        is_mounted(&self.target)
    }

    /// Deletes both volumes, and checks that nothing is left.
    pub fn clear(&self, client: &Client) {
        for (id, target) in [(VOLUME, &self.target), (BYSTANDER, &self.other_target)] {
            client.unpublish(id, target).expect("unpublish");
            client.delete(id).expect("delete");
        }
        wait_until("the trash is empty", || self.trash_is_empty());
        assert_eq!(names(self.pool.join("volumes")), [""; 0]);
        assert_eq!(names(self.pool.join(".hostdir")), ["lock", "new", "pool.json"]);
        assert_eq!(names(self.pool.join(".hostdir/new")), [""; 0]);
        assert!(mounts_below(&self.scratch.path("")).is_empty());
        assert_eq!(names(self.scratch.path("pods")), [""; 0]);
    }
}

/// Starts a driver, and connects to it when no pool is still being opened.
pub fn start(driver: &Driver) -> (Process, Client) {
    let mut process = driver.spawn();
    let client = process.connect_ready();
    (process, client)
}
