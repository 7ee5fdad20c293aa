//! `hostdir`: see the library for everything.

use std::process::ExitCode;

use clap::Parser;
use hostdir::config::Cli;

fn main() -> ExitCode {
    match hostdir::run::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostdir: {error:#}");
            ExitCode::FAILURE
        }
    }
}
