//! Controls the system calls of a process: any call can be made to fail, or the process can be killed before it.
//!
//! The driver under test is the ordinary binary. A seccomp filter, installed between fork and exec, reports each call that is not
//! `HARMLESS` to a listener here (`SECCOMP_RET_USER_NOTIF`, seccomp_unotify(2)). A thread lets the call pass, fails it with an
//! error, or kills the process before the call happens.
#![expect(unsafe_code, reason = "seccomp has no safe wrapper")]

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
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

/// The steps: all calls by which the driver reads or changes a disk or a mount, or starts a thread.
const CALLS: [(libc::c_long, &str); 27] = [
    // glibc's renameat2 without flags calls renameat.
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_syncfs, "syncfs"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
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
    (libc::SYS_utimensat, "utimensat"),
];

/// Calls that change nothing on a disk and no mount: on memory, threads, time, sockets, signals and the process itself, and some that
/// only look.
const HARMLESS: [libc::c_long; 75] = [
    libc::SYS_accept4,
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_lstat,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_pipe2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_uname,
];

/// What to do at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before the call.
    Die,
    /// The call does not happen, and fails with this error.
    Fail(Errno),
    /// The call is held until [`Faults::release`].
    Hold,
}

/// A step, counted since [`Faults::arm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The step of this number (from 0), whichever call it is.
    Number(usize),
    /// The call of this name and number (from 0) among the calls of that name.
    Named(&'static str, usize),
    /// No step: steps are only recorded.
    Never,
}

/// The fault to inject, and the steps so far.
struct Plan {
    fault: Option<(Step, Fault)>,
    steps: Vec<&'static str>,
    held: Option<u64>,
    /// Calls that are neither steps nor harmless.
    others: BTreeSet<libc::c_long>,
    /// Whether the pools are open: from then on the threads that watch them make no steps.
    opened: bool,
}

impl Default for Plan {
    /// Lets all steps pass, and records them.
    fn default() -> Self {
        Self {
            fault: Some((Step::Never, Fault::Die)),
            steps: Vec::new(),
            others: BTreeSet::new(),
            held: None,
            opened: false,
        }
    }
}

/// Controls the system calls of one process.
pub struct Faults {
    listener: Arc<OwnedFd>,
    plan: Arc<Mutex<Plan>>,
}

impl Faults {
    /// Injects `fault` at `step`, counted from now.
    pub fn arm(&self, step: Step, fault: Fault) {
        let mut plan = self.plan.lock().expect("no panic");
        *plan = Plan {
            fault: Some((step, fault)),
            opened: plan.opened,
            ..Plan::default()
        };
    }

    /// Lets all calls pass again. Returns the steps since [`Faults::arm`], or since the process was started.
    pub fn disarm(&self) -> Vec<&'static str> {
        let mut plan = self.plan.lock().expect("no panic");
        let opened = plan.opened;
        let steps = std::mem::take(&mut *plan).steps;
        plan.opened = opened;
        steps
    }

    /// From now on the threads that inspect the pools make no steps.
    pub fn pools_are_open(&self) {
        self.plan.lock().expect("no panic").opened = true;
    }

    /// The steps so far since [`Faults::arm`].
    pub fn steps(&self) -> Vec<&'static str> {
        self.plan.lock().expect("no panic").steps.clone()
    }

    /// The numbers of the calls so far that are neither steps nor harmless. A fault was injected at none of them.
    pub fn others(&self) -> BTreeSet<libc::c_long> {
        self.plan.lock().expect("no panic").others.clone()
    }

    /// Whether a call is being held.
    pub fn holds(&self) -> bool {
        self.plan.lock().expect("no panic").held.is_some()
    }

    /// Lets the held call happen, and all later calls pass.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.plan.lock().expect("no panic")).held;
        answer(&self.listener, held.expect("a call is held"), None);
    }
}

/// Starts a command whose system calls are controlled. `first` is armed from its first call on.
pub fn spawn(command: &mut Command, first: Option<(Step, Fault)>) -> (Child, Faults) {
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
        plan: Arc::new(Mutex::new(Plan {
            fault: first.or(Plan::default().fault),
            ..Plan::default()
        })),
    };
    let plan = Arc::clone(&faults.plan);
    let pid = Pid::from_raw(child.id().try_into().expect("a process id"));
    std::thread::spawn(move || serve(&listener, pid, &plan));
    (child, faults)
}

/// The filter program: "If the call is harmless, allow it, else notify the listener."
fn program() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32, jt, jf| libc::sock_filter {
        code: u16::try_from(code).expect("small"),
        jt,
        jf,
        k,
    };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (at, number) in HARMLESS.iter().enumerate() {
        let left = u8::try_from(HARMLESS.len() - at).expect("few calls");
        let number = u32::try_from(*number).expect("a call's number");
        program.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, left, 0));
    }
    for answer in [libc::SECCOMP_RET_USER_NOTIF, libc::SECCOMP_RET_ALLOW] {
        program.push(statement(libc::BPF_RET | libc::BPF_K, answer, 0, 0));
    }
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
    // SAFETY: the kernel has just returned the descriptor.
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
        panic!("no descriptor was received");
    };
    // SAFETY: the descriptor was sent to this socket, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fds[0]) }
}

/// Decides on each call until the process has ended.
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
        // SAFETY: all zeroes is a valid notification, and the kernel requires it (seccomp_unotify(2)).
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one notification through the pointer.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } != 0 {
            continue;
        }
        match decide(&call, plan) {
            None => answer(listener, call.id, None),
            Some(Fault::Fail(errno)) => answer(listener, call.id, Some(errno)),
            // Without an answer the call never happens.
            Some(Fault::Die) => kill(pid, Signal::SIGKILL).expect("kill the driver"),
            Some(Fault::Hold) => plan.lock().expect("no panic").held = Some(call.id),
        }
    }
}

/// Lets a call happen, or makes it fail.
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
    // SAFETY: the kernel reads one answer through the pointer. The ioctl fails if the process has ended, which does not
    // matter.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
}

fn decide(call: &libc::seccomp_notif, plan: &Mutex<Plan>) -> Option<Fault> {
    let mut plan = plan.lock().expect("no panic");
    let number = libc::c_long::from(call.data.nr);
    let Some((_, name)) = CALLS.iter().find(|(known, _)| *known == number) else {
        plan.others.insert(number);
        return None;
    };
    let (at, fault) = plan.fault?;
    if (at != Step::Never && is_pointless(fault, name)) || !is_step(call, name) || (plan.opened && is_inspection(call))
    {
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

/// Dying before a call that only reads equals dying after the previous step, and a broken disk cannot make clone3 fail.
fn is_pointless(fault: Fault, name: &str) -> bool {
    match fault {
        Fault::Die => ["read", "pread64", "lseek"].contains(&name),
        Fault::Fail(_) => name == "clone3",
        Fault::Hold => false,
    }
}

/// Whether a call is made by a thread that watches a pool.
fn is_inspection(call: &libc::seccomp_notif) -> bool {
    fs::read_to_string(format!("/proc/{}/comm", call.pid)).is_ok_and(|thread| thread.starts_with("watch "))
}

/// Whether a call is a step: calls on sockets, logs, event counters, devices (random numbers) and settings of the kernel are not.
fn is_step(call: &libc::seccomp_notif, name: &str) -> bool {
    if name == "openat" {
        return !opens_a_setting(call);
    }
    if !matches!(name, "write" | "writev" | "ioctl" | "read" | "pread64" | "lseek") {
        return true;
    }
    let link = format!("/proc/{}/fd/{}", call.pid, call.data.args[0]);
    fs::read_link(link).is_ok_and(|path| {
        let setting = SETTINGS.iter().any(|settings| path.starts_with(settings));
        path.is_absolute() && !setting && !path.ends_with("log") && !path.starts_with("/dev")
    })
}

/// Where the kernel shows settings. glibc looks at some when a thread begins or ends to use memory: how many processors there are
/// (get_nprocs(3)), and whether memory is overcommitted.
const SETTINGS: [&str; 2] = ["/proc/sys/", "/sys/devices/system/cpu/"];

/// Whether openat(2) is called for a setting of the kernel.
fn opens_a_setting(call: &libc::seccomp_notif) -> bool {
    let Ok(memory) = fs::File::open(format!("/proc/{}/mem", call.pid)) else {
        return false;
    };
    SETTINGS.iter().any(|settings| {
        let mut path = vec![0; settings.len()];
        let read = memory.read_exact_at(&mut path, call.data.args[1]);
        read.is_ok() && path == settings.as_bytes()
    })
}
