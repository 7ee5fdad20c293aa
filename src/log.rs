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

/// How many lines wait to be written at most. Further ones are dropped.
const LINES_MAX: usize = 4096;

/// Dropping it writes the lines that wait, unless nobody reads them for a second.
pub(crate) struct LogGuard(#[expect(dead_code, reason = "held for its drop")] WorkerGuard);

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
    LogGuard(guard)
}

/// Writes a line to standard error, and waits for a second at most.
pub(crate) fn last_line(line: String) {
    let (written, ended) = channel();
    thread::spawn(move || {
        eprintln!("{line}");
        let _ = written.send(());
    });
    let _ = ended.recv_timeout(Duration::from_secs(1));
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
