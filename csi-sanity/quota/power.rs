//! Power cuts: a machine under load is switched off at a random moment, again and again, and what was answered must hold.
//!
//! The load writes into a journal, which lies outside the machine, what it is about to ask for and what was answered. After
//! each cut the driver recovers, everything is compared with the journal, and the load goes on where it was.
//!
//! `HOSTDIR_CUTS` says how many cuts each filesystem gets (10 if it is not set; 100 for a night), `HOSTDIR_SEED` repeats a run,
//! as far as the moments of a machine can be repeated.

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

/// Threads of the load. Each has volumes of its own.
const THREADS: usize = 4;
/// Volumes that a thread has at most.
const VOLUMES: usize = 5;
/// How long the load may run before the power is cut, in milliseconds.
const LOAD_MAX: u64 = 1500;
/// Answers that the load must get between two cuts, in the mean: far below what it gets.
const ANSWERS_PER_CUT: u64 = 10;
const JOURNAL: &str = "journal";
/// In the journal: what came before has been compared.
const CHECKED: &str = "checked";

#[needs(Root, Uml)]
fn what_was_answered_outlives_power_cuts_on_xfs() {
    cut_power(Filesystem::Xfs);
}

#[needs(Root, Uml)]
fn what_was_answered_outlives_power_cuts_on_ext4() {
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
    // Past the test harness: whoever sees a failure needs it.
    let say = |what: &str| {
        std::io::stderr()
            .write_all(format!("    {name}: {what}\n").as_bytes())
            .expect("say");
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
                "after cut {cut}, HOSTDIR_SEED={seed}: {}\n{}",
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
        "only {answers} answers in {cuts} cuts: hardly anything was at stake"
    );
}

fn tail(journal: &Path) -> String {
    let text = fs::read_to_string(journal).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// What the journal says of a volume.
#[derive(Clone, Debug, Default)]
struct Known {
    /// The size that was answered, and the one that was asked for.
    size: Option<u64>,
    asked: Option<u64>,
    /// Whether something was answered that makes it be there, or be gone; nothing if it may be either.
    there: Option<bool>,
    /// How many files of it were synced.
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
            // "found" is what was found after a cut.
            ("done", "create") | ("found", "there") => (known.size, known.there) = (number, Some(true)),
            ("begin", "expand") => known.asked = number,
            ("done", "expand") => known.size = number,
            ("done", "write") => known.files = number.expect("a number"),
            ("begin", "write") => {}
            ("begin", "delete") => known.there = None,
            ("done", "delete") | ("found", "gone") => known.there = Some(false),
            _ => panic!("the journal has a line that nobody wrote: {line}"),
        }
    }
    volumes
}

/// The journal, for those inside.
struct Journal(Mutex<File>);

impl Journal {
    fn note(&self, line: &str) {
        let mut file = self.0.lock().expect("no writer panics");
        // One write, which reaches the other machine at once.
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

/// Notes that a thread has failed. The others go on until the power is cut; who reads the journal then, knows no such line.
struct NoteFailure<'a>(&'a Journal);

impl Drop for NoteFailure<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.note("failed a-call of-the-load");
        }
    }
}

/// Makes, fills, grows and deletes volumes until the power goes.
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
                let size = known.size.expect("it is there") + 1;
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

/// Every file says whose it is.
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

/// Compares what there is with what the journal says, and notes what could have been either way.
fn check(place: &Place, served: &Served<'_>, known: &BTreeMap<String, Known>, journal: &Journal) {
    let listed = served.client.list(0);
    assert_eq!(listed, names(place.pool.join("volumes")), "half volumes");
    assert_eq!(names(place.pool.join(".hostdir/new")), [""; 0]);
    for name in &listed {
        assert!(known.contains_key(name), "nobody made {name}");
    }
    for (name, known) in known {
        let is_there = listed.contains(name);
        assert!(
            known.there.is_none_or(|there| there == is_there),
            "{name} there: {is_there}; {known:?}"
        );
        if !is_there {
            journal.note(&format!("found gone {name}"));
            continue;
        }
        let size = place.read_record(name)["bytes"].as_u64().expect("a size");
        let possible = [known.size, known.asked].map(|size| size.map(|size| size * MIB));
        assert!(possible.contains(&Some(size)), "{name} has {size} bytes; {known:?}");
        served.publish(name);
        assert_eq!(served.stats(name, Unit::Bytes).0, size);
        check_files(place, name, known);
        assert_eq!(limit_of(place, name), size, "{name} is limited otherwise");
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
            "volumes have {projects:?}, quotas know {:?}",
            leaked()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    projects.dedup();
    assert_eq!(projects.len(), listed.len(), "two volumes have one project");
}

fn check_files(place: &Place, name: &str, known: &Known) {
    let target = place.target(name);
    for count in 1..=known.files {
        let text = fs::read_to_string(target.join(count.to_string()));
        let text = text.unwrap_or_else(|error| panic!("file {count} of {name}: {error}; {known:?}"));
        assert_eq!(text, content(name, count), "file {count} of {name}");
    }
    for file in names(&target) {
        // One that was never synced may be there, or a part of it; nothing of another volume.
        let text = fs::read(target.join(&file)).expect("read");
        let text = String::from_utf8_lossy(&text).into_owned();
        let count = file.parse().expect("a number");
        let whole = content(name, count);
        let written = text.trim_end_matches('\0');
        assert!(whole.starts_with(written), "file {file} of {name} has {written:.80?}");
    }
}

/// The limit that the kernel has, as statfs(2) tells it.
fn limit_of(place: &Place, name: &str) -> u64 {
    let found = nix::sys::statvfs::statvfs(&place.target(name)).expect("statvfs");
    found.blocks() * found.fragment_size()
}
