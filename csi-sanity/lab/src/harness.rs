//! The test harness: a test says what it needs ([`needs`](crate::needs)), and what cannot run on a machine is not called passed.
//!
//! A need that this machine can never meet (no root, no Go) skips the test: it is reported as ignored, and the last line says how
//! many were skipped and why. With `CI` set it fails. A need that can be had, such as a Debian package, fails the test with the
//! way to get it.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hostdir_prove::packages::{self, Package};
use hostdir_prove::upstream;
pub use inventory;
use libtest_mimic::{Arguments, Failed, Trial};

use crate::uml;

/// Longer tests say how long they took.
const LONG: Duration = Duration::from_secs(5);

/// What a test needs of the machine it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// To be root: mounts, namespaces.
    Root,
    /// The Go toolchain, for upstream's programs.
    Go,
    /// Flags of files, as chattr(1) sets them, where temporary files are.
    FileFlags,
    /// Loop devices.
    LoopDevices,
    /// btrfs on a loop device.
    Btrfs,
    /// User-Mode Linux.
    Uml,
    /// A Kubernetes of namespaces.
    Cluster,
    /// It runs inside a machine of [`uml`], and nowhere else.
    Guest,
    /// The same, on a filesystem with project quotas.
    GuestWithProjects,
}

/// Why a need is not met.
enum Unmet {
    /// This machine can never meet it.
    Never(String),
    /// It can be had, and how.
    Missing(String),
}

/// A test.
pub struct Test {
    /// Its path: crate, modules, function.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// It panics to fail.
    pub run: fn(),
}

inventory::collect!(Test);

impl Test {
    /// Its path without the crate.
    fn title(&self) -> &'static str {
        self.name.split_once("::").map_or(self.name, |(_, rest)| rest)
    }

    /// Whether it belongs where this process runs: inside a machine of [`uml`] or outside.
    fn belongs_here(&self) -> bool {
        self.belongs_to(uml::filesystem_inside())
    }

    fn belongs_to(&self, guest: Option<crate::disk::Filesystem>) -> bool {
        let needs = |need| self.needs.contains(&need);
        match guest {
            None => !needs(Need::Guest) && !needs(Need::GuestWithProjects),
            Some(filesystem) => needs(Need::Guest) || (needs(Need::GuestWithProjects) && filesystem.has_projects()),
        }
    }

    fn unmet(&self) -> Option<Unmet> {
        self.needs.iter().find_map(|need| need.unmet().err())
    }

    fn run(&'static self) {
        let start = Instant::now();
        // A thread of its own, as std's harness does: a test may leave its mount namespace behind.
        let thread = std::thread::Builder::new()
            .name(self.title().to_owned())
            .spawn(self.run);
        if let Err(panic) = thread.expect("start a thread").join() {
            resume_unwind(panic);
        }
        if start.elapsed() > LONG {
            eprintln!("    {:<100} {:>6.1} s", self.title(), start.elapsed().as_secs_f64());
        }
    }
}

/// How many tests of this program run inside a machine with such a filesystem, of those whose names contain `filter`.
pub(crate) fn count_inside(filesystem: crate::disk::Filesystem, filter: &str) -> usize {
    let tests = inventory::iter::<Test>.into_iter();
    tests
        .filter(|test| test.belongs_to(Some(filesystem)) && test.title().contains(filter))
        .count()
}

/// The `hostdir` under test.
static HOSTDIR: OnceLock<PathBuf> = OnceLock::new();

/// The `hostdir` under test: a static binary, as its image has it.
///
/// # Panics
/// Outside of [`main`].
#[must_use]
pub fn hostdir() -> &'static Path {
    HOSTDIR.get().expect("tests run below harness::main")
}

/// Names the `hostdir` under test, for programs that are no tests.
pub fn set_hostdir(path: impl Into<PathBuf>) {
    let _ = HOSTDIR.set(path.into());
}

/// The main function of a test program: runs the tests of this crate, with `hostdir` as the program under test, or the one that
/// `HOSTDIR_BINARY` names.
///
/// # Panics
/// A thread cannot be started.
#[must_use]
pub fn main(hostdir: &str) -> ExitCode {
    let arguments = Arguments::from_args();
    // They wait for disks and processes more than they compute.
    let twice = std::thread::available_parallelism().map_or(2, |cores| 2 * cores.get());
    let test_threads = arguments.test_threads.or(Some(twice));
    run(
        hostdir,
        Arguments {
            test_threads,
            ..arguments
        },
    )
}

/// The same, one test after the other: they share something.
///
/// # Panics
/// A thread cannot be started.
#[must_use]
pub fn main_one_by_one(hostdir: &str) -> ExitCode {
    let arguments = Arguments {
        test_threads: Some(1),
        ..Arguments::from_args()
    };
    run(hostdir, arguments)
}

fn run(hostdir: &str, arguments: Arguments) -> ExitCode {
    let named =
        std::env::var_os("HOSTDIR_BINARY").map(|path| std::fs::canonicalize(path).expect("HOSTDIR_BINARY is there"));
    set_hostdir(named.unwrap_or_else(|| hostdir.into()));
    let must_run = std::env::var_os("CI").is_some();
    let mut tests: Vec<&'static Test> = inventory::iter::<Test>
        .into_iter()
        .filter(|test| test.belongs_here())
        .collect();
    tests.sort_by_key(|test| test.name);
    // Ignored means skipped here, and nothing else: asking for it does not make it run.
    let arguments = Arguments {
        include_ignored: false,
        ignored: false,
        ..arguments
    };
    let mut skipped = BTreeMap::<String, usize>::new();
    let mut trials = Vec::new();
    for test in tests {
        let trial = match test.unmet() {
            None => Trial::test(test.title(), || {
                test.run();
                Ok(())
            }),
            Some(Unmet::Never(why)) if !must_run => {
                let trial = Trial::test(test.title(), || Ok(())).with_ignored_flag(true);
                if !arguments.is_filtered_out(&trial) {
                    *skipped.entry(why).or_default() += 1;
                }
                trial
            }
            Some(Unmet::Never(why) | Unmet::Missing(why)) => Trial::test(test.title(), move || {
                Err(Failed::from(format!("it must run here, but cannot: {why}")))
            }),
        };
        trials.push(trial);
    }
    let is_list = arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !is_list {
        let why: Vec<String> = skipped
            .iter()
            .map(|(why, count)| format!("{count} because {why}"))
            .collect();
        let why = if why.is_empty() {
            String::new()
        } else {
            format!(" ({})", why.join("; "))
        };
        println!(
            "{} passed, {} failed, {} skipped{why}",
            conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored
        );
    }
    conclusion.exit_code()
}

impl Need {
    /// Looks whether this machine meets it.
    ///
    /// # Errors
    /// What is missing, and how to get it if it can be had.
    pub fn check(self) -> anyhow::Result<()> {
        self.unmet()
            .map_err(|(Unmet::Never(why) | Unmet::Missing(why))| anyhow::anyhow!(why))
    }

    fn unmet(self) -> Result<(), Unmet> {
        let never = |met: bool, why: &str| if met { Ok(()) } else { Err(Unmet::Never(why.into())) };
        match self {
            Self::Root => never(nix::unistd::geteuid().is_root(), "it needs root"),
            Self::Go => never(upstream::has_go(), "it needs the Go toolchain (https://go.dev)"),
            Self::FileFlags => never(
                has_file_flags(),
                "the filesystem of temporary files has no flags (chattr)",
            ),
            Self::LoopDevices => never(
                has_loop_devices() || (modprobe("loop") && has_loop_devices()),
                "there are no loop devices",
            ),
            Self::Btrfs => {
                never(
                    knows_btrfs() || (modprobe("btrfs") && knows_btrfs()),
                    "this kernel has no btrfs",
                )?;
                Self::LoopDevices.unmet()?;
                have(packages::BTRFS)
            }
            Self::Uml => {
                never(cfg!(target_arch = "x86_64"), "User-Mode Linux is for x86-64")?;
                have(packages::UML)?;
                have(packages::BTRFS)
            }
            Self::Cluster => {
                never(crate::cgroup::are_here(), "there are no cgroups")?;
                have(packages::CLUSTER)
            }
            // Where they are not met, the test does not belong.
            Self::Guest | Self::GuestWithProjects => Ok(()),
        }
    }
}

fn have(wanted: &[Package]) -> Result<(), Unmet> {
    let missing = packages::missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let why = packages::remedy(&missing);
    Err(if packages::can_be_installed() {
        Unmet::Missing(why)
    } else {
        Unmet::Never(why)
    })
}

/// Loads a module of the kernel: what is not there may only not be loaded yet.
fn modprobe(module: &str) -> bool {
    Command::new("modprobe")
        .arg(module)
        .output()
        .is_ok_and(|output| output.status.success())
}

fn has_loop_devices() -> bool {
    Path::new("/dev/loop-control").exists()
}

fn knows_btrfs() -> bool {
    std::fs::read_to_string("/proc/filesystems").is_ok_and(|known| known.contains("btrfs"))
}

fn has_file_flags() -> bool {
    let Ok(file) = tempfile::NamedTempFile::new() else {
        return false;
    };
    let chattr = |flag: &str| {
        Command::new("chattr")
            .arg(flag)
            .arg(file.path())
            .output()
            .is_ok_and(|output| output.status.success())
    };
    chattr("+i") && chattr("-i")
}
