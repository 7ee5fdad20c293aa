//! A driver, its pool, and files outside the pool that must stay untouched.

use hostdir_lab::disk::mount_new;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Process, Scratch, wait_until};
use std::fs;
use std::path::PathBuf;

/// A driver with one pool, and files beside the pool.
pub(super) struct Place {
    pub(super) scratch: Scratch,
    pub(super) process: Process,
    pub(super) client: Client,
    pub(super) outside: Vec<(PathBuf, String)>,
}

impl Place {
    pub(super) fn new() -> Self {
        Self::with(Scratch::new())
    }

    /// A place whose pool is on a disk of its own, with the filesystem that this command makes.
    pub(super) fn on_disk(mkfs: &[&str]) -> Self {
        let scratch = Scratch::new();
        mount_new(&scratch.mkdir("pool"), 64, mkfs);
        Self::with(scratch)
    }

    fn with(scratch: Scratch) -> Self {
        let outside = [
            "etc/passwd",
            "pods/neighbour/file",
            "volumes/pvc-1/volume.json",
            "outside/file",
        ];
        let outside = outside.map(|name| {
            fs::create_dir_all(scratch.path(name).parent().unwrap()).unwrap();
            fs::write(scratch.path(name), name).unwrap();
            (scratch.path(name), name.to_owned())
        });
        let (process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
        Self {
            scratch,
            process,
            client,
            outside: outside.to_vec(),
        }
    }

    pub(super) fn target(&self) -> PathBuf {
        self.scratch.path("pods/target")
    }

    pub(super) fn data(&self, id: &str) -> PathBuf {
        self.scratch.path("pool/volumes").join(id).join("data")
    }

    /// Creates a volume, publishes it and unpublishes it.
    pub(super) fn used_volume(&self, id: &str) {
        self.client.create(id).unwrap();
        self.client.publish(id, &self.target()).unwrap();
        self.client.unpublish(id, &self.target()).unwrap();
    }

    pub(super) fn delete_and_wait(&self, id: &str) {
        self.client.delete(id).unwrap();
        let trash = self.scratch.path("pool/trash");
        wait_until("the trash is empty", || names(&trash).is_empty());
        self.check_outside();
    }

    pub(super) fn restart(self) -> Self {
        let Self {
            scratch,
            process,
            client,
            outside,
        } = self;
        process.kill();
        drop(client);
        let (process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("pool")));
        Self {
            scratch,
            process,
            client,
            outside,
        }
    }

    pub(super) fn check_outside(&self) {
        for (path, content) in &self.outside {
            let now = fs::read_to_string(path)
                .unwrap_or_else(|error| panic!("read {}, which nothing should have touched: {error}", path.display()));
            assert_eq!(now, *content, "{} was changed", path.display());
        }
    }
}
