//! The driver as a process.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::Client;
use super::faults::{self, Fault, Faults, Step};
use super::scratch::Scratch;
use super::{DEADLINE, wait_for};

/// How to start the driver.
pub struct Driver {
    pub socket: PathBuf,
    log: PathBuf,
    args: Vec<String>,
    kubeconfig: Option<PathBuf>,
    binary: PathBuf,
    log_pipe: Option<OwnedFd>,
    with_faults: bool,
}

/// A running driver. Dropping it kills the process.
pub struct Process {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    faults: Option<Faults>,
}

impl Driver {
    /// A driver in local mode whose socket and log are in `scratch`.
    pub fn new(scratch: &Scratch) -> Self {
        Self::on_node(scratch, "node-a")
    }

    /// Like [`Driver::new`], on a node of this name.
    pub fn on_node(scratch: &Scratch, node: &str) -> Self {
        Self::with_args(&scratch.path(""), &["local", "--node-name", node])
    }

    /// `hostdir` with these arguments, whose socket and log are in `dir`.
    pub fn with_args(dir: &Path, args: &[&str]) -> Self {
        Self {
            socket: dir.join("csi.sock"),
            log: dir.join("log"),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            kubeconfig: None,
            binary: crate::harness::hostdir().to_owned(),
            log_pipe: None,
            with_faults: false,
        }
    }

    /// Adds an API server.
    pub fn kubeconfig(mut self, path: impl Into<PathBuf>) -> Self {
        self.kubeconfig = Some(path.into());
        self
    }

    /// Runs another `hostdir` binary than the one under test.
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = path.into();
        self
    }

    /// Writes the log into this pipe instead of a file.
    pub fn log_to(mut self, pipe: OwnedFd) -> Self {
        self.log_pipe = Some(pipe);
        self
    }

    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// A node in elected mode whose API server is unreachable.
    pub fn without_api_server(scratch: &Scratch) -> Self {
        let kubeconfig = scratch.path("kubeconfig");
        let nobody = "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
            clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n\
            users: [{name: c, user: {token: none}}]\n\
            contexts: [{name: c, context: {cluster: c, user: c}}]\n";
        fs::write(&kubeconfig, nobody).expect("write a kubeconfig");
        Self::with_args(&scratch.path(""), &["node", "--node-name", "node-a"]).kubeconfig(kubeconfig)
    }

    /// Adds a pool.
    pub fn pool(self, name: &str, path: &Path) -> Self {
        self.arg("--pool").arg(format!("{name}={}", path.display()))
    }

    /// Puts the driver's system calls under the control of [`Faults`].
    pub fn with_faults(mut self) -> Self {
        self.with_faults = true;
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(&self.args)
            .arg("--endpoint")
            .arg(format!("unix://{}", self.socket.display()));
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        let to_file = || File::options().create(true).append(true).open(&self.log);
        let log = self
            .log_pipe
            .as_ref()
            .map_or_else(to_file, |pipe| pipe.try_clone().map(File::from));
        command
            .stderr(log.expect("open the log"))
            .stdin(std::process::Stdio::null());
        die_with_the_test(&mut command);
        command
    }

    /// Starts the driver without waiting for it.
    pub fn spawn(&self) -> Process {
        self.spawn_armed(None)
    }

    /// Like [`Driver::spawn`], with a fault that is armed from the first system call on.
    pub fn spawn_broken(&self, step: Step, fault: Fault) -> Process {
        self.spawn_armed(Some((step, fault)))
    }

    fn spawn_armed(&self, first: Option<(Step, Fault)>) -> Process {
        let mut command = self.command();
        let (child, faults) = if self.with_faults {
            let (child, faults) = faults::spawn(&mut command, first);
            (child, Some(faults))
        } else {
            (command.spawn().expect("start the driver"), None)
        };
        Process {
            child,
            socket: self.socket.clone(),
            log: self.log.clone(),
            faults,
        }
    }

    /// Starts the driver and waits until it answers and no pool is still being opened.
    pub fn start(&self) -> Process {
        let mut process = self.spawn();
        process.connect_ready();
        process
    }

    /// Runs the driver, which must refuse to start. Returns its standard error.
    pub fn refuses(&self) -> String {
        let output = self
            .command()
            .stderr(std::process::Stdio::piped())
            .output()
            .expect("start the driver");
        assert!(!output.status.success(), "the driver started");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// Lets the kernel kill a child when the thread of its test ends.
pub fn die_with_the_test(command: &mut Command) {
    let die = || set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    #[expect(unsafe_code, reason = "the only way to run code between fork and exec")]
    // SAFETY: prctl(2) is async-signal-safe.
    unsafe {
        command.pre_exec(die);
    }
}

impl Process {
    /// Waits until the driver answers. Returns a new connection.
    pub fn connect(&mut self) -> Client {
        let mut client = None;
        wait_for(DEADLINE, "the driver answers", || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("the driver ended with {status}:\n{}", self.log());
            }
            client = Client::connect(&self.socket).ok();
            client.is_some()
        });
        client.expect("the wait has set it")
    }

    /// Waits until the driver answers and no pool is still being opened. Returns a new connection. Opening a pool syncs its
    /// filesystem, which takes longer when other tests have written there.
    pub fn connect_ready(&mut self) -> Client {
        let client = self.connect();
        wait_for(DEADLINE, "the pools are no longer being opened", || {
            let probed = client.probe();
            !probed.is_err_and(|status| status.message().contains("is still being opened"))
        });
        self.faults.iter().for_each(Faults::pools_are_open);
        client
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("a process id"))
    }

    /// Current and peak resident memory, in MiB: `VmRSS` and `VmHWM`, see proc_pid_status(5).
    pub fn memory(&self) -> (f64, f64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read the status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
            kib.expect("a figure of memory") / 1024.0
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    /// The most descriptors that a thread has open: each pool has a table of its own.
    pub fn descriptors(&self) -> usize {
        // A thread may have ended meanwhile.
        let open = self.tasks().filter_map(|task| fs::read_dir(task.join("fd")).ok());
        open.map(Iterator::count).max().expect("there is a thread")
    }

    /// How many threads the process has.
    pub fn threads(&self) -> usize {
        self.tasks().count()
    }

    /// What each thread does, see proc_pid_status(5) and proc_pid_syscall(5).
    fn threads_now(&self) -> String {
        let of = |task: PathBuf| {
            let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
            let status = read("status");
            let wanted = ["Name:", "State:", "SigPnd:", "ShdPnd:", "SigBlk:"];
            let fields = status
                .lines()
                .filter(|line| wanted.iter().any(|name| line.starts_with(name)));
            let fields: Vec<&str> = fields.collect();
            format!("{} syscall {}", fields.join(" "), read("syscall").trim())
        };
        self.tasks().map(of).collect::<Vec<_>>().join("\n")
    }

    /// The directories of the threads in proc(5).
    pub fn tasks(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("list the threads");
        tasks.flatten().map(|task| task.path())
    }

    pub fn faults(&self) -> &Faults {
        self.faults.as_ref().expect("the driver was started with faults")
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("signal the driver");
    }

    /// Kills the driver by SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("kill the driver");
        self.child.wait().expect("reap the driver");
    }

    /// Sends SIGTERM and waits until the driver ends.
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended()
    }

    pub fn is_dead(&mut self) -> bool {
        self.child.try_wait().expect("wait for the driver").is_some()
    }

    /// Waits until the driver ends.
    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for(DEADLINE, "the driver ends", || {
            status = self.child.try_wait().expect("wait for the driver");
            status.is_some()
        });
        status.expect("the wait has set it")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("read the log")
    }

    /// Ends the driver, and returns its whole log: lines are written some time after what they are about.
    pub fn log_to_its_end(mut self) -> String {
        self.signal(Signal::SIGTERM);
        self.ended();
        self.log()
    }

    /// Waits until the log contains a text.
    pub fn wait_for_log(&self, text: &str) {
        let start = std::time::Instant::now();
        while !self.log().contains(text) {
            assert!(
                start.elapsed() < DEADLINE,
                "{text:?} is not in the driver's log:\n{}\n{}",
                self.log(),
                self.threads_now()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
