//! The program `hostdir`; all of its code is in the library.

use std::process::ExitCode;

use clap::Parser;
use hostdir::config::Cli;

fn main() -> ExitCode {
    hostdir::run::run(Cli::parse())
}
