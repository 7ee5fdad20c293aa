//! A machine made of namespaces.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) use hostdir_prove::text_of;

/// The limit of all waits.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

/// The shortest and the longest pause between two checks of a condition.
const MIN_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// Process 1 of a machine: sets the machine up, makes the file `ready`, and reaps orphans.
const INIT: &str = include_str!("init.sh");

/// A machine that is switched on.
pub(crate) struct Machine {
    /// The host name.
    pub(crate) name: String,
    /// The directory with the machine's private directories and logs.
    pub(crate) dir: PathBuf,
    /// unshare(1), whose child is process 1.
    unshare: Child,
    init: Pid,
}

impl Machine {
    /// Switches a machine on. Its disk (`dir`) may be left from an earlier run.
    pub(crate) fn start(name: &str, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("log")).context("make the machine's directory")?;
        let ready = dir.join("ready");
        let _ = fs::remove_file(&ready);
        let mut command = Command::new("unshare");
        command
            .args([
                "--net",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["--propagation", "private", "bash", "-c", INIT, "init", name])
            .arg(dir);
        detached(&mut command, &dir.join("log/init"))?;
        let unshare = spawn_lasting(command).context("start unshare(1)")?;
        let mut machine = Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            unshare,
            init: Pid::from_raw(0),
        };
        wait_until("the machine is up", || Ok(ready.exists()))?;
        machine.init = child_of(machine.unshare.id())?;
        Ok(machine)
    }

    /// Cuts the power: kills every process of the machine at once, which also removes its mounts and its network.
    pub(crate) fn cut_power(mut self) -> Result<()> {
        kill(self.init, Signal::SIGKILL).context("kill process 1")?;
        self.unshare.wait().context("reap unshare(1)")?;
        Ok(())
    }

    /// The process id of the machine's process 1, outside of the machine.
    pub(crate) fn pid(&self) -> Pid {
        self.init
    }

    /// A command that runs on the machine.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.init.to_string(), "--net", "--mount", "--uts", "--pid", "--"])
            .arg(program);
        command
    }

    /// Runs a shell script on the machine.
    pub(crate) fn sh(&self, script: &str) -> Result<String> {
        let output = self
            .command("sh")
            .args(["-ec", script])
            .stdin(Stdio::null())
            .output()
            .context("run nsenter(1)")?;
        text_of(&output).with_context(|| format!("on {}: {script}", self.name))
    }

    /// Starts a program on the machine that runs until it is killed. Its output goes to the log `name`.
    pub(crate) fn spawn(&self, name: &str, program: &Path, args: &[String], path: &Path) -> Result<()> {
        // The shell records its process id inside the machine, then becomes the program.
        let script = format!("echo $$ > /run/{name}.pid; exec \"$@\"");
        let mut command = self.command("sh");
        command.args(["-c", &script, "sh"]).arg(program).args(args);
        let inherited = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{inherited}", path.display()));
        let log = self.dir.join("log").join(name);
        detached(&mut command, &log)?;
        let child = spawn_lasting(command).with_context(|| format!("start {name}"))?;
        // Reaps the child: nothing else waits for it.
        std::thread::spawn(move || child.wait_with_output());
        Ok(())
    }

    /// Sends a signal to a program that [`Machine::spawn`] started.
    pub(crate) fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        self.sh(&format!("kill -{} $(cat /run/{name}.pid)", signal as i32))
            .map(drop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // unshare(1) kills process 1 when it dies (--kill-child).
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// Starts a command on a thread that lives as long as this process. A child gets its parent-death signal when the thread
/// that started it ends, and test threads end early.
fn spawn_lasting(mut command: Command) -> Result<Child> {
    type Task = Box<dyn FnOnce() + Send>;
    static SPAWNER: OnceLock<Mutex<Sender<Task>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (tasks, received) = channel::<Task>();
        std::thread::spawn(move || received.into_iter().for_each(|task| task()));
        Mutex::new(tasks)
    });
    let (answer, child) = channel();
    let task: Task = Box::new(move || drop(answer.send(command.spawn())));
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(task)
        .map_err(|_| anyhow!("the spawner is gone"))?;
    Ok(child.recv().context("receive from the spawner")??)
}

/// Sends a command's output to a file, and lets the kernel kill it when the thread that starts it ends.
fn detached(command: &mut Command, log: &Path) -> Result<()> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("open {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    #[expect(unsafe_code, reason = "the only way to run code between fork and exec")]
    // SAFETY: prctl(2) is async-signal-safe.
    unsafe {
        command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
    }
    Ok(())
}

fn child_of(parent: u32) -> Result<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).context("read the children")?;
    let child = children.split_whitespace().next().context("unshare(1) has no child")?;
    Ok(Pid::from_raw(child.parse()?))
}

/// Waits until a condition holds.
pub(crate) fn wait_until(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(DEADLINE, what, condition)
}

/// Waits until a condition holds, for at most `limit`.
pub(crate) fn wait_for(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    let mut last = None;
    loop {
        let asked = Instant::now();
        match condition() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => last = Some(error),
        }
        if start.elapsed() > limit {
            match last {
                Some(error) => return Err(error.context(format!("timed out after {limit:?} waiting until {what}"))),
                None => bail!("timed out after {limit:?} waiting until {what}"),
            }
        }
        // More frequent checks would take CPU time from what is waited for.
        std::thread::sleep((2 * asked.elapsed()).clamp(MIN_PAUSE, MAX_PAUSE));
    }
}
