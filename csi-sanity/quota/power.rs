//! Power cuts: the power of a UML machine under load is cut at random moments, and every answered call must hold.
//!
//! The load writes each request and each answer into a journal outside the machine. After each cut the driver recovers,
//! everything is compared with the journal, and the load continues.
//!
//! `HOSTDIR_CUTS` is the number of cuts on each filesystem (10 by default; 100 for a night). `HOSTDIR_SEED` repeats a run,
//! as far as timing can be repeated.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hostdir::csi::proto::volume_usage::Unit;

use super::place::{MIB, Place, Served, request};
use hostdir_lab::disk::Filesystem;
use hostdir_lab::scratch::names;
use hostdir_lab::uml::{self, Files, Machine};
use hostdir_lab::{Client, DEADLINE, Scratch, needs, wait_until};

/// Threads of the load. Each has its own volumes.
const THREADS: usize = 4;
/// The most volumes of a thread.
const VOLUMES: usize = 5;
/// The longest time that the load runs before a cut, in milliseconds.
const LOAD_MAX: u64 = 1500;
/// The fewest answers per cut, on average; the load usually gets far more.
const ANSWERS_PER_CUT: u64 = 10;
const JOURNAL: &str = "journal";
/// The journal line which says that everything before it has been compared.
const CHECKED: &str = "checked";

#[needs(Root, Uml)]
fn answered_calls_survive_power_cuts_on_xfs() {
    cut_power(Filesystem::Xfs);
}

#[needs(Root, Uml)]
fn answered_calls_survive_power_cuts_on_ext4() {
    cut_power(Filesystem::Ext4);
}

fn number(name: &str, default: impl FnOnce() -> u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or_else(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number"))
    })
}

fn cut_power(filesystem: Filesystem) {
    let name = format!("power cuts on {}", filesystem.name());
    let machine = Machine::new(filesystem, 640);
    let (cuts, seed) = (
        number("HOSTDIR_CUTS", || 10),
        number("HOSTDIR_SEED", || fastrand::u64(..1 << 32)),
    );
    // Not captured by the test harness: the seed is needed to repeat a failure.
    let say = |what: &str| {
        std::io::stderr()
            .write_all(format!("    {name}: {what}\n").as_bytes())
            .expect("write to standard error");
    };
    say(&format!("{cuts} cuts, HOSTDIR_SEED={seed}"));
    let mut random = fastrand::Rng::with_seed(seed);
    let journal = machine.shared().join(JOURNAL);
    File::create(&journal).expect("make a journal");
    for cut in 0..=cuts {
        let last = cut == cuts;
        let settings = [
            ("HOSTDIR_SEED", random.u64(..).to_string()),
            ("HOSTDIR_LAST", last.to_string()),
        ];
        let mut running = machine.start("power::guest_load", Files::InMemory, &settings);
        let start = Instant::now();
        let checked = |text: &str| text.lines().filter(|line| *line == CHECKED).count() as u64 > cut;
        while !checked(&fs::read_to_string(&journal).unwrap_or_default()) {
            assert!(
                running.verdict().is_none() && !running.is_off() && start.elapsed() < 2 * DEADLINE,
                "the volumes were not checked after cut {cut}, HOSTDIR_SEED={seed}: {}\n{}",
                running.log(),
                tail(&journal)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        if !last {
            std::thread::sleep(Duration::from_millis(random.u64(..LOAD_MAX)));
            assert!(running.verdict().is_none(), "the load ended: {}", running.log());
        }
        running.cut_power();
    }
    let text = fs::read_to_string(&journal).expect("read the journal");
    let answers = text.lines().filter(|line| line.starts_with("done")).count() as u64;
    say(&format!("{answers} answers held"));
    assert!(
        answers >= ANSWERS_PER_CUT * cuts,
        "only {answers} answers in {cuts} cuts: too few to prove anything"
    );
}

fn tail(journal: &Path) -> String {
    let text = fs::read_to_string(journal).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// What the journal says about a volume.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The size in the last answer, and the size last requested, in MiB.
    size: Option<u64>,
    asked: Option<u64>,
    /// Whether the answers say that the volume exists; `None` if it may or may not.
    there: Option<bool>,
    /// The number of its files that were synced.
    files: u64,
}

/// Reads `begin|done create|write|expand|delete VOLUME [NUMBER]`.
fn read(journal: &str) -> BTreeMap<String, Known> {
    let mut volumes: BTreeMap<String, Known> = BTreeMap::new();
    for line in journal.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [stage, verb, volume, rest @ ..] = &words[..] else {
            continue;
        };
        let number = rest.first().and_then(|word| word.parse().ok());
        let known = volumes.entry((*volume).to_owned()).or_default();
        match (*stage, *verb) {
            ("begin", "create") => {
                *known = Known {
                    asked: number,
                    ..Known::default()
                };
            }
            // "found" lines say what was found after a cut.
            ("done", "create") | ("found", "there") => (known.size, known.there) = (number, Some(true)),
            ("begin", "expand") => known.asked = number,
            ("done", "expand") => known.size = number,
            ("done", "write") => known.files = number.expect("a number"),
            ("begin", "write") => {}
            ("begin", "delete") => known.there = None,
            ("done", "delete") | ("found", "gone") => known.there = Some(false),
            _ => panic!("the journal has an unknown line: {line}"),
        }
    }
    volumes
}

/// The journal, opened inside the machine.
struct Journal(Mutex<File>);

impl Journal {
    fn note(&self, line: &str) {
        let mut file = self.0.lock().expect("no writer panics");
        // One write, which the host sees at once.
        file.write_all(format!("{line}\n").as_bytes())
            .expect("write into the journal");
    }
}

#[needs(Guest)]
fn guest_load() {
    let filesystem = uml::filesystem();
    let scratch = Scratch::new();
    let disk = scratch.mkdir("disk");
    filesystem.mount(Path::new(uml::DEVICE), &disk, true);
    let place = Place {
        pool: disk.join("pool"),
        ..Place::new(scratch, disk, filesystem, false)
    };
    let path = uml::shared().join(JOURNAL);
    let before = read(&fs::read_to_string(&path).expect("read the journal"));
    let journal = OpenOptions::new().append(true).open(&path).expect("open the journal");
    let journal = Journal(Mutex::new(journal));
    let served = place.start();
    wait_until("the pool is open", || served.client.probe().is_ok());
    check(&place, &served, &before, &journal);
    journal.note(CHECKED);
    if std::env::var("HOSTDIR_LAST").as_deref() == Ok("true") {
        return;
    }
    let seed = number("HOSTDIR_SEED", || 0);
    let socket = place.scratch.path("csi.sock");
    let now = read(&fs::read_to_string(&path).expect("read the journal"));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (place, journal, socket, now) = (&place, &journal, &socket, &now);
            scope.spawn(move || {
                let client = Client::connect(socket).expect("connect");
                let random = fastrand::Rng::with_seed(seed ^ thread as u64);
                let _failure = NoteFailure(journal);
                work(place, &client, journal, now, thread, random);
            });
        }
    });
}

/// Notes in the journal that a thread has panicked. The other threads go on until the power is cut; then [`read`] panics at
/// this unknown line.
struct NoteFailure<'a>(&'a Journal);

impl Drop for NoteFailure<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.note("failed a-call of-the-load");
        }
    }
}

/// Makes, fills, grows and deletes volumes until the power is cut.
fn work(
    place: &Place,
    client: &Client,
    journal: &Journal,
    before: &BTreeMap<String, Known>,
    thread: usize,
    mut random: fastrand::Rng,
) {
    let slots = (0..VOLUMES).map(|slot| format!("v-{thread}-{slot}"));
    let mut volumes: Vec<(String, Known)> = slots
        .map(|name| {
            let known = before.get(&name).cloned().unwrap_or_default();
            (name, known)
        })
        .collect();
    loop {
        let (name, known) = &mut volumes[random.usize(..VOLUMES)];
        let target = place.target(name);
        if known.there != Some(true) {
            let size = random.u64(4..9);
            journal.note(&format!("begin create {name} {size}"));
            client.create_as(request(name, size)).expect("create");
            journal.note(&format!("done create {name} {size}"));
            *known = Known {
                size: Some(size),
                there: Some(true),
                ..Known::default()
            };
            continue;
        }
        match random.u32(..4) {
            0 => {
                let size = known.size.expect("an existing volume has a size") + 1;
                journal.note(&format!("begin expand {name} {size}"));
                client
                    .expand(name, i64::try_from(size * MIB).expect("a size"))
                    .expect("expand");
                journal.note(&format!("done expand {name} {size}"));
                known.size = Some(size);
            }
            1 => {
                journal.note(&format!("begin delete {name}"));
                client.unpublish(name, &target).expect("unpublish");
                client.delete(name).expect("delete");
                journal.note(&format!("done delete {name}"));
                known.there = Some(false);
            }
            _ => {
                client.publish(name, &target).expect("publish");
                let count = known.files + 1;
                journal.note(&format!("begin write {name} {count}"));
                write(&target, name, count);
                journal.note(&format!("done write {name} {count}"));
                known.files = count;
            }
        }
    }
}

/// The content of a file, which names the file and its volume.
fn content(name: &str, count: u64) -> String {
    let mut text = String::new();
    for line in 0..200 {
        writeln!(text, "file {count} of volume {name}, line {line}").expect("write");
    }
    text
}

fn write(target: &Path, name: &str, count: u64) {
    let mut file = File::create(target.join(count.to_string())).expect("make a file");
    file.write_all(content(name, count).as_bytes()).expect("write");
    file.sync_all().expect("sync");
    File::open(target).and_then(|dir| dir.sync_all()).expect("sync");
}

/// Compares the volumes with the journal, and notes in the journal what was found.
fn check(place: &Place, served: &Served<'_>, known: &BTreeMap<String, Known>, journal: &Journal) {
    let listed = served.client.list(0);
    assert_eq!(
        listed,
        names(place.pool.join("volumes")),
        "the pool has unlisted volumes"
    );
    assert_eq!(names(place.pool.join(".hostdir/new")), [""; 0]);
    for name in &listed {
        assert!(known.contains_key(name), "the load never created volume {name}");
    }
    for (name, known) in known {
        let is_there = listed.contains(name);
        assert!(
            known.there.is_none_or(|there| there == is_there),
            "volume {name} exists: {is_there}; journal: {known:?}"
        );
        if !is_there {
            journal.note(&format!("found gone {name}"));
            continue;
        }
        let size = place.read_record(name)["bytes"].as_u64().expect("a size");
        let possible = [known.size, known.asked].map(|size| size.map(|size| size * MIB));
        assert!(
            possible.contains(&Some(size)),
            "volume {name} has {size} bytes; journal: {known:?}"
        );
        served.publish(name);
        assert_eq!(served.stats(name, Unit::Bytes).0, size);
        check_files(place, name, known);
        assert_eq!(limit_of(place, name), size, "volume {name} has another limit");
        journal.note(&format!("found there {name} {}", size / MIB));
    }
    served.trash_empties();
    let mut projects: Vec<u64> = listed.iter().map(|name| place.project(name)).collect();
    projects.sort_unstable();
    let leaked = || {
        let mut left = place.known_to_quotas();
        left.sort_unstable();
        left
    };
    let start = Instant::now();
    while leaked() != projects {
        assert!(
            start.elapsed() < DEADLINE,
            "volumes have the projects {projects:?}, but quotas know {:?}",
            leaked()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    projects.dedup();
    assert_eq!(projects.len(), listed.len(), "two volumes share a project");
}

fn check_files(place: &Place, name: &str, known: &Known) {
    let target = place.target(name);
    for count in 1..=known.files {
        let text = fs::read_to_string(target.join(count.to_string()));
        let text = text.unwrap_or_else(|error| panic!("file {count} of volume {name}: {error}; journal: {known:?}"));
        assert_eq!(text, content(name, count), "file {count} of volume {name}");
    }
    for file in names(&target) {
        // An unsynced file may exist, in part or whole, but must not have data of another volume.
        let text = fs::read(target.join(&file)).expect("read");
        let text = String::from_utf8_lossy(&text).into_owned();
        let count = file.parse().expect("a number");
        let whole = content(name, count);
        let written = text.trim_end_matches('\0');
        assert!(
            whole.starts_with(written),
            "file {file} of volume {name} contains {written:.80?}"
        );
    }
}

/// The limit that the kernel enforces, from statfs(2).
fn limit_of(place: &Place, name: &str) -> u64 {
    let found = nix::sys::statvfs::statvfs(&place.target(name)).expect("statvfs");
    found.blocks() * found.fragment_size()
}
