//! Joins the edges to the core, and serves until told to stop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::filter::LevelFilter;

use crate::config::{Cli, Command, Local, LocalArgs, LogFormat, ProbeArgs};
use crate::csi::{self, Listener};
use crate::linux::{self, Linux};
use crate::volume::Driver;

/// Threads for calls that block; more calls than that wait their turn. So many that calls stuck on one bad disk leave room
/// for the others; a thread that waits costs some 10 KiB.
const BLOCKING_THREADS: usize = 512;

/// How long running calls may take to end after SIGTERM: with what comes after it, below the 30 s that the kubelet waits
/// before SIGKILL. A call cut off by that is as one cut off by a power failure: whole or not at all.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs what the command line asks for, to its end.
///
/// # Errors
/// It could not be started, or failed.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Local(args) => local(args),
        Command::Probe(args) => probe(&args),
    }
}

/// Asks another process. Its exit code is the answer, and what is wrong goes to standard error.
fn probe(args: &ProbeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(csi::probe(&args.endpoint, args.ready))
}

fn local(args: LocalArgs) -> anyhow::Result<()> {
    log_to_stderr(args.log_format, args.log_level);
    let Local { endpoint, node, pools } = args.resolve()?;
    if !nix::unistd::geteuid().is_root() {
        warn!("not running as root: volumes can be created and deleted, but not mounted");
    }
    linux::drop_privileges().context("drop privileges")?;
    // The socket first: a second hostdir on it must not touch the pools of the first.
    let listener = Listener::bind(&endpoint)?;
    let driver = Arc::new(Driver::new(node, Arc::new(Linux), pools));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .context("start the runtime")?;
    info!(node = %driver.node(), endpoint = %endpoint.path().display(), version = env!("CARGO_PKG_VERSION"), "serving");
    let stop = stop_signal(&runtime)?;
    runtime.block_on(csi::serve(&listener, Arc::clone(&driver), stop, STOP_TIMEOUT))?;
    runtime.shutdown_background();
    drop(driver);
    info!("stopped");
    Ok(())
}

/// Ready at the first SIGTERM or SIGINT.
fn stop_signal(runtime: &Runtime) -> anyhow::Result<impl Future<Output = ()> + use<>> {
    let _inside = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("stopping: running calls end, no new ones are taken");
    })
}

fn log_to_stderr(format: LogFormat, level: tracing::Level) {
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from_level(level))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
