//! The measurements, and the table in which they are printed.

use std::fmt;
use std::time::Duration;

/// The times of many cycles, step by step.
#[derive(Default)]
pub(crate) struct Samples([Vec<Duration>; 4]);

impl Samples {
    pub(crate) fn add(&mut self, cycle: &[Duration; 4]) {
        for (step, time) in self.0.iter_mut().zip(cycle) {
            step.push(*time);
        }
    }

    /// The times of one step.
    pub(crate) fn step(&self, step: usize) -> &[Duration] {
        &self.0[step]
    }

    /// Cycles per second of a single caller.
    pub(crate) fn rate(&self) -> f64 {
        let time: Duration = self.0.iter().flatten().sum();
        super::per_second(self.0[0].len(), time)
    }
}

/// p50 and p99, in microseconds.
pub(crate) fn percentiles(times: &[Duration]) -> (f64, f64) {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = |percent: usize| sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)].as_secs_f64() * 1e6;
    (at(50), at(99))
}

/// The table: first an empty pool, then a pool with a crowd of volumes.
#[derive(Default)]
pub(crate) struct Table {
    alone: Vec<Row>,
    crowd: Vec<Row>,
    facts: Vec<String>,
}

/// The row of a call or a rate.
struct Row {
    name: String,
    unit: &'static str,
    /// The median or the rate, and the p99 if there is one.
    bare: Option<(f64, Option<f64>)>,
    served: (f64, Option<f64>),
}

impl Table {
    fn column(&mut self, crowd: bool) -> &mut Vec<Row> {
        if crowd { &mut self.crowd } else { &mut self.alone }
    }

    /// Adds the times of a call, and of its bare counterpart if it has one.
    pub(crate) fn times(&mut self, crowd: bool, name: &str, bare: &[Duration], served: &[Duration]) {
        let of = |times| {
            let (p50, p99) = percentiles(times);
            (p50, Some(p99))
        };
        let bare = (!bare.is_empty()).then(|| of(bare));
        self.column(crowd).push(Row {
            name: name.to_owned(),
            unit: "us",
            bare,
            served: of(served),
        });
    }

    /// Adds a rate: whole cycles per second.
    pub(crate) fn rate(&mut self, crowd: bool, callers: &str, bare: f64, served: f64) {
        let (name, bare) = (format!("cycles, {callers}"), Some((bare, None)));
        self.column(crowd).push(Row {
            name,
            unit: "/s",
            bare,
            served: (served, None),
        });
    }

    /// Adds a single result below the table.
    pub(crate) fn fact(&mut self, what: &str, figure: &str) {
        self.facts.push(format!("{what:<60} {figure}"));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<22} {:>10} {:>10} {:>12} {:>12} {:>12} {:>20}",
            "", "bare p50", "bare p99", "hostdir p50", "hostdir p99", "hostdir/bare", "crowd/empty (bare)"
        )?;
        for (title, rows, before) in [
            ("empty pool", &self.alone, None),
            ("crowded pool", &self.crowd, Some(&self.alone)),
        ] {
            writeln!(f, "{title}")?;
            for (number, row) in rows.iter().enumerate() {
                row.print(f, before.and_then(|rows| rows.get(number)))?;
            }
        }
        self.facts.iter().try_for_each(|fact| writeln!(f, "{fact}"))
    }
}

impl Row {
    fn print(&self, f: &mut fmt::Formatter<'_>, empty: Option<&Row>) -> fmt::Result {
        let unit = self.unit;
        let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0} {unit}"));
        let ratio = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let bare = self.bare.map(|(typical, _)| typical);
        let grown = empty.map(|empty| {
            let bare_grown = bare.zip(empty.bare).map(|(now, (then, _))| now / then);
            format!("{:.2} ({})", self.served.0 / empty.served.0, ratio(bare_grown))
        });
        writeln!(
            f,
            "  {:<20} {:>10} {:>10} {:>12} {:>12} {:>12} {:>20}",
            self.name,
            figure(bare),
            figure(self.bare.and_then(|(_, p99)| p99)),
            figure(Some(self.served.0)),
            figure(self.served.1),
            ratio(bare.map(|bare| self.served.0 / bare)),
            grown.unwrap_or_default(),
        )
    }
}
