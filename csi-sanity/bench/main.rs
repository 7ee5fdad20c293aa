//! `cargo bench --bench local`: compares calls to hostdir over its socket with the same system calls made bare.
//!
//! Both sides work on the same filesystem in the same mount namespace. Their cycles alternate, so that a machine that slows
//! down slows both. Both sync what hostdir syncs. Needs root, and prints one table.

mod bare;
mod rpc;
mod sizes;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, mknodat};

use bare::Bare;
use rpc::Served;
use table::{Samples, Table, percentiles};

/// Cycles of a single caller, on each side.
const CYCLES: usize = 500;
/// Concurrent callers, and the cycles of each.
const CALLERS: usize = 16;
const CYCLES_EACH: usize = 100;
/// Volumes that stay published during the second half.
const CROWD: usize = 5_000;
/// Volumes for the first memory measurement.
const FEW: usize = 1_000;
/// Files of the volume that is deleted.
const FILES: usize = 1_000_000;

/// The steps of a volume's life.
const STEPS: [&str; 4] = [
    "CreateVolume",
    "NodePublishVolume",
    "NodeUnpublishVolume",
    "DeleteVolume",
];

fn main() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: the benchmark needs root to mount");
        return;
    }
    hostdir_lab::harness::set_hostdir(env!("CARGO_BIN_EXE_hostdir"));
    unshare(CloneFlags::CLONE_NEWNS).expect("make a mount namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("make the mounts private");
    let scratch = tempfile::Builder::new()
        .prefix("hostdir-bench-")
        .tempdir()
        .expect("make a directory");
    let mut table = Table::default();
    // `cargo bench --bench local -- sizes` measures quotas alone.
    if !std::env::args().any(|arg| arg == "sizes") {
        let bench = Bench {
            dir: scratch.path().to_owned(),
        };
        bench.run(&mut table);
    }
    sizes::run(scratch.path(), &mut table);
    println!("{table}");
    drop(scratch);
}

struct Bench {
    dir: PathBuf,
}

impl Bench {
    fn run(&self, table: &mut Table) {
        let bare = Bare::new(&self.dir.join("bare"));
        let mut served = self.start();
        measure(&bare, &served, false, table);

        served.fill(FEW);
        table.fact(
            &format!("resident memory, {FEW} volumes published"),
            &format!("{:.1} MiB", served.resident_mib()),
        );
        served.fill(CROWD);
        table.fact(
            &format!("resident memory, {CROWD} volumes published"),
            &format!("{:.1} MiB", served.resident_mib()),
        );
        measure(&bare, &served, true, table);

        served.kill();
        let start = Instant::now();
        served = self.start();
        table.fact(
            &format!("start to the first answer, {CROWD} volumes published"),
            &millis(start.elapsed()),
        );
        assert_eq!(served.count(), CROWD, "volumes were lost");
        delete_many_files(&served, table);
        served.unpublish_all(CROWD);
    }

    fn start(&self) -> Served {
        Served::start(&self.dir)
    }
}

/// Measures the delete of a volume with many files, and the calls for other volumes while it is erased.
fn delete_many_files(served: &Served, table: &mut Table) {
    let target = served.make("million");
    let dir = fs::File::open(&target).expect("open the volume");
    for number in 0..FILES {
        mknodat(&dir, format!("{number}").as_str(), SFlag::S_IFREG, Mode::S_IRUSR, 0).expect("make a file");
    }
    drop(dir);
    served.unpublish("million");
    let start = Instant::now();
    served.delete("million");
    table.fact(
        &format!("DeleteVolume of {FILES} files, to the answer"),
        &millis(start.elapsed()),
    );
    let mut beside = Samples::default();
    (0..200).for_each(|number| beside.add(&served.cycle(&format!("beside-{number}"))));
    let (p50, _) = percentiles(beside.step(1));
    table.fact("NodePublishVolume p50 while they are erased", &format!("{p50:.0} us"));
    served.wait_for_eraser();
    table.fact(
        "their space is back after",
        &format!("{:.1} s", start.elapsed().as_secs_f64()),
    );
}

/// Measures the life of a volume, with one caller and with many, and the calls that change nothing.
fn measure(bare: &Bare, served: &Served, crowd: bool, table: &mut Table) {
    let (mut of_bare, mut of_served) = (Samples::default(), Samples::default());
    for number in 0..CYCLES {
        of_bare.add(&bare.cycle(&format!("one-{number}")));
        of_served.add(&served.cycle(&format!("one-{number}")));
    }
    for (step, name) in STEPS.iter().enumerate() {
        table.times(crowd, name, of_bare.step(step), of_served.step(step));
    }
    for (name, bare, served) in served.reads(bare, CYCLES) {
        table.times(crowd, name, &bare, &served);
    }
    table.rate(crowd, "1 caller", of_bare.rate(), of_served.rate());
    let many_bare = rate_of_many(|caller| {
        for number in 0..CYCLES_EACH {
            bare.cycle(&format!("many-{caller}-{number}"));
        }
    });
    table.rate(
        crowd,
        "16 callers",
        many_bare,
        served.rate_of_many(CALLERS, CYCLES_EACH),
    );
}

/// Cycles per second, made by concurrent threads.
fn rate_of_many(cycles: impl Fn(usize) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let cycles = &cycles;
            scope.spawn(move || cycles(caller));
        }
    });
    per_second(CALLERS * CYCLES_EACH, start.elapsed())
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn per_second(cycles: usize, time: Duration) -> f64 {
    cycles as f64 / time.as_secs_f64()
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// The mount point of a volume.
fn target(dir: &Path, name: &str) -> PathBuf {
    dir.join("pods").join(name)
}
