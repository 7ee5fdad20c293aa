//! A process whose system calls are in our hands: any of them can be made to fail, or the process to die before it.
//!
//! The driver under test is the ordinary binary. A seccomp filter, installed between fork and exec, sends each call of
//! `CALLS` to a listener here (`SECCOMP_RET_USER_NOTIF`, seccomp_unotify(2)); a thread lets it pass, answers with an
//! error in its place, or kills the process while the call has not yet happened.
#![expect(unsafe_code, reason = "seccomp has no safe wrapper")]

use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::Pid;

/// The steps: all calls by which the driver looks at or changes a disk or a mount, or starts a thread that does.
const CALLS: [(libc::c_long, &str); 25] = [
    // glibc calls renameat where renameat2 has no flags.
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_syncfs, "syncfs"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_write, "write"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_fchown, "fchown"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_fstatfs, "fstatfs"),
    (libc::SYS_getdents64, "getdents64"),
    (libc::SYS_open_tree, "open_tree"),
    (libc::SYS_mount_setattr, "mount_setattr"),
    (libc::SYS_move_mount, "move_mount"),
    (libc::SYS_umount2, "umount2"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_quotactl_fd, "quotactl_fd"),
    (libc::SYS_read, "read"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_lseek, "lseek"),
    (libc::SYS_flock, "flock"),
    (libc::SYS_clone3, "clone3"),
];

/// What to do at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before the call.
    Die,
    /// The call does not happen and fails so.
    Fail(Errno),
    /// The call waits for [`Faults::release`].
    Hold,
}

/// A step, counted from when the plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The step of this number (from 0), whichever call it is.
    Number(usize),
    /// The call of this name, after so many of the same name.
    Named(&'static str, usize),
    /// None: the steps are only written down.
    Never,
}

/// What is to happen, and has happened.
struct Plan {
    /// Where, and what.
    fault: Option<(Step, Fault)>,
    steps: Vec<&'static str>,
    held: Option<u64>,
}

impl Default for Plan {
    /// Everything passes and is written down.
    fn default() -> Self {
        Self {
            fault: Some((Step::Never, Fault::Die)),
            steps: Vec::new(),
            held: None,
        }
    }
}

/// The hands.
pub struct Faults {
    listener: Arc<OwnedFd>,
    plan: Arc<Mutex<Plan>>,
}

impl Faults {
    /// From now on, does `fault` at `step`.
    pub fn arm(&self, step: Step, fault: Fault) {
        *self.plan.lock().expect("no panic") = Plan {
            fault: Some((step, fault)),
            ..Plan::default()
        };
    }

    /// Lets everything pass again; the steps since [`Faults::arm`], or since the process was started.
    pub fn disarm(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.plan.lock().expect("no panic")).steps
    }

    /// The steps since [`Faults::arm`], so far.
    pub fn steps(&self) -> Vec<&'static str> {
        self.plan.lock().expect("no panic").steps.clone()
    }

    /// Whether a call is being held.
    pub fn holds(&self) -> bool {
        self.plan.lock().expect("no panic").held.is_some()
    }

    /// Lets the call that is held happen, and everything pass.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.plan.lock().expect("no panic")).held;
        answer(&self.listener, held.expect("a call is held"), None);
    }
}

/// Starts a command under a filter.
pub fn spawn(command: &mut Command) -> (Child, Faults) {
    let (ours, theirs) = UnixStream::pair().expect("make a socket pair");
    let program = program();
    let install = move || {
        let listener = install(&program)?;
        sendmsg::<()>(
            theirs.as_raw_fd(),
            &[std::io::IoSlice::new(b"f")],
            &[ControlMessage::ScmRights(&[listener.as_raw_fd()])],
            MsgFlags::empty(),
            None,
        )?;
        Ok(())
    };
    // SAFETY: the closure makes system calls and allocates a little, which glibc allows in a fork of a threaded process.
    unsafe {
        command.pre_exec(install);
    }
    let child = command.spawn().expect("start the driver under seccomp");
    let listener = Arc::new(receive(&ours));
    let faults = Faults {
        listener: Arc::clone(&listener),
        plan: Arc::default(),
    };
    let plan = Arc::clone(&faults.plan);
    let pid = Pid::from_raw(child.id().try_into().expect("a process id"));
    std::thread::spawn(move || serve(&listener, pid, &plan));
    (child, faults)
}

/// "If the call's number is one of ours, tell the listener; else let it pass."
fn program() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: u16::try_from(code).expect("small"),
        jt,
        jf,
        k,
    };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (at, (number, _)) in CALLS.iter().enumerate() {
        let left = u8::try_from(CALLS.len() - at).expect("few calls");
        let number = u32::try_from(*number).expect("a call's number");
        program.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, left, 0));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0));
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_USER_NOTIF,
        0,
        0,
    ));
    program
}

fn install(program: &[libc::sock_filter]) -> std::io::Result<OwnedFd> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("short"),
        filter: program.as_ptr().cast_mut(),
    };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: the program outlives the call, and the kernel only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const filter,
        )
    };
    let fd = RawFd::try_from(Errno::result(fd)?).expect("a descriptor");
    // SAFETY: the kernel has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn receive(socket: &UnixStream) -> OwnedFd {
    let mut byte = [0];
    let mut buffer = [std::io::IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!(RawFd);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffer, Some(&mut space), MsgFlags::empty())
        .expect("receive the listener");
    let mut messages = message.cmsgs().expect("whole control messages");
    let Some(ControlMessageOwned::ScmRights(fds)) = messages.next() else {
        panic!("no descriptor came");
    };
    // SAFETY: it was sent to us alone.
    unsafe { OwnedFd::from_raw_fd(fds[0]) }
}

/// Decides on each call until the process is gone.
fn serve(listener: &OwnedFd, pid: Pid, plan: &Mutex<Plan>) {
    loop {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::NONE) == Err(Errno::EINTR) {
            continue;
        }
        if !ready[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
        {
            return;
        }
        // SAFETY: all zeroes is a valid notification, and what the kernel wants to get (seccomp_unotify(2)).
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one notification through the pointer.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } != 0 {
            continue;
        }
        match decide(&call, plan) {
            None => answer(listener, call.id, None),
            Some(Fault::Fail(errno)) => answer(listener, call.id, Some(errno)),
            // Not answered: the call never happens.
            Some(Fault::Die) => kill(pid, Signal::SIGKILL).expect("kill the driver"),
            Some(Fault::Hold) => plan.lock().expect("no panic").held = Some(call.id),
        }
    }
}

/// Lets a call happen, or fail.
fn answer(listener: &OwnedFd, id: u64, failure: Option<Errno>) {
    let flags = if failure.is_some() {
        0
    } else {
        libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE
    };
    let flags = u32::try_from(flags).expect("a flag");
    let error = failure.map_or(0, |errno| -(errno as i32));
    let answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error,
        flags,
    };
    // SAFETY: the kernel reads one answer through the pointer. It fails when the process is gone, which is no matter.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
}

fn decide(call: &libc::seccomp_notif, plan: &Mutex<Plan>) -> Option<Fault> {
    let mut plan = plan.lock().expect("no panic");
    let (_, name) = CALLS
        .iter()
        .find(|(number, _)| *number == libc::c_long::from(call.data.nr))?;
    let (at, fault) = plan.fault?;
    // To die before a call that only looks is to die after the one before it; and no disk keeps a thread from being started.
    let pointless = match fault {
        _ if at == Step::Never => false,
        Fault::Die => ["read", "pread64", "lseek"].contains(name),
        Fault::Fail(_) => *name == "clone3",
        Fault::Hold => false,
    };
    if pointless || !is_step(call, name) {
        return None;
    }
    let before = |name| plan.steps.iter().filter(|step| **step == name).count();
    let here = match at {
        Step::Number(number) => number == plan.steps.len(),
        Step::Named(wanted, after) => wanted == *name && after == before(wanted),
        Step::Never => false,
    };
    plan.steps.push(name);
    here.then_some(fault)
}

/// Not sockets, logs, event counters, and random numbers: the static binary reads those from a device.
fn is_step(call: &libc::seccomp_notif, name: &str) -> bool {
    if !matches!(name, "write" | "ioctl" | "read" | "pread64" | "lseek") {
        return true;
    }
    let link = format!("/proc/{}/fd/{}", call.pid, call.data.args[0]);
    fs::read_link(link).is_ok_and(|path| path.is_absolute() && !path.ends_with("log") && !path.starts_with("/dev"))
}
