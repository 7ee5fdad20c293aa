//! The test harness: a test says what it needs ([`needs`](crate::needs)), and a test that cannot run never counts as passed.
//!
//! If this machine can never meet a need (no root, no Go), the test is skipped: it is reported as ignored, and the last
//! line says how many were skipped and why. With `CI` set such a test fails. If a need can be met, for example by a Debian
//! package, the test fails and says how.

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

/// The duration of longer tests is printed.
const LONG: Duration = Duration::from_secs(5);

/// What a test needs of the machine it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Root, for mounts and namespaces.
    Root,
    /// The Go toolchain, for upstream's programs.
    Go,
    /// chattr(1) flags on the filesystem of temporary files.
    FileFlags,
    /// Loop devices.
    LoopDevices,
    /// ext4 that can encrypt directories, on a loop device.
    Encryption,
    /// XFS on a loop device, on a kernel that gives flags to links and pipes (file_setattr, Linux 6.17).
    FlagsOfLinks,
    /// btrfs on a loop device.
    Btrfs,
    /// User-Mode Linux.
    Uml,
    /// A cluster of machines made of namespaces: see [`Cluster`](crate::Cluster).
    Cluster,
    /// The test runs only inside a machine of [`uml`].
    Guest,
    /// The test runs only inside a machine of [`uml`] whose filesystem has project quotas.
    GuestWithProjects,
}

/// Why a need is not met.
enum Unmet {
    /// This machine can never meet the need: the reason.
    Never(String),
    /// The need can be met: how.
    Missing(String),
}

/// A test.
pub struct Test {
    /// The path of its function: crate, modules, name.
    pub name: &'static str,
    /// What the test needs.
    pub needs: &'static [Need],
    /// The test; it fails by panicking.
    pub run: fn(),
}

inventory::collect!(Test);

impl Test {
    /// The test's path without the crate.
    fn title(&self) -> &'static str {
        self.name.split_once("::").map_or(self.name, |(_, rest)| rest)
    }

    /// Whether the test belongs where this process runs: inside a machine of [`uml`] or outside.
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
        // Each test gets its own thread, as in std's harness: a test may change the mount namespace of its thread.
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

/// Counts the tests of this program whose names contain `filter` and that run inside a machine with this filesystem.
pub(crate) fn count_inside(filesystem: crate::disk::Filesystem, filter: &str) -> usize {
    let tests = inventory::iter::<Test>.into_iter();
    tests
        .filter(|test| test.belongs_to(Some(filesystem)) && test.title().contains(filter))
        .count()
}

/// The `hostdir` binary under test.
static HOSTDIR: OnceLock<PathBuf> = OnceLock::new();

/// The `hostdir` binary under test: static, as in the image.
///
/// # Panics
/// If neither [`main`] nor [`set_hostdir`] was called before.
#[must_use]
pub fn hostdir() -> &'static Path {
    HOSTDIR.get().expect("harness::main or set_hostdir was called")
}

/// Sets the `hostdir` binary under test, for programs that are not tests.
pub fn set_hostdir(path: impl Into<PathBuf>) {
    let _ = HOSTDIR.set(path.into());
}

/// The main function of a test program: runs the tests of this crate on the binary `hostdir`, or on the one that
/// `HOSTDIR_BINARY` names.
///
/// # Panics
/// A thread cannot be started.
#[must_use]
pub fn main(hostdir: &str) -> ExitCode {
    let arguments = Arguments::from_args();
    // Tests wait for disks and processes more than they compute.
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

/// Like [`main`], but runs at most `at_once` tests at the same time.
///
/// # Panics
/// A thread cannot be started.
#[must_use]
pub fn main_with_threads(hostdir: &str, at_once: usize) -> ExitCode {
    let arguments = Arguments {
        test_threads: Some(at_once),
        ..Arguments::from_args()
    };
    run(hostdir, arguments)
}

fn run(hostdir: &str, arguments: Arguments) -> ExitCode {
    let named =
        std::env::var_os("HOSTDIR_BINARY").map(|path| std::fs::canonicalize(path).expect("HOSTDIR_BINARY exists"));
    set_hostdir(named.unwrap_or_else(|| hostdir.into()));
    let must_run = std::env::var_os("CI").is_some();
    let mut tests: Vec<&'static Test> = inventory::iter::<Test>
        .into_iter()
        .filter(|test| test.belongs_here())
        .collect();
    tests.sort_by_key(|test| test.name);
    // Here "ignored" means that the test cannot run: `--ignored` must not run it.
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
                Err(Failed::from(format!("the test cannot run: {why}")))
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
    /// Checks whether this machine meets the need.
    ///
    /// # Errors
    /// What is missing, and how to get it, if that is possible.
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
                "the filesystem of temporary files has no chattr(1) flags",
            ),
            Self::LoopDevices => never(
                has_loop_devices() || (modprobe("loop") && has_loop_devices()),
                "there are no loop devices",
            ),
            Self::Encryption => {
                never(
                    Path::new("/sys/fs/ext4/features/encryption").exists(),
                    "ext4 cannot encrypt on this kernel",
                )?;
                Self::LoopDevices.unmet()
            }
            Self::FlagsOfLinks => {
                never(
                    knows("xfs") || (modprobe("xfs") && knows("xfs")),
                    "this kernel has no XFS",
                )?;
                never(
                    crate::support::attributes::links_can_have_flags(),
                    "this kernel gives no flags to links (Linux 6.17 does)",
                )?;
                Self::LoopDevices.unmet()?;
                have(packages::UML)
            }
            Self::Btrfs => {
                never(
                    knows("btrfs") || (modprobe("btrfs") && knows("btrfs")),
                    "this kernel has no btrfs",
                )?;
                Self::LoopDevices.unmet()?;
                have(packages::BTRFS)
            }
            Self::Uml => {
                never(cfg!(target_arch = "x86_64"), "User-Mode Linux needs x86-64")?;
                have(packages::UML)?;
                have(packages::BTRFS)
            }
            Self::Cluster => {
                never(crate::cgroup::are_here(), "there are no cgroups")?;
                have(packages::CLUSTER)
            }
            // `belongs_here` has left out the tests whose need is not met.
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

/// Loads a kernel module: a missing feature may only need its module.
fn modprobe(module: &str) -> bool {
    Command::new("modprobe")
        .arg(module)
        .output()
        .is_ok_and(|output| output.status.success())
}

fn has_loop_devices() -> bool {
    Path::new("/dev/loop-control").exists()
}

fn knows(filesystem: &str) -> bool {
    let known = std::fs::read_to_string("/proc/filesystems");
    known.is_ok_and(|known| known.split_whitespace().any(|known| known == filesystem))
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
