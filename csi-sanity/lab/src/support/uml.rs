//! Virtual machines of User-Mode Linux (UML): a kernel with project quotas, which this machine's kernel may lack, and whose
//! power can be cut. A machine is one process group; its root is this machine's own file tree.
//!
//! Inside runs this same test program, with the tests that need [`Need::Guest`](crate::harness::Need::Guest).

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::disk::{Filesystem, run};
use super::driver::die_with_the_test;

/// Inside the machine: the mount point of the disk, and its device.
pub const DISK: &str = "/run/disk";
pub const DEVICE: &str = "/dev/ubda";
/// The variable that names the disk's filesystem inside the machine; not set outside.
const FILESYSTEM: &str = "HOSTDIR_GUEST_FILESYSTEM";
/// The variable that names [`Machine::shared`] inside the machine.
const SHARED: &str = "HOSTDIR_GUEST_SHARED";
/// The time limit of a run, which usually takes a minute or two.
const LIMIT: Duration = Duration::from_mins(15);

/// A machine that is switched off, and its disk.
pub struct Machine {
    dir: TempDir,
    image: PathBuf,
    filesystem: Filesystem,
}

/// A running machine. Dropping it cuts its power.
pub struct Running {
    process: Child,
    verdict: PathBuf,
    log: PathBuf,
}

impl Machine {
    /// A machine with an empty filesystem on its disk, for a test that needs [`Need::Uml`](crate::harness::Need::Uml).
    pub fn new(filesystem: Filesystem, mib: u64) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("uml-")
            .tempdir_in(tmp())
            .expect("make a directory");
        let image = filesystem.make(dir.path(), mib);
        Self { dir, image, filesystem }
    }

    /// A directory that is visible inside and outside.
    pub fn shared(&self) -> &Path {
        self.dir.path()
    }

    /// Switches the machine on, to run the tests whose names contain `tests` inside, with their temporary files in `files`.
    pub fn start(&self, tests: &str, files: Files, settings: &[(&str, String)]) -> Running {
        let path = |name: &str| self.dir.path().join(name);
        let (init, verdict, log, console) = (path("init"), path("verdict"), path("log"), path("console"));
        let _ = fs::remove_file(&verdict);
        let program = std::env::current_exe().expect("the path of this program");
        let mut script = format!(
            "#!/bin/sh\n\
             mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run\n\
             mkdir -p /run/tmp {DISK}\n\
             for module in quota_tree quota_v2; do insmod /usr/lib/uml/modules/$(uname -r)/kernel/fs/quota/$module.ko; done\n\
             ip link set lo up\n\
             export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run CI=true RUST_BACKTRACE=0\n\
             export {FILESYSTEM}={} {SHARED}={} HOSTDIR_BINARY={}\n",
            self.filesystem.name(),
            self.dir.path().display(),
            crate::harness::hostdir().display(),
        );
        for (name, value) in settings {
            writeln!(script, "export {name}='{value}'").expect("write");
        }
        script += match files {
            Files::InMemory => "export TMPDIR=/run/tmp\n",
            Files::OnDisk => "mount -o prjquota /dev/ubda /run/disk || exit 1; export TMPDIR=/run/disk\n",
        };
        writeln!(
            script,
            "cd /run\n\
             {} {} --test-threads=1 > {} 2>&1\n\
             echo $? > {}\n\
             echo o > /proc/sysrq-trigger; sleep 60",
            program.display(),
            tests,
            log.display(),
            verdict.display(),
        )
        .expect("write");
        fs::write(&init, script).expect("write the init script");
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).expect("make it executable");
        let console = File::create(console).expect("make a log");
        let mut command = Command::new("/usr/bin/linux.uml");
        command
            .args(["mem=768M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw"])
            .args(["con=null", "con0=null,fd:1", "con1=null", "quiet", "panic=-1"])
            .arg(format!("ubd0={}", self.image.display()))
            .arg(format!("uml_dir={}/", self.dir.path().display()))
            .arg(format!("init={}", init.display()))
            .env("HOME", self.dir.path())
            .env("LD_PRELOAD", preloaded())
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("share a file"))
            .stderr(console)
            .process_group(0);
        die_with_the_test(&mut command);
        Running {
            process: command.spawn().expect("start User-Mode Linux"),
            verdict,
            log,
        }
    }

    /// Runs the tests whose names contain `tests` inside. At least one must run, and all must pass.
    pub fn run(&self, tests: &str, files: Files, settings: &[(&str, String)]) {
        let count = crate::harness::count_inside(self.filesystem, tests);
        let mut running = self.start(tests, files, settings);
        let start = Instant::now();
        while !running.is_off() && running.verdict().is_none() {
            assert!(
                start.elapsed() < LIMIT,
                "{tests} did not end in time:\n{}\n{}",
                running.log(),
                self.console()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(
            running.verdict() == Some(0),
            "{tests} failed on {}:\n{}\n{}",
            self.filesystem.name(),
            running.log(),
            self.console()
        );
        let passed = format!("\n{count} passed, 0 failed, 0 skipped\n");
        assert!(
            count > 0 && running.log().contains(&passed),
            "the number of passed tests is not {count}:\n{}",
            running.log()
        );
    }

    fn console(&self) -> String {
        let text = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// The library that User-Mode Linux needs on recent CPUs: see `xstate.c`.
fn preloaded() -> &'static Path {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let dir = tempfile::Builder::new()
            .prefix("xstate-")
            .tempdir_in(tmp())
            .expect("make a directory");
        let (source, built) = (dir.path().join("xstate.c"), dir.path().join("xstate.so"));
        fs::write(&source, include_str!("xstate.c")).expect("write a source");
        run(Command::new("cc")
            .args(["-O2", "-shared", "-fPIC", "-o"])
            .args([&built, &source]));
        // Renamed, because two programs may build the library at once.
        let library = tmp().join("xstate.so");
        fs::rename(built, &library).expect("place a library");
        library
    });
    &LIBRARY
}

/// A directory for temporary files that no mount inside the machine hides.
fn tmp() -> PathBuf {
    let tmp = hostdir_prove::target_dir().join("tmp");
    fs::create_dir_all(&tmp).expect("make a directory");
    tmp
}

/// Where tests inside the machine put temporary files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    InMemory,
    /// On the disk, mounted with its quotas on.
    OnDisk,
}

impl Running {
    /// The exit status of the tests, or `None` while they run.
    pub fn verdict(&self) -> Option<i32> {
        fs::read_to_string(&self.verdict).ok()?.trim().parse().ok()
    }

    /// Whether the machine is off.
    pub fn is_off(&mut self) -> bool {
        self.process.try_wait().expect("wait for the machine").is_some()
    }

    /// The output of the tests.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Cuts the power: whatever was not on the disk is lost.
    pub fn cut_power(self) {
        drop(self);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // User-Mode Linux runs several processes in one group.
        let group = Pid::from_raw(self.process.id().try_into().expect("a process id"));
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.process.wait();
    }
}

/// The filesystem of the disk, or `None` if this process runs outside.
pub fn filesystem_inside() -> Option<Filesystem> {
    std::env::var(FILESYSTEM).ok().map(|name| Filesystem::named(&name))
}

/// The filesystem of the disk, for tests inside.
pub fn filesystem() -> Filesystem {
    filesystem_inside().expect("this process runs inside a UML machine")
}

/// The directory that is visible inside and outside, for tests inside.
pub fn shared() -> PathBuf {
    std::env::var_os(SHARED)
        .expect("this process runs inside a UML machine")
        .into()
}
