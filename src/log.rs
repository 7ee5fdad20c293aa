//! The log, on standard error. Writing it never blocks: whoever reads the pipe may have stopped, and must not stop hostdir.

use std::io::{self, Stderr, Write};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use tracing::{error, warn};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::LogFormat;

/// How long to wait for somebody to read the last lines.
const PATIENCE: Duration = Duration::from_millis(1_200);

/// How many lines wait to be written at most. Further ones are dropped.
const LINES_MAX: usize = 4096;

/// Dropping it writes the lines that wait, unless nobody reads them for a second.
pub(crate) struct LogGuard(Option<WorkerGuard>);

impl Drop for LogGuard {
    fn drop(&mut self) {
        let guard = self.0.take();
        // The crate's own drop may block on standard output.
        within(PATIENCE, move || drop(guard));
    }
}

/// Sends the log of this process to standard error, panics included. A thread of its own writes it.
pub(crate) fn to_stderr(format: LogFormat, level: tracing::Level) -> LogGuard {
    let dropped = Arc::<OnceLock<ErrorCounter>>::default();
    let stderr = CountingStderr {
        stderr: io::stderr(),
        dropped: Arc::clone(&dropped),
        reported: 0,
    };
    let builder = NonBlockingBuilder::default().thread_name("log");
    let (writer, guard) = builder.buffered_lines_limit(LINES_MAX).lossy(true).finish(stderr);
    let _ = dropped.set(writer.error_counter());
    // Below warnings, the logs of libraries are useful only to their authors.
    let quiet = level.min(tracing::Level::WARN);
    let levels = Targets::new().with_target("hostdir", level).with_default(quiet);
    let log = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(std::io::IsTerminal::is_terminal(&io::stderr()))
        .with_target(false);
    let registry = tracing_subscriber::registry();
    match format {
        LogFormat::Text => registry.with(log.with_filter(levels)).init(),
        LogFormat::Json => registry.with(log.json().with_filter(levels)).init(),
    }
    std::panic::set_hook(Box::new(|panic| error!("{panic}")));
    LogGuard(Some(guard))
}

/// Writes a line to standard error, unless nobody reads it for a second.
pub(crate) fn last_line(line: String) {
    within(PATIENCE, move || eprintln!("{line}"));
}

/// Does something on a thread of its own, and waits until it is done, but not for longer than `limit`.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) {
    let (done, ended) = channel();
    thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    let _ = ended.recv_timeout(limit);
}

/// Standard error, which says how many lines were dropped as soon as it takes lines again.
struct CountingStderr {
    stderr: Stderr,
    dropped: Arc<OnceLock<ErrorCounter>>,
    reported: usize,
}

impl Write for CountingStderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = self.stderr.write(line)?;
        let dropped = self.dropped.get().map_or(0, ErrorCounter::dropped_lines);
        if dropped > self.reported {
            self.reported = dropped;
            // If this line is dropped, too, the next one says so.
            warn!(
                lines = dropped,
                "lines of this log were dropped since the start, because nobody read it in time"
            );
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stderr.flush()
    }
}
